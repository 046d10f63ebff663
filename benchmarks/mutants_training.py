"""The bugs that mutations.py seeds in the data path, the step and several ranks; as in mutants.py."""

from __future__ import annotations

CORE = "nanovllm_core/"
CHUNKS = "nanovllm_core/data/chunks.py"
BATCHES = "nanovllm_core/data/batches.py"
CUT = "tests/data/test_chunks.py"
BATCHED = "tests/data/test_batches.py"
SPLIT = "tests/data/test_documents.py"
LEDGER = "nanovllm_core/data/ledger.py"
LENIENT = "tests/data/test_on_error.py"
STRICT = "plugins/readers/nanovllm_readers/strict.py"
READERS = "tests/readers/test_readers.py"
TRAINER = "nanovllm_core/training/trainer.py"
EVALUATE = "nanovllm_core/training/evaluate.py"
LOOP = "tests/training/test_trainer.py"
KERNELS = "plugins/kernels/nanovllm_kernels/torch_attention.py"
PARALLEL = "plugins/parallel/nanovllm_parallel/"
RANKS = "tests/testing/test_bundled_parallel.py"

# Bug -> file, text, what stands there instead, tests that must see it.
WATCH = "nanovllm_core/training/watch.py"
BUGS: dict[str, tuple[str, str, str, str]] = {
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
        "micro.targets) / max(1, data.trained)",
        "micro.targets) / max(1, micro.trained) / len(data.micro_batches)",
        LOOP,
    ),
    "gradients are kept for the next step": (
        TRAINER,
        "        self.optimizer.zero_grad(set_to_none=True)\n        if bad:\n",
        "        if bad:\n",
        LOOP,
    ),
    "the learning rate is one step late": (
        TRAINER,
        "s.schedule.share(self.step)",
        "s.schedule.share(max(0, self.step - 1))",
        LOOP,
    ),
    "gradients are not clipped": (TRAINER, "(norm / s.clipping).clamp(min=1.0)", "(norm / 1e9).clamp(min=1.0)", LOOP),
    "small gradients are made long": (TRAINER, "(norm / s.clipping).clamp(min=1.0)", "norm / s.clipping", LOOP),
    "the next step is that before": (TRAINER, "if step is not None and at == position", "if step is not None", LOOP),
    "a bad step moves the weights": (
        TRAINER,
        "self.optimizer.update(divisor, figures.not_finite)",
        "self.optimizer.update(divisor, torch.zeros_like(divisor))",
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
        "micro.targets)), micro.trained))",
        "micro.targets)) / max(1, micro.trained), 1))",
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
        "return documents(q_TNH, k_TKH, v_TKH, batch.lengths, window)",
        "return documents(q_TNH, k_TKH, v_TKH, (sum(batch.lengths),), window)",
        "tests/kernels/test_torch_attention.py",
    ),
    "a window is one too wide": (
        KERNELS,
        "mask &= reach_S > last_B1 - window",
        "mask &= reach_S >= last_B1 - window",
        "tests/kernels",
    ),
    # ------------------------------------------------------------ several ranks
    "replicas give the mean for the sum": (
        PARALLEL + "replicated.py",
        "future.value()[0])",
        "future.value()[0] / 2)",
        RANKS,
    ),
    "shards give the mean for the sum": (PARALLEL + "sharded.py", "divide_factor(1.0)", "divide_factor(2.0)", RANKS),
    "an evaluation leaves blocks gathered": (
        PARALLEL + "sharded.py",
        "                part.reshard()",
        "                pass",
        RANKS,
    ),
    "slices do not sum the gradients of norms": (
        PARALLEL + "slices.py",
        "    distributed.all_reduce(x, group=group)\n",
        "",
        RANKS,
    ),
    "a norm is that of this rank's shards": (
        PARALLEL + "spread.py",
        "                distributed.all_reduce(square, group=mesh.get_group(axis))\n",
        "                pass\n",
        RANKS,
    ),
    "ranks take the launcher's count of restarts for the name of their attempt": (
        "nanovllm_core/training/world.py",
        "PrefixStore(meet(store, rank, size, MEETING if size > count else MEETING_HERE), store)",
        'PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)',
        "tests/end_to_end/test_lost_ranks.py -k nodes",
    ),
    "a team is complete before all have answered": (
        "nanovllm_core/training/meeting.py",
        "range(1, size)]):\n        store.set(",
        "range(1, 2)]):\n        store.set(",
        "tests/training/test_world.py",
    ),
    "ranks whose launcher is gone go on": (
        "nanovllm_core/training/world.py",
        "        if launched():\n            end_with",
        "        if False:\n            end_with",
        "tests/end_to_end/test_lost_ranks.py -k early",
    ),
    "torch's own limit is the timeout": (
        "nanovllm_core/training/world.py",
        "                timeout=FOREVER,\n",
        "                timeout=timedelta(seconds=watch.timeout),\n",
        "tests/end_to_end/test_lost_ranks.py -k slow_disk",
    ),
    "work of a rank alone counts as a hang": (
        WATCH,
        "        at_work = not gone and any(",
        "        at_work = False and any(",
        "tests/training/test_watch.py -k alone",
    ),
    "time in which a process was suspended counts": (
        WATCH,
        "min(now - last, BREATH)",
        "(now - last)",
        "tests/training/test_watch.py -k did_not_run",
    ),
    "who goes on at the last moment is ended": (
        WATCH,
        "        if waited < self.timeout + SILENT + 2 * BEAT:",
        "        if waited < self.timeout:",
        "tests/training/test_watch.py -k last_moment",
    ),
    "nobody keeps an eye on the first of the next node": (
        WATCH,
        "            eye.add(here.stop % self.size)\n",
        "            pass\n",
        "tests/training/test_watch.py -k nobody_waits",
    ),
    "who has left is missed": (
        WATCH,
        '        if self.store.check([f"left/{rank}"]):\n            return None\n',
        "",
        "tests/training/test_watch.py -k left",
    ),
    "a process number of another machine is taken for one here": (
        WATCH,
        "word.place == self._place and _gone",
        "_gone",
        "tests/training/test_watch.py -k another_machine",
    ),
    "a store that does not answer is waited for": (
        WATCH,
        "> self.timeout + 2 * SILENT:",
        "> 1e9:",
        "tests/training/test_watch.py -k does_not_answer",
    ),
    "a launcher's second signal undoes the first's save": (
        "nanovllm_core/interrupt.py",
        "            if self.launched and number == signal.SIGTERM:\n",
        "            if False:\n",
        "tests/end_to_end/test_lost_ranks.py -k at_once",
    ),
    "a wrong recipe is tried again": (
        "nanovllm_core/launch.py",
        "not any(failure.exitcode in NO_HELP for failure in e.failures.values())",
        "True",
        "tests/end_to_end/test_parallel.py -k told_once",
    ),
    "ranks do not compare when they save": (
        "nanovllm_core/runner.py",
        "drift(first, lock, uncounted=ELSEWHERE)",
        "drift(first, lock)",
        "tests/end_to_end/test_parallel.py -k something_else",
    ),
    "a rank's exception is told by the others too": (
        "nanovllm_core/training/world.py",
        "        if not isinstance(error, NanoError | KeyboardInterrupt):\n            self.may_speak()\n",
        "",
        "tests/end_to_end/test_lost_ranks.py -k exception",
    ),
}
