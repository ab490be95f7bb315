"""The steps of a clip of A14B with an expert per GPU, beside both experts on each of two GPUs and on one GPU.

Rank 0 runs the steps of the high-noise expert, and rank 1 those of the low-noise expert. After each round the ranks
exchange their latents:

    round     0         1         2         3
    rank 0    clip 0    clip 1    clip 2
    rank 1              clip 0    clip 1    clip 2

    one clip                 the first and the last round, until rank 0 has the finished latents
    a clip after the other   a round in which both ranks work, which is the time between two finished clips

Ulysses and one GPU need both experts on a GPU. The peak is what torch allocates on rank 0 after loading, so without the
windows of `peers`.

The check: the latents of a clip against one GPU, or by Ulysses a step of each expert, with the block maps of one GPU.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from turbo_nb import catalog
from turbo_nb.errors import InputError
from turbo_nb.parallel import members, ranks
from turbo_nb.scheduler import MAX_STEPS, RCMScheduler

from . import gpus as several
from . import harness, step
from .harness import Check, Job, Timing

A14B = catalog.find("Wan2.2-A14B")
CHANNELS = 16  # of the latents; the other channels of the input are the condition
CLIPS = 3  # one after the other
SINGLE, ULYSSES, ONE_CLIP, MORE_CLIPS = several.SINGLE, "whole", "one clip", "more clips"
MODES = {
    SINGLE: several.MODES[SINGLE],
    ULYSSES: several.MODES[ULYSSES],
    ONE_CLIP: "fused, graph, an expert per GPU, one clip",
    MORE_CLIPS: "fused, graph, an expert per GPU, a clip after the other",
}


def check(gpus: int, device: str) -> None:
    """Raise InputError unless this machine has a GPU for each of the two experts."""
    if gpus != 2:
        raise InputError(f"gpus is {gpus}. Expected 2, one for each expert.")
    several.check(gpus, device)


class Experts:
    """Both experts on a rank, and what it can run.

    Args:
        setup: the shape of an expert, and the clip.
        link: with the other rank.
        rank: the number of this rank, and of the expert that it loads first (0: high noise).
        device: of this rank.

    Attributes:
        peaks: kind → GiB of this rank.
    """

    def __init__(self, setup: step.Setup, link: Any, rank: int, device: str):
        self.link, self.rank, self.device = link, rank, device
        self.scheduler = RCMScheduler(A14B.sigma_max, ode=True)
        self.scheduler.set_timesteps(MAX_STEPS, device)
        boundary = A14B.boundary * self.scheduler.config.num_train_timesteps
        self.steps: tuple[list[int], list[int]] = [], []  # of each expert
        for index, timestep in enumerate(self.scheduler.timesteps.tolist()):
            self.steps[timestep < boundary].append(index)
        self.experts: dict[int, several.Rank] = {}
        self.peaks: dict[str, float | None] = {}
        for kind, number in (ONE_CLIP, rank), (SINGLE, 1 - rank):  # so that the first peak is of one expert
            self.experts[number] = several.Rank(replace(setup, seed=number), link, device)
            self._forget_peak()
            self.experts[number].record_single()
            self.peaks[kind] = several.peak_gib(device)
        self.peaks[MORE_CLIPS] = self.peaks[ONE_CLIP]
        self.starts = [self._start(seed) for seed in range(CLIPS)]

    def _start(self, seed: int) -> Tensor:
        self.scheduler.seed(seed)
        shape = self.experts[0].inputs["hidden_states"][:, :CHANNELS].shape
        return self.scheduler.start_latents(shape, self.device)

    def _forget_peak(self) -> None:
        if self.device != "cpu":
            torch.cuda.empty_cache()  # because a graph's pool cannot use it
            torch.cuda.reset_peak_memory_stats(self.device)

    def share(self) -> float:
        """Let all ranks share steps, too. Return the larger error of both experts' steps on rank 0."""
        self._forget_peak()
        for number in range(2):
            self.experts[number].split()
            self.experts[number].record_whole()
        self.peaks[ULYSSES] = several.peak_gib(self.device)
        refs = [self.experts[number].alone() for number in range(2)]
        return max(harness.relative_error(self.experts[n].together(True), ref) for n, ref in enumerate(refs))

    def denoise(self, number: int, latents: Tensor, kind: str = SINGLE) -> Tensor:
        """Run the steps of an expert: latents (1, 16, T, H, W) → those of the next noise level."""
        expert = self.experts[number]
        model_input, timestep = expert.inputs["hidden_states"], expert.inputs["timestep"]
        for index in self.steps[number]:
            model_input[:, :CHANNELS] = latents
            timestep.copy_(self.scheduler.timesteps[index])
            if kind == ULYSSES:
                self.link.group.broadcast(model_input)
            velocity = expert.result(kind)
            if kind == SINGLE or self.rank == 0:  # which alone gets the result of a shared step
                self.scheduler.set_begin_index(index)
                latents = self.scheduler.step(velocity, timestep, latents).prev_sample
        return latents

    def clip(self, kind: str) -> Tensor:
        """Run the last clip with both experts on this rank, alone or by Ulysses."""
        return self.denoise(1, self.denoise(0, self.starts[-1], kind), kind)

    def clips(self, first: int) -> Tensor:
        """Run the clips from a number on, with an expert per GPU. Rank 0 gets the latents of the last one."""
        latents = self.starts[first]
        for number in range(first, CLIPS + 1):
            if self.rank == 0 and number < CLIPS:
                latents = self.denoise(0, self.starts[number])
            elif self.rank == 1 and number > first:
                latents = self.denoise(1, latents)
            latents = self.link.group.gather(latents, (1, 1), everywhere=True).narrow(0, 1 - self.rank, 1)
        return latents

    @torch.inference_mode()
    def run(self, work: str, argument: Any) -> tuple[float, Tensor]:
        """Run `clip` or `clips`, and return its milliseconds on this rank and its latents."""
        made = []
        with several._on(self.device):
            (spent,) = several.times(lambda: made.append(getattr(self, work)(argument)), self.device, 1)
        return spent, made[0]

    def release(self) -> None:
        """Drop the graphs of both experts."""
        for expert in self.experts.values():
            expert.release()


def serve(member: ranks.Member, setup: step.Setup) -> None:
    """Be the other rank of `jobs`."""
    experts = Experts(setup, member, member.rank, member.device)
    member.ready()
    for command, arguments in member.commands():
        getattr(experts, command)(*arguments)


def jobs(setup: step.Setup, gpus: int, *, runs: int, warmup: int) -> Iterator[Job]:
    """Yield a job for one GPU, one for Ulysses, and two for an expert per GPU. Each has the milliseconds of a clip."""
    with several.team_of(gpus, serve, setup) as team:
        experts = Experts(setup, team, 0, members.device_of(0))
        team.join()
        told = partial(several.on_all, team, experts)
        of_steps = told("share")
        works = {
            SINGLE: partial(experts.run, "clip", SINGLE),
            ULYSSES: partial(told, "run", "clip", ULYSSES),
            ONE_CLIP: partial(told, "run", "clips", CLIPS - 1),
            MORE_CLIPS: partial(told, "run", "clips", 0),
        }
        spent, made = {kind: [] for kind in works}, {}
        for _ in range(1 + warmup + runs):  # all kinds in each, so that a change of the clock reaches all of them
            for kind, work in works.items():
                milliseconds, made[kind] = work()
                spent[kind].append(milliseconds)
        told("release")
        spent[MORE_CLIPS] = [
            (more - one) / (CLIPS - 1) for more, one in zip(spent[MORE_CLIPS], spent[ONE_CLIP], strict=True)
        ]
        errors = {kind: harness.relative_error(out, made[SINGLE]) for kind, out in made.items()}
        steps = of_steps, f"a step against one GPU, same block maps, all layers; clip, own maps {errors[ULYSSES]:.2e}"
        for kind, (first, *found) in spent.items():
            timing = Timing(
                ms=median(found[warmup:]), ms_min=min(found[warmup:]), n=runs, first_ms=first,
                peak_gib=experts.peaks[kind],
            )  # fmt: skip
            error, what = steps if kind in (SINGLE, ULYSSES) else (errors[kind], "latents of a clip against one GPU")
            checked = Check(error=error, limit=several.limit_of(setup), what=what)
            yield Job(
                work=f"{MAX_STEPS} steps{setup.work.removeprefix('step')}", shape="x".join(map(str, setup.size)),
                mode=MODES[kind], weights="random", run=lambda timing=timing, checked=checked: (timing, checked),
                gpus=1 if kind == SINGLE else gpus,
            )  # fmt: skip
