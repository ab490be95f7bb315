"""The candidates of each kernel are compiled, timed and compared; the fastest one that computes the same is used."""

import itertools

import pytest
import torch

from turbo_nb.machine import environment, probe
from turbo_nb.machine.probe import Library, Machine
from turbo_nb.ops import tuning
from turbo_nb.ops.tuning import Launch
from turbo_nb.runtime import tune
from turbo_nb.runtime.tune import Trials

A, B, C = (Launch((number,), 4, 2) for number in (1, 2, 3))
MS = {A: 1.0, B: 0.5, C: 0.25}
KEY = "sla", (128,)


class Kernel:
    """A kernel with an output of some shape, and the launches that it saw; a launch may fail or be wrong"""

    def __init__(self, fails=(), wrong=(), shape=(4,)):
        self.fails, self.wrong, self.seen = fails, wrong, []
        self.out = torch.zeros(shape)

    def __call__(self, how):
        self.seen.append(how)
        if how in self.fails:
            raise RuntimeError("out of resource: shared memory")
        return self.out.fill_(float("nan") if how in self.wrong else 1 + how.tile[0] * 1e-4)


def clock(kernel):
    """Milliseconds of the launch that is timed"""

    def read(launched):
        launched()
        return MS[kernel.seen[-1]]

    return read


def measured(kernel, calls=1, **more):
    trials = Trials({}, clock(kernel), **more)
    for _ in range(calls):
        out = trials(*KEY, (A, B, C), kernel)
        assert out is kernel.out and (out - 1 - 1e-4).abs().max() < 1e-6  # as the first launch leaves it
    return trials.best()


def test_the_fastest_launch_is_the_best_twice():
    for _ in range(2):
        found = measured(Kernel())
        assert found[KEY].launch == C and found[KEY].times == MS


def test_a_launch_that_fails_or_computes_something_else_is_out(caplog):
    found = measured(Kernel(fails=[C]))
    assert found[KEY].launch == B and C not in found[KEY].times
    found = measured(Kernel(fails=[B], wrong=[C]))
    assert found[KEY].launch == A and list(found[KEY].times) == [A]
    assert "other numbers" in caplog.text


def test_a_call_is_measured_once_and_calls_of_other_shapes_add_up():
    kernel = Kernel()
    assert measured(kernel, calls=3)[KEY].times == MS
    trials = Trials({}, clock(kernel))
    trials(*KEY, (A, B, C), kernel)
    kernel.out = torch.zeros(8)
    trials(*KEY, (A, B, C), kernel)
    assert trials.best()[KEY].times == {how: 2 * ms for how, ms in MS.items()}


def test_after_the_time_is_up_the_first_launch_runs_and_nothing_is_kept():
    kernel = Kernel()
    assert measured(kernel, seconds=-1) == {} and kernel.seen == [A]


def test_a_known_kernel_runs_in_its_best_launch_and_is_not_timed():
    kernel = Kernel()
    trials = Trials({KEY: tuning.Measured(B, {})}, clock(kernel))
    trials(*KEY, (A, B, C), kernel)
    assert kernel.seen == [B] and trials.best() == {}


def test_an_output_that_does_not_fit_in_memory_ends_the_trials():
    def full(how):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        Trials({}, clock(None))(*KEY, (A, B), full)


@pytest.fixture
def one_gpu(monkeypatch):
    """Winners of GPU 0 that only this test sees, and a kernel whose launches are timed"""
    kernel, kept = Kernel(), {}
    monkeypatch.setattr(tuning, "winners", lambda gpu: kept)
    monkeypatch.setattr(tuning, "remember", lambda gpu, found: kept.update(found))
    monkeypatch.setattr(tuning, "_candidates", lambda *_: (A, B, C))
    monkeypatch.setattr(tune, "Clock", lambda gpu: clock(kernel))
    return kernel, kept


def test_all_candidates_compile_before_the_first_one_is_timed(one_gpu):
    kernel, kept = one_gpu
    phases = []

    def compiling(work):
        work()
        phases.append(list(kernel.seen))

    def work():
        tuning.run(*KEY, kernel.out, kernel)

    assert tune.tune(0, work, compiling)[KEY].launch == C
    assert phases == [[A, A, B, C, A]] and kept[KEY].times == MS
    seen = len(kernel.seen)
    assert tune.tune(0, work, compiling) == {} and kernel.seen[seen:] == [C]  # compiled, and not timed again


def test_what_was_timed_before_an_error_is_kept(one_gpu):
    kernel, kept = one_gpu
    runs = itertools.count()

    def work():
        tuning.run(*KEY, kernel.out, kernel)
        if next(runs):
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        tune.tune(0, work, lambda work: work())
    assert kept[KEY].launch == C


@pytest.mark.parametrize(
    ("arch", "wish", "expected"),
    [((8, 9), None, True), ((12, 0), None, True), ((9, 0), None, False), ((9, 0), "1", True), ((8, 9), "0", False),
     ((7, 5), None, False)],
)  # fmt: skip
def test_launches_are_timed_where_they_were_not_measured(monkeypatch, arch, wish, expected):
    machine = Machine(gpu="a card", gpu_count=1, arch=arch, libraries={"triton": Library(version="3.6.0")})
    monkeypatch.setattr(probe, "probe", lambda device=None: machine)
    monkeypatch.setenv(environment.TUNING, wish) if wish else monkeypatch.delenv(environment.TUNING, raising=False)
    assert tune.wanted(0) is expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_choice_is_the_best_one_twice(monkeypatch, tmp_path):
    import turbo_nb
    from turbo_nb.runtime import warm_up

    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path))
    monkeypatch.setenv("TURBO_NB_TUNING", "1")
    monkeypatch.setenv("TURBO_NB_ATTENTION", "triton")
    monkeypatch.setenv("TURBO_NB_LINEAR", "triton")
    monkeypatch.setattr(tuning, "_winners", {})
    pipeline = turbo_nb.load_pipeline("nano", device="cuda", text_cache=False)
    first = dict(tuning.winners(0))
    assert {kernel for kernel, _ in first} >= {"sla", "linear_state", "cross", "conv"}
    monkeypatch.setattr(tuning, "_winners", {})
    assert tuning.winners(0) == first  # from disk
    monkeypatch.setattr(tuning, "winners", lambda gpu: tuning._winners.setdefault(gpu, {}))
    monkeypatch.setattr(tuning, "_winners", {})
    warm_up.choose_launches(pipeline, (128, 128, 25))
    for key, again in tuning._winners[0].items():
        best = min(again.times.values())
        assert again.times[first[key].launch] <= best * 1.1 + 0.005, key  # ms; these kernels take microseconds
