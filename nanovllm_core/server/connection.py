"""HTTP over one connection, as uvicorn does it with h11, with an end for clients that are slow or do not read.

uvicorn closes idle connections between two requests. Here a request's head must come in time too, and so must what is
left of a body that was refused; a connection that is closed while its client does not read is dropped.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanovllm_core.server.errors import ApiError

HEAD = 10.0  # seconds for a request's head to come
LOOK = 2.0  # seconds between two looks; a closed connection may take one or two to flush


class Connection(H11Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._waits: float | None = self.loop.time()  # since when, for the rest of a head
        self._closing = False
        self._look = self.loop.call_later(LOOK, self._looks)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._under_way:
            self._waits = None
        elif self._waits is None:
            self._waits = self.loop.time()

    @property
    def _under_way(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _looks(self) -> None:
        if self.transport.is_closing():
            if self._closing:
                self.transport.abort()
                return
            self._closing = True
        elif self._waits is not None and not self._under_way and self.loop.time() - self._waits > HEAD:
            if self.conn.our_state is h11.IDLE:
                self._refuse(ApiError(408, f"the request's head did not come within {HEAD:g} seconds"))
            else:
                self.transport.close()
        self._look = self.loop.call_later(LOOK, self._looks)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._refuse(ApiError(400, "the request is no HTTP/1.1 that this server reads, or its head is too long"))

    def _refuse(self, error: ApiError) -> None:
        if self.conn.our_state is not h11.IDLE:  # in the middle of another answer
            self.transport.close()
            return
        data = json.dumps(error.body).encode()
        headers: list[tuple[str, Any]] = [
            ("content-type", "application/json"),
            ("content-length", str(len(data))),
            ("connection", "close"),
        ]
        for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=data), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
