"""A model in slices on several processes generates what it generates on one; the processes end with the first."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from attrs import evolve
from safetensors.torch import save_file

from nanovllm_core import LLM, Registry, SamplingParams
from nanovllm_core.errors import GenerationError, RefusedError
from nanovllm_core.inference.engine import Engine
from nanovllm_core.llm_ranks import local_shape

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="looks for its processes in Linux's /proc")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random Qwen3 with wide weights and a vocabulary that two ranks do not split evenly, in a folder with a tokenizer."""
    from nanovllm_tokenizers.bpe import train
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("sliced")
    tokenizer = train(["the river runs past old mills and under a stone bridge"] * 9, 301)
    tokenizer.save(folder)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = Qwen3Config(
        vocab_size=tokenizer.vocab_size, intermediate_size=96, max_position_embeddings=256, tie_word_embeddings=True, **sizes
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    config.save_pretrained(folder)
    wide = {n: p + 0.2 * torch.randn_like(p) for n, p in model.named_parameters()}
    save_file(
        {n: p.detach().contiguous() for n, p in wide.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


PROMPTS = ["the river", [5, 6, 7] * 20, "under", [9]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    SamplingParams(seed=3, temperature=1.2, max_tokens=20, n=3, logprobs=2),
    SamplingParams(temperature=0, max_tokens=1),
    SamplingParams(seed=4, top_p=0.9, max_tokens=25, ignore_eos=True),
]


def close(a, b) -> bool:
    """The same but for the last digits of log-probabilities."""
    if isinstance(a, float):
        return abs(a - b) < 1e-4
    if isinstance(a, dict | list):
        items = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
        return all(close(x, y) for x, y in items)
    return a == b


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def interrupted(*args, **kwargs):
    """Ctrl-C when the others were told."""
    raise KeyboardInterrupt


def children() -> set[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return {int(pid) for pid in file.read().split()}


def test_the_command_generates_over_processes(saved):
    words = [
        sys.executable,
        "-m",
        "nanovllm_core.cli",
        "generate",
        str(saved),
        "--temperature",
        "0",
        "--max-tokens",
        "9",
    ]
    prompts = ["--prompt", "the river", "--prompt", "under"]
    one, two = (
        subprocess.run([*words, *prompts, *more], capture_output=True, text=True, timeout=240, check=True)
        for more in ([], ["--tensor-parallel-size", "2", "--kv-cache-tokens", "320", "--max-model-len", "120"])
    )
    assert two.stdout == one.stdout
    assert len(one.stdout) > 40


def test_two_processes_answer_as_one(saved):
    wanted = LLM(saved).generate(PROMPTS, PARAMS)
    before, threads = children(), torch.get_num_threads()
    llm = LLM(saved, tensor_parallel_size=2, kv_cache_tokens=160, max_model_len=120)
    [other] = children() - before
    assert close(llm.generate(PROMPTS, PARAMS), wanted)
    again = list(llm.generate(PROMPTS, PARAMS, stream=True))
    assert "".join(p["text"] for p in again if p["prompt"] == 0) == wanted[0]["text"]
    with pytest.raises(GenerationError, match="already a rank of a process group"):
        LLM(saved, tensor_parallel_size=2)
    for record in (False, True):  # as on GPUs: a step ahead, and steps of one token from fixed places
        engine = Engine(
            llm.module, llm.tokenizer, local_shape(llm.plan.shape, 2), "cpu", max_len=120, pages=10, most=4, budget=48,
            talk=llm._ranks.talk, ahead=True, record=record,
        )  # fmt: skip
        assert (engine.recorder is not None) == record
        for _ in range(2):
            asked = engine.answers(PROMPTS, PARAMS)
            engine.enqueue([s for each in asked for s in each])
            while engine.busy:
                engine.step()
            texts = [s.output(llm.tokenizer)["text"] for each in asked for s in each]
            assert texts == [w["text"] for w in wanted]
        assert engine.scheduler.preempted > 0
        if record:  # what nobody must look at: the other rank draws the same tokens from its own logits
            plain = [evolve(p, top_p=1.0, logprobs=None) for p in PARAMS]
            asked, placed, keep = engine.answers(PROMPTS, plain), [], engine.runner.keep
            engine.runner.keep = lambda *told, placed=placed, keep=keep: (placed.append(1), keep(*told))
            engine.enqueue([s for each in asked for s in each])
            steps = 0
            while engine.busy:
                engine.step()
                steps += 1
            assert len(placed) < steps / 2
            texts = [s.output(llm.tokenizer)["text"] for each in asked for s in each]
            assert texts == [a["text"] for a in LLM(saved).generate(PROMPTS, plain)]
    llm.close()
    assert gone(other)
    assert torch.get_num_threads() == threads
    assert not torch.distributed.is_initialized()

    llm = LLM(saved, tensor_parallel_size=2)  # one after another is allowed
    [other] = children() - before
    module = llm.engine.runner.module
    llm.engine.runner.module = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, PARAMS)
    llm.engine.runner.module = module
    with pytest.raises(GenerationError, match="interrupted in a step: close this LLM and make another"):
        llm.generate(PROMPTS, PARAMS)
    llm.close()
    assert gone(other)

    llm = LLM(saved, tensor_parallel_size=2)
    [other] = children() - before
    os.kill(other, signal.SIGKILL)
    with pytest.raises(
        GenerationError, match=r"a process of tensor_parallel_size has died .*: close this LLM and make"
    ):
        llm.generate(PROMPTS, PARAMS)
    assert llm.lost
    llm.close()
    assert not torch.distributed.is_initialized()


def test_what_cannot_be_sliced_is_told_before_a_process_starts(saved):
    before = children()
    with pytest.raises(RefusedError, match="the model's 4 heads do not split into 3 equal parts"):
        LLM(saved, tensor_parallel_size=3)
    with pytest.raises(GenerationError, match="tensor_parallel_size: got 0, allowed: 1 and more"):
        LLM(saved, tensor_parallel_size=0)
    with pytest.raises(GenerationError, match="know no registry"):
        LLM(saved, tensor_parallel_size=2, registry=Registry.from_environment())
    assert children() == before
