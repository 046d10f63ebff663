"""FLOPs by a model's outline: against counts by hand, really built modules, and the products that torch really makes."""

import random

import pytest
import torch
from attrs import evolve
from nanovllm_models.config import TransformerConfig, outline
from nanovllm_models.gpt2_config import Gpt2Config
from torch.utils.flop_counter import FlopCounterMode

from nanovllm_core.assemble import assemble
from nanovllm_core.contracts import Shape
from nanovllm_core.training.flops import PEAKS, flops_of, pairs, peak_of

SIZES = {
    "vocab_size": 101,
    "hidden": 32,
    "layers": 3,
    "heads": 4,
    "head_dim": 16,
    "intermediate": 80,
    "max_positions": 64,
}


def qwen3(**changes):
    values = {**SIZES, "family": "qwen3", "kv_heads": 2, "tied": True, "norm_eps": 1e-6, **changes}
    return TransformerConfig(**values)


def gpt2(**changes):
    values = {
        **SIZES,
        "family": "gpt2",
        "kv_heads": 4,
        "head_dim": 8,
        "tied": True,
        "norm_eps": 1e-5,
        "gelu_tanh": True,
        **changes,
    }
    return Gpt2Config(**values)


def test_a_tiny_qwen3_by_hand():
    block = 32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 80  # q, k and v, o, MLP
    flops = flops_of(outline(qwen3(), dtype="float32"))
    assert flops.token == 6 * (3 * block + 101 * 32) == 268_224
    assert flops.pair == 12 * 4 * 16 * 3
    assert flops.of([5, 2]) == 7 * 268_224 + (15 + 3) * 2304
    assert flops.of([5]) + flops.of([2]) == flops.of([5, 2]) < flops.of([7])  # attention stays within a document


def test_a_tiny_gpt2_by_hand():
    block = 32 * 96 + 32 * 32 + 2 * 32 * 80
    flops = flops_of(outline(gpt2(), dtype="float32"))
    assert flops.token == 6 * (3 * block + 101 * 32) == 185_280
    assert flops.pair == 12 * 32 * 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("config", "looked_up"), [(qwen3, {"model.embed_tokens"}), (gpt2, {"transformer.wte", "transformer.wpe"})]
)
def test_the_parameters_of_a_built_module_that_tokens_are_multiplied_by(config, looked_up, tied):
    from nanovllm_core.contracts import Ops

    c = config(tied=tied)
    with torch.device("meta"):
        module = c.build(Ops(dtype="float32"))
    if tied:  # the table that is looked up is the head too
        looked_up = looked_up - {"model.embed_tokens", "transformer.wte"}
    counted = sum(
        p.numel()
        for name, p in module.named_parameters()
        if p.ndim >= 2 and name.removesuffix(".weight") not in looked_up
    )
    assert flops_of(outline(c, dtype="float32")).token == 6 * counted


def test_torch_makes_that_many_in_a_step(plan, tiny):
    """Products with parameters, forward and backward, as torch's own counter sees them."""
    model = assemble(plan, "cpu", seed=5, training=True)
    documents = tiny.random_documents(seed=3, steps=1, micro_batches=(6,))[0][0]
    micro = tiny.micro_batch(documents)
    in_place = {torch.ops.aten.addmm_: lambda c, a, b, *rest, **named: 2 * a[0] * a[1] * b[1]}  # which it does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, model.micro_batch(last=True):
        model(micro.tokens, micro.batch, micro.targets).backward()
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    head = 6 * plan.shape.vocab_size * plan.shape.hidden
    made = flops_of(plan.shape).token * len(micro.tokens)
    assert (
        made - head * (len(micro.tokens) - micro.trained) <= products <= made
    )  # a kernel may leave untrained tokens out


def test_pairs_are_those_that_a_mask_lets_through():
    draw = random.Random(8)
    for _ in range(200):
        n, window = draw.randint(1, 90), draw.choice([None, draw.randint(1, 120)])
        seen = [[j <= i and (window is None or i - j < window) for j in range(n)] for i in range(n)]
        assert pairs(n, window) == sum(map(sum, seen)), (n, window)


def test_a_window_shortens_attention_alone():
    whole, short = (flops_of(outline(qwen3(windows=w), dtype="float32")) for w in ((), (8, 8, 8)))
    assert whole.of([6]) == short.of([6])
    assert whole.of([20]) - short.of([20]) == whole.pair * (20 * 21 // 2 - (8 * 9 // 2 + 12 * 8))


def test_a_model_that_does_not_say_what_it_does_has_none():
    shape = outline(qwen3(), dtype="float32")
    for operations in ((), ("linear", "attention"), ("attention", "swiglu"), ("linear", "attention", "swiglu", "gelu")):
        assert flops_of(evolve(shape, operations=operations)) is None
    assert (
        flops_of(
            Shape(
                family="x", vocab_size=9, layers=1, hidden=4, tied=True, max_positions=9, parameters=99, operations=()
            )
        )
        is None
    )


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H200", 989.4e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100-PCIE-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA B200", 2250e12),
        ("NVIDIA L40", None), ("NVIDIA GH200 480GB", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("2 cores", None), ("", None),
    ],
)  # fmt: skip
def test_peaks_are_of_the_very_device(name, peak):
    assert peak_of(name) == peak
    assert len(PEAKS) == 7
