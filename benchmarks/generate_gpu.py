"""Generation on one GPU: nano-vllm's own workload, one answer and 16 at once, start-up; beside transformers' continuous batching.

    python benchmarks/generate_gpu.py [--peer ATTENTION] [--eager] [--filters] [--tensor-parallel GPUS] [--profile TRACE.txt]
                                      [--write benchmarks/results/NAME.json]
    python benchmarks/generate_gpu.py --tiny            (a small model on the CPU, to see that it runs)

The model has the shape of Qwen3-0.6B and random weights. Workload: 256 prompts of 100 to 1,024 random ids and answers of 100
to 1,024 tokens, 133,966 in all, temperature 0.6, no end token heeded (as nano-vllm's `bench.py` draws them); one and 16 prompts
of 128 continued by 512. Speed is new tokens a second of the whole call. Each round has new prompts of the same lengths, the last
("again") those of the one before it, which nano-vllm, we and perhaps others find in their cache. The first round compiles
kernels and records CUDA graphs. The floor is what memory allows: keys and values once a token, weights once a step, at 3.0 TB/s.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import write

QWEN = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151_936, "hidden_size": 1024,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
    "max_position_embeddings": 4096, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "eos_token_id": 1,
}  # fmt: skip
TINY = {**QWEN, "vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 96}  # fmt: skip
BANDWIDTH = 3.0e12  # bytes a second
Work = tuple[list[list[int]], list[int]]


def workload(sequences: int, longest: int, ids: int) -> Work:
    """Prompts, and how many tokens each is continued by."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, ids) for _ in range(draw.randint(100, longest))] for _ in range(sequences)]
    return prompts, [draw.randint(100, longest) for _ in range(sequences)]


def even(batch: int, length: int, tokens: int, ids: int) -> Work:
    draw = random.Random(batch)
    return [[draw.randint(0, ids) for _ in range(length)] for _ in range(batch)], [tokens] * batch


def made(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """A model folder: random weights, and a tokenizer of words so that every id can be drawn."""
    import torch
    from nanovllm_models.families import from_huggingface
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    from nanovllm_core.contracts import Ops

    with torch.device("meta"):
        module = from_huggingface(config).build(Ops(dtype="bfloat16"))
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.ones(p.shape, dtype=torch.bfloat16) if p.ndim < 2
        else (torch.randn(p.shape, generator=generator) * 0.02).to(torch.bfloat16)
        for name, p in module.named_parameters()
    }  # fmt: skip
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(config["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    words.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


def floor(config: dict[str, Any], work: Work) -> float:
    """Seconds that memory needs at least."""
    layers, width = config["num_hidden_layers"], config["num_key_value_heads"] * config["head_dim"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    matrices = layers * (2 * hidden * heads + 2 * hidden * width + 3 * hidden * inner) + config["vocab_size"] * hidden
    keys = sum(2 * 2 * layers * width * (len(p) + i) for p, n in zip(*work, strict=True) for i in range(n))
    return (keys + 2 * matrices * max(work[1])) / BANDWIDTH


def ours(folder: Path, batch: int, eager: bool, ranks: int, filters: dict[str, Any]) -> Callable[[Work], list[int]]:
    from nanovllm_core import LLM, SamplingParams

    llm = LLM(folder, batch_size=batch, enforce_eager=eager, tensor_parallel_size=ranks)

    def run(work: Work) -> list[int]:
        params = [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n, seed=i, **filters)
            for i, n in enumerate(work[1])
        ]
        return [len(answer["token_ids"]) for answer in llm.generate(work[0], params, use_tqdm=False)]

    return run


def theirs(folder: Path, attention: str) -> tuple[Callable[[Work], list[int]], Callable[[], None]]:
    """How it runs, and how it ends."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention).cuda().eval()
    )
    settings = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=0, eos_token_id=-1, pad_token_id=0, max_new_tokens=1024
    )
    manager = model.init_continuous_batching(generation_config=settings)
    manager.start()

    def run(work: Work) -> list[int]:
        places = {
            manager.add_request(ids, max_new_tokens=n, eos_token_id=-1): i
            for i, (ids, n) in enumerate(zip(*work, strict=True))
        }
        found = [0] * len(places)
        while not all(found):
            answer = manager.get_result(timeout=60)
            if answer is None:
                raise RuntimeError("transformers gave no answer for a minute")
            if answer.is_finished():
                found[places[answer.request_id]] = len(answer.generated_tokens)
        return found

    return run, lambda: manager.stop(block=True)


FIRST = """
import sys, time
began = time.perf_counter()
from nanovllm_core import LLM, SamplingParams
llm = LLM(sys.argv[1])
loaded = time.perf_counter()
llm.generate([[5] * 16], SamplingParams(max_tokens=1, seed=1), use_tqdm=False)
print(loaded - began, time.perf_counter() - began)
"""


def start_up(folder: Path) -> dict[str, float]:
    """Seconds from a new Python process to the model, and to the first token."""
    began = time.perf_counter()
    said = subprocess.run([sys.executable, "-c", FIRST, str(folder)], capture_output=True, text=True, check=True).stdout
    loaded, first = map(float, said.split()[-2:])
    return {"loaded": loaded, "first_token": first, "whole_process": time.perf_counter() - began}


def timed(run: Callable[[Work], list[int]], work: Work, rounds: int, ids: int) -> dict[str, Any]:
    """Tokens a second of each round of new prompts, the first included, and of the last one's again."""
    speeds = []
    for turn in [*range(rounds), rounds - 1]:
        prompts = [[(i * (2 * turn + 1) + turn) % ids for i in prompt] for prompt in work[0]]
        began = time.perf_counter()
        found = run((prompts, work[1]))
        speeds.append(round(sum(found) / (time.perf_counter() - began), 1))
        assert found == work[1], "every answer has as many tokens as were asked for"
    return {"rounds": speeds[:-1], "again": speeds[-1]}


def profiled(run: Callable[[Work], list[int]], work: Work, path: Path) -> None:
    """Where a short run spends the GPU's time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run(work)
    table = found.key_averages().table
    path.write_text(
        table(sort_by="cuda_time_total", row_limit=40) + "\n" + table(sort_by="cpu_time_total", row_limit=40)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="ATTENTION", help="also transformers, with this attn_implementation")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument(
        "--filters", action="store_true", help="with top-k 20 and top-p 0.95, as Qwen3's models ask for"
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="GPUS")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    import torch

    config, ids = (TINY, 4000) if args.tiny else (QWEN, 10_000)
    works = {"workload": workload(12, 120, ids) if args.tiny else workload(256, 1024, ids)}
    works |= {f"batch {n}": even(n, 128, 16 if args.tiny else 512, ids) for n in (1, 16)}
    figures: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made(folder, config)
        figures["start_up"] = start_up(folder)
        print(json.dumps(figures), flush=True)
        run = ours(folder, 256, args.eager, args.tensor_parallel, {"top_k": 20, "top_p": 0.95} if args.filters else {})
        for name, work in works.items():
            figures[name] = {"tokens": sum(work[1]), "floor": round(sum(work[1]) / floor(config, work), 1)}
            figures[name]["ours"] = timed(run, work, args.rounds, ids)
            print(name, json.dumps(figures[name]), flush=True)
        if args.profile:
            profiled(run, even(16, 128, 24, ids), args.profile)
        if args.peer:
            del run
            gc.collect()
            torch.cuda.empty_cache()
            figures["free_before_transformers"] = torch.cuda.mem_get_info()[0]
            peer, end = theirs(folder, args.peer)
            for name, work in works.items():
                mine, other = figures[name]["ours"], timed(peer, work, args.rounds, ids)
                figures[name]["transformers"] = other
                figures[name]["ratio"] = round(max(mine["rounds"]) / max(other["rounds"]), 2)
                figures[name]["ratio_again"] = round(mine["again"] / other["again"], 2)
                print(name, json.dumps(figures[name]), flush=True)
            end()
    write(args.write, figures)


if __name__ == "__main__":
    main()
