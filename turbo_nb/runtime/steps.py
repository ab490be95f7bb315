"""A prompt becomes frames: `load_pipeline()` and `generate()`.

The pipeline is diffusers' `WanPipeline` or `WanImageToVideoPipeline`, unchanged, with our scheduler; `generate`
encodes, denoises and decodes one after the other, so that each can be timed and shown. Importing this module is cheap:
torch and diffusers are loaded with the first model.
"""

import time
from typing import TYPE_CHECKING

from . import place

if TYPE_CHECKING:
    pass


class _StepClock:
    """Times the steps of a denoising, hooked to the transformers of a pipeline for as long as it is entered.

    A kernel's launch returns before the kernel runs, so on a GPU perf_counter would time the launches. Waiting for the
    GPU at every step would empty its queue; an event in the stream between two kernels costs microseconds and is read
    after the stage, when all is done.
    """

    def __init__(self, pipeline):
        self._pipeline = pipeline

    def mark(self, name: str) -> None:
        """Where the work is now: a step is at its "call", at its "begin" (with its weights there) or at its "end"."""
        device = self._pipeline.plan.device
        if device == "cpu":
            self._marks[name].append(time.perf_counter())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        self._marks[name].append(event)

    def __enter__(self) -> None:
        self._marks, self._hooks = {"call": [], "begin": [], "end": []}, []
        for transformer in place.transformers(self._pipeline):
            # between the two is what a plan has put around its forward to bring the weights
            for module, name in ((transformer, "call"), (transformer.rope, "begin")):
                hook = lambda *_, name=name: self.mark(name)  # noqa: E731
                self._hooks.append(module.register_forward_pre_hook(hook, prepend=True))

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def steps(self) -> tuple[float, ...]:
        """Seconds of each step, from the transformer's first kernel to the scheduler's last."""
        return self._between("begin", "end")

    @property
    def switch(self) -> float:
        """Seconds that steps waited for weights."""
        return sum(self._between("call", "begin"))

    def _between(self, first: str, last: str) -> tuple[float, ...]:
        pairs = zip(self._marks[first], self._marks[last], strict=True)
        return tuple(b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3 for a, b in pairs)
