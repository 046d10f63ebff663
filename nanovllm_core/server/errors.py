"""What goes wrong with a request, in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """An answer that is an error: its HTTP status, and what was given and is allowed."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def refuse(param: str, given: object, allowed: str) -> ApiError:
    """A parameter that cannot be used."""
    shown = repr(given)
    return ApiError(400, f"{param}: got {shown if len(shown) <= 80 else shown[:80] + '...'}, {allowed}", param=param)


def busy(message: str, status: int, code: str, *, seconds: int = 1) -> ApiError:
    """Come again after so many seconds."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(seconds)})
