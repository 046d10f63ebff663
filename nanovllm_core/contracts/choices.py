"""What a probe answers, and what was decided automatically: always with a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from nanovllm_core.contracts.parallel import Layout


@frozen
class Accept:
    """A probe's yes. The highest priority wins; `why` is shown by `nanovllm explain`."""

    priority: int = 0
    why: str = ""
    layout: Layout | None = None  # parallel strategies say how they would lay the ranks out


@frozen
class Refuse:
    """A probe's no, with its reason."""

    why: str


Verdict = Accept | Refuse


@frozen
class Decision:
    """A value that was chosen automatically, and why."""

    value: int
    why: str
