"""What the parts of a training step cost on a GPU, each by itself, with its alternatives: milliseconds of one step.

    python benchmarks/gpu_parts.py [--out FILE]

The Qwen3-0.6B shape, 16 sequences of 2,048, bf16 over fp32 masters; random values. A part's time is the median of its CUDA
events, times how often a step does it. What a kernel or a layout could gain is read from here before it is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

LAYERS, ROWS, LENGTH, WIDTH, HEADS, KV_HEADS, HEAD, MLP, VOCABULARY = 28, 16, 2048, 1024, 16, 8, 128, 3072, 151_936
TOKENS = ROWS * LENGTH
REPEATS = 12


def timed(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Milliseconds of one call."""
    for _ in range(3):
        work()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in marks)


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype) * 0.02


def products() -> dict[str, float]:
    """Forward, gradient of the input and of the weight (in fp32, as masters take it), of each matrix and of joined ones."""
    shapes = {
        "q": (HEADS * HEAD, WIDTH), "k": (KV_HEADS * HEAD, WIDTH), "v": (KV_HEADS * HEAD, WIDTH),
        "qkv joined": ((HEADS + 2 * KV_HEADS) * HEAD, WIDTH), "o": (WIDTH, HEADS * HEAD), "gate": (MLP, WIDTH), "up": (MLP, WIDTH),
        "gate and up joined": (2 * MLP, WIDTH), "down": (WIDTH, MLP),
    }  # fmt: skip
    told = {}
    for name, (outs, ins) in shapes.items():
        x, w, d = drawn(TOKENS, ins), drawn(outs, ins), drawn(TOKENS, outs)
        told[f"{name}: forward"] = LAYERS * timed(lambda x=x, w=w: x @ w.t())
        told[f"{name}: input's gradient"] = LAYERS * timed(lambda d=d, w=w: d @ w)
        told[f"{name}: weight's gradient, bf16"] = LAYERS * timed(lambda d=d, x=x: d.t() @ x)
        told[f"{name}: weight's gradient, fp32"] = LAYERS * timed(
            lambda d=d, x=x: torch.mm(d.t(), x, out_dtype=torch.float32)
        )
        told[f"{name}: flops at 798 TFLOP/s, each"] = LAYERS * 2 * TOKENS * outs * ins / 798e12 * 1e3
    return told


def head(chunks: int) -> dict[str, float]:
    """The head's three products and the passes over its logits, in so many chunks."""
    rows = TOKENS // chunks
    x, w, logits = (
        drawn(rows, WIDTH),
        drawn(VOCABULARY, WIDTH),
        torch.empty(rows, VOCABULARY, device="cuda", dtype=torch.bfloat16),
    )
    total = torch.zeros(VOCABULARY, WIDTH, device="cuda")
    targets = torch.randint(0, VOCABULARY, (rows,), device="cuda")
    torch.mm(x, w.t(), out=logits)

    @torch.compile
    def gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = logits.float()
        top = torch.logsumexp(wide, 1, keepdim=True)
        probabilities = torch.exp(wide - top)
        hot = torch.arange(VOCABULARY, device=logits.device) == targets[:, None]
        return (top.squeeze(1) - wide.gather(1, targets[:, None]).squeeze(1)).sum(), (probabilities - hot.float()).to(
            logits.dtype
        )

    told = {
        "logits": timed(lambda: torch.mm(x, w.t(), out=logits)),
        "softmax and its gradient, compiled": timed(lambda: gradient(logits, targets)),
        "input's gradient": timed(lambda: logits @ w),
        "weight's gradient, bf16": timed(lambda: logits.t() @ x),
        "weight's gradient, fp32 then added": timed(
            lambda: total.add_(torch.mm(logits.t(), x, out_dtype=torch.float32))
        ),
        "weight's gradient, added by the product": timed(
            lambda: torch.addmm(total, logits.t(), x, out_dtype=torch.float32)
        ),
    }
    return {f"{name}, {chunks} chunks": chunks * value for name, value in told.items()}


def attention() -> dict[str, float]:
    """Forward and backward of causal attention over the sequences, by whoever can."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (drawn(ROWS, LENGTH, n, HEAD).requires_grad_() for n in (HEADS, KV_HEADS, KV_HEADS))
    d = drawn(ROWS, LENGTH, HEADS, HEAD)
    told = {}

    def both(name: str, forward: Callable[[], torch.Tensor], grad: torch.Tensor) -> None:
        try:
            out = forward()
            told[f"{name}: forward"] = LAYERS * timed(forward)
            told[f"{name}: backward"] = LAYERS * timed(
                lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
            )
        except Exception as e:  # this build or device lacks it
            print(f"{name}: {type(e).__name__}: {e}"[:300], file=sys.stderr)

    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
        with sdpa_kernel(getattr(SDPBackend, name)):
            both(
                f"sdpa {name}",
                lambda: F.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
                ),
                d.transpose(1, 2),
            )
    bounds = torch.arange(0, TOKENS + 1, LENGTH, device="cuda", dtype=torch.int32)
    flat = lambda x: x.reshape(TOKENS, *x.shape[2:])  # noqa: E731
    try:
        from flash_attn import flash_attn_varlen_func

        both(
            "flash_attn varlen",
            lambda: flash_attn_varlen_func(flat(q), flat(k), flat(v), bounds, bounds, LENGTH, LENGTH, causal=True),
            flat(d),
        )
    except ImportError as e:
        print(f"flash_attn: {e}", file=sys.stderr)
    try:
        from torch.nn.attention.varlen import varlen_attn

        both(
            "torch varlen_attn, keys repeated",
            lambda: varlen_attn(
                flat(q), flat(k).repeat_interleave(2, 1), flat(v).repeat_interleave(2, 1), bounds, bounds, LENGTH, LENGTH,
                window_size=(-1, 0),
            ),
            flat(d),
        )  # fmt: skip
    except Exception as e:
        print(f"varlen_attn: {type(e).__name__}: {e}"[:300], file=sys.stderr)
    return told


def small() -> dict[str, float]:
    """The compiled elementwise parts, forward and backward, and the optimizer."""
    x, gate, up = (drawn(TOKENS, n).requires_grad_() for n in (WIDTH, MLP, MLP))
    weight = torch.ones(WIDTH, device="cuda", requires_grad=True)
    parts: dict[str, tuple[Any, tuple[torch.Tensor, ...], int]] = {
        "rms_norm": (lambda x, w: F.rms_norm(x.float(), (WIDTH,), w, 1e-6).to(x.dtype), (x, weight), 2 * LAYERS),
        "swiglu": (lambda g, u: F.silu(g) * u, (gate, up), LAYERS),
    }
    told = {}
    for name, (work, given, times) in parts.items():
        compiled = torch.compile(work)
        out = compiled(*given)
        grad = torch.randn_like(out)
        told[f"{name}: forward"] = times * timed(lambda c=compiled, g=given: c(*g))
        told[f"{name}: backward"] = times * timed(
            lambda o=out, g=given, d=grad: torch.autograd.grad(o, g, d, retain_graph=True)
        )
    shapes = [(VOCABULARY, WIDTH)] + LAYERS * [
        (HEADS * HEAD, WIDTH), (KV_HEADS * HEAD, WIDTH), (KV_HEADS * HEAD, WIDTH), (WIDTH, HEADS * HEAD), (MLP, WIDTH),
        (MLP, WIDTH), (WIDTH, MLP),
    ]  # fmt: skip
    masters = [torch.nn.Parameter(drawn(*shape, dtype=torch.float32)) for shape in shapes]
    for p in masters:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(masters, fused=True)
    told["AdamW, fused"] = timed(optimizer.step)
    told["norm and clipping"] = timed(lambda: torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True))
    told["norm alone"] = timed(
        lambda: torch.nn.utils.get_total_norm([p.grad for p in masters if p.grad is not None], foreach=True)
    )
    told["masters to bf16"] = timed(lambda: [p.detach().to(torch.bfloat16) for p in masters])
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(1)
    told: dict[str, Any] = {
        "benchmark": "gpu_parts", "date": date.today().isoformat(), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "milliseconds of a step": {},
    }  # fmt: skip
    for name, work in (
        ("products", products), ("head", lambda: {**head(4), **head(8)}), ("attention", attention), ("small", small),
    ):  # fmt: skip
        found = work()
        told["milliseconds of a step"][name] = {key: round(value, 2) for key, value in found.items()}
        for key, value in found.items():
            print(f"{name}: {key:50} {value:8.2f} ms", flush=True)
        torch.cuda.empty_cache()
        if args.out:
            args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
