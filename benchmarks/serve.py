"""A server under load: many clients stream at once from a small model; errors, time to first token, time a token, leaks.

    python benchmarks/serve.py [--clients 200] [--seconds 60] [--write benchmarks/results/NAME.json]

Model: the `tiny` preset's shape (Qwen3, 4 layers, hidden 256, 4 heads and 2 key/value heads of 64, tied) with a
vocabulary of 2,048 and random weights. `nanovllm serve` runs in a process of its own with its log off; the clients are
one asyncio process beside it, on the same cores. Each asks again as soon as it is answered: a prompt of 8 to 64 tokens,
an answer of 16 to 96, streamed; one in twenty leaves in the middle. Half of them chat.

First token: from sending the request to the first piece of text, the wait in the queue included. Token: from one piece to
the next; a piece is one token unless the client, or the loop that serves it, was late. Memory is the server's resident
set when idle, before and after, behind a warm-up of the same load, and while it runs. The loop ends with SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from report import processor, write

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}assistant: "
WORDS = ("the", "of", "a", "model", "token", "page", "cache", "train", "data", "file", "recipe")
VOCABULARY, LEAVES = 2048, 0.05
WARMUP = 10.0  # seconds


@dataclass
class Figures:
    """What the clients saw."""

    requests: int = 0
    left: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


def make(folder: Path) -> None:
    import torch
    from nanovllm_tokenizers.bpe import train
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(7)
    config = Qwen3Config(
        hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    train([p.read_text("utf-8") for p in sorted((ROOT / "docs").glob("*.md"))], VOCABULARY).save(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))


async def client(number: int, port: int, until: float, found: Figures) -> None:
    draw = random.Random(number)
    while time.perf_counter() < until:
        try:
            async with asyncio.timeout(120):
                await ask(draw, port, found)
            found.requests += 1
        except (OSError, ValueError, KeyError, asyncio.IncompleteReadError, TimeoutError) as e:
            found.errors.append(f"{type(e).__name__}: {e}"[:200])


async def ask(draw: random.Random, port: int, found: Figures) -> None:
    text = " ".join(draw.choices(WORDS, k=draw.randint(8, 64)))
    length, leaves, chat = draw.randint(16, 96), draw.random() < LEAVES, draw.random() < 0.5
    body = {"max_tokens": length, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    data = json.dumps(body).encode()
    head = f"POST /v1/{'chat/' * chat}completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            raise ValueError(f"{status!r} {await reader.read()!r}")
        last, pieces, usage, ended = 0.0, 0, None, False
        async for line in reader:
            if line == b"data: [DONE]\n":
                ended = True
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(event["error"]["message"])
            usage = event["usage"] or usage
            if not any(c.get("text") or c.get("delta", {}).get("content") for c in event["choices"]):
                continue
            now = time.perf_counter()
            if pieces:
                found.gaps.append(now - last)
            else:
                found.first.append(now - began)
            last, pieces = now, pieces + 1
            if leaves and pieces > length // 3:
                found.left += 1
                return
        if not ended or usage is None or usage["completion_tokens"] != length:
            raise ValueError(f"the stream ended early: {usage}, asked for {length} tokens")
        found.tokens += usage["completion_tokens"]
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def load(clients: int, seconds: float, port: int, seed: int) -> Figures:
    found, until = Figures(), time.perf_counter() + seconds
    await asyncio.gather(*(client(seed + i, port, until, found) for i in range(clients)))
    return found


class Server:
    """A running `nanovllm serve`, asked about itself."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        command = [sys.executable, "-m", "nanovllm_core.cli", "serve", str(folder), "--port", "0", "--quiet", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        told = self.process.stdout.readline()
        self.port = int(told.partition("http://127.0.0.1:")[2].split()[0])

    def health(self) -> dict:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=60) as answer:
            return json.load(answer)

    def idle(self) -> dict:
        for _ in range(600):
            health = self.health()
            if not (health["answers"] or health["running"] or health["waiting"]):
                return health
            time.sleep(0.1)
        raise SystemExit(f"the server does not become idle: {health}")

    def resident(self) -> float:
        """MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return round(int(text.partition("VmRSS:")[2].split()[0]) / 1024, 1)

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def state(self) -> dict:
        health = self.idle()
        time.sleep(3)  # connections end
        return {"free_pages": health["free_pages"], "resident_mib": self.resident(), "open_files": self.files()}

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def measure(args: argparse.Namespace, folder: Path) -> dict:
    flags = ["--batch-size", str(args.batch_size)] if args.batch_size else []
    server = Server(folder, [*flags, "--kv-cache-tokens", str(1 << 16)])
    try:
        asyncio.run(load(args.clients, WARMUP, server.port, seed=1_000_000))
        before, memory = server.state(), list[float]()

        async def watched() -> Figures:
            async def watch() -> None:
                while True:
                    memory.append(server.resident())
                    await asyncio.sleep(args.seconds / 12)

            watching = asyncio.create_task(watch())
            try:
                return await load(args.clients, args.seconds, server.port, seed=0)
            finally:
                watching.cancel()

        began = time.perf_counter()
        found = asyncio.run(watched())
        took = time.perf_counter() - began
        after = server.state()
    finally:
        code = server.end()
    return {
        "clients": args.clients,
        "seconds": round(took, 1),
        "batch_size": args.batch_size or "default (64)",
        "requests": found.requests,
        "left_in_the_middle": found.left,
        "errors": len(found.errors),
        "first_errors": found.errors[:5],
        "tokens_per_second": round(found.tokens / took, 1),
        "first_token_ms": quantiles(found.first),
        "token_ms": quantiles(found.gaps),
        "before": before,
        "after": after,
        "resident_mib_during": memory,
        "exit_code": code,
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": round(1000 * cuts[49], 1), "p99": round(1000 * cuts[98], 1), "max": round(1000 * max(seconds), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--batch-size", type=int, help="answers made at once (default: the server's)")
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()
    load_before = round(os.getloadavg()[0], 1)  # of others on the machine
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "tiny"
        make(folder)
        found = measure(args, folder)
    import torch

    about = {
        "benchmark": "serve",
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average_before": load_before,
    }
    print(json.dumps(found, indent=1))
    write(args.write, {**about, **found})


if __name__ == "__main__":
    main()
