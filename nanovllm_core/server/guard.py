"""Who may ask: the Host a request names, the page it comes from, the key it carries.

A server on loopback is reachable by every page in the user's browser. A page elsewhere sends its own Origin; a name
that was made to point here (DNS rebinding) stands in Host. Neither is let in, whether or not there is a key.
"""

from __future__ import annotations

import hmac
from ipaddress import ip_address
from urllib import parse

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm_core.server.errors import ApiError
from nanovllm_core.server.settings import Settings

OPEN = ("/", "/health")  # for everybody
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))


class Guard:
    """Lets requests through, or answers them with an error."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check_host(headers.getlist("host"))
            self._check_origin(headers.getlist("origin"), headers.get("host", ""))
            if scope["path"] not in OPEN:
                check_key(headers, self.settings.key)
        except ApiError as e:
            await e.response()(scope, receive, safe)
            return
        await self.app(scope, receive, safe)

    def _check_host(self, given: list[str]) -> None:
        if self.settings.hosts is None:
            return
        name = _name(given[0]) if len(given) == 1 else None
        if name is None or not (name == "localhost" or _is_address(name) or name in self.settings.hosts):
            shown = given[0] if given else ""
            raise ApiError(
                403, f"Host: got {shown!r:.80}, allowed: an address, localhost, or a name given by --allow-host"
            )

    def _check_origin(self, given: list[str], host: str) -> None:
        """Browsers send it with every request that could do something."""
        for origin in given:
            same = (
                parse.urlsplit(origin).netloc.lower() == host.lower()
                if origin.startswith(("http://", "https://"))
                else False
            )
            if not same and origin not in self.settings.origins:
                raise ApiError(
                    403, f"Origin: got {origin!r:.80}, allowed: the server's own page, or what --allow-origin names"
                )


def check_key(headers: Headers, key: str | None) -> None:
    """Raises ApiError where a key is wanted and another, or none, is given."""
    if key is None:
        return
    scheme, _, given = headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), key.encode())
    if scheme.lower() != "bearer" or not right:
        raise ApiError(
            401,
            "Authorization: allowed: 'Bearer KEY' with the server's API key",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _name(host: str) -> str | None:
    """The name or address in a Host header, in lower case and without the dot that may end it."""
    try:
        return (parse.urlsplit(f"//{host}").hostname or "").removesuffix(".") or None
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
