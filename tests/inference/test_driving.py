"""Callers share an engine: pieces as they are made, in threads and event loops; who leaves is let go; an error is each one's."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest

from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.driving import Driver
from nanovllm_core.inference.params import SamplingParams

MAX = 512


@pytest.fixture
def driver(model):
    return Driver(model.engine(pages=300, max_len=200))


def asked(driver, prompts, params):
    return [s for sequences in driver.engine.answers(prompts, params) for s in sequences]


def settled(driver) -> None:
    """Wait until the engine has nothing to do; every page is free then."""
    deadline = time.monotonic() + 60
    while (driver.engine.busy or driver._word or driver._thread) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not driver.engine.busy
    assert driver.engine.pool.free == driver.engine.pool.count


def params_of(n: int) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=1.3, seed=i, max_tokens=5 + 3 * i, stop=[["e", "zz"], [], [" a", "."]][i % 3])
        for i in range(n)
    ]


def test_pieces_together_are_the_answer(model, driver, prompts_of) -> None:
    prompts, params = prompts_of(12, 30, seed=1), params_of(12)
    wanted = model(prompts, params)
    texts, tokens, ends = [""] * 12, [[] for _ in range(12)], [None] * 12
    pieces = 0
    for piece in driver.stream(asked(driver, prompts, params)):
        i = piece["prompt"]
        assert ends[i] is None, "nothing comes after the last piece"
        texts[i] += piece["text"]
        tokens[i] += piece["token_ids"]
        ends[i] = piece["finish_reason"]
        assert wanted[i]["text"].startswith(texts[i]), "what was told stays"
        pieces += 1
    assert [
        {"text": t, "token_ids": k, "finish_reason": e} for t, k, e in zip(texts, tokens, ends, strict=True)
    ] == wanted
    assert pieces == sum(len(o["token_ids"]) for o in wanted)
    settled(driver)


def test_characters_of_several_tokens_come_whole(model, driver) -> None:
    [[*ids]] = model.tokenizer.encode(["漢字 und 😀"])
    params = SamplingParams(temperature=3.0, seed=0, max_tokens=150, ignore_eos=True)
    pieces = list(driver.stream(asked(driver, [ids], [params])))
    [whole] = model([ids], params)
    assert "".join(p["text"] for p in pieces) == whole["text"]
    assert "\ufffd" not in "".join(p["text"] for p in pieces[:-1]).replace("\ufffd", "", whole["text"].count("\ufffd"))
    assert any(not p["text"] and p["token_ids"] for p in pieces)


def test_leaving_a_stream_ends_its_answers(driver, prompts_of) -> None:
    answers = asked(driver, prompts_of(3, 9), [SamplingParams(max_tokens=150, ignore_eos=True)] * 3)
    for piece in driver.stream(answers):
        if len(answers[piece["prompt"]].ids) == 4:
            break
    settled(driver)
    assert {a.finish_reason for a in answers} == {"abort"}


def test_an_event_loop_gets_what_a_list_gets(model, driver, prompts_of) -> None:
    prompts, params = prompts_of(12, 30, seed=2), params_of(12)
    wanted = model(prompts, params)

    async def one(i: int) -> dict:
        await asyncio.sleep(i % 4 * 0.01)
        text, ids, end = "", [], None
        async for piece in driver.astream(prompts[i], params[i]):
            text, ids, end = text + piece["text"], ids + piece["token_ids"], piece["finish_reason"]
        return {"text": text, "token_ids": ids, "finish_reason": end}

    async def all_of_them() -> list[dict]:
        return await asyncio.gather(*map(one, range(12)))

    assert asyncio.run(all_of_them()) == wanted
    settled(driver)


def test_who_stops_awaiting_is_let_go(model, driver, prompts_of) -> None:
    endless = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    prompts, pick = prompts_of(12, 9, seed=3), random.Random(5)

    async def one(i: int) -> int:
        pieces = driver.astream(prompts[i], endless)
        count = 0
        try:
            async for piece in pieces:
                count += len(piece["token_ids"])
                if i % 3 == 1 and count >= 3:
                    break
        finally:
            await pieces.aclose()
        return count

    async def some() -> list[int | BaseException]:
        tasks = [asyncio.create_task(one(i)) for i in range(12)]
        await asyncio.sleep(0.05)
        for i in range(2, 12, 3):
            await asyncio.sleep(pick.random() * 0.05)
            tasks[i].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    counts = asyncio.run(some())
    settled(driver)
    assert all(counts[i] == 150 for i in range(0, 12, 3))
    assert all(3 <= counts[i] < 150 for i in range(1, 12, 3))  # a piece holds more tokens where the loop was late
    assert all(isinstance(counts[i], asyncio.CancelledError) for i in range(2, 12, 3))


def test_threads_share_the_engine(model, driver, prompts_of) -> None:
    prompts, params = prompts_of(12, 30, seed=4), params_of(12)
    wanted, found = model(prompts, params), [None] * 12

    def some(first: int) -> None:
        answers = asked(driver, prompts[first : first + 3], params[first : first + 3])
        for _ in driver.run(answers):
            pass
        found[first : first + 3] = [a.output(model.tokenizer) for a in answers]

    threads = [threading.Thread(target=some, args=(first,)) for first in range(0, 12, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted
    settled(driver)


def test_short_questions_of_threads_and_event_loops_are_all_answered(model, driver, prompts_of) -> None:
    """The engine's thread ends and begins between them, and callers hear each other's words."""
    prompts = prompts_of(40, 9, seed=8)
    params = [SamplingParams(temperature=0, max_tokens=1 + i % 3, ignore_eos=True) for i in range(40)]
    wanted, found = model(prompts, params), [[] for _ in range(40)]
    stop = threading.Event()

    def drives() -> None:
        while not stop.is_set():
            for _ in driver.run(asked(driver, prompts[:1], params[:1])):
                pass

    async def one(i: int) -> None:
        async for piece in driver.astream(prompts[i], params[i]):
            found[i] += piece["token_ids"]

    async def all_of_them() -> None:
        for first in range(0, 40, 2):
            await asyncio.wait_for(asyncio.gather(one(first), one(first + 1)), 60)

    thread = threading.Thread(target=drives)
    thread.start()
    try:
        asyncio.run(all_of_them())
    finally:
        stop.set()
        thread.join()
    assert found == [o["token_ids"] for o in wanted]
    settled(driver)


def test_word_that_is_left_when_the_thread_is_about_to_end_is_heard(
    model, driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question comes at any moment of the thread: here behind each of its steps, while nothing else is to do."""
    one = SamplingParams(temperature=0, max_tokens=1)
    step, more = driver._step, []

    def leaves_more() -> None:
        step()
        if not driver.engine.busy and len(more) < 5:
            more.append(asked(driver, [[5, 6]], [one]))
            driver._word.append(lambda: driver.engine.enqueue(more[-1]))

    monkeypatch.setattr(driver, "_step", leaves_more)

    async def ask() -> None:
        async for _ in driver.astream([5], one):
            pass

    asyncio.run(asyncio.wait_for(ask(), 60))
    settled(driver)
    assert len(more) == 5
    assert all(s.finish_reason == "length" for [s] in more)


def test_an_error_ends_who_runs_and_not_the_engine(model, driver, prompts_of, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, params = prompts_of(4, 9, seed=5), [SamplingParams(temperature=0, max_tokens=20)] * 4
    wanted, forward, calls = model(prompts, params), driver.engine.runner.forward, []

    def fails_once(parts):
        calls.append(len(parts))
        if len(calls) == 3:
            raise MemoryError("no more")
        return forward(parts)

    monkeypatch.setattr(driver.engine.runner, "forward", fails_once)
    answers = asked(driver, prompts, params)
    with pytest.raises(GenerationError, match="the model failed: MemoryError: no more"):
        list(driver.run(answers))
    assert {a.finish_reason for a in answers} == {"abort"}
    settled(driver)
    again = asked(driver, prompts, params)
    list(driver.run(again))
    assert [a.output(model.tokenizer) for a in again] == wanted


def test_an_interruption_in_a_step_leaves_no_page_behind(
    model, driver, prompts_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C anywhere: here between taking a page and noting it."""
    prompts, params = prompts_of(4, 30, seed=6), [SamplingParams(temperature=0, max_tokens=20)] * 4
    wanted, take, calls = model(prompts, params), driver.engine.pool.take, []

    def interrupted(after=None):
        page = take(after)
        calls.append(page)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return page

    monkeypatch.setattr(driver.engine.pool, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(driver.run(asked(driver, prompts, params)))
    settled(driver)
    again = asked(driver, prompts, params)
    list(driver.run(again))
    assert [a.output(model.tokenizer) for a in again] == wanted


def test_a_stream_that_the_garbage_collector_ends_within_a_step(
    model, driver, prompts_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not wait for the turn, which its own thread has."""
    prompts = prompts_of(2, 9, seed=7)
    params = [SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)] * 2
    wanted, forward = model(prompts[1:], params[1:]), driver.engine.runner.forward
    left = asked(driver, prompts[:1], params[:1])
    holder: list = [driver.stream(left)]
    next(holder[0])

    def ends_it(parts):
        if holder:
            holder.pop().close()
        return forward(parts)

    monkeypatch.setattr(driver.engine.runner, "forward", ends_it)
    answers = asked(driver, prompts[1:], params[1:])
    list(driver.run(answers))
    assert [a.output(model.tokenizer) for a in answers] == wanted
    assert left[0].finish_reason == "abort"
    settled(driver)


def test_a_prompt_that_cannot_be_answered_is_told_at_once(driver) -> None:
    async def ask() -> None:
        async for _ in driver.astream([5] * 600, SamplingParams()):
            pass

    with pytest.raises(GenerationError, match="401 too many"):
        asyncio.run(ask())
    settled(driver)
