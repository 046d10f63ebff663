"""Parallel strategies: whatever the layout, the losses, gradients and weights of one rank."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from nanovllm_core.contracts import Accept, Layout
from nanovllm_core.hookspecs import Parallel
from nanovllm_core.testing.contract import Contract

ASKED = (1, 2, 3, 4, 6, 8, 60, 64)  # ranks that its probe is asked for
LIMIT = 180  # seconds that the processes of a world have
Measured = list[tuple[dict[str, Any], dict[str, Any]]]  # of each rank: numbers, tensors


class ParallelContract(Contract):
    """A parallel strategy. With more than one rank, the test's module is imported in processes of their own.

    worlds: numbers of ranks that it is run on; more than one means real processes, with gloo
    tolerance: difference from one rank, as a share of the largest value
    """

    kind = "parallel"
    worlds: Sequence[int] = (1,)
    tolerance: float = 2e-5
    _measured: ClassVar[dict[int, Measured | Exception]]
    _alone: ClassVar[tuple[dict[str, Any], dict[str, Any]] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._measured = {}  # a world is started once; its measurements serve all tests

    # ------------------------------------------------------------ probe

    def test_layouts_fill_the_world(self) -> None:
        from nanovllm_core.testing.ranks import request

        for world in (*ASKED, *self.worlds):
            answer = self.verdict(f"{world} ranks", self.bound(Parallel).probe, request=request(world))
            if isinstance(answer, Accept):
                layout = answer.layout or Layout()
                product = layout.data * layout.shard * layout.tensor
                told = f"{world} ranks: {layout}"
                self.check(product == world, told, "data x shard x tensor is the number of ranks, or it refuses")

    def test_accepts_its_worlds(self) -> None:
        from nanovllm_core.testing.ranks import request

        for world in self.worlds:
            answer = self.verdict(f"{world} ranks", self.bound(Parallel).probe, request=request(world))
            self.check(isinstance(answer, Accept), f"{world} ranks: {answer}", "it takes what it can run")

    # ------------------------------------------------------------ runs

    def test_data_ranks_share_the_documents(self) -> None:
        """Ranks that differ in data or shard have data ranks of their own; those of a tensor group share one."""
        for world, ranks in self.measured():
            pairs = [(n["data_rank"], n["data_size"]) for n, _ in ranks]
            sizes = {size for _, size in pairs}
            told = f"{world} ranks have (data_rank, data_size) {pairs}"
            good = (
                len(sizes) == 1
                and sorted({r for r, _ in pairs}) == list(range(pairs[0][1]))
                and not world % pairs[0][1]
            )
            self.check(good, told, "data ranks count from 0 to data_size - 1, each as often as the others")

    def test_total_sums_over_data_ranks(self) -> None:
        for world, ranks in self.measured():
            for rank, (numbers, _) in enumerate(ranks):
                size = numbers["data_size"]
                wanted = [float(size), float(sum(range(size)))]
                told = f"total of [1, data_rank] on rank {rank} of {world}: {numbers['total']}"
                self.check(numbers["total"] == wanted, told, f"{wanted}, on every rank")

    def test_loss_is_that_of_one_rank(self) -> None:
        self.numbers_are_alike("sum", 0, "the loss")

    def test_gradients_are_summed_over_data_ranks(self) -> None:
        """Seen in the weights after a step of plain gradient descent; two micro-batches, then nothing is clipped."""
        self.weights_are_alike("sum")

    def test_one_micro_batch_is_enough(self) -> None:
        self.weights_are_alike("once")

    def test_clip_measures_the_whole_gradient(self) -> None:
        for when in ("sum", "once", "clipped"):
            self.numbers_are_alike(when, 1, "the gradient's norm before clipping")

    def test_clip_scales_to_the_norm_asked_for(self) -> None:
        self.weights_are_alike("clipped")

    def test_full_state_is_whole(self) -> None:
        self.weights_are_alike("start")

    def test_an_evaluation_leaves_the_weights_as_they_are(self) -> None:
        for world, ranks in self.measured():
            for rank, (numbers, _) in enumerate(ranks):
                told = f"after an evaluation, rank {rank} of {world} has other parameters or values"
                self.check(
                    numbers["kept sum"] and numbers["kept once"], told, "what is saved afterwards is what was trained"
                )

    def test_tied_weights_stay_one(self) -> None:
        """After a step the loss is what the full state gives in a model of one rank."""
        for world, ranks in self.measured():
            for numbers, tensors in ranks:
                wanted, expected = self.loss_of(tensors, "sum"), self.alone()[0]["names sum"]
                names = numbers["names sum"]
                told = f"{world} ranks: full_state names {names}"
                self.check(sorted(names) == sorted(expected), told, f"each parameter once: {expected}")
                told = f"{world} ranks: after a step the loss is {numbers['after sum']:.6f}"
                off = abs(numbers["after sum"] - wanted)
                self.check(off <= self.tolerance * wanted, told, f"that of its full state, {wanted:.6f}")

    # ------------------------------------------------------------ helpers

    def numbers_are_alike(self, when: str, which: int, what: str) -> None:
        right = self.alone()[0][when][which]
        for world, ranks in self.measured():
            for rank, (numbers, _) in enumerate(ranks):
                found = numbers[when][which]
                told = f"{what} on rank {rank} of {world} is {found:.6f} ({when})"
                self.check(abs(found - right) <= self.tolerance * right, told, f"as on one rank, {right:.6f}")

    def weights_are_alike(self, when: str) -> None:
        from nanovllm_core.testing.modelling import far

        right = {k: v for k, v in self.alone()[1].items() if k.startswith(f"{when}/")}
        for world, ranks in self.measured():
            for rank, (_, tensors) in enumerate(ranks):
                for name, wanted in right.items():
                    found, told = tensors.get(name), f"{name} on rank {rank} of {world}"
                    self.check(found is not None, f"{told} is missing from full_state", "every parameter, in full")
                    off = far(found, wanted) if found is not None else 0.0
                    self.check(off <= self.tolerance, f"{told} is off by {off:.1e}", "the weights of one rank")

    def alone(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What one rank measures without any strategy."""
        from nanovllm_core.testing.alone import Alone
        from nanovllm_core.testing.ranks import measure

        if self._alone is None:
            type(self)._alone = measure(Alone(), 1, None)
        assert self._alone is not None
        return self._alone

    def loss_of(self, tensors: dict[str, Any], when: str) -> float:
        from nanovllm_core.testing.alone import Held, module_of
        from nanovllm_core.testing.ranks import evaluate

        weights = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{when}/")}
        return evaluate(Held(module_of(weights)))

    def measured(self) -> list[tuple[int, Measured]]:
        """Each world with what its ranks measured."""
        for world in self.worlds:
            if world not in self._measured:
                try:
                    self._measured[world] = self.started(world) if world > 1 else self.here()
                except Exception as e:  # the tests that need the world all fail with it; none starts it again
                    self._measured[world] = e
        found = []
        for world in self.worlds:
            measured = self._measured[world]
            if isinstance(measured, Exception):
                raise measured
            found.append((world, measured))
        return found

    def here(self) -> Measured:
        from nanovllm_core.testing.ranks import measure

        return [measure(self.bound(Parallel), 1, None)]

    def started(self, world: int) -> Measured:
        """Start the processes of a world, wait for them, end those that hang."""
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            processes = [self.process(world, rank, Path(folder)) for rank in range(world)]
            end = time.monotonic() + LIMIT
            try:
                while any(p.poll() is None for p in processes) and time.monotonic() < end:
                    if any(p.poll() for p in processes):
                        break  # the others would wait for it
                    time.sleep(0.05)
            finally:
                hung = [rank for rank, p in enumerate(processes) if p.poll() is None]
                for p in processes:
                    p.kill()
                    p.wait()
            failed = [rank for rank, p in enumerate(processes) if p.returncode and rank not in hung]
            told = {
                rank: (Path(folder) / f"{rank}.log").read_text("utf-8", "replace")[-1500:] for rank in failed or hung
            }
            what = f"failed on {failed}" if failed else f"hung on {hung} for {LIMIT} s"
            self.check(not told, f"{world} ranks: {what}: {told}", "every rank comes to its end")
            return [_read(Path(folder), rank) for rank in range(world)]

    def process(self, world: int, rank: int, folder: Path) -> subprocess.Popen[bytes]:
        cls = type(self)
        local = "<locals>" in cls.__qualname__
        self.check(not local, f"{cls.__qualname__} stands in a function", "processes can import it: put it in a module")
        module = "contract_under_test" if cls.__module__ == "__main__" else cls.__module__
        told = {
            "paths": sys.path, "module": module, "file": inspect.getfile(cls), "name": cls.__qualname__,
            "world": world, "rank": rank, "folder": str(folder),
        }  # fmt: skip
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with (folder / f"{rank}.log").open("wb") as log:
            command = [sys.executable, "-m", "nanovllm_core.testing.ranks", json.dumps(told)]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _read(folder: Path, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors.torch import load

    numbers = json.loads((folder / f"{rank}.json").read_text("utf-8"))
    return numbers, load((folder / f"{rank}.safetensors").read_bytes())
