"""The switch of experts: one leaves the GPU and the other comes, as in every clip of A14B; random 8-bit weights.

"accelerate" moves them as its model offload does; "turns" is `turbo_nb.offload`; "ahead" is that after a step for which
the GPU had room beside the first expert, so that the second was fetched meanwhile. A row's first_ms is the first
switch's. The check. Whichever came holds the bytes it was made with.
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
MATRIX = 5120 * 13824  # bytes of a parameter: a feed-forward's of 14B
STEP = 1.0  # seconds for what is fetched ahead to come


class Expert(nn.Module):
    """So many bytes of int8, whose output tells them from others."""

    def __init__(self, size: float, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        count = max(1, round(size / MATRIX))
        one = torch.randint(-128, 128, (int(size / count),), dtype=torch.int8, generator=generator)
        # random once, the others are copies, each of them moved on by some bytes: 14 GB take a minute to draw
        self.weights = nn.ParameterList(nn.Parameter(one.roll(97 * i), requires_grad=False) for i in range(count))

    def forward(self) -> Tensor:
        """Of every parameter the sum of its last 4096 bytes, (parameters,) float32"""
        return torch.stack([weight[-4096:].float().sum() for weight in self.weights])


class Pipeline:
    """What `expert_swap.take_turns` asks of a pipeline."""

    def __init__(self, experts: tuple[Expert, Expert]):
        self.experts = experts

    def maybe_free_model_hooks(self) -> None:
        """diffusers': nothing is offloaded by it"""

    def remove_all_hooks(self) -> None:
        """diffusers': from all parts"""
        from accelerate.hooks import remove_hook_from_module

        for expert in self.experts:
            remove_hook_from_module(expert)


def jobs(gigabytes: float, modes: list[str], device: str, *, runs: int, warmup: int) -> Iterator[Job]:
    """A job for each of `MODES` that is named. Raises InputError for another, and for no bytes."""
    for mode in modes:
        if mode not in MODES:
            raise InputError(f"mode is {mode!r}; it is one of {', '.join(MODES)}")
    if not gigabytes > 0:
        raise InputError(f"gb is {gigabytes:g}; it is the size of an expert in GB, above 0")
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
            return timing, Check(error=error, limit=0, what="what came, against what was made")

        size = sum(weight.nbytes for weight in experts[0].weights)
        shape = f"{size / 1e9:.1f} GB"
        return Job(work="switch of experts, int8", shape=shape, mode=mode, weights="random", run=run)

    yield from map(job, modes)


Switch = Callable[[], tuple[float, int, Tensor]]  # → seconds, which expert came, and its output on the CPU


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
    expert_swap.take_turns(pipeline, experts, device)

    def switch():
        experts[0]()
        if ahead:
            experts[0]()  # a second step, beside which the other is fetched
            time.sleep(STEP)
        seconds, out = _timed(experts[1], device)
        return seconds, 1, out.cpu()

    try:
        with patch.object(expert_swap, "room_on", expert_swap.room_on if ahead else lambda device: 0):
            yield switch
    finally:
        pipeline.maybe_free_model_hooks()
        expert_swap.end_turns(pipeline)


def _timed(work: Callable[[], Tensor | None], device: str) -> tuple[float, Tensor | None]:
    """Seconds of the work, and what it gives"""
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    synchronize()
    begin = time.perf_counter()
    out = work()
    synchronize()
    return time.perf_counter() - begin, out
