"""A request's JSON, under limits of bytes and seconds.

What JSON leaves open is refused, since nobody means it: NaN, a name twice, half a surrogate pair.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm_core.server.errors import ApiError, ClientGone

SMALL = 1 << 16  # bytes that are parsed in the event loop; more takes milliseconds, in which it serves nobody
LINGER = 2.0  # seconds to hear the rest of a refused body
HEARD = 64 << 20  # bytes of it


async def read_object(request: Request, *, most: int, seconds: float) -> dict[str, Any]:
    """The body as an object. Raises ApiError, or ClientGone where the client left before its end."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type: got {kind!r:.80}, allowed: application/json")
    try:
        async with asyncio.timeout(seconds):
            data = await _read(request, most)
            return parsed(data) if len(data) <= SMALL else await asyncio.to_thread(parsed, data)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {seconds:g} seconds", code="slow_body") from None
    except ClientDisconnect:
        raise ClientGone from None


async def _read(request: Request, most: int) -> bytes:
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told[:20]) > most:
        raise _too_long(most)
    read = bytearray()
    async for chunk in request.stream():
        read += chunk
        if len(read) > most:
            raise _too_long(most)
    return bytes(read)


def _too_long(most: int) -> ApiError:
    return ApiError(413, f"the body is too long: at most {most:,} bytes (--max-body)", code="body_too_long")


def parsed(data: bytes) -> dict[str, Any]:
    """Bytes of a JSON object."""
    try:
        found = json.loads(data, parse_constant=_no_number, object_pairs_hook=_single)
        if b"\\u" in data:
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(
            400, "the body holds half a surrogate pair (\\ud800 to \\udfff alone), which is no text"
        ) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as e:  # JSONDecodeError, UnicodeDecodeError, an integer of thousands of digits
        raise ApiError(400, f"the body is no JSON: {e}") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body: got a JSON {type(found).__name__}, allowed: an object")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _single(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict[str, Any]()
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} stands there twice")
        found[name] = value
    return found


class HeardOut:
    """Wraps an application that may refuse a request before its body came.

    Closing a connection on a client that still sends makes its system drop the answer, so the rest is heard, and thrown
    away, before a refusal is sent.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        more = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers

        async def heard() -> Message:
            nonlocal more
            message = await receive()
            more = more and bool(message.get("more_body"))
            return message

        async def discard() -> None:
            left = HEARD
            while more and left > 0:
                left -= len((await heard()).get("body", b""))

        async def last(message: Message) -> None:
            if more and message["type"] == "http.response.start" and "expect" not in headers:
                with suppress(TimeoutError):
                    await asyncio.wait_for(discard(), LINGER)
            await send(message)

        await self.app(scope, heard, last)
