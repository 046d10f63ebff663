"""Checkpoints made to do harm: passed over with the reason, or one clear error; no code runs, nothing outside is read.

The run has sound checkpoints at steps 2 and 4. Each case rewrites checkpoint-4 and its manifest, as one who means it would,
and takes the finished model away; the same command then goes on from checkpoint-2, unless the case says otherwise.
"""

import base64
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard uses inotify")
GUARDED = Path(__file__).with_name("guarded.py")
STATE, WEIGHTS, MOMENTS, MANIFEST = "state.json", "model.safetensors", "optimizer.safetensors", "manifest.json"
OLDER = object()  # goes on from checkpoint-2


class Evil:
    """Runs a shell where it is unpickled."""

    def __init__(self, outside):
        self.outside = outside

    def __reduce__(self):
        return os.system, (f"touch {self.outside}/ran",)


def state(**values):
    def act(f, o):
        told = json.loads((f / STATE).read_text()) | values
        (f / STATE).write_text(json.dumps({k: v for k, v in told.items() if v is not ...}))

    return act


def text(name, content):
    return lambda f, o: (f / name).write_text(content)


def pickled(name):
    return lambda f, o: (f / name).write_bytes(pickle.dumps(Evil(o)))


def link(name, target):
    def act(f, o):
        (f / name).unlink()
        (f / name).symlink_to(o / target)

    return act


def fifo(name):
    def act(f, o):
        (f / name).unlink(missing_ok=True)
        os.mkfifo(f / name)

    return act


def folder_instead(name):
    def act(f, o):
        (f / name).unlink()
        (f / name).mkdir()

    return act


def whole_link(f, o):
    shutil.rmtree(f)
    f.symlink_to(o / "checkpoint-4")


def moments(change):
    def act(f, o):
        from safetensors.torch import load_file, save_file

        held = load_file(f / MOMENTS)
        name = next(k for k in sorted(held) if k.startswith("exp_avg:"))
        held[name] = change(held[name])
        save_file(held, f / MOMENTS)

    return act


def code(f, o):
    config = json.loads((f / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "configuration_evil.Evil"}, "trust_remote_code": True}
    (f / "config.json").write_text(json.dumps(config))
    (f / "configuration_evil.py").write_text(f"open({str(o / 'ran')!r}, 'w').close()\n")
    pickled("training_args.bin")(f, o)


def manifest(**entries):
    """Names added to the manifest after it was made right."""
    return lambda f: (f / MANIFEST).write_text(json.dumps(json.loads((f / MANIFEST).read_text()) | entries))


def root(act):
    """On the run's folder, not the checkpoint."""
    return lambda f, o: act(f.parent, o)


NONE = lambda f, o: None  # noqa: E731
PASSWD = {
    "size": Path("/etc/passwd").stat().st_size,
    "sha256": hashlib.sha256(Path("/etc/passwd").read_bytes()).hexdigest(),
}
DEEP = '{"a": ' * 100_000
DAMAGED = {
    "manifest_up": (NONE, manifest(**{"../../../../../../../../etc/passwd": PASSWD}), "is a link or lies outside"),
    "manifest_absolute": (NONE, manifest(**{"/etc/passwd": PASSWD}), "is a link or lies outside"),
    "manifest_zero_byte": (NONE, manifest(**{"a\0b": PASSWD}), "cannot be a file's name"),
    "manifest_long": (NONE, manifest(**{"a" * 5000: PASSWD}), "cannot be a file's name"),
    "manifest_types": (NONE, manifest(**{STATE: [1, 2]}), "manifest.json cannot be read"),
    "manifest_empty": (NONE, text(MANIFEST, "{}"), "does not name state.json"),
    "manifest_list": (NONE, text(MANIFEST, '["state.json", "model.safetensors", "optimizer.safetensors"]'), "cannot be read"),
    "manifest_deep": (NONE, text(MANIFEST, DEEP), "manifest.json cannot be read"),
    "manifest_fifo": (NONE, fifo(MANIFEST), "manifest.json is no file"),
    "manifest_link": (NONE, link(MANIFEST, "checkpoint-4/manifest.json"), "manifest.json is a link"),
    "manifest_number": (NONE, text(MANIFEST, "9" * 5000), "manifest.json cannot be read"),
    "weights_link": (link(WEIGHTS, "checkpoint-4/model.safetensors"), None, "model.safetensors is a link"),
    "state_link": (link(STATE, "checkpoint-4/state.json"), None, "state.json is a link"),
    "state_fifo": (NONE, fifo(STATE), "state.json is no file"),
    "weights_fifo": (NONE, fifo(WEIGHTS), "model.safetensors is no file"),
    "moments_folder": (NONE, folder_instead(MOMENTS), "optimizer.safetensors is no file"),
    "checkpoint_link": (whole_link, ..., "is a link"),
    "state_list": (text(STATE, "[]"), None, "state.json cannot be used"),
    "state_deep": (text(STATE, DEEP), None, "nested too deeply"),
    "state_huge_number": (state(step=10**1000), None, "step is"),
    "state_nan": (state(step=float("nan")), None, "step is"),
    "state_true": (state(position=True), None, "position is"),
    "state_negative": (state(position=-1), None, "position is"),
    "state_text": (state(total_steps="4"), None, "total_steps is"),
    "state_other_step": (state(step=400), None, "step is 400"),
    "state_unknown": (state(__class__="os.system"), None, "__class__"),
    "state_lacks": (state(random=...), None, "random"),
    "state_no_random": (state(random=[]), None, "random is"),
    "state_metrics": (state(metrics={"eval_loss": "low"}), None, "metrics is"),
    "state_other_run": (state(identity="0" * 64), None, "was saved by another run"),
    "state_other_format": (state(format=[DEEP]), None, "has format"),
}  # fmt: skip
ELSE = {
    "random_short": (state(random=[base64.b64encode(b"abc").decode()]), None, "CheckpointError", "random state is none"),
    "random_no_base64": (state(random=["*" * 100]), None, "CheckpointError", "random state is none"),
    "random_zeros": (state(random=[base64.b64encode(bytes(5056)).decode()]), None, "CheckpointError", "random state is none"),
    "moments_shape": (moments(lambda t: t[:1].clone()), None, "CheckpointError", "belongs to another model"),
    "moments_dtype": (moments(lambda t: t.double()), None, "CheckpointError", "belongs to another model"),
    "moments_pickle": (pickled(MOMENTS), None, "CheckpointError", "optimizer.safetensors"),
    "weights_pickle": (pickled(WEIGHTS), None, "ModelError", "model.safetensors: cannot be read"),
    "weights_other": (lambda f, o: shutil.copy(f / MOMENTS, f / WEIGHTS), None, "ModelError", "holds no tensor"),
    "config_link": (link("config.json", "checkpoint-4/config.json"), ..., "ModelError", "link out of the model's folder"),
    "config_fifo": (fifo("config.json"), ..., "ModelError", "no config.json"),
}  # fmt: skip
HARMLESS = {
    "code_beside": (code, None),
    "figures_lack": (state(before={}, metrics={}), None),
    "best_up": (root(text("checkpoints.json", '{"best": "../../outside", "best_eval_loss": -1}')), None),
    "best_nan": (root(text("checkpoints.json", '{"best": "checkpoint-2", "best_eval_loss": NaN}')), None),
    "best_fifo": (root(fifo("checkpoints.json")), None),
    "finished_fifo": (root(fifo("finished.json")), None),
    "finished_types": (root(text("finished.json", '{"files": {"../../outside/config.json": 1}, "step": "x"}')), None),
}
CASES = {**DAMAGED, **ELSE, **HARMLESS}


def sealed(folder: Path) -> None:
    """Make the manifest say what the files are now, links and pipes as they were said to be."""
    told = json.loads((folder / MANIFEST).read_text())
    for name in told:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            told[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(told))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    subprocess.run([sys.executable, GUARDED, "make", folder], check=True)
    outside = folder / "outside"
    shutil.copytree(folder / "run" / "checkpoint-4", outside / "checkpoint-4")
    for name, (act, after, *_) in CASES.items():
        run = folder / "runs" / name
        shutil.copytree(folder / "run", run)
        (run / "config.json").unlink()
        act(run / "checkpoint-4", outside)
        if after is not ...:
            sealed(run / "checkpoint-4")
        else:
            manifest_without(run / "checkpoint-4", "config.json")
        if callable(after):
            after(run / "checkpoint-4") if after.__code__.co_argcount == 1 else after(run / "checkpoint-4", outside)
    subprocess.run([sys.executable, GUARDED, "try", folder], check=True, timeout=300)
    assert not (outside / "ran").exists()
    return json.loads((folder / "outcomes.json").read_text())


def manifest_without(folder: Path, name: str) -> None:
    """So that only who opens the file is left to refuse it."""
    if not folder.is_symlink():
        told = json.loads((folder / MANIFEST).read_text())
        del told[name]
        (folder / MANIFEST).write_text(json.dumps(told))


@pytest.mark.parametrize("name", DAMAGED)
def test_a_hostile_checkpoint_is_passed_over_with_its_reason(outcomes, name):
    got = outcomes[name]
    assert got["seen"] == []
    assert "error" not in got, got
    assert any("checkpoint-4" in note and DAMAGED[name][2] in note for note in got["notes"]), got["notes"]
    assert "going on from checkpoint-2" in got["notes"]
    assert got["steps"] == [3, 4]


@pytest.mark.parametrize("name", ELSE)
def test_a_checkpoint_that_is_whole_but_no_good_is_one_error(outcomes, name):
    got, (_, _, error, part) = outcomes[name], ELSE[name]
    assert got["seen"] == []
    assert got.get("error") == error, got
    assert part in got["message"]


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_not_needed_is_not_believed(outcomes, name):
    got = outcomes[name]
    assert got["seen"] == []
    assert "error" not in got, got
    assert "going on from checkpoint-4" in got["notes"]
    assert got["steps"] == []
