"""Every error a user can meet, as one tree.

    NanoError                     who, what was given, what is allowed, how to mend; the command line exits with 2
    ├── RecipeError               the recipe's text or values (file:line:column)
    │   └── OptionError           an option of a component
    ├── ComponentError            finding and loading plugins
    │   ├── UnknownComponent      no such name
    │   ├── AmbiguousComponent    several distributions offer the name, or two priorities tie
    │   ├── BrokenComponent       it does not import, or does not follow its hook spec
    │   └── RefusedError          it was named and says no, with its reason
    ├── DataError                 a document cannot be read (file:line:byte)
    ├── ModelError                a model or tokenizer folder is missing, incomplete or unsupported
    ├── TrainingError             the run cannot go on (a loss that is not finite)
    ├── CheckpointError           no sound checkpoint where one is needed
    ├── Elsewhere                 another rank of the run failed, and says why
    ├── Interrupted              the run was asked to stop; its message says how to go on (exit code 128 + signal)
    ├── OutputError               the output folder cannot be used
    ├── LockError                 what would run is not what a lock says, or the lock cannot be read
    ├── GenerationError           a prompt or sampling parameter is unusable
    └── ServingError              a server cannot start as it was told to

Anything else that escapes is a bug of ours or of a plugin, and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NanoError(Exception):
    """Base of all errors that the user can mend."""


class RecipeError(NanoError):
    """The recipe's text or values are wrong."""


class OptionError(RecipeError):
    """An option of a component is wrong; never confused with a refusal."""


class ComponentError(NanoError):
    """A component cannot be used."""


class UnknownComponent(ComponentError):
    """No installed component has this name."""


class AmbiguousComponent(ComponentError):
    """More than one component fits and nothing decides between them."""


class BrokenComponent(ComponentError):
    """A component does not import or does not follow its hook spec."""


class RefusedError(ComponentError):
    """A named component refuses, with its reason."""


class DataError(NanoError):
    """A document cannot be read."""


class ModelError(NanoError):
    """A model or tokenizer folder cannot be used."""


class TrainingError(NanoError):
    """The run cannot go on."""


class CheckpointError(NanoError):
    """No sound checkpoint where one is needed."""


class Interrupted(NanoError):
    """The run was asked to stop, and did."""


class Elsewhere(NanoError):
    """Another rank of the run failed. `lost`: it died or hangs, so that the same command may well go on."""

    def __init__(self, text: str, *, lost: bool = False) -> None:
        super().__init__(text)
        self.lost = lost


class OutputError(NanoError):
    """The output folder cannot be used."""


class LockError(NanoError):
    """What would run is not what a lock says."""


class GenerationError(NanoError):
    """A prompt or a sampling parameter is unusable."""


class ServingError(NanoError):
    """A server cannot start as it was told to."""


def nearest(given: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a known name is close to `given`, else the empty string."""
    match = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def listed(names: Iterable[str]) -> str:
    """Names for an error message: sorted, comma-separated, or `none`."""
    return ", ".join(sorted(names)) or "none"


def reason(error: BaseException) -> str:
    """A stranger's exception in one line of bounded length: `ValueError: no licence file`."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # its __str__ fails too
        text = ""
    text = text if len(text) <= 500 else f"{text[:500]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
