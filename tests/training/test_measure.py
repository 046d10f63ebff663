"""What the loop measures of itself, in real steps of a tiny model."""

import time

import pytest
from attrs import frozen

from nanovllm_core.errors import Interrupted
from nanovllm_core.training.flops import Flops
from nanovllm_core.training.measure import Meter
from nanovllm_core.training.profiling import PHASES, Profile, table

KEYS = {"tokens_per_second", "peak_memory_bytes", *(f"seconds_{phase}" for phase in PHASES)}


@frozen(eq=False)
class Slow:
    """Steps that are read slowly."""

    steps: object
    seconds: float

    def step(self, position):
        time.sleep(self.seconds)
        return self.steps.step(position)

    def sources(self, position):
        return self.steps.sources(position)


def phases(metrics):
    return {phase: metrics[f"seconds_{phase}"] for phase in PHASES}


def test_a_logged_step_tells_speed_memory_and_phases(tiny):
    heard = tiny.Heard()
    trainer = tiny.trainer(tiny.random_documents(seed=21), heard, logging_steps=3)
    began = time.perf_counter()
    trainer.run(lambda t: None)
    passed = time.perf_counter() - began
    assert sorted(heard.steps) == [1, 3, 6, 8]
    for metrics in heard.steps.values():
        assert metrics.keys() >= KEYS
        assert "mfu" not in metrics
        assert all(value > 0 for value in phases(metrics).values())
    weights = 4 * sum(p.numel() for _, p in trainer.model.module.named_parameters())
    assert 4 * weights < heard.steps[8]["peak_memory_bytes"] < 1 << 40  # gradients and moments too
    assert sum(sum(phases(metrics).values()) for metrics in heard.steps.values()) <= passed


def test_phases_of_every_step_fill_no_more_than_the_time_that_passed(tiny):
    """Evaluation, saving and what callbacks do are outside them."""
    outside = 0.03

    class Slowly(tiny.Heard):
        def step_done(self, step, metrics):
            time.sleep(outside)
            self.steps[step] = metrics

    heard = Slowly()
    part = tiny.micro_batch(tiny.random_documents(seed=22)[0][0])
    trainer = tiny.trainer(tiny.random_documents(seed=21), heard, tiny.evaluation([part]))
    trainer.steps = Slow(trainer.steps, 0.02)
    began = time.perf_counter()
    trainer.run(lambda t: time.sleep(outside))
    passed = time.perf_counter() - began
    assert all(metrics["seconds_data"] >= 0.02 for metrics in heard.steps.values())
    slept = outside * (8 + 4)  # steps, and saves after 3, 4, 6 and 8
    assert sum(sum(phases(metrics).values()) for metrics in heard.steps.values()) <= passed - slept


def test_utilisation_is_tokens_times_their_flops_over_the_peak(tiny):
    heard, flops, peak = tiny.Heard(), Flops(token=1000, pair=7, window=9), 3e9
    documents = tiny.random_documents(seed=23)
    trainer = tiny.trainer(documents, heard, logging_steps=4)
    trainer.meter = Meter("cpu", flops, peak)
    trainer.run(lambda t: None)
    for step, begin in ((1, 0), (4, 1), (8, 4)):
        lengths = [len(t) for whole in documents[begin:step] for micro in whole for t, _ in micro]
        seen = sum(sum(min(i, 9) for i in range(1, n + 1)) for n in lengths)
        a_token = 1000 + 7 * seen / sum(lengths)
        assert heard.steps[step]["mfu"] == pytest.approx(heard.steps[step]["tokens_per_second"] * a_token / peak)


@pytest.mark.parametrize(
    ("done", "total", "told"),
    [(0, 8, "profiled steps 4 to 6"), (0, 5, "profiled steps 4 to 5"), (0, 2, "profiled step 2"),
     (2, 7, "profiled steps 6 to 7"), (8, 8, "nothing was profiled: there was no step left to train")],
)  # fmt: skip
def test_a_profile_takes_what_steps_there_are(tiny, tmp_path, done, total, told):
    documents, notes, losses = tiny.random_documents(seed=24), [], []
    for profiled in (False, True):
        heard = tiny.Heard()
        trainer = tiny.trainer(documents, heard, total=total)
        trainer.step = trainer.position = done
        profile = Profile(tmp_path, notes.append, device="this", done=done, total=total)
        trainer.meter = Meter("cpu", profile=profile if profiled else None)
        if profiled:
            with profile:
                trainer.run(lambda t: None)
        else:
            trainer.run(lambda t: None)
        losses.append({step: metrics["loss"] for step, metrics in heard.steps.items()})
    assert losses[0] == losses[1]
    assert len(notes) == 1
    assert notes[0].startswith(told)
    assert sorted(p.name for p in tmp_path.rglob("*")) == (
        ["phases.txt", "profile", "trace.json.gz"] if done < total else []
    )


def test_a_run_that_ends_before_its_profile_says_so_or_leaves_none(tiny, tmp_path):
    from torch.profiler import profile as another

    documents, notes = tiny.random_documents(seed=25), []

    class Stop:
        def __init__(self, items):
            self.left = items

        def checked(self, items):
            for item in items:
                if not self.left:
                    raise Interrupted("asked")
                self.left -= 1
                yield item

    for micro_batches in (3, 9):  # before the profile, and within
        trainer = tiny.trainer(documents)
        profile = Profile(tmp_path, notes.append, device="this", done=0, total=8)
        trainer.meter, trainer.stop = Meter("cpu", profile=profile), Stop(micro_batches)
        with pytest.raises(Interrupted), profile:
            trainer.run(lambda t: None)
        assert notes == []
    with Profile(tmp_path, notes.append, device="this", done=0, total=8):
        pass  # as a run that stops early
    assert notes == ["nothing was profiled: the run ended before its step 4"]
    assert list(tmp_path.iterdir()) == []
    with another():  # none is left running
        pass


def test_kernels_count_for_the_phase_that_launched_them_from_whichever_thread():
    """As a GPU's trace has them: they run later than they are launched, and the spans are there once more on its side."""

    def event(kind, name, begin, length, thread=1, **args):
        return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": length, "tid": thread, "args": args}

    trace = [
        event("user_annotation", "nanovllm: forward", 0.0, 100.0),
        event("user_annotation", "nanovllm: backward", 100.0, 200.0),
        event("user_annotation", "Optimizer.step#AdamW.step", 350.0, 10.0),
        event("gpu_user_annotation", "nanovllm: forward", 150.0, 900.0, thread=7),
        event("cuda_runtime", "cudaLaunchKernel", 90.0, 5.0, correlation=1),
        event("cuda_runtime", "cudaMemsetAsync", 110.0, 5.0, thread=2, correlation=2),
        event("cuda_driver", "cuLaunchKernel", 120.0, 5.0, thread=2, correlation=3),
        event("cuda_runtime", "cudaLaunchKernel", 360.0, 5.0, correlation=4),
        event("kernel", "void at::native::product<float>", 150.0, 4000.0, thread=7, correlation=1),
        event("gpu_memset", "Memset", 4150.0, 2000.0, thread=7, correlation=2),
        event("kernel", "attention", 6150.0, 6000.0, thread=7, correlation=3),
        event("kernel", "attention", 12150.0, 1000.0, thread=7, correlation=4),
        {"ph": "M", "name": "process_name"},
    ]
    lines = table(trace, {"aten::mm": (500.0, 4)}, steps=2).splitlines()
    told = {words[0]: words[1:] for line in lines if len(words := line.split()) == 3}
    assert told == {
        "milliseconds": ["a", "step"], "phase": ["host", "kernels"], "data": ["0.000", "0.000"], "forward": ["0.050", "2.000"],
        "backward": ["0.100", "4.000"], "optimizer": ["0.000", "0.000"], "elsewhere": ["0.000", "0.500"],
        "all": ["0.150", "6.500"],
    }  # fmt: skip
    costs = [line.split() for line in lines if "%" in line]
    assert costs == [
        ["3.500", "53.8%", "1.0", "attention"], ["2.000", "30.8%", "0.5", "product<float>"],
        ["1.000", "15.4%", "0.5", "Memset"], ["0.250", "100.0%", "2.0", "aten::mm"],
    ]  # fmt: skip
