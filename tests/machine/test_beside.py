"""Threads beside the caller: ended when the context ends, with its warnings, and never with a lost error."""

import threading
import time

import pytest

from turbo_nb.errors import collect_warnings, warn
from turbo_nb.machine.beside import Beside, within


def test_work_runs_at_the_same_time_and_has_ended_afterwards():
    both, done = threading.Barrier(3, timeout=30), []

    def work(name):
        both.wait()
        done.append(name)

    with Beside() as beside:
        beside.start(work, "a")
        beside.start(work, "b")
        both.wait()
    assert sorted(done) == ["a", "b"]


def test_the_caller_gets_warnings_results_and_the_first_error():
    with collect_warnings() as messages, Beside() as beside:
        result = beside.start(lambda: warn("a lost word") or 3)
    assert messages == ["a lost word"] and result.result() == 3

    def fail(text):
        raise ValueError(text)

    with pytest.raises(ValueError, match="one"), Beside() as beside:
        beside.start(fail, "one")
        beside.start(fail, "two")


def test_an_error_of_the_caller_comes_first_and_waits_for_the_threads():
    ended = []
    with pytest.raises(KeyError), Beside() as beside:
        beside.start(lambda: threading.Event().wait(0.2) or ended.append(1) or 1 / 0)
        raise KeyError("the caller's")
    assert ended == [1]


def test_waiting_ends_the_work_so_far_and_more_can_begin():
    done = []
    with Beside() as beside:
        beside.start(lambda: threading.Event().wait(0.1) or done.append("first"))
        beside.wait()
        assert done == ["first"]
        beside.start(done.append, "second")
    assert done == ["first", "second"]


def test_work_within_a_time_gives_its_result_its_error_or_a_timeout():
    ended = threading.Event()
    assert within(30, max, 1, 2) == 2
    with pytest.raises(ValueError, match="one"):
        within(30, fail, ValueError("one"))
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer in 0\.1 s"):
        within(0.1, ended.wait, 30)
    assert time.monotonic() - begin < 10
    ended.set()


def fail(error):
    raise error
