"""`TrainingConfig`: the guide's configuration as an object."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm_core.errors import RecipeError
from nanovllm_core.guide.keys import TABLE, config_text, recipe_of
from nanovllm_core.recipe import Recipe
from nanovllm_core.yamltext import Text


class TrainingConfig:
    """The configuration of a training run, by the guide's keys; `TrainingConfig.keys()` names all of them.

    Each key is an attribute. It always constructs where the values are possible; what a run needs and has not been given
    is named when it is used. Raises RecipeError for an unknown key (with the nearest) or a value that cannot be.
    """

    def __init__(self, **given: Any) -> None:
        self.__dict__["_given"] = {key: _plain(v) for key, v in given.items()}
        self.recipe()

    @classmethod
    def from_json(cls, path: Path | str) -> TrainingConfig:
        """The configuration of a JSON file. Raises RecipeError with the place of what is wrong."""
        text = config_text(path)
        recipe_of(text, Path.cwd())
        return cls(**{key: value for key, value in text.data.items() if not key.startswith("_")})

    @staticmethod
    def keys() -> dict[str, str]:
        """Every key -> the recipe's key that it means."""
        return {key: meaning.recipe for key, meaning in TABLE.items()}

    def recipe(self) -> Recipe:
        """The recipe that this means; relative paths count from the working folder."""
        return recipe_of(self.text(), Path.cwd())

    def text(self) -> Text:
        """What was given, as a configuration file would hold it."""
        return Text(dict(self._given), "TrainingConfig")

    def to_dict(self) -> dict[str, Any]:
        """All keys with their values."""
        return {key: self._given.get(key, meaning.default) for key, meaning in TABLE.items()}

    def to_json(self, path: Path | str) -> None:
        """Write what was given as JSON."""
        Path(path).write_text(json.dumps(self._given, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @property
    def given(self) -> Mapping[str, Any]:
        """What was set, without defaults."""
        return dict(self._given)

    def changed(self, **keys: Any) -> TrainingConfig:
        """The same with other values."""
        return TrainingConfig(**{**self._given, **keys})

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_") or key not in TABLE:
            raise AttributeError(f"TrainingConfig has no {key!r}")
        return self._given.get(key, TABLE[key].default)

    def __setattr__(self, key: str, value: Any) -> None:
        before = self._given
        self.__dict__["_given"] = {**before, key: _plain(value)}
        try:
            self.recipe()
        except RecipeError:
            self.__dict__["_given"] = before
            raise

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *TABLE})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainingConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # its values change

    def __repr__(self) -> str:
        return f"TrainingConfig({', '.join(f'{k}={v!r}' for k, v in self._given.items())})"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else os.fspath(value) if isinstance(value, os.PathLike) else value
