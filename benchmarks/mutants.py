"""The bugs that mutations.py seeds, one at a time, and the tests that must see each.

A bug is a file, a text that stands in it exactly once, what stands there instead, and test files.
"""

from __future__ import annotations

CORE = "nanovllm_core/"
FILES, SAVER, CHECKPOINT = CORE + "files.py", CORE + "training/saver.py", CORE + "training/checkpoint.py"
JOB, OUTPUT, EXPORT = CORE + "job.py", CORE + "output.py", CORE + "training/export.py"
POWER, CRASH = "tests/training/test_power_loss.py", "tests/end_to_end/test_crash.py"
SAVED, READ, RUN = "tests/training/test_saver.py", "tests/training/test_checkpoint.py", "tests/end_to_end/test_run.py"
HOSTILE, OUT = "tests/end_to_end/test_hostile_checkpoints.py", "tests/end_to_end/test_output.py"
CORRUPT, STOPPED = "tests/training/test_corruption.py", "tests/end_to_end/test_interrupt.py"
CHUNKS, BATCHES = CORE + "data/chunks.py", CORE + "data/batches.py"
CUT, BATCHED, SPLIT = (
    "tests/data/test_chunks.py",
    "tests/data/test_batches.py",
    "tests/data/test_documents.py",
)
LEDGER, LENIENT = CORE + "data/ledger.py", "tests/data/test_on_error.py"
STRICT, READERS = "plugins/readers/nanovllm_readers/strict.py", "tests/readers/test_readers.py"
TRAINER, EVALUATE, LOOP = CORE + "training/trainer.py", CORE + "training/evaluate.py", "tests/training/test_trainer.py"
KERNELS = "plugins/kernels/nanovllm_kernels/torch_attention.py"

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
    "a snapshot shares its memory": (CHECKPOINT, 'to("cpu", copy=copy)', 'to("cpu")', SAVED),
    "the moments are not loaded": (
        JOB,
        "            checkpoint.load_optimizer(",
        "            (lambda *a: None)(",
        RUN,
    ),
    "the random state is not restored": (
        JOB,
        "            checkpoint.set_random_state(state.random[0])\n",
        "",
        "tests/end_to_end/test_any_architecture.py",
    ),
    "the position is off by one": (JOB, "position=trainer.position,", "position=trainer.position + 1,", RUN),
    "the best is pruned": (SAVER, "latest.name, self.best, self", "latest.name, self", SAVED),
    "the one gone on from is pruned": (SAVER, "self.resumed.name if self.resumed else None", "None", SAVED),
    "damaged newer ones take the place of sound ones": (SAVER, " if step <= last]", "]", SAVED),
    "the best is forgotten on going on": (SAVER, "if found := best(", "if found := (lambda *a: None)(", SAVED),
    "pointers are not mended on going on": (SAVER, "            self._point(self.resumed)\n", "", CORRUPT),
    "the later of two equal losses is the best": (SAVER, "loss < self.best_loss", "loss <= self.best_loss", SAVED),
    "pointers move before the checkpoint is written": (
        SAVER,
        "            folder = save(self.root, state, snapshot, self.write_rest)\n",
        '            folder = self.root / f"checkpoint-{state.step}"\n            self._point(folder)\n'
        "            save(self.root, state, snapshot, self.write_rest)\n",
        SAVED,
    ),
    "an error of the writing thread is lost": (SAVER, "            raise error\n", "            return\n", SAVED),
    "figures of an older step make a best": (SAVER, "if state.evaluated and loss", "if loss", SAVED),
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
    # ------------------------------------------------------------ data
    "a token is its own target": (
        CHUNKS,
        "ids[1:].astype(np.int64), IGNORE)",
        "ids[:-1].astype(np.int64), IGNORE)",
        CUT,
    ),
    "an overlap is trained twice": (CHUNKS, "        targets[: self.windows.context[number]] = IGNORE\n", "", CUT),
    "the end of a long text is left out": (
        CHUNKS,
        "-(-(lengths - length) // stride) + 1)",
        "(lengths - length) // stride + 1)",
        CUT,
    ),
    "a short tail keeps its place": (CHUNKS, "np.where(tail, limit - length, start)", "start", CUT),
    "a separator is trained": (CHUNKS, "marks = np.zeros(end - start", "marks = np.ones(end - start", CUT),
    "positions go on over documents": (
        BATCHES,
        "[np.arange(n) for n in lengths]",
        "[np.arange(sum(lengths))]",
        BATCHED,
    ),
    "every epoch has one order": (
        BATCHES,
        "SeedSequence([self.seed, 2, epoch])",
        "SeedSequence([self.seed, 2, 0])",
        BATCHED,
    ),
    "a rank forgets what others train": (
        BATCHES,
        "for s in sequences for w in self.packing.sequence(int(s)))\n        tokens",
        "for s in mine for w in self.packing.sequence(int(s)))\n        tokens",
        BATCHED,
    ),
    "windows are left out of sequences": (
        CORE + "data/packing.py",
        "            first += placed\n",
        "            first += placed + 1\n",
        "tests/data/test_packing.py",
    ),
    "copies fall on both sides of the split": (
        CORE + "data/split.py",
        "np.unique(contents, return_inverse",
        "np.unique(np.arange(len(contents), dtype=np.uint64), return_inverse",
        SPLIT,
    ),
    "a killed build of tokens does some twice": (
        CORE + "data/building.py",
        "        if number < done:\n",
        "        if number < done - 1:\n",
        "tests/data/test_store.py",
    ),
    "bad ids are taken": (
        CORE + "data/building.py",
        "if size and int(one.ids.max()) >= self._vocab_size:",
        "if False:",
        "tests/data",
    ),
    "a key given twice passes": (STRICT, "if len(result) != len(pairs):", "if False:", READERS),
    "a NUL in a text passes": (
        CORE + "data/decoding.py",
        'if self._nul or "\\0" not in text:',
        "if True:",
        READERS,
    ),
    "the rest of a file weighs nothing": (
        LEDGER,
        "self.lost + self.packed > allow * self.size",
        "False",
        LENIENT,
    ),
    "a compressed file's rest weighs nothing": (
        LEDGER,
        "self.lost + self.packed > allow * self.size",
        "self.lost > allow * self.size",
        LENIENT,
    ),
    "the rest of a file begins at the damage": (
        "plugins/readers/nanovllm_readers/json.py",
        "begins = self.begins if last else None",
        "begins = None",
        LENIENT,
    ),
    "bytes that are no text pass in a JSON array": (
        "plugins/readers/nanovllm_readers/window.py",
        "if self._file.spoilt and (found",
        "if False and (found",
        "tests/readers/test_formats.py",
    ),
    "half a surrogate pair passes": (STRICT, "(deep or _SURROGATE.search(text, start, end))", "deep", READERS),
    # ------------------------------------------------------------ the step
    "the mean of micro-batch means": (
        TRAINER,
        "targets=micro.targets) / max(1, data.trained)",
        "targets=micro.targets) / max(1, micro.trained) / len(data.micro_batches)",
        LOOP,
    ),
    "gradients are kept for the next step": (
        TRAINER,
        "        self.optimizer.step()\n        self.optimizer.zero_grad(set_to_none=True)\n",
        "        self.optimizer.step()\n",
        LOOP,
    ),
    "the learning rate is one step late": (
        TRAINER,
        "s.schedule.share(self.step)",
        "s.schedule.share(max(0, self.step - 1))",
        LOOP,
    ),
    "gradients are not clipped": (TRAINER, "model.clip(s.clipping)", "model.clip(1e9)", LOOP),
    "a bad step moves the weights": (
        TRAINER,
        "        if bad := self.guard.accept(value, norm):\n",
        "        if bad := self.guard.accept(value, norm):\n            self.optimizer.step()\n",
        "tests/training/test_guard.py",
    ),
    "norms decay": (
        CORE + "training/optimizer.py",
        "if p.ndim >= 2]",
        "if p.ndim >= 1]",
        "tests/training/test_optimizer.py",
    ),
    "a warm-up begins at nothing": (
        CORE + "training/schedule.py",
        "(step + 1) / (self.warmup + 1)",
        "step / (self.warmup + 1)",
        "tests/training/test_schedule.py",
    ),
    "a parameter thaws late": (
        CORE + "training/freezing.py",
        "first.get(name, 0) <= step",
        "first.get(name, 0) < step",
        "tests/training/test_freezing.py",
    ),
    "evaluation is a mean of means": (
        EVALUATE,
        "[loss, micro.trained], dtype",
        "[loss / max(1, micro.trained), 1], dtype",
        LOOP,
    ),
    "a bad loss is used": (
        CORE + "training/guard.py",
        "if not (math.isfinite(loss) and math.isfinite(norm)):",
        "if not math.isfinite(norm):",
        "tests/training/test_guard.py",
    ),
    "a tie is lost when weights are filled in": (
        CORE + "assemble.py",
        "in places[id(old)]:",
        "in places[id(old)][:1]:",
        "tests/models",
    ),
    "documents see each other": (
        KERNELS,
        "return _documents(q_TNH, k_TKH, v_TKH, batch.lengths, window)",
        "return _documents(q_TNH, k_TKH, v_TKH, (sum(batch.lengths),), window)",
        "tests/kernels/test_torch_attention.py",
    ),
    "a window is one too wide": (
        KERNELS,
        "mask &= reach_S > last_B1 - window",
        "mask &= reach_S >= last_B1 - window",
        "tests/kernels",
    ),
}
