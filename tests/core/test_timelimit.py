"""The limit on a stranger's code: it interrupts, leaves no trace, and an alarm of someone else's goes on."""

import signal
import threading
import time
from contextlib import suppress

import pytest

from nanovllm_core.timelimit import Expired, time_limit

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no alarm, and so no limit")


@pytest.fixture(autouse=True)
def untouched():
    before = signal.getsignal(signal.SIGALRM)
    yield
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def stubborn():
    while True:
        with suppress(Exception):
            time.sleep(60)


def test_code_that_hangs_is_interrupted_even_when_it_catches_every_exception():
    with pytest.raises(Expired), time_limit(0.05):
        stubborn()


def test_code_that_catches_the_first_alarm_gets_another():
    caught = []

    def sleepy():
        try:
            time.sleep(60)
        except Expired as e:
            caught.append(e)
        time.sleep(60)

    with pytest.raises(Expired), time_limit(0.05):
        sleepy()
    assert len(caught) == 1


def test_what_ends_in_time_is_left_alone():
    with time_limit(60):
        value = 1
    assert value == 1
    with pytest.raises(KeyError), time_limit(60):
        raise KeyError


def test_an_alarm_of_someone_elses_still_comes():
    came = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: came.set())
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(Expired), time_limit(0.05):
        time.sleep(60)
    assert not came.is_set()
    assert came.wait(10)
    signal.signal(signal.SIGALRM, before)


def test_another_thread_has_no_limit():
    said = []

    def work():
        with time_limit(0.01):
            time.sleep(0.1)
        said.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == ["done"]
