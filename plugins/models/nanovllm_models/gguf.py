"""A `.gguf` file as a model folder: `transformers` reads and dequantises it, whole, into memory.

Quantised values become plain ones once, at opening (150 MB/s of file); a fine-tuned model is exported as an ordinary
folder, not as GGUF. The price is memory: a file of 4-bit weights takes eight times its size while it is open.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm_core.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # GGUF -> torch; other types are quantised
NEEDED = ("gguf", "accelerate")


class GgufModel:
    """The tensors of a GGUF file, with the interface of `nanovllm_core.weights.ModelFolder`."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        import transformers

        plain = getattr(transformers, "GgufConfig", None)  # older versions always dequantise
        more = {} if plain is None else {"quantization_config": plain(dequantize=True)}
        self.path, self.config, self.dtype = path, dict(config), _dtype(path)
        with _opening(path):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=self.dtype, local_files_only=True, **more
            )
        self.config["architectures"] = [type(model).__name__]
        self._tensors: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted; tied ones once."""
        return tuple(sorted(self._tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(self.tensor(name).shape)

    def tensor(self, name: str) -> Tensor:
        """One tensor, dequantised."""
        if name not in self._tensors:
            raise ModelError(f"{self.path}: holds no tensor {name!r}")
        return self._tensors[name]


def read_gguf_config(path: Path) -> dict[str, Any]:
    """The configuration that the file's metadata describes, as `config.json` would hold it. Raises ModelError."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ModelError(f"{path}: opening a GGUF file needs {' and '.join(missing)}: pip install 'nanovllm[gguf]'")
    from transformers import AutoConfig

    with _opening(path):
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True).to_dict()
    return {k: v for k, v in config.items() if v is not None and not k.startswith("_") and k != "quantization_config"}


def _dtype(path: Path) -> str:
    """Of the plain values: that of most tensors, bfloat16 where they are quantised (their scales have no more digits)."""
    from gguf import GGUFReader

    with _opening(path):
        values: Counter[str] = Counter()
        for tensor in GGUFReader(path).tensors:
            values[tensor.tensor_type.name] += int(tensor.n_elements)
    return PLAIN.get(values.most_common(1)[0][0] if values else "F32", "bfloat16")


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """transformers and gguf raise many kinds of error at a file that is cut short, or of an unknown architecture.

    They also draw progress bars of their own, which go nowhere.
    """
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            yield
    except Exception as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise ModelError(f"{path}: transformers cannot open this GGUF file ({lines[0]})") from e
