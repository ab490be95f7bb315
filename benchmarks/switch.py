"""Switch from one expert on the GPU to the other, as every clip of A14B does, with random 8-bit weights.

Modes:
- accelerate: move both, as accelerate's model offload does.
- turns: `turbo_nb.runtime.expert_swap`.
- ahead: the same, with room on the GPU, so that the second expert is prefetched during a step of the first.

The column first_ms is the time of the first switch. The check: an expert on the GPU has its own bytes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor, nn

from turbo_nb.errors import InputError
from turbo_nb.runtime import expert_swap

from . import harness
from .harness import Check, Job, Timing

MODES = ("accelerate", "turns", "ahead")
MATRIX = 5120 * 13824  # bytes of a parameter, such as a feed-forward layer of 14B
STEP = 1.0  # seconds, enough to prefetch an expert


class Expert(nn.Module):
    """A module with `size` bytes of int8. Its output differs from that of other bytes."""

    def __init__(self, size: float, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        count = max(1, round(size / MATRIX))
        one = torch.randint(-128, 128, (int(size / count),), dtype=torch.int8, generator=generator)
        # Only one is drawn, because drawing 14 GB takes a minute. The others are copies, each shifted by some bytes.
        self.weights = nn.ParameterList(nn.Parameter(one.roll(97 * i), requires_grad=False) for i in range(count))

    def forward(self) -> Tensor:
        """Return the sum of the last 4096 bytes of each parameter, (parameters,) float32."""
        return torch.stack([weight[-4096:].float().sum() for weight in self.weights])


class Pipeline:
    """The methods of a pipeline that `expert_swap.enable` uses."""

    def __init__(self, experts: tuple[Expert, Expert]):
        self.experts = experts

    def maybe_free_model_hooks(self) -> None:
        """Do nothing, because diffusers offloads nothing here."""

    def remove_all_hooks(self) -> None:
        """Remove the hooks of all parts, as diffusers does."""
        from accelerate.hooks import remove_hook_from_module

        for expert in self.experts:
            remove_hook_from_module(expert)


def jobs(gigabytes: float, modes: list[str], device: str, *, runs: int, warmup: int) -> Iterator[Job]:
    """Yield a job for each mode. Raises InputError for an unknown mode, and for a size that is not above 0."""
    for mode in modes:
        if mode not in MODES:
            raise InputError(f"mode is {mode!r}. Expected one of {', '.join(MODES)}.")
    if not gigabytes > 0:
        raise InputError(f"gb is {gigabytes:g}. Expected the size of an expert in GB, above 0.")
    experts = Expert(gigabytes * 1e9, 0), Expert(gigabytes * 1e9, 1)
    made = [expert() for expert in experts]

    def job(mode: str) -> Job:
        def run() -> tuple[Timing, Check]:
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats(device)
            with (_accelerate if mode == "accelerate" else _turns)(experts, device, mode == "ahead") as switch:
                switches = [switch() for _ in range(1 + warmup + runs)]
            first, *others = (1e3 * seconds for seconds, _, _ in switches)
            warm = others[warmup:]
            peak = torch.cuda.max_memory_allocated(device) / 2**30 if device != "cpu" else None
            timing = Timing(ms=median(warm), ms_min=min(warm), n=runs, first_ms=first, peak_gib=peak)
            error = max(harness.relative_error(out, made[number]) for _, number, out in switches)
            return timing, Check(error=error, limit=0, what="the expert on the GPU against the expert that was made")

        size = sum(weight.nbytes for weight in experts[0].weights)
        shape = f"{size / 1e9:.1f} GB"
        return Job(work="switch of experts, int8", shape=shape, mode=mode, weights="random", run=run)

    yield from map(job, modes)


Switch = Callable[
    [], tuple[float, int, Tensor]
]  # → seconds, number of the expert on the GPU, and its output on the CPU


@contextmanager
def _accelerate(experts: tuple[Expert, Expert], device: str, _: bool) -> Iterator[Switch]:
    there = 0
    experts[there].to(device)

    def switch():
        nonlocal there
        there = 1 - there

        def move():
            experts[1 - there].to("cpu")
            experts[there].to(device)

        seconds, _ = _timed(move, device)
        return seconds, there, experts[there]().cpu()

    try:
        yield switch
    finally:
        for expert in experts:
            expert.to("cpu")


@contextmanager
def _turns(experts: tuple[Expert, Expert], device: str, ahead: bool) -> Iterator[Switch]:
    pipeline = Pipeline(experts)
    expert_swap.enable(pipeline, experts, device)

    def switch():
        experts[0]()
        if ahead:
            experts[0]()  # a second step, during which the other expert is prefetched
            time.sleep(STEP)
        seconds, out = _timed(experts[1], device)
        return seconds, 1, out.cpu()

    try:
        with patch.object(expert_swap, "free_at_peak", expert_swap.free_at_peak if ahead else lambda device: 0):
            yield switch
    finally:
        pipeline.maybe_free_model_hooks()
        expert_swap.disable(pipeline)


def _timed(work: Callable[[], Tensor | None], device: str) -> tuple[float, Tensor | None]:
    """Return the seconds of the work, and its result"""
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    synchronize()
    begin = time.perf_counter()
    out = work()
    synchronize()
    return time.perf_counter() - begin, out
