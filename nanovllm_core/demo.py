"""`nanovllm init`: a folder of real documents and a recipe to start from.

The documents are the reference topics of Python's own documentation, which every Python carries in
`pydoc_data.topics` (about 465,000 characters of English, PSF licence), laid out in every format that the bundled
readers take.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from nanovllm_core.errors import OutputError

RECIPE = """\
# A nano-vllm recipe: everything that one run does. Relative paths count from this file's folder.
#   nanovllm run recipe.yaml                       train, evaluate, export, generate
#   nanovllm explain recipe.yaml                   what would be done, and why
#   nanovllm run recipe.yaml --set train.seed=1    change any key for one run
# A part is `{use: NAME, ...its options}` or just its name; `nanovllm plugins` lists the names.

data:
  path: documents            # a file or a folder, nested and mixed: .txt, .json, .jsonl
  max_seq_length: 256        # tokens that the model sees at once
  chunk_overlap: 0           # tokens that a long document's windows share
  min_chunk_size: 32         # a shorter tail joins the window before it
  eval_fraction: 0.05        # of the documents, held out to measure what was learned

tokenizer:
  use: bpe                   # a vocabulary built from your documents; `hf` takes an existing one
  size: null                 # null: chosen from the amount of text

model:
  use: preset                # random weights; to fine-tune: {use: pretrained, path: FOLDER_OR_HUB_NAME}
  size: tiny                 # tiny, small, medium or large

train:
  num_train_epochs: 3        # how often every document is seen
  learning_rate: 1.0e-3      # from scratch about 1e-3, fine-tuning about 5e-5
  warmup_steps: 20
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 1
  logging_steps: 20
  eval_steps: 200
  save_steps: 200

generate:                    # what the finished model is asked to continue
  prompts:
    - "The \\"return\\" statement"
    - "Changed in version 3."
  max_tokens: 80
  temperature: 0.6
  top_p: 0.9

output_dir: model            # the model, its checkpoints and metrics.jsonl
"""

FORMATS = ("txt", "txt", "txt", "array", "single", "text", "content", "pair")  # how topics are dealt out, in turn


def init(folder: Path) -> tuple[Path, int, int]:
    """Write documents and recipe into a new or empty folder: the recipe's path, documents, characters.

    Raises OutputError when the folder is not empty or cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder}: exists and is not an empty folder; name a new one")
        return _fill(folder)
    except OSError as e:
        raise OutputError(f"{folder}: cannot be written ({e.strerror or e}); name a folder where you may write") from e


def _fill(folder: Path) -> tuple[Path, int, int]:
    topics = sorted(_sections().items())
    documents = folder / "documents"
    written: dict[str, list[dict[str, str]]] = {"array": [], "text": [], "content": [], "pair": []}
    for i, (name, text) in enumerate(topics):
        how = FORMATS[i % len(FORMATS)]
        if how == "txt":
            _write(documents / "reference" / name[0] / f"{name}.txt", text)
        elif how == "single":
            _write(documents / "single" / f"{name}.json", json.dumps({"title": name, "text": text}))
        elif how == "pair":
            title, _, rest = text.partition("\n")
            written[how].append({"input": title, "output": rest.lstrip("*=-\n ")})
        else:
            written[how].append({"content" if how == "content" else "text": text})
    _write(documents / "articles.json", json.dumps(written["array"], indent=1))
    lines: Callable[[Any], str] = lambda records: "".join(json.dumps(r) + "\n" for r in records)  # noqa: E731
    _write(documents / "notes" / "records.jsonl", lines(written["text"] + written["content"]))
    _write(documents / "notes" / "questions.jsonl", lines(written["pair"]))
    _write(folder / "recipe.yaml", RECIPE)
    return folder / "recipe.yaml", len(topics), sum(len(text) for _, text in topics)


def _sections() -> dict[str, str]:
    """The topics by name."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return topics


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
