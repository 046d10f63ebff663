"""What a person can get wrong in a recipe: each mistake ends in one message with its place and exit code 2, before torch.

`python tests/core/test_bad_recipes.py` runs each case in a process of its own and prints how long the slowest took.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

DATA, MODEL = "data: {path: docs}\n", "model: {use: preset, size: tiny}\n"
BASE = DATA + MODEL  # what a case adds begins in line 3
ABSENT, FOLDER, HUGE = object(), object(), object()

# name: (recipe, how the message begins, settings...)
# fmt: off
CASES = {
    # the file
    "missing file": (ABSENT, "s.yaml: no such file"),
    "folder": (FOLDER, "docs: is a folder; name the recipe file in it"),
    "empty": ("", "r.yaml:1:1: data.path is missing: the file or folder of your documents"),
    "comments only": ("# nothing\n", "r.yaml:1:1: data.path is missing: the file or folder of your documents"),
    "list": ("- data\n", "r.yaml:1:1: got a list; a recipe is a mapping: data, model, train, ..."),
    "text": ("just words\n", "r.yaml:1:1: got 'just words'; a recipe is a mapping: data, model, train, ..."),
    "utf-16": (BASE.encode("utf-16"), "r.yaml:1:1: byte 0 is not UTF-8 (it looks like UTF-16); save the file as UTF-8"),
    "latin-1": (BASE.encode() + "# caf\u00e9\n".encode("latin-1"),
        "r.yaml:3:6: byte 57 is not UTF-8 (invalid continuation byte); save the file as UTF-8"),
    "zero byte": (BASE + "output_dir: a\0b\n", "r.yaml:3:14: character U+0000 is not allowed in YAML"),
    "mark and mistake": (b"\xef\xbb\xbf" + b"dta: 1\n", "r.yaml:1:1: unknown key 'dta'; did you mean 'data'? (allowed: "),
    "50 MB": (HUGE, "r.yaml: larger than 1 MB; a recipe is a short text"),
    "patience without evaluation": (BASE + "train:\n  early_stopping_patience: 2\n",
        "r.yaml:4:28: train.early_stopping_patience: data.eval_fraction is 0, so nothing is evaluated", "data.eval_fraction=0"),
    "two documents": (BASE + "---\nmodel: preset\n", "r.yaml:3:1: a second document begins; a recipe is one document"),
    "tab": (BASE + "train:\n\tseed: 1\n",
        "r.yaml:4:1: not valid YAML (while scanning for the next token, found character '\\t' that cannot star"),
    "tab after a key": (BASE + "train:\n  seed: 1\n\tbeta1: 0\n",
        "r.yaml:5:1: not valid YAML (while scanning for the next token, found character '\\t' that cannot star"),
    "indentation": (BASE + "train:\n  seed: 1\n   beta1: 0.9\n",
        "r.yaml:5:9: not valid YAML (mapping values are not allowed here): the indentation is off, or a value"),
    "no colon": (BASE + "train:\n  seed 1\n  beta1: 0.9\n",
        "r.yaml:5:8: not valid YAML (mapping values are not allowed here): the indentation is off, or a value"),
    "unclosed quote": (BASE + 'output_dir: "out\n',
        "r.yaml:3:13: not valid YAML (while scanning a quoted scalar, found unexpected end of stream): a quote that is not cl"),
    "unclosed bracket": (BASE + "callbacks: [metrics\ntrain: {seed: 1}\n",
        "r.yaml:4:6: not valid YAML (while parsing a flow sequence, expected ',' or ']', but got ':'): a brac"),
    "colon in a value": (BASE + "output_dir: a: b\n",
        "r.yaml:3:14: not valid YAML (mapping values are not allowed here): the indentation is off, or a valu"),
    "5,000 brackets": (BASE + "callbacks: " + "["*5000 + "]"*5000 + "\n", "r.yaml:3:43: nested deeper than 32 levels"),
    "5,000 braces": (BASE + "train: " + "{a: "*5000 + "1" + "}"*5000 + "\n", "r.yaml:3:132: nested deeper than 32 levels"),
    "deep blocks": (BASE + "train:\n" + "".join(" "*i + "a:\n" for i in range(1,200)),
        "r.yaml:35:33: nested deeper than 32 levels"),
    "anchor": (BASE + "train: &t {seed: 1}\n", "r.yaml:3:8: anchor &t is not allowed; write the value out where it is needed"),
    "alias": (BASE + "callbacks: [*m]\n", "r.yaml:3:13: alias *m is not allowed; write the value out"),
    "merge": (BASE + "train:\n  <<: {seed: 1}\n", "r.yaml:4:3: merge key << is not allowed; write the keys out"),
    "tag": (BASE + "train: !!python/object/apply:os.system ['true']\n",
        "r.yaml:3:8: tag tag:yaml.org,2002:python/object/apply:os.system is not allowed; a recipe holds plain data"),
    "duplicate section": (BASE + "model: preset\n", "r.yaml:3:1: key 'model' appears twice (first at line 2); keep one"),
    "duplicate key": (BASE + "train:\n  seed: 1\n  beta1: 0.9\n  seed: 2\n",
        "r.yaml:6:3: key 'seed' appears twice (first at line 4); keep one"),
    "key is a number": (BASE + "1: x\n", "r.yaml:3:1: key 1 must be a string; put quotes around it"),
    "key is a list": (BASE + "? [a]\n: 1\n", "r.yaml:3:3: a key must be a string, not a list or mapping"),
    "not a number": (BASE + "train: {learning_rate: .nan}\n",
        "r.yaml:3:24: .nan: numbers must be finite; leave the key out or use null where that is allowed"),
    "infinite": (BASE + "train: {learning_rate: .inf}\n",
        "r.yaml:3:24: .inf: numbers must be finite; leave the key out or use null where that is allowed"),
    "1e999": (BASE + "train: {learning_rate: 1e999}\n", "r.yaml:3:24: 1e999: this number is too large"),
    "5,000 digits": (BASE + "train: {seed: " + "9"*5000 + "}\n",
        "r.yaml:3:15: 9999999999999999999999999999999999999999: an integer of more than 4,000 digits is not allowed"),
    "surrogate": (BASE + 'output_dir: "\\ud800"\n',
        "r.yaml:3:13: half of a surrogate pair is no character; write the character itself"),
    # keys
    "unknown section": (BASE + "trian: {seed: 1}\n", "r.yaml:3:1: unknown key 'trian'; did you mean 'train'? (allowed: "),
    "unknown key of data": ("data: {path: docs, max_sequence_length: 64}\n" + MODEL,
        "r.yaml:1:20: data: unknown key 'max_sequence_length'; did you mean 'max_seq_length'? (allowed: "),
    "unknown key of train": (BASE + "train: {lerning_rate: 1e-4}\n",
        "r.yaml:3:9: train: unknown key 'lerning_rate'; did you mean 'learning_rate'? (allowed: "),
    "unknown key of generate": (BASE + "generate: {promts: [a]}\n",
        "r.yaml:3:12: generate: unknown key 'promts'; did you mean 'prompts'? (allowed: "),
    "unknown option": (DATA + "model: {use: preset, sise: tiny}\n",
        "r.yaml:2:22: model: unknown key 'sise'; did you mean 'size'? (allowed: "),
    "unknown option of a list item": ("data:\n  path: docs\n  readers:\n    - json\n    - {use: txt, encodign: latin-1}\n" + MODEL,
        "r.yaml:5:18: data.readers[1]: unknown key 'encodign'; did you mean 'encoding'? (allowed: "),
    "unknown operation": (BASE + "kernels: {atention: torch}\n",
        "r.yaml:3:11: kernels: unknown operation 'atention'; did you mean 'attention'? (allowed: "),
    "several at once": ("data: {pth: docs}\nmodel: 3\ntrain: {seed: x, beta1: 2}\n",
        "r.yaml:2:8: model: got 3, expected a component's name or `{use: NAME, ...its options}`"),
    "Use": (DATA + "model: {Use: preset}\n",
        "r.yaml:2:8: model: 'use' is missing: the component's name ('Use' is given; did you mean 'use'?)"),
    # values
    "section is a number": (BASE + "train: 3\n", "r.yaml:3:8: train: got 3, expected mapping"),
    "section is a list": (BASE + "train: [seed, 1]\n", "r.yaml:3:8: train: got a list, expected mapping"),
    "section is null": (BASE + "train: null\n", "r.yaml:3:8: train: got null, expected mapping"),
    "path is a list": ("data: {path: [docs]}\n" + MODEL, "r.yaml:1:14: data.path: got a list, expected string or null"),
    "text for a number": (BASE + "train: {learning_rate: fast}\n",
        "r.yaml:3:24: train.learning_rate: got 'fast', expected number"),
    "on for a number": (BASE + "train: {learning_rate: on}\n", "r.yaml:3:24: train.learning_rate: got 'on', expected number"),
    "yes for a boolean": ("data: {path: docs, concatenate_documents: yes}\n" + MODEL,
        "r.yaml:1:43: data.concatenate_documents: got 'yes', expected true or false"),
    "quoted number": (BASE + 'train: {seed: "7"}\n', "r.yaml:3:15: train.seed: got '7', expected integer"),
    "fraction for a count": (BASE + "train: {max_steps: 2.5}\n",
        "r.yaml:3:20: train.max_steps: got 2.5, expected integer or null"),
    "5e-5 for a count": (BASE + "train: {save_steps: 5e-5}\n", "r.yaml:3:21: train.save_steps: got 5e-05, expected integer"),
    "boolean for a count": (BASE + "train: {save_steps: true}\n", "r.yaml:3:21: train.save_steps: got true, expected integer"),
    "null for a count": (BASE + "train: {save_steps: null}\n", "r.yaml:3:21: train.save_steps: got null, expected integer"),
    "negative": (BASE + "train: {weight_decay: -0.1}\n", "r.yaml:3:23: train.weight_decay: got -0.1, at least 0"),
    "zero": (BASE + "train: {learning_rate: 0}\n", "r.yaml:3:24: train.learning_rate: got 0.0, above 0"),
    "zero steps": (BASE + "train: {save_steps: 0}\n", "r.yaml:3:21: train.save_steps: got 0, at least 1"),
    "too large a seed": (BASE + "train: {seed: 9223372036854775808}\n",
        "r.yaml:3:15: train.seed: got 9223372036854775808, below 9223372036854775808"),
    "number in a list of texts": (BASE + "generate: {prompts: [a, 1]}\n",
        "r.yaml:3:25: generate.prompts[1]: got 1, expected string"),
    "empty stop": (BASE + 'generate: {stop: ""}\n',
        "r.yaml:3:18: generate.stop: got '', an empty text, which would end every answer before it begins"),
    "misspelt choice": (BASE + "train: {lr_scheduler_type: cosin}\n",
        "r.yaml:3:28: train.lr_scheduler_type: got 'cosin'; did you mean 'cosine'? (allowed: "),
    "on for a choice": (BASE + "train: {mixed_precision: on}\n", "r.yaml:3:26: train.mixed_precision: got 'on' (allowed: "),
    "overlap": ("data: {path: docs, max_seq_length: 64, chunk_overlap: 64}\n" + MODEL,
        "r.yaml:1:55: data.chunk_overlap: got 64, below max_seq_length (64)"),
    "longer than the model": ("data: {path: docs, max_seq_length: 5000}\n" + MODEL,
        "r.yaml:1:36: data.max_seq_length: got 5000, at most 4096 (what preset was made for)"),
    # components
    "no model": (DATA, "r.yaml:1:1: model is missing: e.g. `model: {use: preset, size: tiny}` for a new model, or `model: {u"),
    "no data": (MODEL, "r.yaml:1:1: data.path is missing: the file or folder of your documents"),
    "null model": (DATA + "model:\n",
        "r.yaml:1:1: model is missing: e.g. `model: {use: preset, size: tiny}` for a new model, or `model: {u"),
    "model is a number": (DATA + "model: 7\n",
        "r.yaml:2:8: model: got 7, expected a component's name or `{use: NAME, ...its options}`"),
    "model is a list": (DATA + "model: [preset]\n",
        "r.yaml:2:8: model: got a list, expected a component's name or `{use: NAME, ...its options}`"),
    "no use": (DATA + "model: {size: tiny}\n", "r.yaml:2:8: model: 'use' is missing: the component's name ('size' is given)"),
    "use is null": (DATA + "model: {use: }\n", "r.yaml:2:13: model.use: got null, expected a component's name"),
    "empty name": (DATA + 'model: ""\n',
        "r.yaml:2:8: model: got '', expected a component's name or `{use: NAME, ...its options}`"),
    "unknown model": (DATA + "model: {use: prset, size: tiny}\n",
        "r.yaml:2:14: model.use: nothing installed in models is named 'prset'; did you mean 'preset'? (installed: "),
    "unknown reader": ("data: {path: docs, readers: [txt, jsnol]}\n" + MODEL,
        "r.yaml:1:35: data.readers[1]: nothing installed in readers is named 'jsnol'; did you mean 'jsonl'? (installed: "),
    "unknown extractor": ("data: {path: docs, extractors: feilds}\n" + MODEL,
        "r.yaml:1:32: data.extractors: nothing installed in extractors is named 'feilds'; did you mean 'fields'? (installed: "),
    "unknown tokenizer": (BASE + "tokenizer: bpee\n",
        "r.yaml:3:12: tokenizer: nothing installed in tokenizers is named 'bpee'; did you mean 'bpe'? (installed: "),
    "unknown kernel": (BASE + "kernels: {attention: trch}\n",
        "r.yaml:3:22: kernels.attention: nothing installed in kernels is named 'trch'; did you mean 'torch'? (installed: "),
    "unknown strategy": (BASE + "parallel: sinlge\n",
        "r.yaml:3:11: parallel: nothing installed in parallel is named 'sinlge'; did you mean 'single'? (installed: "),
    "unknown callback": (BASE + "callbacks: [metrics, progres]\n",
        "r.yaml:3:22: callbacks[1]: nothing installed in callbacks is named 'progres'; did you mean 'progress'? (installed: "),
    "auto callback": (BASE + "callbacks: auto\n",
        "r.yaml:3:12: callbacks: `auto` chooses nothing here; name the callbacks that you want (installed: "),
    "unknown distribution": (DATA + "model: nanovlm/preset\n",
        "r.yaml:2:8: model: nothing installed in models is named 'nanovlm/preset'; did you mean 'nanovllm/preset'? (installed: "),
    "kind in the name": (DATA + "model: models:preset\n",
        "r.yaml:2:8: model: nothing installed in models is named 'models:preset'; did you mean 'preset'? (installed: "),
    "option of another type": (DATA + "model: {use: preset, tied: on}\n",
        "r.yaml:2:28: model.tied: got 'on', expected true or false"),
    "option out of bounds": (BASE + "tokenizer: {use: nanovllm/bpe, size: 10}\n",
        "r.yaml:3:38: tokenizer.size: got 10, between 258 and 1000000"),
    "size 5e2": (BASE + "tokenizer: {use: nanovllm/bpe, size: 5e2}\n",
        "r.yaml:3:38: tokenizer.size: got 500.0, expected integer or null"),
    "misspelt size": (DATA + "model: {use: preset, size: smal}\n",
        "r.yaml:2:28: model.size: got 'smal'; did you mean 'small'? (allowed: "),
    "options that do not go together": (DATA + "model: {use: preset, size: tiny, kv_heads: 3}\n",
        "r.yaml:2:8: model: kv_heads 3 does not divide the 4 heads of size tiny"),
    "missing option": (BASE + "tokenizer: hf\n", "r.yaml:3:12: tokenizer: 'path' is missing (model folder or hub name)"),
    "no option taken": (BASE + "kernels: {use: torch, fast: true}\n", "r.yaml:3:23: kernels: unknown key 'fast' (allowed: "),
    "option's own check": ("data: {path: docs, readers: {use: txt, encoding: utf-9}}\n" + MODEL,
        "r.yaml:1:50: data.readers.encoding: got 'utf-9', expected a text encoding that Python knows, such as utf-8 or latin-1"),
    "option of no reader": ("data: {path: docs, readers: {use: auto, encodign: x}}\n" + MODEL,
        "r.yaml:1:29: data.readers: no component can be used:"),
    "kernel for what the model leaves out": (DATA + "model: deaf\nkernels: {swiglu: torch}\n",
        "r.yaml:3:11: kernels: torch is named for an operation that model deaf does not call (it calls: embed"),
    "broken": ("data: {path: docs, readers: broken}\n" + MODEL,
        "r.yaml:1:29: data.readers: readers:broken from strange-tools 1.5: does not import: OSError: no licence file"),
    "stale": ("data: {path: docs, readers: [txt, stale]}\n" + MODEL,
        "r.yaml:1:35: data.readers[1]: readers:stale from strange-tools 1.5: does not import: ModuleNotFoundErr"),
    "newer level": (BASE + "callbacks: newer\n",
        "r.yaml:3:12: callbacks: callbacks:newer from strange-tools 1.5: Newer is written for API level 2 of cal"),
    "options that do not resolve": (BASE + "parallel: unresolved\n",
        "r.yaml:3:11: parallel: parallel:unresolved from strange-tools 1.5: strange_tools:Unresolved: the types of its option"),
    "default that fails": (BASE + "parallel: failing\n",
        "r.yaml:3:11: parallel: parallel:failing from strange-tools 1.5: strange_tools:Failing: the default of its opt"),
    "ambiguous": (BASE + "tokenizer: {use: bpe, size: 300}\n",
        "r.yaml:3:18: tokenizer.use: tokenizers 'bpe' is offered by several distributions; write one of nanov"),
    "refusing model": (DATA + "model: refusing\n", "r.yaml:2:8: model: refusing refuses: needs a licence"),
    "refusing kernel": (BASE + "kernels: {attention: refusing}\n",
        "r.yaml:3:22: kernels.attention: refusing refuses: needs a unit that is not here"),
    "refusing strategy": (BASE + "parallel: {use: refusing}\n",
        "r.yaml:3:11: parallel: refusing refuses: needs a unit that is not here"),
    # paths
    "no such documents": ("data: {path: dosc}\n" + MODEL,
        "r.yaml:1:14: data.path: 'dosc' is neither a file nor a folder, and no reader takes it; did you mean 'docs'?"),
    "zero byte in a path": ('data: {path: "a\\0b"}\n'+MODEL,
        "r.yaml:1:14: data.path: 'a\\x00b' is neither a file nor a folder, and no reader takes it"),
    "long path": ("data: {path: " + "x"*300 + "}\n" + MODEL,
        "r.yaml:1:14: data.path: 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx... is neither a fi"),
    "no such model folder": (DATA + "model: {use: pretrained, path: ./nowhere}\n",
        "r.yaml:2:8: model: pretrained refuses: ./nowhere: no such folder"),
    "a file for a model folder": (DATA + "model: {use: pretrained, path: docs/a.txt}\n",
        "r.yaml:2:8: model: pretrained refuses: docs/a.txt: is a file; a model is named by its folder (with c"),
    "empty model folder": (DATA + "model: {use: pretrained, path: docs}\n", "r.yaml:2:8: model: pretrained refuses: "),
    "empty name of a model": (DATA + 'model: {use: pretrained, path: ""}\n',
        "r.yaml:2:8: model: pretrained refuses: a model's name is empty (''); give its folder or its hub name"),
    "long path of a model": (DATA + "model: {use: pretrained, path: " + "x"*300 + "}\n",
        "r.yaml:2:32: model.path: got 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'..., whic"),
    "no such tokenizer folder": (BASE + "tokenizer: {use: hf, path: ./nowhere}\n",
        "r.yaml:3:12: tokenizer: ./nowhere: no such folder"),
    "output is a file": (BASE + "output_dir: docs/a.txt\n", "r.yaml:3:13: output_dir: got 'docs/a.txt', but "),
    "output under a file": (BASE + "output_dir: docs/a.txt/deeper\n", "r.yaml:3:13: output_dir: got 'docs/a.txt/deeper', but "),
    "output holds the documents": (BASE + "output_dir: .\n", "r.yaml:1:14: data.path: "),
    "output is the documents": (BASE + "output_dir: docs\n", "r.yaml:1:14: data.path: "),
    "output of a number": (BASE + "output_dir: 7\n", "r.yaml:3:13: output_dir: got 7, expected string"),
    "home of nobody": (BASE + "output_dir: ~nobody-here/out\n",
        "r.yaml:3:13: output_dir: got '~nobody-here/out', which cannot be a path (Could not determine home directory.)"),
    # settings
    "set: no value": (BASE, "--set train.seed: expected KEY=VALUE, e.g. --set train.learning_rate=1e-4", "train.seed"),
    "set: unknown section": (BASE, "--set trian.seed=1: unknown key 'trian'; did you mean 'train'? (allowed: ", "trian.seed=1"),
    "set: unknown key": (BASE,
        "--set train.lerning_rate=1: train: unknown key 'lerning_rate'; did you mean 'learning_rate'?", "train.lerning_rate=1"),
    "set: wrong type": (BASE, "--set train.seed=x: train.seed: got 'x', expected integer", "train.seed=x"),
    "set: negative": (BASE, "--set train.max_steps=-1: train.max_steps: got -1, at least 1", "train.max_steps=-1"),
    "set: bad yaml": (BASE,
        "--set train={seed: [: value:1:9: not valid YAML (while parsing a flow node, expected the node conten", "train={seed: ["),
    "set: unknown component": (BASE,
        "--set model.use=prset: model: nothing installed in models is named 'prset'; did you mean 'preset'", "model.use=prset"),
    "set: unknown option": (BASE,
        "--set model.sise=tiny: model: unknown key 'sise'; did you mean 'size'? (allowed: ", "model.sise=tiny"),
    "set: choice": (BASE, "--set model.size=huge: model.size: got 'huge' (allowed: ", "model.size=huge"),
    "set: option of a list item": (BASE,
        "--set data.readers.0.x=1: data.readers: no component can be used:", "data.readers.0.x=1"),
    "set: item": (BASE,
        "--set callbacks.7=metrics: callbacks is a list of 2; give a number from 0 to 2", "callbacks.7=metrics"),
    "set: operation": (BASE,
        "--set kernels.atention=torch: kernels: unknown operation 'atention'; did you mean 'attenti", "kernels.atention=torch"),
    "set: into a value": (BASE, "--set train.seed.x=1: train.seed is a single value and holds no 'x'", "train.seed.x=1"),
    "set: path": (BASE,
        "--set data.path=dosc: data.path: 'dosc' is neither a file nor a folder, and no reader takes it; di", "data.path=dosc"),
}
# fmt: on
NEED_TORCH = ("refusing kernel", "refusing strategy")  # they are asked about this machine

STRANGERS = """
from typing import ClassVar
from attrs import field, frozen
from nanovllm_core.contracts import Accept, Refuse, Shape
from nanovllm_core.hookspecs import hookimpl


@frozen(kw_only=True, eq=False)
class Newer:
    nanovllm_api: ClassVar[int] = 2
    @hookimpl
    def note(self, text): ...


@frozen(kw_only=True, eq=False)
class Strategy:
    @hookimpl
    def probe(self, request): return Refuse("needs a unit that is not here")
    @hookimpl
    def parallelize(self, module, layout, mesh): ...


@frozen(kw_only=True, eq=False)
class Failing(Strategy):
    x: int = field(factory=lambda: 1 // 0)


@frozen(kw_only=True, eq=False)
class Unresolved(Strategy):
    x: "Decimal" = 1


@frozen(kw_only=True, eq=False)
class Kernel:
    @hookimpl
    def probe(self, request): return Refuse("needs a unit that is not here")
    @hookimpl
    def load(self, request): ...


@frozen(kw_only=True, eq=False)
class Twin:
    @hookimpl
    def vocab_size(self, data_bytes): ...
    @hookimpl
    def make(self, texts, vocab_size): ...


@frozen(kw_only=True, eq=False)
class Refusing:
    @hookimpl
    def probe(self): return Refuse("needs a licence")
    @hookimpl
    def tokenizer(self): return {"use": "nanovllm/bpe"}
    @hookimpl
    def shape(self, vocab_size):
        return Shape(family="deaf", vocab_size=vocab_size, layers=1, hidden=8, heads=1, kv_heads=1, head_dim=8,
                     intermediate=8, tied=True, max_positions=4096, parameters=8 * vocab_size,
                     operations=("embedding", "linear_cross_entropy"))
    @hookimpl
    def build(self, shape, ops): ...
    @hookimpl
    def weight(self, shape, name, seed): ...
    @hookimpl
    def config(self, shape): ...


@frozen(kw_only=True, eq=False)
class Deaf(Refusing):
    @hookimpl
    def probe(self): return Accept()
"""
POINTS = {
    "nanovllm.readers": {"broken": "strange_broken:Part", "stale": "strange_absent:Part"},
    "nanovllm.callbacks": {"newer": "strange_tools:Newer"},
    "nanovllm.parallel": {
        "refusing": "strange_tools:Strategy",
        "failing": "strange_tools:Failing",
        "unresolved": "strange_tools:Unresolved",
    },
    "nanovllm.kernels": {"refusing": "strange_tools:Kernel"},
    "nanovllm.models": {"refusing": "strange_tools:Refusing", "deaf": "strange_tools:Deaf"},
    "nanovllm.tokenizers": {"bpe": "strange_tools:Twin"},
}


def lay_out(folder):
    """Documents, and beside them the distribution of a stranger."""
    (folder / "docs").mkdir()
    (folder / "docs" / "a.txt").write_text("a river runs past a mill\n")
    site = folder / "site"
    info = site / "strange_tools-1.5.dist-info"
    info.mkdir(parents=True)
    (site / "strange_tools.py").write_text(STRANGERS)
    (site / "strange_broken.py").write_text("raise OSError('no licence\\nfile')")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strange-tools\nVersion: 1.5\n")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in named.items()) for group, named in POINTS.items()]
    (info / "entry_points.txt").write_text("".join(lines))


def command(name):
    """The arguments of a case, whose recipe is written here."""
    recipe, _, *sets = CASES[name]
    file = "docs" if recipe is FOLDER else "r.yaml"
    if recipe is HUGE:
        Path(file).write_bytes(b"#" * 50_000_000)
    elif isinstance(recipe, str | bytes):
        Path(file).write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    elif recipe is ABSENT:
        file = "s.yaml"
    return ["run", file, *(part for text in sets for part in ("--set", text))]


def run_all(folder):
    """Every case, one after another, in this process: exit code, both streams, whether torch was imported."""
    from nanovllm_core.cli import main

    os.chdir(folder)
    sys.path.insert(0, str(folder / "site"))
    told = {}
    for name in sorted(CASES, key=lambda n: n in NEED_TORCH):
        Path("r.yaml").unlink(missing_ok=True)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(command(name))
        told[name] = (code, out.getvalue(), err.getvalue(), "torch" in sys.modules)
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    lay_out(folder)
    code = (
        f"import json, runpy, sys; from pathlib import Path; run = runpy.run_path({__file__!r})['run_all']; "
        f"print(json.dumps(run(Path({str(folder)!r}))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in folder.iterdir()} <= {"docs", "site", "r.yaml"}  # no run began
    return json.loads(done.stdout.splitlines()[-1])


def test_there_are_enough():
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_message_with_its_place_and_exit_code_2(told, name):
    code, out, err, torch = told[name]
    assert code == 2
    assert out == ""
    assert err.startswith(f"nanovllm: {CASES[name][1]}")
    assert "Traceback" not in err
    assert len(err) < 4000
    assert not torch or name in NEED_TORCH


UNSEEN = {  # by a schema: it knows no files, no machine, no two options together, no validator of one's own
    "empty", "comments only", "no model", "no data", "null model", "overlap", "longer than the model", "empty stop",
    "options that do not go together", "option's own check", "option of no reader", "refusing model", "refusing kernel",
    "refusing strategy", "kernel for what the model leaves out", "no such documents", "zero byte in a path", "long path",
    "no such model folder", "a file for a model folder", "empty model folder", "empty name of a model",
    "long path of a model", "no such tokenizer folder", "output is a file", "output under a file",
    "output holds the documents", "output is the documents", "home of nobody",
    "size 5e2",  # to a schema 500.0 is an integer
}  # fmt: skip


def test_a_schema_refuses_what_it_can_see(tmp_path):
    from jsonschema import Draft202012Validator

    from nanovllm_core.errors import RecipeError
    from nanovllm_core.yamltext import parse

    lay_out(tmp_path)
    command = [sys.executable, "-m", "nanovllm_core.cli", "schema"]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.stderr == "nanovllm: 5 broken components are left out; `nanovllm plugins` says why\n"
    validator = Draft202012Validator(json.loads(done.stdout))
    assert validator.is_valid(parse(BASE, "f").data)
    accepted = set()
    for name, (recipe, _, *sets) in CASES.items():
        if isinstance(recipe, str) and not sets:
            try:
                data = parse(recipe, "f").data
            except RecipeError:
                continue
            if validator.is_valid({} if data is None else data):
                accepted.add(name)
    assert accepted == UNSEEN


@pytest.mark.parametrize(
    ("recipe", "at", "value"),
    [
        (b"\xef\xbb\xbf" + BASE.encode(), ("data", "path"), "docs"),
        (BASE + "train: {learning_rate: 5e-5}\n", ("train", "learning_rate"), 5e-5),
        (BASE + "train: {learning_rate: 1}\n", ("train", "learning_rate"), 1.0),
        (BASE + "train: {seed: 012, save_steps: 0x10}\n", ("train", "seed"), 12),
        (BASE + "output_dir: on\n", ("output_dir",), "on"),
        (BASE + "output_dir: 5e-5x\n", ("output_dir",), "5e-5x"),
        (BASE.replace("\n", "\r\n"), ("data", "path"), "docs"),
        ("%YAML 1.2\n---\n" + BASE, ("data", "path"), "docs"),
    ],
)
def test_what_is_no_mistake(tmp_path, recipe, at, value):
    from nanovllm_core.recipe import Recipe

    path = tmp_path / "r.yaml"
    path.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    found = Recipe.load(path)
    for part in at:
        found = getattr(found, part)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0, reason="root may read every file, Windows has other permissions"
)
def test_a_recipe_that_may_not_be_read(tmp_path, capsys):
    from nanovllm_core.cli import main

    (tmp_path / "r.yaml").write_text(BASE)
    (tmp_path / "r.yaml").chmod(0)
    assert main(["run", str(tmp_path / "r.yaml")]) == 2
    assert "r.yaml: cannot be read (Permission denied)" in capsys.readouterr().err


def measure():
    """How long each case takes, from the start of its process to the end."""
    with tempfile.TemporaryDirectory() as made:
        lay_out(Path(made))
        os.chdir(made)
        env = os.environ | {"PYTHONPATH": "site", "HF_HUB_OFFLINE": "1"}
        seconds = {}
        for name in CASES:
            Path("r.yaml").unlink(missing_ok=True)
            arguments, began = command(name), time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "nanovllm_core.cli", *arguments], env=env, capture_output=True)
            seconds[name] = time.perf_counter() - began
            assert done.returncode == 2, name
    for name in sorted(seconds, key=lambda n: -seconds[n])[:6]:
        print(f"{seconds[name]:.2f} s  {name}")


if __name__ == "__main__":
    measure()
