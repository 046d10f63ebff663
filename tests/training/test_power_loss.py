"""The short form of benchmarks/power_loss.py: no cut of the power leaves a run without what it had told was saved."""

import base64
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the names of open files from /proc")


@linux
def test_what_was_told_as_saved_outlives_a_power_cut(tmp_path):
    out = tmp_path / "figures.json"
    script = [
        sys.executable,
        BENCHMARKS / "power_loss.py",
        "--states",
        "200",
        "--runs",
        "5",
        "--seed",
        "7",
        "--out",
        out,
    ]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    got = json.loads(out.read_text())
    assert (got["states"], got["wrong"]) == (200, [])
    assert got["run_to_the_end"] >= 4
    assert len(got["states_by_newest_told"]) == 7, "before the first checkpoint and after each"


@pytest.fixture
def disk(monkeypatch):
    """An empty disk that can lose its power."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from disk import Disk

    return Disk()


def left(disk, times=300):
    draw = random.Random(3)
    return [disk.crash(draw) for _ in range(times)]


def test_the_disk_keeps_what_was_synced_and_may_lose_all_else(disk):
    disk.do("mkdir", "a")
    disk.do("write", "a/x", b"old")
    seen = left(disk)
    assert {len(state) for state in seen} == {0, 1, 2}
    assert {state["a/x"] for state in seen if "a/x" in state} >= {b"", b"old", b"ol", b"\0ld", b"ol\0"}
    for path in ("a/x", "a", "."):
        disk.do("fsync", path)
    assert left(disk, 20) == [{"a": None, "a/x": b"old"}] * 20
    disk.do("write", "a/y", b"new")
    disk.do("fsync", "a/y")
    disk.do("rename", "a/y", "a/x")
    disk.do("remove", "a/x")
    states = {tuple(sorted(state.items())) for state in left(disk)}
    assert states == {(("a", None), *rest) for rest in ((), (("a/x", b"old"),), (("a/x", b"new"),), (("a/y", b"new"),),
                      (("a/x", b"old"), ("a/y", b"new")))}  # fmt: skip


RECORDED = """\
import atexit, base64, json, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import operations
from power_loss import Recorder

folder = Path(sys.argv[2])
out, recorder = folder / "out", Recorder(folder)

def told(step):
    recorder.look()
    recorder.log.append(("saved", step))

def kept():
    text = json.dumps(recorder.log, default=lambda content: {"base64": base64.b64encode(content).decode()})
    Path(sys.argv[3]).write_text(text)

atexit.register(kept)
"""


def recorded(tmp_path, script):
    """The file operations of a script, and the folder that it worked in."""
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()
    subprocess.run([sys.executable, "-c", RECORDED + script, BENCHMARKS, place, log], check=True)
    return place, json.loads(log.read_text(), object_hook=lambda held: base64.b64decode(held["base64"]))


WRITES = """\
from nanovllm_core.files import make_folder, replace_text, written_whole
from nanovllm_core.output import mark_finished

operations.watch(folder, recorder.meet)
make_folder(out)
for text in ("old", "new"):
    with written_whole(out / "model") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_text(text * 100)
    told(1 if text == "old" else 3)
    replace_text(out / "note", text * 100)
    told(2 if text == "old" else 4)
(out / "best").mkdir()
mark_finished(out, 1, {}, ["note"])
told(5)
"""


@linux
def test_each_way_of_writing_keeps_its_word(disk, tmp_path):
    """Of every state after each operation: a folder is whole, old or new; so is a small file; a note comes last."""
    from nanovllm_core.files import damage, recover

    place, log = recorded(tmp_path, WRITES)
    from power_loss import lay

    draw = random.Random(8)
    for operation in log:
        disk.do(*operation)
        for _ in range(25):
            state = disk.crash(draw)
            lay(place, state)
            out = place / "out"
            if not out.exists():
                assert disk.told == 0
                continue
            recover(out / "model")
            model, note = out / "model" / "inner" / "a", out / "note"
            assert model.exists() or disk.told < 1
            assert not model.exists() or damage(out / "model") is None
            assert not model.exists() or model.read_text() in ("old" * 100, "new" * 100)
            assert disk.told < 3 or model.read_text() == "new" * 100
            assert note.exists() or disk.told < 2
            assert not note.exists() or note.read_text() in ("old" * 100, "new" * 100)
            assert disk.told < 4 or note.read_text() == "new" * 100
            finished = out / "finished.json"
            assert finished.exists() or disk.told < 5
            assert not finished.exists() or (out / "best").is_dir()


EXPORTS = """\
import torch
from nanovllm_tokenizers.bpe import train
from nanovllm_core.files import make_folder
from nanovllm_core.training.export import export

operations.watch(folder, recorder.meet)
make_folder(out)
for number in (1, 2):
    tokenizer = train(["the river runs past old mills " * number], 270 + number)
    weights = [("model.weight", torch.full((64, 8), float(number)))]
    export(out, weights, {"model_type": "llama", "hidden_size": number}, tokenizer, "float32")
    told(number)
"""


@linux
def test_an_exported_file_is_whole_wherever_it_has_its_name(disk, tmp_path):
    """After each operation and whatever the power took: a file of the first model or of the second, with every byte."""
    _, log = recorded(tmp_path, EXPORTS)
    draw, models, states = random.Random(9), [], []
    for operation in log:
        disk.do(*operation)
        states += [(disk.told, disk.crash(draw)) for _ in range(20)]
        if operation[0] == "saved":  # once it is told: just what was written
            models.append({p: c for p, c in all_written(disk).items() if c is not None})
            assert {"out/config.json", "out/model.safetensors", "out/tokenizer.json"} <= models[-1].keys()
    assert models[0].keys() == models[1].keys()
    assert not any(models[0][name] == models[1][name] for name in ("out/config.json", "out/model.safetensors"))
    for told, state in states:
        for name in models[0].keys() & state.keys():
            assert state[name] in [model[name] for model in models[max(0, told - 1) :]], name
        assert told < 2 or models[1].items() <= state.items()


def all_written(disk):
    """Path -> content of everything as it is now, before any power is lost."""
    left = {}

    def walk(folder, path):
        for name, node in folder.now.items():
            if hasattr(node, "since"):
                left[f"{path}{name}"] = node.now
            else:
                walk(node, f"{path}{name}/")

    walk(disk.top, "")
    return left
