"""The chat page: one file, sent with a policy that lets it run its own script and speak to this server only."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response


def _text() -> str:
    return (files("nanovllm_core.server") / "page.html").read_text("utf-8")


def policy() -> str:
    """The page's Content-Security-Policy."""

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", _text(), re.DOTALL)
        return " ".join(f"'sha256-{b64encode(sha256(one.encode()).digest()).decode()}'" for one in found)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def page(request: Request) -> Response:
    return HTMLResponse(_text(), headers={"Content-Security-Policy": policy(), "Referrer-Policy": "no-referrer"})
