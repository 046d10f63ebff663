"""All answers to a list of prompts: against recomputation and transformers, and the same draws in any company."""

from __future__ import annotations

import pytest
import torch
from nanovllm_tokenizers.bpe import train

from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.generate import generate
from nanovllm_core.inference.params import SamplingParams

MAX = 512
GREEDY = SamplingParams(temperature=0, max_tokens=24)


def test_greedy_equals_recomputation(model, prompts_of) -> None:
    prompts = [*prompts_of(6, 40), [5], [7] * 250]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (24, 1, 60, 7, 24, 2, 40, 30)]
    wanted = [model.recomputed(ids, p.max_tokens) for ids, p in zip(prompts, params, strict=True)]
    assert len({tuple(w) for w in wanted}) == len(wanted)
    for most in (1, 3, 32):
        outputs = model(prompts, params, most)
        assert [o["token_ids"] for o in outputs] == wanted
        for o, p in zip(outputs, params, strict=True):
            assert o["finish_reason"] == ("stop" if o["token_ids"][-1] in model.tokenizer.stop_ids else "length")
            assert len(o["token_ids"]) <= p.max_tokens


def test_long_answers_outgrow_the_cache_and_end_at_the_models_length(model) -> None:
    endless = SamplingParams(temperature=0, max_tokens=10_000, ignore_eos=True)
    outputs = model([[9, 8, 7], [11] * 5, [12] * (MAX - 1)], endless)
    assert [len(o["token_ids"]) for o in outputs] == [MAX - 3, MAX - 5, 1]
    assert {o["finish_reason"] for o in outputs} == {"length"}
    model.tokenizer.stop_ids, kept = (), model.tokenizer.stop_ids
    try:
        assert outputs[0]["token_ids"][:300] == model.recomputed([9, 8, 7], 300)
    finally:
        model.tokenizer.stop_ids = kept


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", False), ("qwen3", True), ("qwen2", True), ("mistral", False), ("gpt2", True), ("gpt2", False)],
)
def test_greedy_equals_transformers(family: str, tied: bool, prompts_of, make_model) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = make_model(family, tied, seed=4)
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.settings)).eval()
    missing, unexpected = reference.load_state_dict(model.module.state_dict(), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    reference.tie_weights()
    with torch.no_grad():  # transformers would choose padding rows
        reference.get_input_embeddings().weight[model.tokenizer.vocab_size :] = 0
        reference.get_output_embeddings().weight[model.tokenizer.vocab_size :] = 0
    prompts = prompts_of(5, 30, seed=2)
    for ids, output in zip(prompts, model(prompts, SamplingParams(temperature=0, max_tokens=40)), strict=True):
        given = torch.tensor([ids])
        ends = list(model.tokenizer.stop_ids)
        wanted = reference.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=40, eos_token_id=ends,
            pad_token_id=ends[0],
        )  # fmt: skip
        assert output["token_ids"] == wanted[0, len(ids) :].tolist()


def test_the_same_seed_draws_the_same_in_any_company(model, prompts_of) -> None:
    prompts = prompts_of(8, 30, seed=3)
    params = [
        SamplingParams(seed=i % 3, temperature=0.3 + i / 4, top_k=(None, 20)[i % 2], top_p=(1.0, 0.9, 0.7)[i % 3])
        for i in range(8)
    ]
    together = model(prompts, params)
    assert model(prompts[::-1], params[::-1], most=3)[::-1] == together
    assert [model([ids], p)[0] for ids, p in zip(prompts, params, strict=True)] == together
    other = [SamplingParams(seed=99, temperature=1.0)] * 8
    assert [o["token_ids"] for o in model(prompts, other)] != [o["token_ids"] for o in together]


def test_seeds_are_each_answers_own_and_leave_torchs_alone(model) -> None:
    state = torch.get_rng_state()
    free = model([[5, 6]] * 3, SamplingParams(temperature=2.0))
    assert len({tuple(o["token_ids"]) for o in free}) == 3
    fixed = model([[5, 6]] * 3, SamplingParams(temperature=2.0, seed=1))
    assert len({tuple(o["token_ids"]) for o in fixed}) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_beyond_the_vocabulary_are_never_drawn(model, prompts_of) -> None:
    params = [SamplingParams(temperature=50.0, seed=i, max_tokens=60, ignore_eos=True) for i in range(16)]
    outputs = model(prompts_of(16, 5), params)
    ids = [i for o in outputs for i in o["token_ids"]]
    assert max(ids) < model.tokenizer.vocab_size < model.shape.vocab_size
    assert len(set(ids)) > 300


def test_text_prompts_get_the_prefix(model) -> None:
    [[*ids]] = model.tokenizer.encode(["Was für ein Tag"])
    prefixed = [*model.tokenizer.prefix_ids, *ids]
    first, second, third = model(["Was für ein Tag", prefixed, tuple(ids)], GREEDY)
    assert first == second
    assert third["token_ids"] == model.recomputed(ids, 24)
    assert model([""], GREEDY)[0]["token_ids"] == model.recomputed(list(model.tokenizer.prefix_ids), 24)


def test_stop_ids(model) -> None:
    ids = model([[5, 6, 7]], GREEDY)[0]["token_ids"]
    stop = next(i for k, i in enumerate(ids) if k >= 4 and i not in ids[:k])
    at = ids.index(stop)
    other = train(model.texts, 420)
    other.stop_ids = (other.end_id, stop)
    settings = {"shape": model.shape, "device": "cpu", "max_len": MAX}
    [output] = generate(model.module, other, [[5, 6, 7]], [GREEDY], **settings)
    assert output == {"text": other.decode(ids[:at]), "token_ids": ids[: at + 1], "finish_reason": "stop"}
    on = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    [output] = generate(model.module, other, [[5, 6, 7]], [on], **settings)
    assert output["token_ids"][: len(ids)] == ids


def test_stop_texts(model) -> None:
    plain = model([[5, 6, 7]], GREEDY)[0]
    text = plain["text"]
    for begin in range(2, len(text) - 5, 3):
        stop = text[begin : begin + 4]
        if "\ufffd" in stop:
            continue
        output = model([[5, 6, 7], [8]], [SamplingParams(temperature=0, max_tokens=24, stop=["never", stop]), GREEDY])[
            0
        ]
        assert output["text"] == text[: text.index(stop)]
        assert output["finish_reason"] == "stop"
        n = len(output["token_ids"])
        assert output["token_ids"] == plain["token_ids"][:n]
        assert stop in model.tokenizer.decode(plain["token_ids"][:n])
        assert stop not in model.tokenizer.decode(plain["token_ids"][: n - 1])


def test_the_module_comes_back_as_it_was(model) -> None:
    for mode in (True, False):
        model.module.train(mode)
        model([[5]], GREEDY)
        assert model.module.training is mode
    assert all(p.grad is None and not p.is_inference() for p in model.module.parameters())


def test_bfloat16(prompts_of, make_model) -> None:
    model = make_model("qwen3", True, dtype="bfloat16")
    outputs = model(prompts_of(3, 20), GREEDY)
    assert all(o["token_ids"] for o in outputs)


def test_damaged_weights_are_told(model, make_model) -> None:
    broken = make_model("llama", False)
    with torch.no_grad():
        broken.module.model.norm.weight[0] = float("nan")
    with pytest.raises(GenerationError, match="not finite"):
        broken([[5]], GREEDY)
    assert model([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "prompt 1: is empty"),
        ([5] * MAX, "prompt 1: has 512 tokens, 1 too many"),
        ([5] * (MAX + 88), "prompt 1: has 600 tokens, 89 too many"),
        ([420], "prompt 1: got token id 420, allowed: 0 to 419"),
        ([-1], "got token id -1"),
        ([True], "got token id True"),
        (["a"], "got token id 'a'"),
    ],
)
def test_prompts_that_cannot_be(model, prompt: list, said: str) -> None:
    with pytest.raises(GenerationError) as caught:
        model(["fine", prompt], GREEDY)
    assert said in str(caught.value)
