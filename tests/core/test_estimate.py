"""The memory estimate against what a step really holds: every tensor that lives is counted, op by op."""

import itertools
import weakref

import pytest
import torch
from attrs import evolve
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanovllm_core.assemble import assemble
from nanovllm_core.contracts import IGNORE, Batch, Layout, Shape
from nanovllm_core.estimate import training_memory
from nanovllm_core.machine import Machine
from nanovllm_core.plan_model import plan_model
from nanovllm_core.recipe import Recipe
from nanovllm_core.registry import Registry
from nanovllm_core.training.optimizer import adamw
from nanovllm_core.training.recompute import recompute_blocks


class Living(TorchDispatchMode):
    """Bytes of all storages that operations make while it is on: now and at most."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, {}

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known[key] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.known.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return out


def planned(size="tiny", vocabulary=1000, **options):
    data = {"model": {"use": "preset", "size": size, **options}, "tokenizer": {"use": "bpe", "size": vocabulary}}
    return plan_model(Recipe.from_data(data), Registry.from_environment(), Machine())


def batch_of(lengths):
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    batch = Batch(positions=torch.cat([torch.arange(n) for n in lengths]), lengths=lengths, cu_seqlens=bounds)
    tokens = torch.randint(0, 300, (sum(lengths),))
    targets = tokens.roll(-1)
    targets[bounds[1:] - 1] = IGNORE
    return tokens, batch, targets


MIXED, UNIFORM = (200, 120, 100, 80, 12), (128,) * 4


def shorter(lengths, dtype):
    """In bf16 an eighth: many CPUs emulate it, thirty times slower."""
    return lengths if dtype == "float32" else tuple(-(-n // 8) for n in lengths)


CASES = [
    ({"family": "qwen3"}, MIXED), ({"family": "qwen3"}, UNIFORM), ({"family": "llama", "tied": False}, MIXED),
    ({"family": "llama", "kv_heads": 1, "intermediate": 2000}, UNIFORM), ({"vocabulary": 9000}, MIXED),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("options", "lengths"), CASES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_activations_are_what_autograd_saves(options, lengths, dtype, checkpointing):
    plan = evolve(planned(**options), dtype=dtype)
    module = assemble(plan, "cpu", seed=1, training=True).module
    if checkpointing:
        recompute_blocks(module)
    own, saved = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens, batch, targets = batch_of(shorter(lengths, dtype))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(tokens, batch, targets=targets)
    assert loss.isfinite()
    kept, recomputed = (
        training_memory(
            plan.shape, tokens=len(tokens), dtype=dtype, mixed=lengths is MIXED, gradient_checkpointing=on
        ).activations
        for on in (False, True)
    )
    if checkpointing:  # counts the one block that is run again, which a forward does not hold
        between = plan.shape.layers * len(tokens) * plan.shape.hidden * (2 if dtype == "bfloat16" else 4)
        recomputed -= (kept - recomputed + between) // (plan.shape.layers - 1)
    assert sum(saved.values()) == pytest.approx(recomputed if checkpointing else kept, rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("options", "lengths", "micro_batches"), [(*c, 1) for c in CASES] + [(*c, 2) for c in CASES[2:]]
)
@pytest.mark.parametrize("checkpointing", [False, True, "selective"], ids=["kept", "recomputed", "selective"])
def test_the_total_is_the_most_that_lives_in_a_step(options, lengths, dtype, checkpointing, micro_batches):
    plan = evolve(planned(**options), dtype=dtype)
    mixed, lengths = lengths is MIXED, shorter(lengths, dtype)
    memory = training_memory(
        plan.shape, tokens=sum(lengths), dtype=dtype, gradient_checkpointing=checkpointing, accumulates=micro_batches > 1,
        mixed=mixed,
    )  # fmt: skip
    assert most(plan, lengths, checkpointing, micro_batches) == pytest.approx(memory.total, rel=0.05)


@pytest.mark.parametrize(("options", "lengths"), [CASES[0], CASES[2], CASES[4]])
@pytest.mark.parametrize(("checkpointing", "micro_batches"), [(False, 1), (False, 2), (True, 1)])
def test_bf16_weights_live_in_half(options, lengths, checkpointing, micro_batches):
    plan = evolve(planned(**options), dtype="bfloat16", weights="bfloat16")
    mixed, lengths = lengths is MIXED, shorter(lengths, "bfloat16")
    memory = training_memory(
        plan.shape, tokens=sum(lengths), dtype="bfloat16", gradient_checkpointing=checkpointing,
        accumulates=micro_batches > 1, mixed=mixed, masters=False,
    )  # fmt: skip
    assert most(plan, lengths, checkpointing, micro_batches) == pytest.approx(memory.total, rel=0.05)


def most(plan, lengths, checkpointing, micro_batches):
    """Bytes that live at once in the second of two steps."""
    living = Living()
    with living:
        module = assemble(plan, "cpu", seed=1, training=True).module
        if checkpointing:
            recompute_blocks(module, every=2 if checkpointing == "selective" else 1)
        optimizer = adamw(module.named_parameters(), learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
        for step in range(2):
            living.most = 0 if step else living.most  # the first has no moments yet
            for _ in range(micro_batches):
                tokens, batch, targets = batch_of(lengths)
                module(tokens, batch, targets=targets).backward()
            optimizer.update()
            optimizer.zero_grad()
    return living.most


SHAPE = Shape(
    family="x", vocab_size=1000, layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, tied=False,
    max_positions=64, parameters=300_000, operations=("swiglu",),
)  # fmt: skip


def test_layouts_divide_what_they_divide():
    def of(**changes):
        return training_memory(SHAPE, tokens=4096, dtype="bfloat16", **changes)

    one = of()
    data = of(layout=Layout(data=8))
    assert data.moments["loss"] == one.moments["loss"] + one.gradients  # buckets that stay
    assert of(layout=Layout(data=8, ordered=True)) == one
    tensor = of(layout=Layout(tensor=2))
    assert (tensor.weights, tensor.gradients, tensor.optimizer) == (600_000, 600_000, 1_200_000)
    assert one.activations / 2 < tensor.activations < one.activations  # the residual stream is whole on every rank
    shard = of(layout=Layout(shard=4))
    assert (shard.weights, shard.gradients, shard.optimizer) == (300_000, 300_000, 600_000)
    assert shard.total < one.total
    kept = of(layout=Layout(shard=4, reshard=False))
    assert kept.moments["loss"] - shard.moments["loss"] == 2 * (300_000 - 2 * 43_000 - 64_000)


def test_what_is_frozen_has_no_gradient_and_no_moments():
    part = training_memory(SHAPE, tokens=64, dtype="float32", frozen=200_000)
    assert (part.weights, part.gradients, part.optimizer) == (1_200_000, 400_000, 800_000)


def test_a_model_with_layers_of_its_own_keeps_more_and_all_its_logits():
    own = evolve(SHAPE, operations=())
    native = training_memory(SHAPE, tokens=4096, dtype="float32")
    foreign = training_memory(own, tokens=4096, dtype="float32")
    assert foreign.activations > 1.5 * native.activations
    assert foreign.loss == 3 * 4 * 4096 * 1000
