"""Guessed tokens: the answers are those without guessing, whatever is asked; a guess that is right spares a forward."""

from __future__ import annotations

import random

import pytest

from nanovllm_core.inference.lookup import FEWEST, Lookup
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.inference.sequence import Sequence
from nanovllm_core.inference.stopping import StopTexts

GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def sequence(*tokens: int, room: int = 99) -> Sequence:
    return Sequence(list(tokens), SamplingParams(seed=0), room, StopTexts(None, ()))  # type: ignore[arg-type]


def test_a_guess_is_what_followed_the_last_time() -> None:
    lookup, s = Lookup(), sequence(1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 1, 2, 3)
    assert lookup.guess(s, 8) == [6, 7][:FEWEST]
    assert lookup.guess(s, 1) == [6]
    s.ids += [6, 9]
    assert lookup.guess(s, 8) == []
    s.ids += [7, 1, 2, 3]
    lookup.told(2, 2)
    assert lookup.guess(s, 8) == [6, 9, 7, 1]


def test_a_guess_goes_round_with_what_does() -> None:
    lookup = Lookup()
    lookup.told(4, 4)
    assert lookup.guess(sequence(9, 1, 2, 1, 2, 1), 8) == [2, 1] * 4
    assert Lookup().guess(sequence(5, 5), 8) == []  # fewer than it looks for


def test_wrong_guesses_are_made_less_often() -> None:
    lookup, s, made = Lookup(), sequence(*[7] * 9), []
    for _ in range(200):
        guesses = lookup.guess(s, 8)
        made.append(bool(guesses))
        if guesses:
            lookup.told(len(guesses), 0)
    assert 8 <= sum(made) <= 16
    lookup.told(2, 2)
    assert lookup.guess(s, 8) == [7] * 4


def mixed(pick: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=pick.choice((0, 0, 0.2, 0.7)), top_k=pick.choice((None, None, 5)), seed=pick.randrange(99),
        top_p=pick.choice((1.0, 0.9)), max_tokens=pick.randint(1, 60), stop=pick.choice(((), ("e", "zz"))),
        ignore_eos=pick.random() < 0.8, n=pick.choice((1, 1, 3)), logprobs=pick.choice((None, None, None, 2)),
        repetition_penalty=pick.choice((1.0, 1.0, 1.0, 1.2)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"guesses": 400},
        {"guesses": 8, "most": 2},
        {"guesses": 60, "pages": 60, "max_len": 200, "budget": 12, "most": 9},
        {"guesses": 60, "page_size": 1, "pages": 220, "max_len": 200},
    ],
    ids=str,
)
def test_answers_are_those_without_guessing(model, prompts_of, settings) -> None:
    pick = random.Random(str(settings))
    prompts = [ids * pick.choice((1, 1, 4)) for ids in prompts_of(30, 25, seed=4)]
    params = [mixed(pick) for _ in prompts]
    wanted = model.ran(model.engine(most=64, pages=4000), prompts, params)
    engine = model.engine(**settings)
    found = model.ran(engine, prompts, params)
    for a, b in zip(found, wanted, strict=True):
        if "logprobs" in b:
            assert [told["token_id"] for told in a["logprobs"]] == b["token_ids"]
        assert {**a, "logprobs": None} == {**b, "logprobs": None}
    assert engine.pool.free == engine.pool.count
    assert engine.guessed > engine.right > 0
    if "budget" in settings:
        assert engine.scheduler.preempted > 0


def test_a_text_that_goes_round_takes_few_forwards(model, monkeypatch) -> None:
    """Greedy answers of small models go round sooner or later."""
    plain, engine = model.engine(), model.engine(guesses=8)
    counts = {}
    for e in (plain, engine):
        forward, calls = e.runner.forward, []
        monkeypatch.setattr(e.runner, "forward", lambda parts, f=forward, c=calls: c.append(1) or f(parts))
        counts[e] = calls
    prompt = [5, 6, 7] * 8
    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    assert model.ran(engine, [prompt], params) == model.ran(plain, [prompt], params)
    assert len(counts[plain]) == 300
    assert len(counts[engine]) == 300 - engine.right < 300
    assert engine.pool.free == engine.pool.count


def test_pieces_come_with_all_that_is_right(model) -> None:
    from nanovllm_core.inference.driving import Driver

    driver = Driver(model.engine(guesses=8))
    [wanted] = model.ran(model.engine(), [[5, 6, 7] * 8], GREEDY)
    [[asked]] = driver.engine.answers([[5, 6, 7] * 8], [GREEDY])
    tokens, text = [], ""
    for piece in driver.stream([asked]):
        tokens += piece["token_ids"]
        text += piece["text"]
    assert (tokens, text) == (wanted["token_ids"], wanted["text"])
