"""The stages of a clip, run one after another: timed, with their peak memory, and again where memory runs out."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Protocol, TypeVar

from ..errors import TurboNbError, warn
from .plan import Plan

Result = TypeVar("Result")


def current_device(device: str):
    """Return a context in which `device` is torch's current GPU, because Triton launches there."""
    import torch

    return nullcontext() if device == "cpu" else torch.cuda.device(device)


class Planned(Protocol):
    """Something whose parts are where a memory plan says."""

    plan: Plan

    def follow(self, plan: Plan) -> None:
        """Put the parts where another plan says."""

    def drop_graphs(self) -> bool:
        """Drop CUDA graphs, whose memory other work needs. Returns whether one existed."""


class StageRunner:
    """Run the stages of a clip.

    Args:
        model: what the stages work with.
        on_stage: called with the name of each stage as it begins.

    After `run`, `timings` holds the seconds of each stage, and `peaks` the most bytes of GPU memory in each.
    """

    def __init__(self, model: Planned, on_stage: Callable[[str], None] | None = None):
        self.timings: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._model, self._device = model, model.plan.device
        self._on_stage = on_stage or (lambda name: None)

    def run(self, name: str, work: Callable[[], Result]) -> Result:
        """Run one stage.

        If memory runs out, CUDA graphs are dropped, and the stage runs again. If that does not help, the next plan is
        taken with a warning, until a plan suffices. Under a tight plan, memory that torch has cached for other stages
        is given back first.

        Args:
            name: "text", "denoise" or "decode".
            work: the stage; it may be called several times.

        Returns:
            What work returned, which is not None.

        Raises:
            TurboNbError: memory ran out for good.
        """
        import torch

        self._on_stage(name)
        begin, on_gpu = time.perf_counter(), self._device != "cpu"
        if on_gpu:
            if self._model.plan.is_tight:
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        result = _attempt(work)
        if result is None and self._model.drop_graphs():
            result = _attempt(work)
        plan = self._model.plan
        while result is None:
            plan = self._following(name, plan)
            result = _attempt(partial(self._follow, plan, work))
        if on_gpu:
            torch.cuda.synchronize(self._device)
            self.peaks[name] = torch.cuda.max_memory_allocated(self._device)
        self.timings[name] = time.perf_counter() - begin
        return result

    def _following(self, name: str, failed: Plan) -> Plan:
        """Return the plan after one that ran out of memory, with a warning"""
        if failed.next is None:
            raise TurboNbError(
                f"out of memory while at {name}, with plan {failed.name}. Take fewer frames, a smaller resolution, or "
                "the int8 checkpoint."
            )
        warn(f"out of memory while at {name}; going on with {failed.next}", stacklevel=3)
        return failed.next

    def _follow(self, plan: Plan, work: Callable[[], Result]) -> Result:
        self._model.follow(plan)
        return work()


def _attempt(work: Callable[[], Result]) -> Result | None:
    """Run a stage; None where memory ran out, because the error would hold on to the stage's tensors"""
    import torch

    try:
        return work()
    except torch.OutOfMemoryError:
        return None
