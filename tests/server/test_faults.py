"""What a client hears when the model or the server itself fails; then the next one is answered."""

import asyncio
import json

import pytest

from nanovllm_core import LLM
from nanovllm_core.server.answering import Service
from nanovllm_core.server.app import application
from nanovllm_core.server.settings import Settings

SECRET = "PLUM-TREE"


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, kv_cache_tokens=8192)


@pytest.fixture
def ask(llm):
    """Asks the application in this process: status, body, and whether the connection was cut."""

    def ask(**body):
        async def call():
            app = application(Service(llm, Settings(name="small")))
            sent, cut, data = [], [], json.dumps({"prompt": SECRET, "max_tokens": 4, **body}).encode()
            scope = {
                "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"",
                "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
                "state": {"abort": lambda: cut.append(True)},
            }  # fmt: skip
            body_first = [{"type": "http.request", "body": data, "more_body": False}]

            async def receive():
                if body_first:
                    return body_first.pop()
                return await asyncio.sleep(60)

            async def send(message):
                sent.append(message)

            await app(scope, receive, send)
            assert not [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]).decode(), bool(cut)

        return asyncio.run(call())

    yield ask
    assert ask()[0] == 200
    assert llm.engine.pool.free == llm.engine.pool.count


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at", [1, 3])
def test_a_model_that_fails(ask, llm, monkeypatch, capsys, stream, at):
    forward, calls = llm.engine.runner.forward, []

    def fails(parts):
        calls.append(1)
        if len(calls) >= at:
            raise RuntimeError("out of memory")
        return forward(parts)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "forward", fails)
        code, body, cut = ask(stream=stream)
    assert code == (200 if stream else 500)
    assert not cut
    assert '"code":"model_failed"' in body
    assert "[DONE]" not in body
    told = capsys.readouterr().err
    assert "error: the model failed: RuntimeError: out of memory" in told
    assert "POST /v1/completions 500" in told
    assert SECRET not in told


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_server(ask, monkeypatch, capsys, stream):
    def broken(*given):
        raise KeyError(f"{SECRET} {given}")

    with monkeypatch.context() as patch:
        patch.setattr("nanovllm_core.server.shapes.Shaper._choice", broken)
        code, body, cut = ask(stream=stream)
    assert (code, cut) == ((200, True) if stream else (500, False))
    assert SECRET not in body
    told = capsys.readouterr().err
    assert "KeyError, a fault of the server" in told
    assert "shapes.py" in told  # where it happened
    assert SECRET not in told
