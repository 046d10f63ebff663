"""Readers, extractors, tokenizers and callbacks that are wrong in one way each, told by the test that is there for it."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter

import pytest
from attrs import define, field, frozen

from nanovllm_core import hookimpl
from nanovllm_core.contracts import Accept, Decision, Document, Record, Refuse, Segment
from nanovllm_core.errors import DataError, ModelError
from nanovllm_core.testing import CallbackContract, ExtractorContract, ReaderContract, TokenizerContract, failures


def told(base, component, **options):
    """Names of the tests that fail for a component."""
    return set(failures(type("Kit", (base,), {"component": component, **options})))


# ---------------------------------------------------------------- readers


@frozen(kw_only=True, eq=False)
class Lines:
    """Files of lines (.lines): one line, one record."""

    @hookimpl
    def probe(self, source):
        if source.exists and source.name.endswith(".lines"):
            return Accept(why=".lines file")
        return Refuse("not a .lines file")

    @hookimpl
    def read(self, source):
        return self.records(source)

    def records(self, source):
        byte = 0
        with open(source.path, "rb") as file:
            for index, line in enumerate(file):
                yield self.record(source, index, byte, self.text(source, line))
                byte += len(line)

    def text(self, source, line):
        try:
            return line.decode("utf-8").rstrip("\n")
        except UnicodeDecodeError as e:
            raise DataError(f"{source.name}: not UTF-8 ({e.reason})") from e

    def record(self, source, index, byte, text):
        return Record(value=text, source=source.name, line=index + 1, index=index, byte=byte)


class DropsTheLast(Lines):
    def records(self, source):
        held = None
        for record in super().records(source):
            if held is not None:
                yield held
            held = record


class ClaimsEveryFile(Lines):
    @hookimpl
    def probe(self, source):
        return Accept(why="why not") if source.exists else Refuse("no file")


class ClaimsWhatIsNotThere(Lines):
    @hookimpl
    def probe(self, source):
        return Accept(why="by name") if source.name.endswith(".lines") else Refuse("another name")


class OpensWhatIsNotThere(Lines):
    @hookimpl
    def probe(self, source):
        with open(source.path, "rb") as file:
            begins = file.read(4)
        return Accept(why="by name") if begins and source.name.endswith(".lines") else Refuse("another name")


class ReadsAllInProbe(Lines):
    @hookimpl
    def probe(self, source):
        if not source.exists or not source.name.endswith(".lines"):
            return Refuse("not a .lines file")
        with open(source.path, "rb") as file:
            lines = sum(1 for _ in file)
        return Accept(why=f"{lines} lines")


class RefusesWithoutAReason(Lines):
    @hookimpl
    def probe(self, source):
        return Accept(why="ok") if source.exists and source.name.endswith(".lines") else Refuse("")


class CountsFromOne(Lines):
    def record(self, source, index, byte, text):
        return super().record(source, index + 1, byte, text)


class StandsNowhere(Lines):
    def record(self, source, index, byte, text):
        return super().record(source, index, -byte, text)


class SaysThePath(Lines):
    def record(self, source, index, byte, text):
        return Record(value=text, source=source.path, line=index + 1, index=index, byte=byte)


class GivesBytes(Lines):
    def record(self, source, index, byte, text):
        return super().record(source, index, byte, (text, index))


class RaisesWhatItMeets(Lines):
    def text(self, source, line):
        return line.decode("utf-8").rstrip("\n")


class NamesNoSource(Lines):
    def text(self, source, line):
        try:
            return line.decode("utf-8").rstrip("\n")
        except UnicodeDecodeError as e:
            raise DataError("not UTF-8") from e


class GivesAList(Lines):
    @hookimpl
    def read(self, source):
        return list(self.records(source))


class ReadsBeforeItIsAsked(Lines):
    @hookimpl
    def read(self, source):
        with open(source.path, "rb") as file:
            file.read()
        return self.records(source)


class LeavesFilesOpen(Lines):
    def records(self, source):
        byte = 0
        for index, line in enumerate(open(source.path, "rb")):  # noqa: SIM115
            yield self.record(source, index, byte, self.text(source, line))
            byte += len(line)


class WritesBeside(Lines):
    def records(self, source):
        with open(source.path + ".index", "w") as file:
            file.write("seen")
        return super().records(source)


@frozen(kw_only=True, eq=False)
class ReadsOnce(Lines):
    """Keeps what it read, as an iterator."""

    _kept: dict = field(factory=dict, init=False)

    def records(self, source):
        return self._kept.setdefault(source.path, super().records(source))


@frozen(kw_only=True, eq=False)
class SharesItsPlace(Lines):
    """Counts records of all readings together."""

    _count: Counter = field(factory=Counter, init=False)

    def records(self, source):
        self._count.clear()
        for record in super().records(source):
            yield super().record(source, self._count["records"], record.byte, record.value)
            self._count["records"] += 1


TWICE = {"test_reads_the_same_twice", "test_two_readings_go_on_side_by_side"}
READERS = {
    Lines: set(),
    DropsTheLast: {"test_gives_every_record"},
    ClaimsEveryFile: {"test_refuses_other_files"},
    ClaimsWhatIsNotThere: {"test_refuses_what_does_not_exist"},
    OpensWhatIsNotThere: {"test_refuses_what_does_not_exist"},
    ReadsAllInProbe: {"test_probe_reads_first_bytes_only"},
    RefusesWithoutAReason: {"test_refuses_other_files", "test_refuses_what_does_not_exist"},
    CountsFromOne: {"test_records_say_where_they_stand"},
    StandsNowhere: {"test_records_say_where_they_stand"},
    SaysThePath: {"test_records_say_where_they_stand"},
    GivesBytes: {"test_records_say_where_they_stand", "test_gives_every_record"},
    RaisesWhatItMeets: {"test_broken_files_are_data_errors", "test_damaged_files_raise_nothing_else"},
    NamesNoSource: {"test_broken_files_are_data_errors", "test_damaged_files_raise_nothing_else"},
    GivesAList: {"test_reads_as_records_are_asked_for"},
    ReadsBeforeItIsAsked: {"test_reads_as_records_are_asked_for"},
    LeavesFilesOpen: {"test_closes_what_it_opens"},
    WritesBeside: {"test_leaves_the_files_as_they_are"},
    ReadsOnce: TWICE,
    SharesItsPlace: {"test_two_readings_go_on_side_by_side"},
}


@pytest.mark.parametrize("cls", READERS, ids=lambda c: c.__name__)
def test_readers(cls):
    files = {"a.lines": b"one\ntwo\nthree\nfour\nfive", "deep/b.lines": "zwölf\n".encode()}
    found = told(
        ReaderContract,
        cls(),
        files=files,
        records={"a.lines": ["one", "two", "three", "four", "five"], "deep/b.lines": ["zwölf"]},
        broken={"c.lines": b"\xff\n"},
    )
    if cls is GivesAList:
        assert READERS[cls] <= found
    else:
        assert found - {"test_has_a_summary"} == READERS[cls]


# ---------------------------------------------------------------- what all kinds share


def test_what_every_component_keeps():
    @frozen(kw_only=True, eq=False)
    class Undocumented(Lines):
        """Lines.

        first: where to begin
        """

        first: int = 0
        last: int = 3

    @frozen(kw_only=True, eq=False)
    class Coerced(Lines):
        """Lines.

        first: where to begin
        """

        first: int = 2.5

    @frozen(kw_only=True)
    class ByValue(Lines):
        """Lines."""

    @frozen(kw_only=True, eq=False)
    class Yields(Lines):
        """Lines."""

        @hookimpl
        def read(self, source):
            yield from self.records(source)

    @frozen(kw_only=True, eq=False)
    class Misspelt(Lines):
        """Lines."""

        @hookimpl
        def reed(self, source): ...

    files = {"a.lines": b"one\n"}
    for cls, test in (
        (Undocumented, "test_options_are_documented"),
        (Coerced, "test_options_can_be_written_in_a_recipe"),
        (ByValue, "test_follows_its_spec"),
        (Yields, "test_follows_its_spec"),
        (Misspelt, "test_follows_its_spec"),
        (DropsTheLast, "test_has_a_summary"),
    ):
        assert told(ReaderContract, cls(), files=files) == {test}, cls


def test_heavy_imports_at_load(tmp_path, monkeypatch):
    (tmp_path / "heavy_reader.py").write_text(
        "import numpy\nfrom attrs import frozen\nfrom nanovllm_core import hookimpl\n"
        "@frozen(kw_only=True, eq=False)\nclass Heavy:\n    'Heavy.'\n"
        "    @hookimpl\n    def extract(self, record): return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        from heavy_reader import Heavy
    finally:
        sys.modules.pop("heavy_reader", None)
    found = failures(type("Kit", (ExtractorContract,), {"component": Heavy(), "documents": [("a", "a")]}))
    assert "importing heavy_reader imports numpy" in found["test_loads_without_heavy_imports"]
    assert "Heavy" in found["test_gives_the_text"]


# ---------------------------------------------------------------- extractors


@frozen(kw_only=True, eq=False)
class Words:
    """The text under `words`."""

    @hookimpl
    def extract(self, record):
        if not isinstance(record.value, dict):
            return None
        if not isinstance(record.value.get("words"), str):
            raise DataError(f"{record.place}: no words")
        return Document(segments=self.segments(record), source=record.source, index=self.index(record))

    def segments(self, record):
        return (Segment(record.value["words"]),)

    def index(self, record):
        return record.index


class Strips(Words):
    def segments(self, record):
        return (Segment(record.value["words"].strip()),)


class LosesTheIndex(Words):
    def index(self, record):
        return 0


class Pops(Words):
    def segments(self, record):
        return (Segment(record.value.pop("words")),)


class GivesAListOfSegments(Words):
    def segments(self, record):
        return [Segment(record.value["words"])]


class KeyErrors(Words):
    @hookimpl
    def extract(self, record):
        return Document(segments=self.segments(record), source=record.source, index=record.index)


class PassesAllOn(Words):
    @hookimpl
    def extract(self, record):
        try:
            return super().extract(record)
        except DataError:
            return None


@frozen(kw_only=True, eq=False)
class Remembers(Words):
    """Joins what it saw before."""

    _seen: list = field(factory=list, init=False)

    def segments(self, record):
        self._seen.append(record.value["words"])
        return (Segment(record.value["words"], trained=len(self._seen) < 4),)


EXTRACTORS = {
    Words: set(),
    Strips: {"test_gives_the_text"},
    LosesTheIndex: {"test_documents_say_where_they_are_from"},
    Pops: {"test_leaves_the_record_as_it_is"},
    GivesAListOfSegments: {"test_any_value_is_answered"},
    KeyErrors: {"test_any_value_is_answered", "test_wrong_records_are_data_errors", "test_passes_on_only_what_is_not_its_own"},
    PassesAllOn: {"test_wrong_records_are_data_errors"},
    Remembers: {"test_answers_the_same_again"},
}  # fmt: skip


@pytest.mark.parametrize("cls", EXTRACTORS, ids=lambda c: c.__name__)
def test_extractors(cls):
    found = told(
        ExtractorContract,
        cls(),
        documents=[({"words": " a "}, " a "), ({"words": "b"}, "b")],
        passed_on=["text", 3],
        wrong=[{}, {"words": 3}],
    )
    assert found - {"test_has_a_summary"} == EXTRACTORS[cls]


# ---------------------------------------------------------------- tokenizers


@define(eq=False)
class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends a document."""

    fingerprint: str = ""
    vocab_size = 257
    prefix_ids = ()
    end_id = 256
    stop_ids = (256,)
    has_chat_template = False
    special_texts = ("<|end|>",)

    def encode(self, texts, *, markup=False):
        return [self.one(text, markup) for text in texts]

    def one(self, text, markup):
        ids = []
        for i, part in enumerate(text.split("<|end|>") if markup else [text]):
            ids += [256] * bool(i) + list(part.encode())
        return ids

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def chat(self, messages, *, answer_next):
        raise ModelError("no template")

    def save(self, folder): ...


@frozen(kw_only=True, eq=False)
class Bytes:
    """Bytes as ids."""

    tokenizer: type = field(default=ByteTokenizer, metadata={"internal": True})

    @hookimpl
    def vocab_size(self, data_bytes):
        return Decision(257, "256 bytes and an end")

    @hookimpl
    def make(self, texts, vocab_size):
        return self.tokenizer(hashlib.sha256(b"bytes").hexdigest())


class LosesBytes(ByteTokenizer):
    def decode(self, ids):
        return bytes(i for i in ids if i < 128).decode()


class Special(ByteTokenizer):
    special_texts = ("<|endoftext|>",)

    def one(self, text, markup):
        return super().one(text.replace("<|endoftext|>", "<|end|>"), True)


class EndIsAByte(ByteTokenizer):
    end_id, stop_ids, special_texts = 0, (0,), ()


class TooMany(ByteTokenizer):
    vocab_size = 300


class OutOfRange(ByteTokenizer):
    end_id, stop_ids, special_texts = 10, (10,), ()

    def one(self, text, markup):
        return [i + 200 for i in super().one(text, markup)]

    def decode(self, ids):
        return super().decode([i - 200 for i in ids if 200 <= i < 456])


class Pads(ByteTokenizer):
    def encode(self, texts, *, markup=False):
        ids = super().encode(texts, markup=markup)
        longest = max(map(len, ids), default=0)
        return [[*i, *[256] * (longest - len(i))] for i in ids]


class PutsAPrefix(ByteTokenizer):
    prefix_ids = (256,)

    def one(self, text, markup):
        return [256, *super().one(text, markup)]


class NeverStops(ByteTokenizer):
    stop_ids = ()


class CutsOff(ByteTokenizer):
    def one(self, text, markup):
        return super().one(text, markup)[:4096]


class RaisesOnHalfACharacter(ByteTokenizer):
    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode()


class SpeaksSpecials(ByteTokenizer):
    def decode(self, ids):
        return "".join(super(SpeaksSpecials, self).decode([i]) if i < 128 else "<|end|>" for i in ids)


class StripsParts(ByteTokenizer):
    """Puts a space before every text, and drops it when it decodes."""

    def one(self, text, markup):
        return [32, *super().one(text, markup)] if text else []

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


class SharesABuffer(ByteTokenizer):
    buffer = []

    def one(self, text, markup):
        import time

        self.buffer.clear()
        for i in super().one(text, markup):
            self.buffer.append(i)
            if not len(self.buffer) % 20:
                time.sleep(0)
        time.sleep(0.0001)
        return list(self.buffer)


TOKENIZERS = {
    ByteTokenizer: set(),
    LosesBytes: {"test_decoding_gives_the_text_back", "test_parts_decode_to_the_whole", "test_a_long_text"},
    Special: {"test_a_text_never_becomes_a_special_token"},
    EndIsAByte: {"test_a_text_never_becomes_a_special_token"},
    TooMany: {"test_ids_stay_below_the_planned_size"},
    OutOfRange: {"test_ids_stay_below_the_planned_size"},
    Pads: {"test_a_batch_is_encoded_as_each_text_alone"},
    PutsAPrefix: {"test_empty_text_has_no_ids"},
    NeverStops: {"test_end_stop_and_prefix_ids_agree"},
    CutsOff: {"test_a_long_text"},
    RaisesOnHalfACharacter: {"test_any_ids_decode"},
    SpeaksSpecials: {"test_markup_reads_special_tokens"},
    StripsParts: {"test_parts_decode_to_the_whole"},
    SharesABuffer: {"test_threads_do_not_disturb_each_other"},
}
ALONE = {ByteTokenizer, OutOfRange, EndIsAByte, TooMany, CutsOff, RaisesOnHalfACharacter, NeverStops}


@pytest.mark.parametrize("cls", TOKENIZERS, ids=lambda c: c.__name__)
def test_tokenizers(cls):
    found = told(TokenizerContract, Bytes(tokenizer=cls), not_in_transformers="bytes have no tokenizer.json")
    assert TOKENIZERS[cls] <= found
    if cls in ALONE:
        assert found == TOKENIZERS[cls]


def test_a_folder_that_transformers_cannot_open():
    assert told(TokenizerContract, Bytes()) == {"test_saved_folder_opens_in_transformers"}


def test_a_fingerprint_that_says_nothing():
    class Ranked(ByteTokenizer):
        def one(self, text, markup):
            return [(i + self.shift) % 256 if i < 256 else i for i in super().one(text, markup)]

        def decode(self, ids):
            return super().decode([(i - self.shift) % 256 if i < 256 else i for i in ids])

    @frozen(kw_only=True, eq=False)
    class Shifted(Bytes):
        """Bytes, shifted by what was read."""

        @hookimpl
        def make(self, texts, vocab_size):
            made = Ranked("the same for all")
            made.shift = sum(map(len, texts())) % 256
            return made

    found = told(TokenizerContract, Shifted(), not_in_transformers="bytes have no tokenizer.json")
    assert found == {"test_fingerprint_tells_vocabularies_apart"}


# ---------------------------------------------------------------- callbacks


@define
class State:
    runs: int = 0
    file: object = None


@frozen(kw_only=True, eq=False)
class Board:
    """Writes losses."""

    _state: State = field(factory=State, init=False)

    @hookimpl
    def run_started(self, plan):
        self._state.file = plan.output_dir / "board.txt"

    @hookimpl
    def step_done(self, step, metrics):
        with self._state.file.open("a") as file:
            file.write(f"{step} {metrics['loss']}\n")


class RaisesOnTheSecondRun(Board):
    """Board."""

    @hookimpl
    def run_started(self, plan):
        super().run_started(plan)
        self._state.runs += 1
        if self._state.runs > 1:
            raise RuntimeError("already started")


class RaisesWhenItGoesOn(Board):
    """Board."""

    @hookimpl
    def run_started(self, plan):
        super().run_started(plan)
        self._state.runs += 1

    @hookimpl
    def phase_progress(self, phase, done, total, unit):
        assert self._state.runs < 2 or done != 500_000 or phase == "reading"


class AnswersSomething(Board):
    """Board."""

    @hookimpl
    def note(self, text):
        return text


class NeedsTheNorm(Board):
    """Board."""

    @hookimpl
    def step_done(self, step, metrics):
        metrics["gradient_norm"] + 1


class CannotTellInfinity(Board):
    """Board."""

    @hookimpl
    def evaluated(self, step, metrics):
        int(metrics["eval_perplexity"])


class DividesByTheTotal(Board):
    """Board."""

    @hookimpl
    def phase_progress(self, phase, done, total, unit):
        done / total


class WritesHere(Board):
    """Board."""

    @hookimpl
    def generated(self, prompt, text):
        with open("answers.txt", "a") as file:
            file.write(text)


class ExpectsAnEvaluation(Board):
    """Board."""

    @hookimpl
    def evaluated(self, step, metrics):
        self._state.runs = 1

    @hookimpl
    def run_finished(self, output_dir):
        assert self._state.runs, "nothing was evaluated"


AGAIN = {
    "test_two_runs_in_one_process",
    "test_the_same_run_again",
    "test_a_run_that_breaks_off_and_goes_on",
    "test_on_every_rank",
}
WHOLE = {
    "test_a_whole_run", "test_figures_may_be_missing_or_new_or_infinite", "test_without_held_out_documents_or_prompts",
    "test_writes_nowhere_but_into_the_output_folder",
}  # fmt: skip
CALLBACKS = {
    Board: set(),
    RaisesOnTheSecondRun: AGAIN,
    RaisesWhenItGoesOn: AGAIN - {"test_the_same_run_again"},
    AnswersSomething: AGAIN | WHOLE,
    NeedsTheNorm: {"test_figures_may_be_missing_or_new_or_infinite"},
    CannotTellInfinity: {"test_figures_may_be_missing_or_new_or_infinite"},
    DividesByTheTotal: AGAIN | WHOLE,
    WritesHere: {"test_writes_nowhere_but_into_the_output_folder"},
    ExpectsAnEvaluation: {"test_without_held_out_documents_or_prompts"},
}


@pytest.mark.parametrize("cls", CALLBACKS, ids=lambda c: c.__name__)
def test_callbacks(cls):
    class Kit(CallbackContract):
        def make(self):  # a fresh one for each test
            self.component = self.component or cls()
            return self.component

    assert set(failures(Kit)) == CALLBACKS[cls]
