"""Document -> token ids, with a mark on every token whose prediction is trained.

A plain document is `prefix_ids + text + end_id`. Untrained segments (a prompt) are context; the end token is trained. A
document whose segments all have roles is framed by the tokenizer's chat template if there is one: each answer is
trained up to its end token, everything else is context. The first token is never trained: nothing stands before it.

Text never becomes a special token, in a chat neither (`shield`).

Long texts are cut before white space, where encoding the halves was seen to give the ids of the whole around the cut:
memory stays bounded (tokenizers hold some 150 bytes a token while encoding) and all cores have work. A text that comes in
parts is cut at such places too; only where it has none for 8 million characters, the ids at the cut are other ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from nanovllm_core.contracts import Document, Segment, Tokenizer
from nanovllm_core.data.shield import Piece, Shield, specials_of
from nanovllm_core.errors import DataError, NanoError

T = TypeVar("T")
RULES = 2  # raised whenever the same document and tokenizer would give other ids or marks
GROUP = 1_000_000  # characters given to the tokenizer at once
LONG = 100_000  # characters; longer texts are cut
TAIL = 50_000  # characters at the end of a part in which the cut is looked for
HUGE = 8_000_000  # characters kept for want of a place to cut
CONTEXT = 256  # characters on each side of a cut that is tried
TRIES = 16
CUTS = (re.compile(r"[^\W\d_](?=[ \n])"), re.compile(r"\S(?=\s)"))  # the first is most often right

Ids = NDArray[np.uint32]


@frozen(eq=False)
class Encoded:
    """A document as the store keeps it."""

    ids: Ids
    trained: NDArray[np.uint8]  # 1 where the token's prediction is trained
    bytes: int  # of the text whose tokens are trained, in UTF-8: what bits per byte divide by


@frozen(eq=False)
class _Stretch:
    """Neighbouring text that is trained, or not, as a whole."""

    pieces: tuple[Piece, ...]
    trained: bool

    @property
    def bytes(self) -> int:
        return sum(len(text.encode("utf-8")) for text, _ in self.pieces)


class Encoder:
    """Encodes documents with one tokenizer, many at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._specials = specials_of(tokenizer)

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """Raises DataError when the chat template cannot frame a document, or its text is no Unicode."""
        plans = []
        for document in documents:
            whole = document.opens and document.closes
            chat = whole and self.tokenizer.has_chat_template and _is_chat(document)
            plans.append((chat, self._chat(document) if chat else self._plain(document)))
        ids = iter(self._ids([piece for _, plan in plans for stretch in plan for piece in stretch.pieces]))
        result = []
        for document, (chat, plan) in zip(documents, plans, strict=True):
            parts = [(np.concatenate([next(ids) for _ in s.pieces]), s) for s in plan]
            result.append(self._close_chat(parts) if chat else self._close_plain(parts, document))
        return result

    def recut(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents; texts that come in parts are parted anew, where that changes no id as far as is seen."""
        text, opens = "", True
        for document in documents:
            if document.opens and document.closes:
                yield document
                continue
            text, opens = (document.text, True) if document.opens else (text + document.text, opens)
            cut = len(text) if document.closes else self._cut(text, max(0, len(text) - TAIL), room=CONTEXT)
            if cut is None and len(text) > HUGE:
                cut = len(text)
            if cut is not None:
                segment = evolve(document.segments[0], text=text[:cut])
                yield evolve(document, segments=(segment,), opens=opens)
                text, opens = text[cut:], False

    # ------------------------------------------------------------ framing

    def _plain(self, document: Document) -> list[_Stretch]:
        runs: list[tuple[str, bool]] = []
        last = len(document.segments) - 1
        for i, segment in enumerate(document.segments):
            text = segment.text if i == last else segment.text + "\n"
            if runs and runs[-1][1] == segment.trained:
                runs[-1] = (runs[-1][0] + text, segment.trained)
            else:
                runs.append((text, segment.trained))
        return [_Stretch(tuple((part, False) for part in self._parts(text)), trained) for text, trained in runs]

    def _chat(self, document: Document) -> list[_Stretch]:
        """Up to the last trained answer: what the template puts before each answer, and the answer."""
        shield = Shield(self._specials, [s.text for s in document.segments])
        messages = [{"role": str(s.role), "content": shield.hide(s.text)} for s in document.segments]
        stretches, done = [], ""
        for i, segment in enumerate(document.segments):
            if not _is_answer(segment):
                continue
            prompt = self._render(document, messages[:i], answer_next=True)
            whole = self._render(document, messages[: i + 1], answer_next=False)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise DataError(
                    f"{document.source}[{document.index}]: the tokenizer's chat template renders the conversation with "
                    "its answer differently from the prompt alone, so the answer cannot be told from the prompt; set "
                    "`chat: false` on the fields extractor to join them by a newline"
                )
            for text, trained in ((prompt[len(done) :], False), (whole[len(prompt) :], True)):
                stretches.append(_Stretch(tuple(shield.pieces(text)), trained))
            done = whole
        return stretches

    def _render(self, document: Document, messages: Sequence[dict[str, str]], *, answer_next: bool) -> str:
        try:
            return self.tokenizer.chat(messages, answer_next=answer_next)
        except NanoError as e:
            raise DataError(
                f"{document.source}[{document.index}]: {e}; set `chat: false` on the fields extractor to go without "
                "the template"
            ) from e

    # ------------------------------------------------------------ ids

    def _close_plain(self, parts: list[tuple[Ids, _Stretch]], document: Document) -> Encoded:
        prefix = self.tokenizer.prefix_ids if document.opens else ()
        end = (self.tokenizer.end_id,) if document.closes else ()
        ids = np.concatenate([_ids(prefix), *(i for i, _ in parts), _ids(end)])
        marks = [(len(prefix), False), *((len(i), s.trained) for i, s in parts), (len(end), True)]
        size = sum(s.bytes for _, s in parts if s.trained)
        if not document.opens:
            return _encoded(ids, marks, size, opens=False)
        if not prefix and parts and parts[0][1].trained and len(parts[0][0]):
            size -= _bytes_of(self.tokenizer, int(ids[0]))
        return _encoded(ids, marks, max(0, size))

    def _close_chat(self, parts: list[tuple[Ids, _Stretch]]) -> Encoded:
        tokenizer, chunks, marks, size = self.tokenizer, [], [], 0
        for n, (ids, stretch) in enumerate(parts):
            if n == 0 and tuple(ids[: len(tokenizer.prefix_ids)].tolist()) != tokenizer.prefix_ids:
                chunks.append(_ids(tokenizer.prefix_ids))
                marks.append((len(tokenizer.prefix_ids), False))
            if stretch.trained:
                last = n == len(parts) - 1
                stops = np.flatnonzero(np.isin(ids, tokenizer.stop_ids))
                answer = int(stops[0]) if len(stops) else len(ids)
                size += len(tokenizer.decode(ids[:answer].tolist()).encode("utf-8"))
                if not len(stops) and last:
                    ids = np.append(ids, np.uint32(tokenizer.end_id))
                elif last:
                    ids = ids[: answer + 1]
                closed = min(answer + 1, len(ids))
                marks += [(closed, True), (len(ids) - closed, False)]
            else:
                marks.append((len(ids), False))
            chunks.append(ids)
        return _encoded(np.concatenate(chunks), marks, size)

    def _ids(self, pieces: Sequence[Piece]) -> list[Ids]:
        """The ids of each piece, encoded in groups of bounded size."""
        result: list[Ids] = [_ids(())] * len(pieces)
        for markup in (False, True):
            chosen = [i for i, piece in enumerate(pieces) if piece[1] == markup]
            for group in groups(chosen, lambda i: len(pieces[i][0])):
                encoded = self.tokenizer.encode([pieces[i][0] for i in group], markup=markup)
                for i, ids in zip(group, encoded, strict=True):
                    result[i] = _ids(ids)
        return result

    def _parts(self, text: str) -> list[str]:
        """The text, cut where that changes no id as far as the tokenizer shows."""
        parts, start = [], 0
        while len(text) - start > LONG and (cut := self._cut(text, start + LONG)):
            parts.append(text[start:cut])
            start = cut
        return [*parts, text[start:]]

    def _cut(self, text: str, after: int, room: int = 0) -> int | None:
        """A place to cut behind `after`, with at least `room` characters behind it."""
        for pattern in CUTS:
            for _, found in zip(range(TRIES), pattern.finditer(text, after, len(text) - room), strict=False):
                cut = found.end()
                left, right = text[max(0, cut - CONTEXT) : cut], text[cut : cut + CONTEXT]
                whole, first, second = self.tokenizer.encode([left + right, left, right])
                if whole == [*first, *second]:
                    return cut
        return None


def _is_answer(segment: Segment) -> bool:
    return segment.trained and segment.role == "assistant"


def _is_chat(document: Document) -> bool:
    return all(s.role is not None for s in document.segments) and any(map(_is_answer, document.segments))


def _ids(ids: Sequence[int]) -> Ids:
    return np.array(ids, dtype=np.uint32)


def _encoded(ids: Ids, marks: Sequence[tuple[int, bool]], size: int, *, opens: bool = True) -> Encoded:
    trained = np.repeat(np.array([m for _, m in marks], np.uint8), [n for n, _ in marks])
    if opens:
        trained[:1] = 0
    return Encoded(ids, trained, size)


def _bytes_of(tokenizer: Tokenizer, token: int) -> int:
    """UTF-8 bytes of one token; a part of a character counts one byte a replacement sign, at most 2 too few."""
    text = tokenizer.decode([token])
    return len(text.replace("\ufffd", "?").encode("utf-8"))


def groups(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """The items, as many at a time as the tokenizer is given at once; `size` of an item in characters."""
    group: list[T] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= GROUP:
            yield group
            group, total = [], 0
    if group:
        yield group
