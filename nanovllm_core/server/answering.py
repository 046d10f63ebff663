"""One request from its body to the last byte, ended early by its client, its time, or the server's end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

from attrs import define, field
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from nanovllm_core.errors import GenerationError
from nanovllm_core.llm import LLM
from nanovllm_core.server.admission import Admission
from nanovllm_core.server.asked import Asked, asked
from nanovllm_core.server.body import read_object
from nanovllm_core.server.errors import ApiError, ClientGone, busy
from nanovllm_core.server.log import say
from nanovllm_core.server.logprobs import TokenTexts
from nanovllm_core.server.pieces import pieces
from nanovllm_core.server.settings import Settings
from nanovllm_core.server.shapes import Shaper

LAST_WORD = 1.0  # seconds to send why a stream ends early
EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),  # a proxy is to pass each event on at once
)


def _encode(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@define(eq=False)
class Service:
    """A model and who asks it."""

    llm: LLM
    settings: Settings
    admission: Admission = field(init=False)
    texts: TokenTexts = field(init=False)
    cut: asyncio.Event = field(factory=asyncio.Event)  # set: what still runs ends now

    def __attrs_post_init__(self) -> None:
        self.admission = Admission(self.llm.batch_size + self.settings.queue)
        self.texts = TokenTexts(self.llm.tokenizer)


class Answering:
    """The application behind /v1/completions, or (`chat`) /v1/chat/completions."""

    def __init__(self, service: Service, *, chat: bool) -> None:
        self.service, self.chat = service, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, limits = self.service, self.service.settings
        service.admission.check(1)  # before a body takes memory
        body = await read_object(Request(scope, receive), most=limits.max_body, seconds=limits.body_timeout)
        answer = _Answer(service, scope, send)
        await answer.until_over(receive, answer.give(body, chat=self.chat))


class _Answer:
    def __init__(self, service: Service, scope: Scope, send: Send) -> None:
        self.service, self.scope, self._send = service, scope, send
        self.started = False

    async def give(self, body: dict[str, Any], *, chat: bool) -> None:
        service = self.service
        wanted = await asked(body, service.llm, service.settings.name, chat=chat, most=service.admission.most)
        with service.admission.place(wanted.answers):
            shaper = Shaper(wanted, service.settings.name, service.texts)
            self.scope["nanovllm.usage"] = lambda: shaper.usage  # for the log, whatever becomes of it
            try:
                if wanted.stream:
                    await self._stream(wanted, shaper)
                    return
                async with aclosing(pieces(service.llm, wanted)) as coming:
                    async for index, piece in coming:
                        shaper.take(index, piece)
            except GenerationError as e:  # the prompt was found good before: it is the model
                say(f"error: {e}")
                raise ApiError(500, "the model failed; the server's log says how", code="model_failed") from None
        await JSONResponse(shaper.whole())(self.scope, _nothing, self.send)

    async def _stream(self, wanted: Asked, shaper: Shaper) -> None:
        async with aclosing(pieces(self.service.llm, wanted)) as coming:
            await self.send({"type": "http.response.start", "status": 200, "headers": list(EVENTS)})
            for chunk in shaper.opening():
                await self._event(chunk)
            async for index, piece in coming:
                more = shaper.chunk(index, piece)
                if more is not None:
                    await self._event(more)
        for chunk in shaper.closing():
            await self._event(chunk)
        await self._end()

    async def until_over(self, receive: Receive, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, unless the client leaves, time is up or the server ends. Raises ApiError, ClientGone."""
        service = self.service
        work_done = asyncio.ensure_future(work)
        left, cut = asyncio.ensure_future(_left(receive)), asyncio.ensure_future(service.cut.wait())
        ends = work_done, left, cut
        try:
            await asyncio.wait(ends, timeout=service.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
            if work_done.done():
                work_done.result()
            elif left.done():
                raise ClientGone
            elif cut.done():
                raise busy("the server ended before the answer did", 503, "draining", seconds=5)
            else:
                raise _late(service.settings.timeout)
        except ApiError as e:
            await _ended(ends)
            if not self.started:
                raise
            await self._excuse(e)
        finally:
            await _ended(ends)

    async def send(self, message: Message) -> None:
        self.started = True
        await self._send(message)

    async def _event(self, value: Any) -> None:
        data = f"data: {_encode(value)}\n\n".encode()
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def _end(self) -> None:
        await self.send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _excuse(self, error: ApiError) -> None:
        """Say in a stream that has begun why it ends, and drop the connection of who does not read."""
        self.scope["nanovllm.status"] = error.status  # for the log
        try:
            async with asyncio.timeout(LAST_WORD):
                await self._event(error.body)
                await self.send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            self.scope["state"]["abort"]()
            raise ClientGone from None


def _late(seconds: float) -> ApiError:
    """OpenAI's client asks again after such an error unless it is told not to."""
    told = f"the answer took longer than {seconds:g} seconds (--timeout); ask for fewer tokens, or later"
    return ApiError(504, told, code="timeout", headers={"x-should-retry": "false"})


async def _left(receive: Receive) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(tasks: tuple[asyncio.Future[Any], ...]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)  # not one by one: raising anew would lose where it was raised


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
