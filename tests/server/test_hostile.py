"""Malformed, oversized, slow and abandoned requests: each gets a clean answer or a clean end, and leaves nothing behind."""

import asyncio
import http.client
import json
import re
import socket
import struct

import openai
import pytest
from starlette.requests import Request

from nanovllm_core.server.answering import _Answer
from nanovllm_core.server.body import parsed, read_object
from nanovllm_core.server.errors import ApiError, ClientGone

ENDLESS = {"prompt": "The river", "max_tokens": 4000, "ignore_eos": True}
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(autouse=True)
def nothing_is_left(server):
    before = server.idle()
    yield
    after = server.idle()
    assert after["free_pages"] == before["free_pages"] == after["pages"]
    assert "fault of the server" not in server.said
    assert "Traceback" not in server.said


def answered(data):
    """Status and body of one response."""
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def response(connection):
    """Status and body of the response that comes."""
    found = http.client.HTTPResponse(connection, method="POST")
    found.begin()
    return found.status, json.loads(found.read())["error"]["message"]


def request(body, *more):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return "".join([HEAD, f"Content-Length: {len(data)}\r\n", *more, "\r\n"]).encode() + data


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1 and more\r\nHost: localhost\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    ],
)
def test_what_is_no_http(server, data):
    code, told = answered(server.send(data))
    assert code in (400, 501)
    assert "no HTTP/1.1" in told


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b'{"prompt": "a"} x', "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b'"text"', "got a JSON str"),
        (b"[]", "got a JSON list"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no JSON number"),
        (b'{"prompt": "a", "temperature": 1e999}', "a number from 0 on"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "no JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' stands there twice"),
        (b'{"prompt": "\\ud800"}', "half a surrogate pair"),
        (b'{"prompt": "a", "\\udfff": 1}', "half a surrogate pair"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"prompt": "a", "user": {"' + b"a" * 1000 + b'": 1}, "model": {}}', "allowed: 'small'"),
        (b'{"prompt": [true, false]}', "got token id True"),
        (b'{"prompt": [-1]}', "allowed: 0 to 399"),
        (b'{"prompt": [1' + b"0" * 400 + b"]}", "allowed: 0 to 399"),
        (b'{"prompt": ""}', None),  # the begin token alone
        (b'{"prompt": "\\u0000"}', None),
    ],
)
def test_bodies(server, body, told):
    code, _, found = server.post("/v1/completions", body)
    assert code == (200 if told is None else 400), found
    if told:
        assert told in json.loads(found)["error"]["message"]


def test_json_of_any_shape_is_read_or_refused(server):
    """Whatever stands where, the server has no fault of its own."""
    values = [None, True, 0, -1, 1.5, 1e300, 10**30, "", "x", [], [[]], [0], ["a"], {}, {"a": {}}]
    names = [
        "model", "prompt", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "logprobs", "stream", "stream_options",
        "echo", "user", "top_k", "min_p", "repetition_penalty", "ignore_eos", "stop_token_ids", "best_of", "logit_bias",
    ]  # fmt: skip
    for chat in (False, True):
        path = "/v1/chat/completions" if chat else "/v1/completions"
        asked = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
        for name in [*names, *(["messages", "top_logprobs", "max_completion_tokens", "tools"] if chat else [])]:
            for value in values:
                code, _, found = server.post(path, {**asked, "max_tokens": 1, name: value})
                assert code in (200, 400, 404), (name, value, found)
    for value in values:
        for message in (value, {"role": value, "content": "x"}, {"role": "user", "content": value}):
            asked = {"messages": [message], "max_tokens": 1}
            assert server.post("/v1/chat/completions", asked)[0] in (200, 400), message


@pytest.mark.parametrize("size", [(1 << 20) + 1, 50 << 20])
def test_too_long_a_body_is_refused_before_it_is_read(server, size):
    with server.connect() as made:
        made.sendall(f"{HEAD}Content-Length: {size}\r\nExpect: 100-continue\r\n\r\n".encode())
        code, told = response(made)
    assert (code, "at most 1,048,576 bytes" in told) == (413, True)
    code, _, found = server.post("/v1/completions", b"x" * ((1 << 20) + 1))  # that is sent nevertheless
    assert code == 413, found


def test_a_body_without_a_told_length_is_measured(server):
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    with server.connect() as made:
        made.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            for _ in range(80):
                made.sendall(piece)
        except OSError:
            pass
        made.settimeout(10)
        assert response(made)[0] == 413


def test_a_body_in_single_bytes(server):
    with server.connect() as made:
        for byte in request({"prompt": "a", "max_tokens": 2}):
            made.sendall(bytes([byte]))
        assert made.recv(65536).startswith(b"HTTP/1.1 200")


def test_pipelined_requests_are_answered_in_turn(server):
    data = request({"prompt": "a", "max_tokens": 2}) + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    found = server.send(data * 2, close=False)
    assert found.count(b"HTTP/1.1 200") == 4


def test_the_old_http_ends_with_the_connection(server):
    found = server.send(b"GET /health HTTP/1.0\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 403")  # no Host
    assert server.send(b"GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("how", ["closed", "reset"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("read", [0, 1])
def test_abandoned(server, how, stream, read):
    with server.connect() as made:
        made.sendall(request({**ENDLESS, "stream": stream, "n": 2}))
        server.until(lambda h: h["running"] == 2)
        if read and stream:
            made.recv(1000)
        if how == "reset":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.idle(5)


def test_abandoned_in_the_middle(server):
    for data in (b"POST /v1/comp", HEAD.encode(), request(ENDLESS)[:-5], b""):
        for _ in range(20):
            with server.connect() as made:
                made.sendall(data)
    assert server.health()["answers"] == 0


def test_a_head_that_does_not_come_is_not_waited_for(server):
    stalled = [server.connect() for _ in range(3)]
    stalled[1].sendall(b"GET / HT")
    stalled[2].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET")
    found = [b"".join(iter(lambda made=made: made.recv(65536), b"")) for made in stalled]
    for made in stalled:
        made.close()
    assert [data.count(b"HTTP/1.1 408") for data in found] == [1, 1, 0]
    assert found[2].startswith(b"HTTP/1.1 200")


def test_a_body_that_does_not_come_is_not_waited_for():
    async def silent():
        await asyncio.sleep(60)

    asked = Request({"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}, silent)
    with pytest.raises(ApiError, match=r"did not come within 0\.05 seconds") as error:
        asyncio.run(read_object(asked, most=100, seconds=0.05))
    assert error.value.status == 408


def test_half_surrogates_are_told_from_whole_ones():
    assert parsed(b'{"a": "\\ud83d\\ude00", "b": "\\\\ud800"}') == {"a": "😀", "b": "\\ud800"}


def test_the_log_says_nothing_of_what_was_said(server):
    before = len(server.lines)
    secret = "PLUM-TREE"
    for body in ({"prompt": secret, "max_tokens": 2}, {"prompt": "a", secret: 1}, {"prompt": "a", "model": secret}):
        server.post(f"/v1/completions?api_key={secret}", body, {"Authorization": f"Bearer {secret}"})
    server.send(f"GET /%0a%1b[31m\u00e9 HTTP/1.1\r\nHost: {secret}\r\n\r\n".encode("latin-1"), close=False)
    server.get("/%0aPOST%20/forged")
    server.until(lambda h: len(server.lines) > before + 4)
    said = "".join(server.lines[before:])
    assert secret not in said
    for line in said.splitlines():
        assert re.fullmatch(r"\S+Z (GET|POST) \S+ \d{3}( \d+\+\d+ tokens)? [\d.]+ s", line), line


# ------------------------------------------------------------ limits


@pytest.fixture(scope="module")
def narrow(start):
    return start("--batch-size", "1", "--queue", "1", "--max-body", "2000", "--kv-cache-tokens", "8192")


def test_a_full_queue_refuses(narrow):
    with narrow.client() as client:
        extra = {"ignore_eos": True}
        asked = {"model": "small", "prompt": "a", "max_tokens": 4000, "stream": True, "extra_body": extra}
        with client.completions.create(**asked) as one:
            next(iter(one))
            with narrow.connect() as waiting:
                waiting.sendall(request({**ENDLESS, "stream": True}))
                narrow.until(lambda h: h["waiting"] == 1)
                code, headers, found = narrow.post("/v1/completions", {"prompt": "a"})
                assert (code, headers["Retry-After"]) == (429, "1")
                told = json.loads(found)["error"]
                assert (told["code"], told["type"]) == ("queue_full", "rate_limit_error")
                with pytest.raises(openai.RateLimitError):
                    client.completions.create(model="small", prompt="a")
        narrow.idle(5)
        assert client.completions.create(model="small", prompt="a", max_tokens=2).choices
        assert narrow.post("/v1/completions", {"prompt": "a", "n": 3})[0] == 400
        assert narrow.post("/v1/completions", {"prompt": "a" * 2000})[0] == 413


@pytest.fixture(scope="module")
def hasty(start):
    return start("--timeout", "2", "--kv-cache-tokens", "131072")


def test_an_answer_that_takes_too_long_ends(hasty):
    code, headers, found = hasty.post("/v1/completions", ENDLESS)
    assert (code, headers["x-should-retry"]) == (504, "false")
    assert "longer than 2 seconds" in json.loads(found)["error"]["message"]
    with hasty.client() as client:
        asked = {"model": "small", "prompt": "a", "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**asked, stream=True)
        with pytest.raises(openai.APIError, match="longer than 2 seconds"):
            assert all(chunk.choices for chunk in stream)
    health = hasty.idle(5)
    assert health["free_pages"] == health["pages"]


def test_a_client_that_does_not_read_is_dropped(hasty):
    """What it does not take fills the system's buffers, and then the server waits, until its time is up."""
    message = {"role": "user", "content": "a"}
    asked = {"messages": [message], "max_tokens": 4000, "stream": True, "n": 32, "logprobs": True, "top_logprobs": 100}
    asked["ignore_eos"] = True
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.connect(("127.0.0.1", hasty.port))
        made.sendall(request(asked).replace(b"/v1/", b"/v1/chat/"))
        hasty.until(lambda h: h["running"] == 32)
        health = hasty.idle(20)
        assert health["free_pages"] == health["pages"]


def test_who_does_not_read_the_last_word_is_cut_off():
    async def never(message):
        await asyncio.sleep(60)

    cut = []
    answer = _Answer(None, {"state": {"abort": lambda: cut.append(1)}}, never)
    with pytest.raises(ClientGone):
        asyncio.run(answer._excuse(ApiError(504, "late")))
    assert cut == [1]
