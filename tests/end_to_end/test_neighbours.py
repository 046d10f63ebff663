"""Strangers' distributions that are broken in every way: each is listed with its reason, and nobody else is touched."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from nanovllm_core.registry import Registry

HEAD = """
from typing import ClassVar
from attrs import field, frozen
from nanovllm_core.contracts import Accept, Refuse
from nanovllm_core.hookspecs import hookimpl
"""
READER = """
@frozen(kw_only=True, eq=False)
class Part:
    '''A sound reader.'''
    {options}
    @hookimpl
    def probe(self, source): {probe}
    @hookimpl
    def read(self, source): return iter(())
"""


def reader(options="", probe="return Refuse('not mine')"):
    return HEAD + READER.format(options=options or "pass", probe=probe)


def hooks(*methods, decorator="@frozen(kw_only=True, eq=False)"):
    body = "\n".join(f"    @hookimpl\n    {method}" for method in methods)
    return f"{HEAD}\n{decorator}\nclass Part:\n    '''Strange.'''\n{body}\n"


PROBE, READ = "def probe(self, source): return Refuse('no')", "def read(self, source): return iter(())"

# name of the distribution: (kind, name of the component, source of its module, what its row says)
BROKEN = {
    "raises": (
        "readers",
        "raises",
        "raise ValueError('no licence\\nfile')",
        "does not import: ValueError: no licence file",
    ),
    "unspeakable": ("readers", "unspeakable", "class E(Exception):\n def __str__(self): 1 / 0\nraise E", "import: E"),
    "exits": ("kernels", "exits", "raise SystemExit(3)", "does not import: SystemExit: 3"),
    "base": ("parallel", "base", "class Stop(BaseException): pass\nraise Stop('now')", "does not import: Stop: now"),
    "recurses": ("readers", "recurses", "def f(): f()\nf()", "does not import: RecursionError"),
    "hangs": ("extractors", "hangs", "while True: pass", "its import does not end within 1 s"),
    "sleeps": (
        "tokenizers",
        "sleeps",
        "import time\ntry: time.sleep(60)\nexcept Exception: pass",
        "does not end within 1 s",
    ),
    "syntax": ("readers", "syntax", "def part(:", "does not import: SyntaxError"),
    "stale": ("models", "stale", None, "does not import: ModuleNotFoundError: No module named 'hostile_stale'"),
    "emptied": ("models", "emptied", "Prt = 1", "does not import: AttributeError"),
    "others": ("models", "others", reader(), "has a hook 'read' that models do not have"),
    "typo": (
        "readers",
        "typo",
        hooks(PROBE, "def raed(self, source): ..."),
        "'raed' that readers do not have; did you mean",
    ),
    "missing": ("readers", "missing", hooks(PROBE), "lacks the hook 'read'"),
    "keyword": ("readers", "keyword", hooks(PROBE, "def read(self, *, source): ..."), "takes 'source' in a way"),
    "default": ("readers", "default", hooks(PROBE, "def read(self, source=None): ..."), "gives 'source' a default"),
    "generator": ("readers", "generator", hooks(PROBE, "def read(self, source): yield 1"), "is a generator function"),
    "plain": ("readers", "plain", hooks(PROBE, READ, decorator=""), "is not an attrs class"),
    "number": ("readers", "number", "Part = 7", "int is not an attrs class"),
    "equal": ("readers", "equal", hooks(PROBE, READ, decorator="@frozen(kw_only=True)"), "compares by value"),
    "typing": ("readers", "typing", reader("x: 'Decimal' = 1"), "types of its options cannot be resolved"),
    "failing": (
        "readers",
        "failing",
        reader("x: int = field(factory=lambda: 1 // 0)"),
        "default of its option 'x' fails",
    ),
    "newer": ("readers", "newer", reader("nanovllm_api: ClassVar[int] = 9"), "is written for API level 9 of readers"),
    "blind": (
        "readers",
        "blind",
        "class M(type):\n def __getattribute__(c, n): raise OSError(n)\nclass Part(metaclass=M): pass",
        "its class cannot be looked at (OSError",
    ),
    "slash": ("readers", "nanovllm/txt", reader(), "its name 'nanovllm/txt' cannot be written in a recipe"),
    "nameless": ("readers", "", reader(), "its name '' cannot be written"),
    "colon": ("readers", "a:b", reader(), "its name 'a:b' cannot be written"),
    "spaces": ("readers", "my reader", reader(), "its name 'my reader' cannot be written"),
    "reserved": ("readers", "auto", reader(), "its name 'auto' has a meaning of its own"),
    "kind": ("reader", "kind", reader(), "nanovllm.reader is no group of components; did you mean 'readers'?"),
}
SOUND = {  # but not harmless
    "printing": ("readers", "printing", "print('BUY NOW')\n" + reader(), ""),
    "quitting": ("readers", "quitting", reader(probe="raise SystemExit(1)"), ""),
    "nonsense": ("readers", "nonsense", reader(probe="return 17"), ""),
    "escapes": ("readers", "escapes", reader().replace("A sound", "\\x1b[2JA \\u202e"), ""),
}
COLLIDING = {
    "twin-bpe": ("tokenizers", "bpe", hooks("def vocab_size(self, data_bytes): ...", "def make(self, texts): ..."), ""),
    "twin-fields": ("extractors", "fields", hooks("def extract(self, record): ..."), ""),
    "twin-progress": ("callbacks", "progress", hooks("def note(self, text): ..."), ""),
    "twin-one": ("callbacks", "both", hooks("def note(self, text): ..."), ""),
    "twin-two": ("callbacks", "both", hooks("def note(self, text): ..."), ""),
}
FATAL = {  # only `--check` survives them, or sees them
    "ends": ("readers", "ends", "import os\nos._exit(0)", "ends its process (exit code 0) when it is imported"),
    "leaving": (
        "kernels",
        "leaving",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n1/0",
        "does not import: ZeroDivisionError",
    ),
    "crashes": (
        "readers",
        "crashes",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        "crashes its process (SIGSEGV)",
    ),
    "stubborn": (
        "readers",
        "stubborn",
        "import time\nwhile True:\n  try: time.sleep(9)\n  except BaseException: pass",
        "does not end within 1 s, and cannot be interrupted, when it is imported",
    ),
}


def lay_out(site, neighbours):
    """As pip lays distributions out: modules, and beside them their metadata."""
    site.mkdir(exist_ok=True)
    for name, (kind, component, source, _) in neighbours.items():
        module = f"hostile_{name.replace('-', '_')}"
        if source is not None:
            (site / f"{module}.py").write_text(source)
        describe(site, name, f"[console_scripts]\nx = y:z\n\n[nanovllm.{kind}]\n{component} = {module}:Part\n".encode())


def describe(
    site, name, points, metadata="Metadata-Version: 2.1\nName: {}\nVersion: 1.5\n\nName: of the description\n"
):
    info = site / f"hostile_{name}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(metadata.format(f"hostile-{name}"))
    (info / "entry_points.txt").write_bytes(points)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = tmp_path_factory.mktemp("env") / "site"
    lay_out(site, BROKEN | SOUND | COLLIDING)
    return site


def nanovllm(*arguments, site=None, cwd=None):
    command = [sys.executable, "-m", "nanovllm_core.cli", *map(str, arguments)]
    env = os.environ | ({"PYTHONPATH": str(site)} if site else {})
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory):
    """Metadata that importlib.metadata itself, and so `import torch`, cannot read."""
    site = tmp_path_factory.mktemp("metadata") / "site"
    site.mkdir()
    describe(site, "no-equals", b"[nanovllm.readers]\njust a line\n")
    describe(site, "no-class", b"[nanovllm.readers]\nx = not a module\n")
    describe(site, "twice", b"[nanovllm.callbacks]\nx = a:B\nx = a:C\n")
    describe(site, "latin", b"[nanovllm.readers]\nx = \xe9:A\n")
    describe(site, "anonymous", b"[nanovllm.readers]\nanonymous = a:B\n", metadata="\n")
    return site


def test_metadata_that_cannot_be_read_is_listed(unreadable):
    done = nanovllm("plugins", "--json", site=unreadable)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    said = {r["distribution"]: r["summary"] for r in rows if r["state"] == "broken"}
    assert "is not `name = module:Class`" in said["hostile-no-equals"]
    assert "is not `name = module:Class`" in said["hostile-no-class"]
    assert "has the name 'x' twice" in said["hostile-twice"]
    nameless = [r["summary"] for r in rows if not r["kind"]]
    assert len(nameless) == 2
    assert any("latin" in text and "UnicodeDecodeError" in text for text in nameless)
    assert any("anonymous" in text and "METADATA has no name" in text for text in nameless)


def test_each_is_listed_with_its_reason(site):
    done = nanovllm("plugins", "--json", "--timeout", "1", site=site)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)  # nothing but JSON, whatever a module prints
    assert len(BROKEN) >= 15
    for name, (kind, component, _, says) in BROKEN.items():
        [row] = [r for r in rows if r["distribution"] == f"hostile-{name}"]
        assert (row["kind"], row["name"], row["state"], row["version"]) == (kind, component, "broken", "1.5")
        assert says in row["summary"]
        assert "\n" not in row["summary"]
    named = {r["distribution"]: r for r in rows}
    for name in SOUND:
        assert named[f"hostile-{name}"]["state"] == "ok"
    for name in COLLIDING:
        assert named[f"hostile-{name}"]["state"] == "collision"
    ours = {(r["kind"], r["name"]): r["state"] for r in rows if r["distribution"] == "nanovllm"}
    colliding = {(kind, name) for kind, name, *_ in COLLIDING.values()}
    assert {key: ("collision" if key in colliding else "ok") for key in ours} == ours
    table = nanovllm("plugins", "--timeout", "1", site=site)
    assert table.returncode == 0
    assert "\x1b" not in table.stdout
    assert len(table.stdout.splitlines()) == len(rows) + 1
    assert "BUY NOW" not in table.stdout


def test_a_run_that_names_none_of_them_is_untouched(site, folder):
    short = ("--set", "train.max_steps=2", "--set", "train.save_steps=2", "--set", "tokenizer={use: auto, size: 400}")
    short += ("--set", "generate.prompts=[':smile: The']")
    alone = nanovllm("run", folder / "recipe.yaml", *short, "--set", "output_dir=alone")
    among = nanovllm("run", folder / "recipe.yaml", *short, "--set", "output_dir=among", site=site)
    assert (alone.returncode, among.returncode) == (0, 0), among.stderr
    assert "BUY" not in among.stdout
    assert ":smile: The" in among.stdout
    told = [line for line in among.stdout.splitlines() if line.startswith(("reader ", "and "))]  # of the .png
    n = sum(kind == "readers" for kind, *_ in BROKEN.values()) + len({"quitting", "nonsense"})
    assert told[0].startswith("reader (no name): readers: from hostile-nameless 1.5: its name '' cannot be written")
    assert told[3:] == [f"and {n - 3} more broken readers"]
    locks = [json.loads((folder / out / "plan.lock.json").read_text()) for out in ("alone", "among")]
    assert locks[0]["identity"] == locks[1]["identity"]
    digests = [hashlib.sha256((folder / out / "model.safetensors").read_bytes()).digest() for out in ("alone", "among")]
    assert digests[0] == digests[1]


def test_explain_says_who_could_not_be_asked_and_ends_well(site, folder):
    done = nanovllm("explain", folder / "recipe.yaml", "--set", "tokenizer=auto", site=site)
    assert done.returncode == 0, done.stderr
    assert "BUY" not in done.stdout
    assert (
        "raises from hostile-raises 1.5: unusable: readers:raises from hostile-raises 1.5: does not import"
        in done.stdout
    )
    assert "quitting from hostile-quitting 1.5: 0 files; its probe raised SystemExit: 1\n" in done.stdout
    assert "json from nanovllm 0.1.0: 2 files\n" in done.stdout
    assert "tokenizer     bpe from nanovllm" in done.stdout


def test_check_survives_what_ends_crashes_and_hangs_a_process(tmp_path):
    heavy = {
        "heavy": (
            "readers",
            "heavy",
            "import numpy\n" + reader(),
            "imports numpy (that belongs inside methods); A sound",
        )
    }
    chosen = {name: (BROKEN | SOUND)[name] for name in ("hangs", "printing", "raises", "nameless")}
    lay_out(tmp_path / "site", FATAL | heavy | chosen)
    done = nanovllm("plugins", "--check", "--json", "--timeout", "1", site=tmp_path / "site")
    assert done.returncode == 1, done.stderr
    rows = {r["distribution"].removeprefix("hostile-"): r for r in json.loads(done.stdout)}
    for name, (*_, says) in (FATAL | heavy | chosen).items():
        assert says in rows[name]["summary"]
        assert rows[name]["state"] == ("ok" if name in ("heavy", "printing") else "broken")
    assert rows["heavy"]["heavy"] == ["numpy"]
    assert "writes to the terminal when it is imported ('BUY NOW')" in rows["printing"]["summary"]
    assert rows["stubborn"]["seconds"] > 1
    done = nanovllm("plugins", "readers:printing", "--check", site=tmp_path / "site")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2


def test_a_hanging_candidate_of_auto_is_given_up_in_this_process(tmp_path, monkeypatch):
    import signal

    lay_out(tmp_path / "site", {"hanging-here": ("readers", "hanging", "import time\ntime.sleep(60)", "")})
    monkeypatch.syspath_prepend(tmp_path / "site")
    before = signal.getsignal(signal.SIGALRM)
    registry = Registry.from_environment(timeout=0.2)
    [row] = [r for r in registry.rows() if r.name == "hanging"]
    assert (row.state, "does not end within 0.2 s" in row.summary) == ("broken", True)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
