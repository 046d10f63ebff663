"""What a strategy does on one rank: steps on this rank's share of some documents, and all that can be measured.

Run as a script (`python -m nanovllm_core.testing.ranks`), it is one rank of several, with gloo between them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm_core.assemble import fill
from nanovllm_core.contracts import Accept, Batch, Layout, Parallelized, ParallelRequest
from nanovllm_core.hookspecs import Parallel
from nanovllm_core.testing import tiny
from nanovllm_core.testing.modelling import draw, pack
from nanovllm_core.testing.reference import reference_ops
from nanovllm_core.training.sharding import full_state

LENGTHS = (9, 2, 5, 13, 3, 4, 11, 2, 6, 7, 1, 8, 3, 5, 10, 12)  # of the documents: uneven, so ranks get unlike shares
CLIP = 0.05  # below the norm of the gradient
PATIENCE = timedelta(seconds=60)  # of a rank that waits for others


def request(world: int) -> ParallelRequest:
    """What a strategy is asked: a model of some thousand parameters, on CPUs."""
    return ParallelRequest(
        world_size=world, device="cpu", shape=tiny.shape(), memory_needed=10**6, memory_available=10**10
    )


def micro_batches(rank: int, size: int, count: int) -> Iterator[tuple[Tensor, Batch, Tensor]]:
    """This data rank's documents (every `size`-th), in `count` parts."""
    mine = range(rank, len(LENGTHS), size)
    for part in range(count):
        chosen = mine[part::count]
        documents = [draw(LENGTHS[i] + 1, tiny.SIZES["vocab_size"], seed=i) for i in chosen]
        batch = pack(*(LENGTHS[i] for i in chosen))
        yield torch.cat([d[:-1] for d in documents]), batch, torch.cat([d[1:] for d in documents])


def step(model: Parallelized, count: int, max_norm: float) -> tuple[float, float]:
    """A step of plain gradient descent as the trainer takes it; the loss of all ranks, and the norm."""
    total = torch.zeros(())
    for i, (tokens, batch, targets) in enumerate(micro_batches(model.data_rank, model.data_size, count), 1):
        with model.micro_batch(last=i == count):
            loss = model(tokens, batch, targets) / sum(LENGTHS)
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    value, norm = float(model.total(total)), float(model.clip(max_norm))
    optimizer = torch.optim.SGD([p for _, p in model.module.named_parameters()], lr=1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value, norm


def evaluate(model: Parallelized) -> float:
    model.module.train(False)
    with torch.no_grad():
        (only,) = micro_batches(model.data_rank, model.data_size, 1)
        value = model.total(model(only[0], only[1], only[2]) / sum(LENGTHS))
    model.module.train(True)
    return float(value)


def measure(strategy: Parallel, world: int, mesh: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Numbers, and tensors by `when/parameter`."""
    layout = layout_of(strategy, world)

    def fresh() -> Parallelized:
        with torch.device("meta"):
            module: Any = tiny.Tiny(reference_ops())
        sizes = {name: p.shape for name, p in module.named_parameters()}
        model = strategy.parallelize(module=module, layout=layout, mesh=mesh)
        fill(model.module, lambda name: tiny.weight(name, sizes[name]), "cpu")
        model.ready()
        model.module.train(True)
        return model

    numbers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for when, count, max_norm in (("sum", 2, 0.0), ("once", 1, 1e6), ("clipped", 2, CLIP)):
        model = fresh()
        if when == "sum":
            numbers |= {"data_rank": model.data_rank, "data_size": model.data_size}
            numbers["total"] = model.total(torch.tensor([1.0, float(model.data_rank)])).tolist()
            tensors |= {f"start/{name}": t.detach().clone() for name, t in full_state(model.module)}
        numbers[when] = step(model, count, max_norm)
        held = [(name, t.detach().clone()) for name, t in full_state(model.module)]
        numbers[f"names {when}"] = [name for name, _ in held]
        tensors |= {f"{when}/{name}": t for name, t in held}
        trained = [id(p) for _, p in model.module.named_parameters()]
        numbers[f"after {when}"] = evaluate(model)
        same = [id(p) for _, p in model.module.named_parameters()] == trained  # those that an optimizer has
        again = dict(full_state(model.module))
        numbers[f"kept {when}"] = same and again.keys() == dict(held).keys() and all(again[n].equal(t) for n, t in held)
    return numbers, tensors


def layout_of(strategy: Parallel, world: int) -> Layout:
    verdict = strategy.probe(request=request(world))
    assert isinstance(verdict, Accept), f"its probe refuses {world} ranks: {verdict.why}"
    return verdict.layout or Layout()


def main(told: dict[str, Any]) -> None:
    from safetensors.torch import save_file
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    sys.path[:] = told["paths"]
    spec = importlib.util.spec_from_file_location(told["module"], told["file"])
    assert spec is not None, told["file"]
    assert spec.loader is not None, told["file"]
    found: Any = importlib.util.module_from_spec(spec)
    sys.modules[told["module"]] = found
    spec.loader.exec_module(found)
    for part in told["name"].split("."):
        found = getattr(found, part)
    world, rank, folder = told["world"], told["rank"], Path(told["folder"])
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=PATIENCE)
    strategy = found().bound(Parallel)
    layout = layout_of(strategy, world)
    size = (layout.data, layout.shard, layout.tensor)
    mesh = init_device_mesh("cpu", size, mesh_dim_names=("data", "shard", "tensor"))
    numbers, tensors = measure(strategy, world, mesh)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(numbers), "utf-8")
    destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
