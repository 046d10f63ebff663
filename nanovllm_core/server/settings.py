"""What a server was told: where it listens, who may ask, how much."""

from __future__ import annotations

from attrs import field, frozen


@frozen(kw_only=True)
class Settings:
    """Limits in bytes, answers and seconds."""

    name: str  # of the model, in requests and answers
    key: str | None = field(default=None, repr=False)  # None: nobody is asked for one
    hosts: frozenset[str] | None = frozenset()  # names in a Host header beside addresses and localhost; None: any
    origins: tuple[str, ...] = ()  # of pages elsewhere that may ask
    max_body: int = 1 << 20
    queue: int = 256  # answers that wait beside those that are made
    timeout: float = 600.0  # of a request, its wait included
    body_timeout: float = 30.0  # to send a body
    drain: float = 30.0  # for running answers after SIGTERM
    quiet: bool = False  # no line a request
