"""Which path is answered by what."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from nanovllm_core.server.answering import Answering, Service
from nanovllm_core.server.asked import unknown_model
from nanovllm_core.server.body import HeardOut
from nanovllm_core.server.errors import ApiError
from nanovllm_core.server.guard import Guard, check_key
from nanovllm_core.server.log import Logged, fault
from nanovllm_core.server.page import page

PATHS = "/v1/completions, /v1/chat/completions, /v1/models, /health and /"


def application(service: Service) -> ASGIApp:
    """All of it: log, cross-origin headers where asked for, guard, routes."""
    settings = service.settings
    routes = [
        Route("/", page, methods=["GET"]),
        Route("/health", _Health(service), methods=["GET", "HEAD"]),
        Route("/v1/models", _Models(service), methods=["GET", "HEAD"]),
        Route("/v1/models/{model:path}", _Models(service), methods=["GET", "HEAD"]),
        Route("/v1/completions", Answering(service, chat=False), methods=["POST"]),
        Route("/v1/chat/completions", Answering(service, chat=True), methods=["POST"]),
    ]
    inner = Starlette(routes=routes, exception_handlers={ApiError: _told, HTTPException: _http, Exception: _fault})
    inner.router.redirect_slashes = False
    app: ASGIApp = HeardOut(Guard(inner, settings))
    if settings.origins:
        app = CORSMiddleware(
            app, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=["Authorization", "Content-Type"]
        )  # fmt: skip
    return Logged(app, quiet=settings.quiet)


class _Health:
    """Status for everybody; figures for who has the key."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        service = self.service
        status = "draining" if service.admission.draining else "failed" if service.llm.lost else "ok"
        told: dict[str, Any] = {"status": status}
        try:
            check_key(Headers(scope=scope), service.settings.key)
        except ApiError:
            pass
        else:
            told |= figures(service)
        await JSONResponse(told, 200 if status == "ok" else 503)(scope, receive, send)


def figures(service: Service) -> dict[str, Any]:
    """Of the engine, read while it runs. `answers`: that clients wait for; pages: of the cache, None where it has none."""
    scheduler, pool = service.llm.engine.scheduler, service.llm.engine.pool
    return {
        "model": service.settings.name,
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "answers": service.admission.under_way,
        "free_pages": None if pool is None else pool.free,
        "pages": None if pool is None else pool.count,
    }


class _Models:
    """The one model, in a list or by its name."""

    def __init__(self, service: Service) -> None:
        import time

        llm = service.llm
        self.name = service.settings.name
        self.model = {
            "id": self.name, "object": "model", "created": int(time.time()), "owned_by": "nanovllm",
            "max_model_len": llm.max_model_len, "chat": bool(llm.tokenizer.has_chat_template),
        }  # fmt: skip

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        wanted = scope["path_params"].get("model")
        if wanted is not None and wanted != self.name:
            raise unknown_model(wanted, self.name)
        told = self.model if wanted is not None else {"object": "list", "data": [self.model]}
        await JSONResponse(told)(scope, receive, send)


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _fault(request: Request, error: Exception) -> Response:
    return fault().response()


async def _http(request: Request, error: Exception) -> Response:
    """No such path, or not by this method."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        told = ApiError(405, f"{method:.20} {path:.80}: allowed: {allowed}", headers=error.headers)
    else:
        told = ApiError(error.status_code, f"{path:.80}: there is {PATHS}", code="not_found")
    return told.response()
