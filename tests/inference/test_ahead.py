"""A forward that is queued before the tokens of the last are seen, and steps from recordings: the same answers, token for token."""

from __future__ import annotations

import random
import sys

import pytest
from attrs import evolve

from nanovllm_core.inference.driving import Driver
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.inference.recording import bucket

MODES = [{"ahead": True, "record": False}, {"ahead": True, "record": True}]
SETTINGS = (
    {},
    {"most": 3},
    {"pages": 45, "max_len": 160, "budget": 9, "most": 9},
    {"page_size": 1, "pages": 170, "max_len": 160},
)
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def mixed(pick: random.Random, model) -> SamplingParams:
    """What one answer may ask for; of some, the host must see every token before the next."""
    watched = pick.random() < 0.1
    return SamplingParams(
        temperature=pick.choice((0, 0.6, 1.0, 1.5)), top_k=pick.choice((None, None, None, 20)), seed=pick.randrange(99),
        top_p=pick.choice((1.0, 1.0, 1.0, 0.9)), max_tokens=pick.randint(1, 30), stop=pick.choice(((), ("e", "zz"))),
        ignore_eos=pick.random() < 0.8, n=pick.choice((1, 1, 1, 3)), repetition_penalty=1.3 if watched else 1.0,
        logprobs=2 if pick.random() < 0.1 else None,
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES, ids=["ahead", "recorded"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_answers_are_those_of_an_engine_that_waits(model, prompts_of, settings, mode) -> None:
    """Whatever is asked, who comes late, who leaves, with prefix hits, under preemption."""
    pick = random.Random(str(settings))
    prompts = [[5, 6, 7, 8, 9, 10] * pick.choice((0, 0, 2, 5)) + ids for ids in prompts_of(40, 30, seed=3)]
    params = [mixed(pick, model) for _ in prompts]
    wanted = model.ran(model.engine(most=64, pages=4000), prompts, params)
    engine = model.engine(**settings, **mode)
    answers = engine.answers(prompts, params)
    left, gone, seen = list(answers), [], 0
    while engine.busy or left:
        if left and (pick.random() < 0.3 or not engine.busy):
            engine.enqueue(left.pop(0))
        if pick.random() < 0.03:
            running = [s for s in engine.scheduler.running if s.ids]
            if running:
                gone.append(pick.choice(running))
                engine.abort(gone[-1])
        seen += sum(1 for _ in engine.step())
    flat = [s for sequences in answers for s in sequences]
    for s, right in zip(flat, wanted, strict=True):
        output = s.output(model.tokenizer)
        if s in gone:
            n = len(output["token_ids"])
            assert output["token_ids"] == right["token_ids"][:n]
            assert n < len(right["token_ids"])
        elif "logprobs" in right:
            assert [told["token_id"] for told in output["logprobs"]] == output["token_ids"] == right["token_ids"]
        else:
            assert output == right
    assert seen >= sum(len(s.ids) for s in flat)
    assert engine.pool.free == engine.pool.count
    if "budget" in settings:
        assert engine.scheduler.preempted > 0
    assert engine.scheduler.reused > 0


@pytest.mark.parametrize("mode", MODES, ids=["ahead", "recorded"])
def test_the_device_is_a_step_ahead_of_the_host(model, mode, monkeypatch) -> None:
    engine = model.engine(**mode)
    [[answer]] = engine.answers([[5, 6, 7]], [SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)])
    engine.enqueue([answer])
    seen = []
    while engine.busy:
        engine.step()
        seen.append((len(answer.ids), answer.drawn))
    assert seen == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 0)]
    assert model.ran(model.engine(), [[5, 6, 7]], GREEDY)[0]["token_ids"][:4] == answer.ids


def test_steps_run_from_the_recorder(model, prompts_of, monkeypatch) -> None:
    """All but prompts; an answer that is watched, or filtered, draws anew from the recorded logits."""
    engine = model.engine(ahead=True, record=True, pages=4000, budget=9999)
    forward, calls = engine.runner.forward, []
    monkeypatch.setattr(engine.runner, "forward", lambda parts: calls.append(len(parts)) or forward(parts))
    more = {"top_k": 3}, {"logprobs": 1}, {"repetition_penalty": 2.0}
    params = [GREEDY, *(SamplingParams(seed=1, max_tokens=9, **options) for options in more)]
    assert model.ran(engine, prompts_of(4, 30), params)
    assert calls == [4]


def test_filters_are_part_of_a_step_where_sampling_knows_them_from_the_device(model, prompts_of, monkeypatch) -> None:
    """As Triton's does: it gets them from fixed places, and nobody draws anew."""
    calls, torchs = [], model.module.ops.sample

    def sample(logits_BV, draws):
        calls.append(None if draws.filtered_R is None else draws.filtered_R.tolist())
        kept_B = (draws.top_k_B == logits_BV.shape[1]) & (draws.top_p_B == 1) & (draws.min_p_B == 0)
        rows_R = (~kept_B & (draws.temperature_B > 0)).nonzero()[:, 0]
        return torchs(logits_BV, evolve(draws, filtered_R=rows_R if len(rows_R) else None))

    sample.recordable = True
    filters = {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9}, {}
    params = [SamplingParams(seed=i, max_tokens=20, ignore_eos=True, **f) for i, f in enumerate(filters)]
    prompts = prompts_of(5, 30)
    wanted = model.ran(model.engine(pages=4000, budget=9999), prompts, params)
    monkeypatch.setattr(model.module, "ops", evolve(model.module.ops, sample=sample))
    assert model.ran(model.engine(ahead=True, record=True, pages=4000, budget=9999), prompts, params) == wanted
    assert calls[0] == [0, 1, 2, 3]
    assert calls[1:] == [[0, 1, 2, 3, 4, 5, 6, 7]] * 19, "rows that may have filters, and nobody drew anew"


def test_an_answer_that_ends_early_wastes_nothing_but_a_token(model, prompts_of) -> None:
    """What was drawn after its end is dropped, and its pages hold only what they are known by."""
    [ids] = [model.ran(model.engine(), [[5, 6, 7]], GREEDY)[0]["token_ids"]]
    ends = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[ids[7]])
    engine = model.engine(ahead=True, record=True, page_size=1, pages=100, max_len=60)
    at = ids.index(ids[7])
    for _ in range(3):
        [output] = model.ran(engine, [[5, 6, 7]], ends)
        assert (output["token_ids"], output["finish_reason"]) == (ids[: at + 1], "stop")
        [output] = model.ran(engine, [[5, 6, 7]], GREEDY)
        assert output["token_ids"] == ids
    assert engine.pool.free == engine.pool.count


def test_damaged_logits_end_their_own_answer(model, prompts_of, monkeypatch) -> None:
    engine = model.engine(ahead=True, record=True)
    step, calls = engine.recorder.step, []

    def spoilt(sequences):
        logits, tokens = step(sequences)
        calls.append(len(sequences))
        if len(calls) == 4:
            tokens[[1, 3]] = -1
        return logits, tokens

    monkeypatch.setattr(engine.recorder, "step", spoilt)
    prompts = prompts_of(5, 9, seed=13)
    wanted = model.ran(model.engine(), prompts, GREEDY)
    answers = [a for [a] in engine.answers(prompts, [GREEDY] * 5)]
    engine.enqueue(answers)
    while engine.busy:
        engine.step()
    bad = [a for a in answers if a.error is not None]
    assert [str(a.error)[:28] for a in bad] == ["the model's logits are not f"] * 2
    assert all(a.output(model.tokenizer) == w for a, w in zip(answers, wanted, strict=True) if a.error is None)
    assert engine.pool.free == engine.pool.count


def test_streams_and_errors_with_a_step_in_flight(model, prompts_of, monkeypatch) -> None:
    driver = Driver(model.engine(ahead=True, record=True))
    prompts = prompts_of(6, 20, seed=2)
    wanted = model.ran(model.engine(), prompts, GREEDY)
    asked = [a for [a] in driver.engine.answers(prompts, [GREEDY] * 6)]
    tokens = [[] for _ in prompts]
    for piece in driver.stream(asked):
        tokens[piece["prompt"]] += piece["token_ids"]
    assert tokens == [w["token_ids"] for w in wanted]
    forward = driver.engine.runner.forward
    monkeypatch.setattr(driver.engine.runner, "forward", lambda parts: 1 / 0)
    with pytest.raises(Exception, match="division by zero"):
        list(driver.stream([a for [a] in driver.engine.answers(prompts, [GREEDY] * 6)]))
    monkeypatch.setattr(driver.engine.runner, "forward", forward)
    again = [a for [a] in driver.engine.answers(prompts, [GREEDY] * 6)]
    for _ in driver.run(again):
        pass
    assert [a.output(model.tokenizer) for a in again] == wanted
    assert driver.engine.pool.free == driver.engine.pool.count


def test_recordings_are_few() -> None:
    sizes = {n: bucket(n, 100) for n in range(1, 101)}
    assert all(size >= n for n, size in sizes.items())
    assert sorted(set(sizes.values())) == [1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 100]


def test_nobody_is_recorded_whose_attention_does_not_say_so(model) -> None:
    assert model.engine(ahead=True).recorder is None
    assert model.engine(ahead=True, record=True).recorder is not None
    assert model.engine(record=True).recorder is None


def test_what_another_sequence_left_behind_is_not_read(model, prompts_of) -> None:
    """Pages that are handed on hold what their last owner wrote, which may be no numbers."""
    prompts = prompts_of(3, 9, seed=5)
    wanted = model.ran(model.engine(), prompts, GREEDY)
    for mode in ({}, *MODES):
        engine = model.engine(**mode)
        model.ran(engine, prompts_of(8, 60, seed=6), GREEDY)
        for kv in engine.runner.kv:
            kv.k_PSKH.fill_(float("nan"))
            kv.v_PSKH.fill_(float("nan"))
        engine.pool.forget()
        assert model.ran(engine, prompts, GREEDY) == wanted


@pytest.mark.parametrize("mode", [{}, *MODES], ids=str)
def test_an_interruption_anywhere_leaves_an_engine_that_answers(model, prompts_of, mode) -> None:
    """Ctrl-C at any line of a step, where a sequence, a page or a slot is between two hands."""
    prompts = prompts_of(9, 20, seed=7)
    wanted = model.ran(model.engine(), prompts, GREEDY)
    driver, pick, hit = Driver(model.engine(pages=60, max_len=120, most=4, **mode)), random.Random(3), 0
    files = ("scheduler.py", "engine.py", "pages.py")
    for _ in range(150):
        left = pick.randrange(1, 4000)

        def trace(frame, event, arg):
            nonlocal left
            if not frame.f_code.co_filename.endswith(files):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        asked = [a for [a] in driver.engine.answers(prompts, [GREEDY] * 9)]
        sys.settrace(trace)
        try:
            for _ in driver.run(asked):
                pass
        except KeyboardInterrupt:
            hit += 1
        finally:
            sys.settrace(None)
        driver._hear_if_free()
        assert not driver.engine.busy
        assert driver.engine.pool.free == driver.engine.pool.count
    assert hit > 50
    again = [a for [a] in driver.engine.answers(prompts, [GREEDY] * 9)]
    for _ in driver.run(again):
        pass
    assert [a.output(model.tokenizer) for a in again] == wanted
