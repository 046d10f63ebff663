"""`nanovllm serve`: its flags, and what they may say. Light: the server itself is imported when it starts."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm_core.errors import ServingError
from nanovllm_core.generation.flags import add_batch_size, add_model, llm_of

if TYPE_CHECKING:
    from nanovllm_core.server.settings import Settings

KEY = "NANOVLLM_API_KEY"

ABOUT = f"""\
Serve a model by OpenAI's HTTP API: /v1/completions, /v1/chat/completions, /v1/models, /health, and a page to chat at /.
Needs the extra `serve`: pip install 'nanovllm[serve]'.

It listens on this machine only. Set {KEY} in the environment and clients must send it ("Authorization: Bearer ...");
to listen elsewhere (--host) there must be a key, or --no-key. There is no encryption: put a proxy before it for that.

SIGTERM or Ctrl-C: new requests are refused, running answers may end within --drain seconds; once more ends at once.

example:
  nanovllm serve demo/model --port 8000
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{{"prompt": "The", "max_tokens": 20}}'
"""


def add_parser(commands: Any) -> None:
    """The command, for `cli`."""
    raw = argparse.RawDescriptionHelpFormatter
    serve = commands.add_parser(
        "serve", help="answer by OpenAI's HTTP API, with a page to chat", formatter_class=raw, description=ABOUT
    )
    add_model(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=_port, default=8000, help="0: any free one, which is printed (default: 8000)")
    serve.add_argument("--name", help="the model's name in requests (default: the folder's)")
    serve.add_argument(
        "--no-key", action="store_true", help="let everybody ask who reaches an address that is not this machine's own"
    )
    serve.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name by which clients may call this server"
    )
    serve.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a page elsewhere that may ask, e.g. https://example.com",
    )
    serve.add_argument(
        "--max-body", type=_above_zero, default=1 << 20, metavar="BYTES", help="longest request (default: 1048576)"
    )
    serve.add_argument(
        "--queue", type=_from_zero, default=256, metavar="ANSWERS", help="that may wait for their turn (default: 256)"
    )
    serve.add_argument(
        "--timeout", type=_seconds, default=600.0, metavar="SECONDS", help="a request may take (default: 600)"
    )
    serve.add_argument(
        "--drain", type=_wait, default=30.0, metavar="SECONDS", help="running answers get at the end (default: 30)"
    )
    serve.add_argument("--quiet", action="store_true", help="no line a request on standard error")
    add_batch_size(serve)
    serve.set_defaults(command=serve_command)


def serve_command(args: argparse.Namespace) -> int:
    """Serve until a signal ends it; the exit code."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ServingError(f"serve: {' and '.join(missing)} not installed: pip install 'nanovllm[serve]'")
    from nanovllm_core.server.serving import listen, serve

    key = key_of(os.environ.get(KEY, ""), no_key=args.no_key)
    with listen(args.host, args.port) as listener:
        settings = settings_of(args, key, listener.getsockname()[0])
        llm = llm_of(args, args.max_model_len, args.batch_size)
        return serve(llm, settings, listener)


def settings_of(args: argparse.Namespace, key: str | None, address: str) -> Settings:
    """address: where it listens. Raises ServingError for an open door that was not asked for."""
    from nanovllm_core.server.settings import Settings

    local = ip_address(address.partition("%")[0]).is_loopback
    if not local and key is None and not args.no_key:
        raise ServingError(
            f"serve: --host {args.host}: others can reach this address and there is no API key: set {KEY} in the "
            "environment, or say --no-key"
        )
    for origin in args.allow_origin:
        if not origin.startswith(("http://", "https://")) or "*" in origin or origin.count("/") != 2:
            raise ServingError(f"serve: --allow-origin: got {origin!r}, allowed: http:// or https:// and a host")
    hosts = frozenset(name.lower().rstrip(".") for name in args.allow_host)
    return Settings(
        name=args.name or _name_of(args.folder),
        key=key,
        hosts=hosts if local or key is None or hosts else None,  # elsewhere a key keeps out whom a name leads here
        origins=tuple(args.allow_origin),
        max_body=args.max_body,
        queue=args.queue,
        timeout=args.timeout,
        drain=args.drain,
        quiet=args.quiet,
    )


def key_of(text: str, *, no_key: bool) -> str | None:
    """The API key that the environment gives. Raises ServingError, which never shows it."""
    if not text:
        return None
    if no_key:
        raise ServingError(f"serve: --no-key: {KEY} is set: leave out one of them")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ServingError(f"serve: {KEY}: allowed: printable ASCII characters without spaces")
    return text


def _name_of(folder: str) -> str:
    """A folder's own name; a hub name as it is."""
    path = Path(folder)
    return path.resolve().name if path.is_dir() else folder


def _whole(text: str, least: int, most: int) -> int:
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else -1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from {least} to {most}")
    return value


def _port(text: str) -> int:
    return _whole(text, 0, 65535)


def _above_zero(text: str) -> int:
    return _whole(text, 1, sys.maxsize >> 16)


def _from_zero(text: str) -> int:
    return _whole(text, 0, sys.maxsize >> 16)


def _seconds(text: str, least: float = 0.001) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value < 1e6:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds, {'above' if least else 'from'} 0")
    return value


def _wait(text: str) -> float:
    return _seconds(text, 0.0)
