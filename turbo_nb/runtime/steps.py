"""Seconds of each denoising step, and what CUDA graphs did."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..records import GraphRecord
from .place import transformers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(kw_only=True)
class Tally:
    """What the graphs did in a run; `reason` says why a step was plain, though a graph could have saved time."""

    replayed: int = 0
    captured: int = 0
    reason: str = ""

    @property
    def record(self) -> GraphRecord:
        """The tally as a video carries it."""
        return GraphRecord(replayed=self.replayed, captured=self.captured, reason=self.reason)


class StepTimer:
    """Time the steps of a denoising, hooked to the transformers of a pipeline while it is entered.

    On a GPU a launch returns before its kernel runs, so `perf_counter` would time the launches. Waiting for the GPU at
    every step would empty its queue. An event in the stream between two kernels costs microseconds, and is read after
    the stage.
    """

    def __init__(self, pipeline: "DiffusionPipeline", device: str):
        self._pipeline, self._device = pipeline, device

    def mark(self, name: str) -> None:
        """Note the time of a step's "call", its "begin" (when its weights are on the device) or its "end"."""
        if self._device == "cpu":
            self._marks[name].append(time.perf_counter())
            return
        import torch

        if torch.cuda.is_current_stream_capturing():  # the hooks of a step that only records a graph
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks[name].append(event)

    def __enter__(self) -> "StepTimer":
        self._marks, self._hooks = {"call": [], "begin": [], "end": []}, []
        for transformer in transformers(self._pipeline):
            # a plan's own hook, which onloads the weights, runs between these two
            for module, name in ((transformer, "call"), (transformer.rope, "begin")):
                hook = lambda *_, name=name: self.mark(name)  # noqa: E731
                self._hooks.append(module.register_forward_pre_hook(hook, prepend=True))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def steps(self) -> tuple[float, ...]:
        """Seconds of each step, from the transformer's first kernel to the scheduler's last."""
        return self._between("begin", "end")

    @property
    def switch(self) -> float:
        """Seconds that the steps waited for weights."""
        return sum(self._between("call", "begin"))

    def _between(self, first: str, last: str) -> tuple[float, ...]:
        pairs = zip(self._marks[first], self._marks[last], strict=True)
        return tuple(b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3 for a, b in pairs)
