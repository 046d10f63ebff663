"""The process of a server: its socket, its signals, its end.

The first SIGTERM or SIGINT closes the door, not the house: requests get 503 (/health says `draining`), answers that
run may end; then the process ends with 0. The second ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType

import uvicorn

from nanovllm_core.errors import ServingError
from nanovllm_core.llm import LLM
from nanovllm_core.server.answering import Service
from nanovllm_core.server.app import application
from nanovllm_core.server.connection import Connection
from nanovllm_core.server.log import say
from nanovllm_core.server.settings import Settings

SIGNALS = (signal.SIGTERM, signal.SIGINT)
HEAD = 32 << 10  # bytes of a request's head
SPARE = 256  # connections beside those of the answers: health, models, refusals
SWITCH = 1e-4  # seconds: see `serve`
CLOSING = 3  # seconds for connections to close when all is said


def listen(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: clients are refused until the model is loaded. Raises ServingError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as e:
        raise ServingError(f"serve: --host {host}: is no address to listen on ({e})") from None
    try:
        if os.name == "posix":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as e:
        found.close()
        raise ServingError(
            f"serve: cannot listen on {host} port {port} ({e.strerror or e}); --port 0 takes a free one"
        ) from None
    return found


def serve(llm: LLM, settings: Settings, listener: socket.socket) -> int:
    """Answer until a signal comes; the exit code.

    The engine's thread gives way at each of its hundred operations a forward, and would get its turn back only after 5 ms
    of a busy event loop: a shorter interval makes a quarter more tokens with 200 clients on two cores.
    """
    sys.setswitchinterval(SWITCH)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # what it would tell of a client is the client's matter
    code: int = asyncio.run(_serve(llm, settings, listener))
    return code


async def _serve(llm: LLM, settings: Settings, listener: socket.socket) -> int:
    service = Service(llm, settings)
    server = _Server(service)
    address, port = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    about = "with an API key" if settings.key else "without an API key"
    server.greeting = f"{settings.name} is served at http://{shown}:{port} ({about}; Ctrl-C ends)"
    await server.serve(sockets=[listener])
    for _ in range(100):  # what was aborted is let go before the interpreter goes
        if not llm.engine.busy:
            break
        await asyncio.sleep(0.02)
    return 0


class _Server(uvicorn.Server):
    def __init__(self, service: Service) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                application(service),
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                workers=1,
                limit_concurrency=service.admission.most + SPARE,
                timeout_graceful_shutdown=CLOSING,
                h11_max_incomplete_event_size=HEAD,
            )
        )
        self.service, self.settings = service, settings
        self.greeting = ""
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.greeting, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def heard(number: int, frame: FrameType | None) -> None:
            if self.service.admission.draining:
                os.write(2, b"nanovllm: stopped at once\n")
                os._exit(128 + number)
            self.service.admission.draining = True
            loop.call_soon_threadsafe(self._drain)

        for number in SIGNALS:
            signal.signal(number, heard)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _drain(self) -> None:
        self._draining = asyncio.create_task(self._drained())

    async def _drained(self) -> None:
        """Let answers end, then everything."""
        admission, loop = self.service.admission, asyncio.get_running_loop()
        say(
            f"ending within {self.settings.drain:g} s (answers under way: {admission.under_way}); once more (Ctrl-C) ends at once"
        )
        deadline = loop.time() + self.settings.drain
        while admission.under_way and loop.time() < deadline:
            await asyncio.sleep(0.05)
        if admission.under_way:
            say(f"answers that did not end in time and are cut (--drain): {admission.under_way}")
            self.service.cut.set()
        self.should_exit = True
