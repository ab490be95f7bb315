"""Time the launches of each kernel once on this GPU, on the clip's shapes, and keep the fastest (`ops.tuning`).

A block of the transformer and a chunk of the VAE run on noise. Each kernel that has several candidates is first
compiled in all of them at the same time, then timed. An output that is not the first candidate's, up to rounding, takes
a candidate out.
"""

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..machine import environment, probe
from ..ops import registry, tuning
from ..ops.tuning import Launch, Measured, Output, Shape

SECONDS = 10.0  # for all timings of a GPU; what is not timed by then keeps its first candidate until the next start
RUNS = 5  # of a candidate, whose median counts
LEAD_CYCLES = 1_000_000  # that a GPU waits before a timing, about 0.6 ms, because the host needs time to launch
ROUNDING = 0.02  # largest relative difference to the output of the first candidate; float16 and bfloat16 round

log = logging.getLogger("turbo_nb")


def wanted(gpu: int) -> bool:
    """Return whether to time launches on a GPU: where our kernels run, but not on sm_90, where they were measured.

    TURBO_NB_TUNING 0: take every first candidate. 1: time the candidates on sm_90, too.
    """
    machine, wish = probe.probe(gpu), environment.switch(environment.TUNING)
    if wish is False or registry.no_kernels(machine):
        return False
    return machine.arch != registry.GLUON_ARCH or bool(wish)


class Trials:
    """Run each kernel in all its candidates, at its first call with an output of some shape.

    Args:
        known: what was measured before: such a kernel runs in its best launch.
        clock: launches a kernel, and returns the ms that it took. None: only launch it, which compiles it.
        seconds: no kernel is measured later than this.
    """

    def __init__(
        self,
        known: dict[tuple[str, Shape], Measured],
        clock: Callable[[Callable[[], Any]], float] | None = None,
        seconds: float = SECONDS,
    ):
        self.known, self.clock, self.end = known, clock, time.monotonic() + seconds
        self.times: dict[tuple[str, Shape], dict[Launch, float]] = {}
        self._seen: set[tuple] = set()

    def __call__(
        self, kernel: str, shape: Shape, candidates: tuple[Launch, ...], launched: Callable[[Launch], Output]
    ) -> Output:
        """Run a kernel in the launches that are still candidates, as `tuning.Trial`. Return the first one's output."""
        key = kernel, shape
        if key in self.known:
            return launched(self.known[key].launch)
        times = self.times.get(key) or dict.fromkeys(candidates, 0.0)
        first = next(iter(times))
        output = launched(first)
        call = (key, *(x.shape for x in _tensors(output)))
        if call in self._seen or time.monotonic() > self.end:
            return output
        self._seen.add(call)
        expected = [x.clone() for x in _tensors(output)]
        found = {how: self._measure(kernel, how, launched, expected) for how in times}
        self.times[key] = {how: times[how] + ms for how, ms in found.items() if ms is not None}
        return launched(first)

    def best(self) -> dict[tuple[str, Shape], Measured]:
        """Return the fastest launch of each kernel that was measured, by the sum of its calls' times."""
        return {key: Measured(tuning.best(times), times) for key, times in self.times.items() if times}

    def _measure(
        self, kernel: str, how: Launch, launched: Callable[[Launch], Output], expected: list[Tensor]
    ) -> float | None:
        """Return the ms of a launch; None where it fails or computes something else"""
        try:
            output = _tensors(launched(how))
            if self.clock is None:
                return 0.0
            ms = self.clock(lambda: launched(how))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton has no common class for what a launch raises
            log.info("%s does not run with %s here: %s", kernel, how, error)
            return None
        if not all(_close(*pair) for pair in zip(output, expected, strict=True)):
            log.warning("%s gives other numbers with %s than with its first launch, so it is not used", kernel, how)
            return None
        return ms


def tune(
    gpu: int,
    work: Callable[[], None],
    compiling: Callable[[Callable[[], None]], None],
    seconds: float = SECONDS,
) -> dict[tuple[str, Shape], Measured]:
    """Measure the kernels of some work that were not measured on a GPU before, and use the fastest launches.

    Args:
        gpu: its index.
        work: runs the kernels, in the clip's shapes.
        compiling: runs a function whose launches only compile, all at the same time.
        seconds: for all timings.

    Returns:
        What was measured now.
    """
    known = tuning.winners(gpu)
    pending = Trials(known)
    with tuning.trying(pending):
        compiling(work)
    if not pending.times:
        return {}
    trials = Trials(known, Clock(gpu), seconds)
    try:
        with tuning.trying(trials):
            work()
    finally:
        found = trials.best()
        tuning.remember(gpu, found)
    return found


class Clock:
    """Time launches on a GPU, each after its cache was overwritten, because a clip's kernels find other data there."""

    def __init__(self, gpu: int, runs: int = RUNS):
        cache = getattr(torch.cuda.get_device_properties(gpu), "L2_cache_size", 64 << 20)
        self.cache, self.runs = torch.empty(2 * cache, dtype=torch.int8, device=gpu), runs

    def __call__(self, launched: Callable[[], Any]) -> float:
        """Return the median ms of a launch that was launched before."""
        marks = []
        for _ in range(self.runs):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(LEAD_CYCLES)
            self.cache.zero_()
            begin.record()
            launched()
            end.record()
            marks.append((begin, end))
        torch.cuda.synchronize(self.cache.device)
        return statistics.median(begin.elapsed_time(end) for begin, end in marks)


def _tensors(output: Output) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output


def _close(out: Tensor, ref: Tensor) -> bool:
    """Return whether two outputs agree up to rounding; in their own dtype, because a clip's tensors are large"""
    difference, norm = (torch.linalg.vector_norm(x, dtype=torch.float32) for x in (out - ref, ref))
    return bool(difference <= ROUNDING * norm)  # NaN is not close
