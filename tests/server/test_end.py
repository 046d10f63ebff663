"""How a server ends: new requests are refused, running answers end within a limit, the second signal ends at once."""

import json
import os
import signal
import threading

import openai
import pytest

ASKED = {"model": "small", "prompt": "a", "stream": True, "extra_body": {"ignore_eos": True}}
ROOM = ("--kv-cache-tokens", "16384")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(start, number):
    server = start(*ROOM)
    server.signal(number)
    assert server.ended(20) == 0
    assert "Traceback" not in server.said


def test_running_answers_end_first(start):
    server = start(*ROOM)
    whole = []

    def ask():
        asked = {**ASKED, "stream": False, "max_tokens": 400}
        whole.append(client.completions.create(**asked))

    with server.client() as client, client.completions.create(**ASKED, max_tokens=400) as stream:
        chunks = iter(stream)
        next(chunks)
        other = threading.Thread(target=ask)
        other.start()
        server.until(lambda h: h["running"] == 2)
        server.signal()
        health = server.until(lambda h: h["status"] == "draining")
        assert health["answers"] == 2
        assert server.get("/health")[0] == 503
        code, headers, found = server.post("/v1/completions", {"prompt": "b"})
        assert (code, headers["Retry-After"], json.loads(found)["error"]["code"]) == (503, "5", "draining")
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        other.join(30)
    assert whole[0].usage.completion_tokens == 400
    assert server.ended(30) == 0
    assert "Traceback" not in server.said


def test_answers_that_take_longer_are_cut(start):
    server = start(*ROOM, "--drain", "0.5")
    with server.client() as client:
        stream = client.completions.create(**ASKED, max_tokens=4000)
        next(iter(stream))
        server.signal()
        with pytest.raises(openai.APIError, match="ended before the answer did"):
            assert all(chunk.choices for chunk in stream)
    assert server.ended(30) == 0
    assert "did not end in time and are cut (--drain): 1" in server.said
    assert "Traceback" not in server.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_at_once(start, number):
    server = start(*ROOM)
    with server.client() as client, client.completions.create(**ASKED, max_tokens=4000) as stream:
        next(iter(stream))
        server.signal(number)
        server.until(lambda h: h["status"] == "draining")
        server.signal(number)
        assert server.ended(10) == 128 + number
    assert "stopped at once" in server.said


def test_a_process_that_dies_is_told(start):
    server = start("--tensor-parallel-size", "2", *ROOM)
    assert server.post("/v1/completions", {"prompt": "b", "max_tokens": 3})[0] == 200
    with open(f"/proc/{server.process.pid}/task/{server.process.pid}/children", encoding="ascii") as file:
        [other] = map(int, file.read().split())
    os.kill(other, signal.SIGKILL)
    server.until(lambda h: h["status"] == "failed")
    assert server.get("/health")[0] == 503
    code, _, found = server.post("/v1/completions", {"prompt": "b"})
    assert code == 500
    assert "error" in json.loads(found)
    server.signal()
    assert server.ended(20) == 0
