"""`nanovllm analyze`: what a folder of documents holds, before anything is trained on it.

Documents stream: one walk measures them (and tokenises them, if a tokenizer is given), a second one names exact copies
where there are any. Memory holds the result, whose figures for each file are what grows (some 400 bytes a file), and 16
bytes a document. Nothing is written, and nothing that is wrong with a document is an error here: it is the answer.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from nanovllm_core.contracts import Damage, Document, Source, Tokenizer
from nanovllm_core.data.decoding import Nul, Text, Undecodable
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.ledger import EMPTY, UNREADABLE, Skipped
from nanovllm_core.data.opening import MARKS, opened
from nanovllm_core.data.sources import Progress
from nanovllm_core.errors import DataError
from nanovllm_core.hooks import bind
from nanovllm_core.hookspecs import Tokenizers
from nanovllm_core.plan_data import DataPlan, plan_data
from nanovllm_core.recipe import Component, Recipe
from nanovllm_core.registry import Registry
from nanovllm_core.slots import Slots

LISTED = 1000  # skipped records and groups of copies that are listed; all are counted
NAMED = 10  # documents named of a group of copies
SIGHT = 1 << 16  # bytes that tell a file's encoding
PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
SHORTEST, LONGEST = 128, 2048  # tokens suggested for a sequence
CHARACTERS_A_TOKEN = 4  # of English text with usual vocabularies, where no tokenizer is given


def analyze_document_collection(
    path: str | Path,
    tokenizer: str | Path | Tokenizer | None = None,
    *,
    registry: Registry | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Figures of the documents under `path`, as plain data.

    `tokenizer`: a folder or hub name, or a ready one. Keys: total_documents, total_characters, total_bytes, total_words,
    file_types (suffix -> files), files (path, documents, characters, avg_length of each), encodings (-> files), duplicates,
    skipped (kind -> records), skipped_records (the first 1,000, with place and reason), loss (what is lost with unreadable
    files, in bytes), left_out (sentences), tokens (None without a tokenizer), suggested (key of `data` -> value and reason).
    Raises DataError when there is nothing at `path`, ModelError for a tokenizer that cannot be opened.
    """
    registry = registry or Registry.from_environment()
    recipe = Recipe.from_data({"data": {"path": str(path), "on_error": "skip", "max_errors": 1 << 62}})
    slots = Slots(registry, recipe)
    if isinstance(tokenizer, str | Path):
        named = slots.named("tokenizers", Component(use="hf", options={"path": str(tokenizer)}))
        tokenizer = bind(Tokenizers, [(named.entry.full_name, named.component)]).make(
            texts=lambda: (), vocab_size=0, kept=None
        )
    plan = plan_data(slots, (recipe.base / recipe.output_dir).resolve())
    return _Analysis(plan).run(tokenizer, progress)


class _Analysis:
    def __init__(self, plan: DataPlan) -> None:
        self.plan, self.documents = plan, plan.documents
        self.words = 0
        self.lengths = array("Q")  # characters of each document
        self.files: dict[str, list[int]] = {s.name: [0, 0] for s, _ in plan.documents.known()}  # documents, characters
        self.skipped: list[Skipped] = []
        self.undecodable: set[str] = set()

    def run(self, tokenizer: Tokenizer | None, progress: Progress | None) -> dict[str, Any]:
        pieces = self._measured(self.documents.walk(progress, self._tell))
        tokens = array("Q")
        try:
            if tokenizer is None:
                for _ in pieces:
                    pass
            else:
                tokens.extend(_token_counts(tokenizer, pieces))
        except DataError:
            counts = self.documents.counts
            if counts is None or counts.documents:  # otherwise it says that there is no document
                raise
        counts = self.documents.counts
        assert counts is not None, "a whole walk sets it"
        return {
            "path": self.documents.all.path,
            "total_documents": counts.documents,
            "total_characters": counts.characters,
            "total_bytes": counts.bytes,
            "total_words": self.words,
            "file_types": dict(self.documents.all.suffixes),
            "files": [
                {"path": name, "documents": n, "characters": size, "avg_length": size / n if n else 0.0}
                for name, (n, size) in self.files.items()
            ],
            "encodings": dict(Counter(map(self._encoding, (s for s, _ in self.documents.known() if s.exists)))),
            "duplicates": _duplicates(self.documents),
            "skipped": dict(counts.skipped),
            "skipped_records": [attrs.asdict(s) for s in self.skipped],
            "loss": {"bytes": counts.lost, "of": counts.size, "of_compressed": counts.packed, "text": counts.loss},
            "left_out": list(self.plan.left_out),
            "tokens": {"total": sum(tokens), **_spread(tokens)} if tokenizer else None,
            "suggested": _suggested(tokens if tokenizer else self.lengths, bool(tokenizer)) if counts.documents else {},
        }

    def _encoding(self, source: Source) -> str:
        """By a file's first bytes, and by what was found wrong with later ones."""
        found = _encoding(source)
        return "no UTF-8" if source.name in self.undecodable and found in ("ascii", "utf-8") else found

    def _tell(self, skipped: Skipped) -> None:
        if "UTF-8" in skipped.reason:
            self.undecodable.add(skipped.source)
        if len(self.skipped) < LISTED:
            self.skipped.append(skipped)

    def _measured(self, pieces: Iterable[Document]) -> Iterator[Document]:
        length = 0
        for piece in pieces:
            for segment in piece.segments:
                length += len(segment.text)
                self.words += len(segment.text.split())
            if piece.closes:
                file = self.files.setdefault(piece.source, [0, 0])
                file[0] += 1
                file[1] += length
                self.lengths.append(length)
                length = 0
            yield piece


def _token_counts(tokenizer: Tokenizer, pieces: Iterable[Document]) -> Iterator[int]:
    """Tokens of each document, as training would see it."""
    from nanovllm_core.data.building import batches, encoded
    from nanovllm_core.data.encode import Encoder

    encoder, length = Encoder(tokenizer), 0
    for batch, found in encoded(encoder, batches((piece, 0) for piece in encoder.recut(pieces))):
        for (piece, _), one in zip(batch, found, strict=True):
            length += len(one.ids)
            if piece.closes:
                yield length
                length = 0


def _encoding(source: Source) -> str:
    """What the first bytes of a file's content are."""
    try:
        with opened(source) as content:
            text = Text(content, nul=False).read(SIGHT)
            if content.start:
                return f"{next(c for _, c in MARKS if c == content.codec)} with a byte order mark"
            return "ascii" if text.isascii() else "utf-8"
    except Undecodable as e:
        if e.guess:
            return f"probably {e.guess} without a byte order mark"
        return "no text: it has NUL characters" if isinstance(e, Nul) else "no UTF-8"
    except (OSError, DataError):
        return "unreadable"


def _duplicates(documents: Documents) -> dict[str, Any]:
    """Documents whose text another one has too, in groups, the largest first."""
    import numpy as np

    kinds, counts = np.unique(np.array(documents.contents, np.uint64), return_counts=True)
    several = kinds[counts > 1][np.argsort(-counts[counts > 1], kind="stable")]
    groups: dict[int, list[str]] = {int(kind): [] for kind in several[:LISTED]}
    if groups:
        contents, number = documents.contents, 0
        for document in documents.walk():
            found = groups.get(contents[number])
            if document.closes:
                number += 1
                if found is not None and len(found) < NAMED:
                    found.append(f"{document.source}[{document.index}]")
    copies = dict(zip(kinds.tolist(), counts.tolist(), strict=True)) if groups else {}
    return {
        "documents": int((counts - 1).sum()),  # more than one of each
        "groups": [{"copies": copies[kind], "documents": names} for kind, names in groups.items()],
    }


def _spread(lengths: array[int]) -> dict[str, Any]:
    import numpy as np

    if not lengths:
        return {"percentiles": {}}
    values = np.percentile(np.array(lengths, np.uint64), PERCENTILES, method="lower")
    return {"percentiles": {str(p): int(v) for p, v in zip(PERCENTILES, values, strict=True)}}


def _suggested(lengths: array[int], exact: bool) -> dict[str, dict[str, Any]]:
    """Keys of `data` that suit these documents, each with its reason."""
    import numpy as np

    tokens = -(-np.array(lengths, np.int64) // (1 if exact else CHARACTERS_A_TOKEN))
    most = int(np.percentile(tokens, 95, method="lower"))
    wanted = 1 << max(0, most - 1).bit_length()
    length = min(LONGEST, max(SHORTEST, wanted))
    why = f"{(tokens <= most).mean():.0%} of the documents have at most {most:,} tokens"
    if not exact:
        why += f", at about {CHARACTERS_A_TOKEN} characters a token"
    if wanted > LONGEST:
        why += f"; longer than {LONGEST:,} costs memory and is rarely needed"
    cut = int((tokens > length).sum())
    overlap = min(128, length // 4) if cut else 0
    because = (
        f"{cut:,} documents are cut; what is repeated is context, and trained once" if cut else "no document is cut"
    )
    return {
        "max_seq_length": {"value": length, "why": why},
        "chunk_overlap": {"value": overlap, "why": because},
        "min_chunk_size": {
            "value": min(100, length // 4),
            "why": "a shorter rest is made that long by tokens before it, for context",
        },
    }


# ---------------------------------------------------------------- for people


def table(found: dict[str, Any], files: int = 20) -> str:
    """The figures as text; the `files` largest files."""
    return "\n".join(_lines(found, files)) + "\n"


def _lines(found: dict[str, Any], files: int) -> Iterator[str]:
    yield f"{found['path']}: {found['total_documents']:,} documents in {len(found['files']):,} files"
    yield (
        f"text         {found['total_characters']:,} characters, {found['total_words']:,} words, "
        f"{found['total_bytes']:,} bytes in UTF-8"
    )
    yield f"file types   {_counted(found['file_types'], '(no suffix)')}"
    yield f"encodings    {_counted(found['encodings'])}"
    duplicates = found["duplicates"]
    yield f"duplicates   {duplicates['documents']:,} exact copies, in {len(duplicates['groups']):,} groups"
    for group in duplicates["groups"][:3]:
        more = group["copies"] - len(group["documents"][:3])
        yield f"             {', '.join(group['documents'][:3])}{f' and {more:,} more' if more > 0 else ''}"
    yield f"skipped      {_counted(found['skipped']) or 'nothing'}"
    for record in found["skipped_records"][:5]:
        yield f"             {_record(record)}"
    if told := found["loss"]["text"]:
        yield f"lost         {told}, with unreadable files"
    for text in found["left_out"]:
        yield f"left out     {text}"
    if tokens := found["tokens"]:
        told = ", ".join(f"{p} %: {n:,}" for p, n in tokens["percentiles"].items())
        yield f"tokens       {tokens['total']:,}; of a document at most, by share: {told}"
    if found["suggested"]:
        yield "suggested    data:"
        for key, item in found["suggested"].items():
            yield f"               {key}: {item['value']}    # {item['why']}"
    largest = sorted(found["files"], key=lambda f: -f["characters"])[:files]
    if largest:
        cells = [("documents", "characters", "average", "file")]
        cells += [
            (f"{f['documents']:,}", f"{f['characters']:,}", f"{f['avg_length']:,.1f}", f["path"]) for f in largest
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        yield ""
        for row in cells:
            yield "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        if len(largest) < len(found["files"]):
            yield f"... and {len(found['files']) - len(largest):,} smaller files; --json lists all"


def _record(record: dict[str, Any]) -> str:
    name, line, index, byte, reason = (record[key] for key in ("source", "line", "index", "byte", "reason"))
    if record["kind"] in (UNREADABLE, EMPTY) and not (line or index or byte):
        return f"{name}: {reason}"
    return Damage(name, reason, line, index, byte).message


def _counted(counts: dict[str, int], unnamed: str = "") -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n:,} {name or unnamed}" for name, n in ordered)


def said(stream: Any) -> Callable[[int, int], None]:
    """A progress function that writes a line to a terminal, over and over, and nothing anywhere else."""
    last = -1

    def tell(done: int, total: int) -> None:
        nonlocal last
        share = done * 100 // max(1, total)
        if stream.isatty() and share != last:
            last = share
            print(f"\rreading {share:3} %", end="" if done < total else "\r             \r", file=stream, flush=True)

    return tell
