"""Schedules by their definition."""

import math

import pytest

from nanovllm_core.training.schedule import Schedule


def shares(kind, total, warmup, **more):
    schedule = Schedule(kind=kind, total=total, warmup=warmup, **more)
    return [schedule.share(step) for step in range(total)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_to_the_peak_and_never_wastes_a_step(kind):
    rates = shares(kind, 50, 9)
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == rates[9] == 1.0
    assert min(rates) > 0


def test_the_decays():
    assert shares("linear", 10, 0) == pytest.approx([1 - s / 10 for s in range(10)])
    assert shares("cosine", 50, 0)[25] == pytest.approx(0.5)
    assert shares("cosine", 40, 20)[30] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert set(shares("constant", 10, 0)) == {1.0}


def test_warm_up_stable_decay():
    rates = shares("wsd", 100, 10, decay_ratio=0.3)
    assert rates[10:71] == [1.0] * 61
    assert rates[70:] == pytest.approx([1 - math.sqrt(i / 30) for i in range(30)])
    rates = shares("wsd", 100, 10, decay_ratio=0.3, decay_shape="linear")
    assert rates[10:71] == [1.0] * 61
    assert rates[70:] == pytest.approx([1 - i / 30 for i in range(30)])
    assert shares("wsd", 10, 6, decay_ratio=1.0)[5:7] == [pytest.approx(6 / 7), 1.0]  # the decay waits for the warm-up
    assert shares("wsd", 3, 0, decay_ratio=0.01) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_a_warm_up_longer_than_the_run_still_rises(kind):
    rates = shares(kind, 5, 100)
    assert rates == sorted(rates)
