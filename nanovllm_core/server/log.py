"""One line a request, on standard error: what was asked for and how it went, never what was said.

No prompt, no answer, no header and no query comes in; of an unforeseen error its kind and places, without its message.
"""

from __future__ import annotations

import sys
import time
import traceback
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm_core.server.errors import ApiError, ClientGone

LONGEST = 100  # characters of a path
GONE = 499  # as nginx logs it: the client left before the answer


def say(text: str) -> None:
    """One line with the time."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with suppress(OSError):  # nobody reads the log any more
        sys.stderr.write(f"{stamp} {text.encode('ascii', 'backslashreplace').decode()}\n")
        sys.stderr.flush()


def fault() -> ApiError:
    """What a client hears of an unforeseen error."""
    return ApiError(500, "a fault of the server; its log says where", code="internal_error")


class Logged:
    """Wraps the whole application: nothing escapes it."""

    def __init__(self, app: ASGIApp, *, quiet: bool) -> None:
        self.app, self.quiet = app, quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status, whole = time.monotonic(), 0, False

        async def told(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                whole = not message.get("more_body")
            await send(message)

        try:
            await self.app(scope, receive, told)
        except ClientGone:
            status = GONE
        except Exception as e:
            say(f"error: {type(e).__name__}, a fault of the server:\n{''.join(traceback.format_tb(e.__traceback__))}")
            if not status:
                await fault().response()(scope, receive, told)
            elif not whole:  # a client must not take it for all
                scope["state"]["abort"]()
            status = 500
        if not self.quiet:
            usage = scope["nanovllm.usage"]() if "nanovllm.usage" in scope else None
            tokens = f" {usage['prompt_tokens']}+{usage['completion_tokens']} tokens" if usage else ""
            path = scope.get("raw_path", b"").decode("latin-1")[:LONGEST]
            seconds = time.monotonic() - began
            say(f"{scope['method'][:LONGEST]} {path} {scope.get('nanovllm.status', status)}{tokens} {seconds:.3f} s")
