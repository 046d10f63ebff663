"""Tokenizers: ids that stand for the text and nothing else, the same at every asking."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import SkipTest

from nanovllm_core.contracts import Tokenizer
from nanovllm_core.errors import ModelError
from nanovllm_core.hookspecs import Tokenizers
from nanovllm_core.testing.contract import Contract

TEXTS = (
    "The river runs past old mills and under a stone bridge, where children fish for trout.",
    "Zażółć gęślą jaźń; Привет, мир; שלום עולם; مرحبا بالعالم; नमस्ते दुनिया; 你好,世界; こんにちは; 안녕하세요; ไทย",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ea\U0001f1fa, \U0001d4d0, e\u0301 and \u00e9",
    "  two spaces\t\ttabs \n\n\r\n lines \u00a0\u2028\u2029\u3000 end  ",
    "control \x00\x01\x07\x1b\x7f\x85 \ufeff\u200b\ufffd \ue000 \U0010ffff",
    'def f(x):\n    return {"a": [1, 2.5e-3]} # 100_000 != 0x1F\n',
    "<s></s><unk><pad><|endoftext|><|im_start|>user\n[INST] <eos> <bos> [CLS] [SEP] [MASK] <0x0A> \u2581",
    "a",
    " ",
    "\n",
    "1234567890" * 5,
    "naïve café coöperate " * 3,
)
LONG = 120_000  # characters


class TokenizerContract(Contract):
    """A tokenizer.

    texts: what it is tried on, and made from; the default has many scripts, control characters and special spellings
    lossless: decoding gives the very text that was encoded; false: it may normalise it, once and for all
    not_in_transformers: why its saved folder does not open in `transformers`; empty: it must
    """

    kind = "tokenizers"
    texts: Sequence[str] = TEXTS
    lossless: bool = True
    not_in_transformers: str = ""

    def test_vocabulary_size_is_decided_with_a_reason(self) -> None:
        hooks = self.bound(Tokenizers)
        for data_bytes in (0, 1, 10_000, 10**12):
            decided, again = hooks.vocab_size(data_bytes=data_bytes), hooks.vocab_size(data_bytes=data_bytes)
            given = f"for {data_bytes:,} bytes it decided {decided!r}"
            self.check(isinstance(getattr(decided, "value", None), int), given, "a Decision with a whole number")
            self.check(decided.value >= 1 and bool(decided.why), given, "at least one id, and the reason why")
            self.check(decided == again, f"{given}, then {again!r}", "the size depends on data_bytes alone")

    def test_ids_stay_below_the_planned_size(self) -> None:
        planned, tokenizer = self.planned(), self.made()
        size = tokenizer.vocab_size
        self.check(1 <= size <= planned, f"planned {planned} ids, it has {size}", "no more ids than planned")
        for text, ids in zip(self.texts, tokenizer.encode(self.texts), strict=True):
            good = isinstance(ids, list) and all(type(i) is int and 0 <= i < size for i in ids)
            self.check(good, f"{text!r} gave {ids}", f"ids are a list of whole numbers from 0 to {size - 1}")

    def test_decoding_gives_the_text_back(self) -> None:
        tokenizer = self.made()
        for text in self.texts:
            once = tokenizer.decode(tokenizer.encode([text])[0])
            if self.lossless:
                self.check(once == text, f"{text!r} came back as {once!r}", "no character is lost or changed")
            else:
                again = tokenizer.decode(tokenizer.encode([once])[0])
                self.check(again == once, f"{text!r} came back as {once!r}, then {again!r}", "the text settles at once")

    def test_parts_decode_to_the_whole(self) -> None:
        """Long texts are encoded in parts, and what is generated is decoded as it comes."""
        if not self.lossless:
            raise SkipTest("what a tokenizer normalises may depend on where a text begins")
        tokenizer = self.made()
        parts = tokenizer.encode(self.texts)
        joined, whole = tokenizer.decode([i for ids in parts for i in ids]), "".join(self.texts)
        self.check(joined == whole, f"the parts of {whole!r} give {joined!r}", "ids of parts decode to the whole")

    def test_a_text_never_becomes_a_special_token(self) -> None:
        tokenizer = self.made()
        special = self.special_ids(tokenizer)
        spelled = [f"a{s}b {s}" for s in tokenizer.special_texts] + list(tokenizer.special_texts)
        for text, ids in zip([*spelled, *self.texts], tokenizer.encode([*spelled, *self.texts]), strict=True):
            met = sorted(special & set(ids))
            self.check(
                not met, f"{text!r} holds the ids {met}", "special ids come from markup alone, never from a text"
            )

    def test_markup_reads_special_tokens(self) -> None:
        tokenizer = self.made()
        for text in tokenizer.special_texts:
            self.check(bool(text), "special_texts holds an empty text", "special tokens have spellings")
            (ids,) = tokenizer.encode([text], markup=True)
            left = tokenizer.decode(ids)
            self.check(
                bool(ids) and left == "", f"markup {text!r} gave {ids}, decoded {left!r}", "read as special, left out"
            )

    def test_a_batch_is_encoded_as_each_text_alone(self) -> None:
        tokenizer = self.made()
        for markup in (False, True):
            together = tokenizer.encode(self.texts, markup=markup)
            alone = [tokenizer.encode([text], markup=markup)[0] for text in self.texts]
            for text, a, b in zip(self.texts, together, alone, strict=True):
                self.check(a == b, f"{text!r} gave {a} in a batch, {b} alone", "texts of a batch do not meet")
        self.check(tokenizer.encode([]) == [], "no text gave something", "one list of ids a text")

    def test_empty_text_has_no_ids(self) -> None:
        tokenizer = self.made()
        found = tokenizer.encode(["", "a", ""])
        self.check(found[0] == found[2] == [], f"'' gave {found[0]}", "prefix and end are not put by `encode`")
        self.check(tokenizer.decode([]) == "", f"no ids gave {tokenizer.decode([])!r}", "no ids, no text")

    def test_a_long_text(self) -> None:
        tokenizer = self.made()
        text = " ".join(self.texts)
        text = text * (LONG // len(text) + 1)
        (ids,) = tokenizer.encode([text])
        back = tokenizer.decode(ids)
        if self.lossless:
            self.check(back == text, f"{len(text):,} characters came back as {len(back):,}", "length has no limit")
        self.check(len(ids) * 8 >= len(text) / 8, f"{len(text):,} characters gave {len(ids)} ids", "nothing is cut off")

    def test_any_ids_decode(self) -> None:
        """Generation may stop anywhere, within a character too."""
        tokenizer = self.made()
        size = tokenizer.vocab_size
        for i in {*range(min(size, 600)), size // 2, size - 1}:
            self.check(isinstance(tokenizer.decode([i]), str), f"id {i} decoded to no text", "any id decodes")
        for ids in tokenizer.encode(self.texts):
            for n in range(min(len(ids), 40)):
                self.check(isinstance(tokenizer.decode(ids[:n]), str), f"{ids[:n]} is no text", "any ids decode")

    def test_end_stop_and_prefix_ids_agree(self) -> None:
        t = self.made()
        given = f"end_id {t.end_id}, stop_ids {t.stop_ids}, prefix_ids {t.prefix_ids}, vocab_size {t.vocab_size}"
        kinds = isinstance(t.stop_ids, tuple) and isinstance(t.prefix_ids, tuple)
        self.check(kinds, given, "stop_ids and prefix_ids are tuples")
        self.check(t.end_id in t.stop_ids, given, "stop_ids holds end_id")
        ids = (t.end_id, *t.stop_ids, *t.prefix_ids)
        self.check(all(type(i) is int and 0 <= i < t.vocab_size for i in ids), given, "ids of the vocabulary")

    def test_fingerprint_tells_vocabularies_apart(self) -> None:
        first, again, other = self.made(), self.made(), self.made(self.texts[: len(self.texts) // 2])
        self.check(bool(first.fingerprint), "the fingerprint is empty", "it stands for the vocabulary")
        told = f"made twice from the same texts: {first.fingerprint!r} and {again.fingerprint!r}"
        self.check(first.fingerprint == again.fingerprint, told, "the same texts give the same fingerprint")
        self.check(first.encode(self.texts) == again.encode(self.texts), "made twice, ids differ", "the same ids, too")
        if first.encode(self.texts) != other.encode(self.texts):
            told = f"other ids, one fingerprint: {first.fingerprint!r}"
            self.check(first.fingerprint != other.fingerprint, told, "it changes whenever a text could give other ids")

    def test_threads_do_not_disturb_each_other(self) -> None:
        tokenizer = self.made()
        texts = [*self.texts, *tokenizer.special_texts]
        jobs = [(text, markup) for text in texts for markup in (False, True)] * 8

        def encode(job: tuple[str, bool]) -> list[int]:
            return tokenizer.encode([job[0]], markup=job[1])[0]

        alone = [encode(job) for job in jobs]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(encode, jobs))
        for (text, markup), a, b in zip(jobs, alone, together, strict=True):
            self.check(
                a == b, f"{text!r} (markup {markup}) gave {b} beside other threads, {a} alone", "threads may share"
            )

    def test_chat_template(self) -> None:
        tokenizer, messages = self.made(), [{"role": "user", "content": "Where is the mill?"}]
        if not tokenizer.has_chat_template:
            try:
                told = tokenizer.chat(messages, answer_next=True)
            except ModelError:
                return
            self.check(False, f"chat gave {told!r}", "without a template (has_chat_template) chat raises ModelError")
        text = tokenizer.chat(messages, answer_next=True)
        self.check(messages[0]["content"] in text, f"chat gave {text!r}", "the template holds the message")

    def test_saved_folder_opens_in_transformers(self, tmp_path: Path) -> None:
        if self.not_in_transformers:
            raise SkipTest(f"not opened in transformers: {self.not_in_transformers}")
        tokenizer = self.made()
        tokenizer.save(tmp_path)
        from transformers import AutoTokenizer

        try:
            opened: Any = AutoTokenizer.from_pretrained(str(tmp_path))
        except Exception as e:
            written = sorted(path.name for path in tmp_path.iterdir())
            raise AssertionError(self.told(f"saved {written}: {e}", "`save` writes what AutoTokenizer opens")) from e
        plain = [text for text in self.texts if not any(s in text for s in tokenizer.special_texts)]
        marked = [f"a{s}b" for s in tokenizer.special_texts]
        for text, ids in zip(
            [*plain, *marked], [*tokenizer.encode(plain), *tokenizer.encode(marked, markup=True)], strict=True
        ):
            other = opened.encode(text, add_special_tokens=False)
            self.check(other == ids, f"{text!r}: {ids} here, {other} in transformers", "the same ids there")
        end = opened.eos_token_id
        self.check(end == tokenizer.end_id, f"end_id {tokenizer.end_id}, eos_token_id {end}", "the same end there")

    def test_what_it_kept_gives_the_same_again(self, tmp_path: Path) -> None:
        first = self.made(kept=tmp_path)
        again = self.made(kept=tmp_path)
        same = first.fingerprint == again.fingerprint and first.encode(self.texts) == again.encode(self.texts)
        self.check(same, "made again beside what it kept, it differs", "`kept` spares the work and changes nothing")

    # ------------------------------------------------------------ helpers

    def planned(self) -> int:
        return self.bound(Tokenizers).vocab_size(data_bytes=sum(len(t.encode()) for t in self.texts)).value

    def made(self, texts: Sequence[str] | None = None, kept: Path | None = None) -> Tokenizer:
        """The tokenizer, made as a run makes it."""
        given = self.texts if texts is None else texts
        return self.bound(Tokenizers).make(texts=lambda: iter(given), vocab_size=self.planned(), kept=kept)

    def special_ids(self, tokenizer: Tokenizer) -> set[int]:
        marked = tokenizer.encode(tokenizer.special_texts, markup=True) if tokenizer.special_texts else []
        alone = {ids[0] for ids in marked if len(ids) == 1}
        return {*alone, tokenizer.end_id, *tokenizer.stop_ids, *tokenizer.prefix_ids}
