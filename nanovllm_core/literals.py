"""Tables of installed packages, read from their source: some modules import seconds of others to be asked for one."""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@lru_cache(maxsize=8)
def literal(package: str, module: str, name: str) -> Any:
    """What `package.module` assigns to `name`: a literal, or a mapping made of one. Imports it where it is neither.

    Nobody may change what is given. Raises ImportError or AttributeError where there is no such module, or name in it.
    """
    spec = find_spec(package)
    places = spec.submodule_search_locations if spec else None
    file = Path(places[0], *module.split(".")).with_suffix(".py") if places else Path()
    try:
        for node in ast.parse(file.read_bytes()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return _value(node.value)  # type: ignore[attr-defined]
    except (OSError, ValueError, SyntaxError, TypeError):
        pass
    return getattr(import_module(f"{package}.{module}"), name)


def _value(node: ast.expr) -> Any:
    """Raises ValueError or TypeError for what is no literal."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("OrderedDict", "dict"):
        (argument,) = node.args
        return dict(ast.literal_eval(argument))
    return ast.literal_eval(node)
