"""Our side of `train_gpu.py`: a shape planned as a recipe with `kernels: auto` would be, through the trainer's own loop."""

from __future__ import annotations

import random
import time
from typing import Any

from attrs import frozen
from train_gpu_peers import Case


def config_of(case: Case) -> Any:
    from nanovllm_models.config import TransformerConfig
    from nanovllm_models.gpt2_config import Gpt2Config

    if case.outline["family"] == "gpt2":
        return Gpt2Config(**case.outline, tied=True, norm_eps=1e-5, gelu_tanh=True)
    return TransformerConfig(**case.outline, tied=True, norm_eps=1e-6)


def packed(tokens: int, seed: int) -> tuple[int, ...]:
    """Lengths of documents that fill so many tokens, most of them short: 20 to 2,048, other ones for each seed."""
    draw, lengths = random.Random(seed), []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, round(20 * 102.4 ** draw.random())))
    return tuple(lengths)


def ours(case: Case, warm: int, steps: int) -> dict[str, Any]:
    """Seconds of `steps` steps after `warm`, the mean loss of all, the parameters, the kernels chosen."""
    import torch
    from nanovllm_models.config import outline

    from nanovllm_core.assemble import assemble
    from nanovllm_core.contracts import IGNORE, Accept, Batch, MicroBatch, Step
    from nanovllm_core.hookspecs import hookimpl
    from nanovllm_core.machine import Machine
    from nanovllm_core.plan_model import plan_model
    from nanovllm_core.recipe import Recipe
    from nanovllm_core.registry import Registry
    from nanovllm_core.settings import settings_of
    from nanovllm_core.training.trainer import Trainer

    config, rows, length, machine = config_of(case), case.batch, case.length, Machine.detect()
    shapes = config.parameter_shapes()

    @frozen(kw_only=True, eq=False)
    class Drawn:
        """The case's outline as a model component."""

        @hookimpl
        def probe(self) -> Any:
            return Accept(0, "random weights")

        @hookimpl
        def shape(self, vocab_size: int) -> Any:
            return outline(config, dtype="float32")

        @hookimpl
        def tokenizer(self) -> dict[str, Any]:
            return {"use": "bpe", "size": config.vocab_size}

        @hookimpl
        def build(self, shape: Any, ops: Any) -> Any:
            return config.build(ops)

        @hookimpl
        def weight(self, shape: Any, name: str, seed: int) -> torch.Tensor:
            if len(shapes[name]) == 1:  # of a norm, or a bias
                return torch.full(shapes[name], float(name.endswith("weight")), device=machine.device)
            return torch.randn(shapes[name], device=machine.device) * 0.02

        @hookimpl
        def config(self, shape: Any) -> dict[str, Any]:
            return {}  # nothing is exported

    recipe = Recipe.from_data({
        "data": {"max_seq_length": length},
        "model": "drawn",
        "kernels": "auto",
        "parallel": "single",
        "train": {
            "mixed_precision": "bf16", "learning_rate": 1e-4, "gradient_clipping": 1.0, "per_device_train_batch_size": rows,
            "gradient_checkpointing": case.variant == "checkpointing", "master_weights": case.variant != "bf16-weights",
        },
    })  # fmt: skip
    plan = plan_model(recipe, Registry.from_environment().extended(models={"drawn": Drawn}), machine)

    class Tokens:
        """Steps of one micro-batch; the last token of a sequence has no target, as with the peers."""

        def __init__(self) -> None:
            self.ids = torch.randint(0, config.vocab_size, (warm + steps, rows, length))

        def step(self, position: int) -> Step:
            ids = self.ids[position].flatten()
            lengths = packed(rows * length - position % 64, position) if case.variant == "packed" else (length,) * rows
            ids = ids[: sum(lengths)]
            ends = torch.tensor(lengths).cumsum(0)
            targets = ids.roll(-1)
            targets[ends - 1] = IGNORE
            pinned = machine.device == "cuda"
            put = lambda x: (x.pin_memory() if pinned else x).to(machine.device, non_blocking=True)  # noqa: E731
            batch = Batch(
                positions=put(torch.cat([torch.arange(n) for n in lengths])),
                lengths=lengths,
                cu_seqlens=put(torch.cat([torch.zeros(1), ends]).to(torch.int32)),
            )
            trained = len(ids) - len(lengths)
            micro = MicroBatch(tokens=put(ids), targets=put(targets), batch=batch, trained=trained)
            return Step(micro_batches=(micro,), trained=trained, tokens=len(ids), next_position=position + 1, epoch=0.0)

        def sources(self, position: int) -> list[str]:
            return []

    logged: list[dict[str, Any]] = []

    class Told:
        def __getattr__(self, name: str) -> Any:
            return lambda **told: logged.append(told["metrics"]) if name == "step_done" else None

    model = assemble(plan, machine.device, seed=0, training=True)
    trainer = Trainer(model, Tokens(), settings_of(recipe.train, warm + steps), Told(), None)
    synchronize = torch.cuda.synchronize if machine.device == "cuda" else lambda: None
    marks = []

    compiled = []
    if machine.device == "cuda":
        import triton

        triton.knobs.runtime.jit_post_compile_hook = lambda **told: compiled.append(trainer.step)

    def tick() -> None:
        if trainer.step in (warm, warm + steps):
            synchronize()
            marks.append(time.perf_counter())

    trainer.run(save=lambda trainer: None, tick=tick)
    return {
        "seconds": marks[1] - marks[0],
        "loss": sum(figures["loss"] for figures in logged) / len(logged),
        "peak": max(
            figures["peak_memory_bytes"] for figures in logged
        ),  # since the one before: the trainer begins it anew
        "kernels_compiled_after_step_3": sum(step >= 3 for step in compiled),
        "parameters": plan.shape.parameters,
        "weights": plan.weights,
        "kernels": {operation: choice.entry.name for operation, choice in plan.kernels.items()},
    }
