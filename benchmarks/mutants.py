"""The bugs that mutations.py seeds in saving, going on and stopping, one at a time, and the tests that must see each.

A bug is a file, a text that stands in it exactly once, what stands there instead, and test files.
"""

from __future__ import annotations

CORE = "nanovllm_core/"
FILES = "nanovllm_core/files.py"
SAVER = "nanovllm_core/training/saver.py"
CHECKPOINT = "nanovllm_core/training/checkpoint.py"
JOB = "nanovllm_core/job.py"
OUTPUT = "nanovllm_core/output.py"
EXPORT = "nanovllm_core/training/export.py"
POWER = "tests/training/test_power_loss.py"
SAVED = "tests/training/test_saver.py"
READ = "tests/training/test_checkpoint.py"
RUN = "tests/end_to_end/test_run.py"
HOSTILE = "tests/end_to_end/test_hostile_checkpoints.py"
OUT = "tests/end_to_end/test_output.py"
CORRUPT = "tests/training/test_corruption.py"
STOPPED = "tests/end_to_end/test_interrupt.py"

# Bug -> file, text, what stands there instead, tests that must see it.
BUGS: dict[str, tuple[str, str, str, str]] = {
    "files of a checkpoint are not synced": (FILES, "        for p in files:\n            sync(p)\n", "", POWER),
    "the manifest is not synced": (FILES, "        sync(partial / MANIFEST)\n", "", POWER),
    "the folder of a checkpoint is not synced": (
        FILES,
        "        sync(partial)\n        if folder",
        "        if folder",
        POWER,
    ),
    "the rename of a checkpoint is not synced": (
        FILES,
        "        os.replace(partial, folder)\n        sync(folder.parent)\n",
        "        os.replace(partial, folder)\n",
        POWER,
    ),
    "the output folder's own entry is not synced": (
        FILES,
        "        sync(path.parent)\n\n\ndef share",
        "        pass\n\n\ndef share",
        POWER,
    ),
    "a small file is replaced before it is synced": (
        FILES,
        "    sync(partial)\n    os.replace(partial, path)",
        "    os.replace(partial, path)",
        POWER,
    ),
    "best/ is not synced before the run is called finished": (
        OUTPUT,
        "        sync(folder)  # `best/`",
        "        # `best/`",
        POWER,
    ),
    "an exported file is not synced": (EXPORT, "            sync(path)\n", "", POWER),
    "metrics are not synced": (CORE + "callbacks/metrics.py", "                sync(path)\n", "", POWER),
    "what a kill took away is not brought back": (
        FILES,
        "    if old.exists() and not folder.exists():",
        "    if False:",
        READ,
    ),
    "digests are not compared": (
        FILES,
        "            if digest(folder / name) != sha256:",
        "            if False:",
        CORRUPT,
    ),
    "a missing file is not named": (
        FILES,
        '            return f"{name} is missing"',
        '            return f"{folder} is missing"',
        CORRUPT,
    ),
    "links are followed": (FILES, "if path.resolve() != path or root not in path.parents", "if False", HOSTILE),
    "the newest is taken by name": (CHECKPOINT, "(int(m.group(1)), p)\n", "(p.name, p)\n", READ),
    "a checkpoint of another run is used": (
        CHECKPOINT,
        "if identity is not None and state.identity != identity",
        "if False",
        HOSTILE,
    ),
    "a snapshot shares its memory": (
        CORE + "training/parts.py",
        'to("cpu", copy=copy and full.data_ptr() == local(tensor).data_ptr())',
        'to("cpu")',
        SAVED,
    ),
    "the moments are not loaded": (
        JOB,
        "            load_optimizer(",
        "            (lambda *a: None)(",
        RUN,
    ),
    "the random state is not restored": (
        JOB,
        "                checkpoint.set_random_state(state.random[self.world.rank])\n",
        "                pass\n",
        "tests/end_to_end/test_any_architecture.py",
    ),
    "the position is off by one": (JOB, "position=trainer.position,", "position=trainer.position + 1,", RUN),
    "the best is pruned": (SAVER, "latest.name, self.best, self", "latest.name, self", SAVED),
    "the one gone on from is pruned": (SAVER, "self.resumed.name if self.resumed else None", "None", SAVED),
    "damaged newer ones take the place of sound ones": (SAVER, " if step <= last and", " if", SAVED),
    "the best is forgotten on going on": (SAVER, "if found := best(", "if found := (lambda *a: None)(", SAVED),
    "pointers are not mended on going on": (SAVER, "            self._point(self.resumed)\n", "", CORRUPT),
    "the later of two equal losses is the best": (SAVER, "loss < self.best_loss", "loss <= self.best_loss", SAVED),
    "pointers move before the checkpoint is written": (
        SAVER,
        "            folder = save(self.root, state, snapshot, self.write_rest, self.world, key)\n",
        '            folder = self.root / f"checkpoint-{state.step}"\n            self._point(folder)\n'
        "            save(self.root, state, snapshot, self.write_rest, self.world, key)\n",
        SAVED,
    ),
    "an error of the writing thread is lost": (SAVER, "            raise error\n", "            return\n", SAVED),
    "figures of an older step make a best": (SAVER, "known = state.evaluated and loss is", "known = loss is", SAVED),
    "a folder that a kill left half begun is refused": (OUTPUT, "not in (BUSY, BEGINNING)", "not in (BUSY,)", OUT),
    "token stores that kills left stay": (OUTPUT, '.glob(".building-*")', '.glob("never-*")', OUT),
    "metrics keep what is done again": (
        CORE + "callbacks/metrics.py",
        "if _order(text) < _order",
        "if _order(text) <= _order",
        RUN,
    ),
    "an interrupted step counts as evaluated": (JOB, "evaluated=trainer.evaluated,", "evaluated=True,", STOPPED),
    "a wish to stop is not heard": (
        CORE + "training/stop.py",
        "        if self.asked:\n",
        "        if False:\n",
        STOPPED,
    ),
    "an interrupted run is not saved": (
        JOB,
        "                save(trainer)\n            saver.finish()",
        "                pass\n            saver.finish()",
        STOPPED,
    ),
}
