"""Steps and the VAE on several GPUs, beside the same work on one GPU in the same run.

The ranks are those of `turbo_nb.parallel`. Every rank has the same random weights. Three CUDA graphs are timed:

    whole      a step, as `generate` runs it
    compute    the same kernels without any exchange; what they write to other GPUs stays on this one
    exchange   only the other exchanges, with the same sizes and in the same order

waiting = whole − compute − exchange: what neither explains. A rank waits for a slower one, and kernels that write to
other GPUs take longer. In compute all parts of q, k and their sums go to the same bytes, so it may write less to memory
than a step does.

The check: the same step on one GPU and on all, with the block maps of one GPU on every rank.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from turbo_nb import backends
from turbo_nb.checkup.selftest import SAGE_STEP_BOUND
from turbo_nb.fused import transformer as fused_transformer
from turbo_nb.fused import vae as fused_vae
from turbo_nb.machine import probe
from turbo_nb.ops.parts import Parts
from turbo_nb.parallel import members, ranks, strips, ulysses
from turbo_nb.parallel.peers import FLAG, Peers, Window
from turbo_nb.runtime.graphs import CudaRecorder

from . import harness, step
from . import vae as vae_benchmark
from .harness import Check, Job, Timing

LIMIT = 5e-3  # relative L2 error of a step on several GPUs against one GPU; with 8 bits the mode's own error
ROUNDS = 5  # over all kinds and one GPU, so that a change of the clock reaches all of them
PSNR = 45  # dB, the least of decoded frames
SEAM = 2  # the most that the error of a row of pixels is over that of the median row
SINGLE = "one GPU"
MODES = {
    SINGLE: "fused, graph",
    "whole": "fused, graph",
    "compute": "fused, graph, only compute",
    "exchange": "fused, graph, only exchange",
}
KINDS = [kind for kind in MODES if kind != SINGLE]


def check(gpus: int, device: str) -> None:
    """Raise InputError where the machine has fewer GPUs."""
    probe.gpus_of(gpus, device)


class _Done:
    """An exchange that did nothing"""

    def wait(self) -> None:
        """Do nothing."""


class Rank:
    """A rank with a transformer, and what it can run.

    Args:
        setup: the transformer and the clip.
        link: with the other ranks; `members.split` takes it.
        device: of this rank.
    """

    def __init__(self, setup: step.Setup, link: Any, device: str):
        self.setup, self.link, self.device = setup, link, device
        own = step.replace(setup, device=device)
        with _on(device):
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
            self.model, self.inputs = step.build(own, dtype), step.make_inputs(own, dtype)
            fused_transformer.fuse(self.model, device)
        self.maps: list[Tensor] = []
        self._works: dict[str, Callable[[], Any]] = {}
        self._recorder, self.calls, self._kept = None, [], []

    @torch.inference_mode()
    def alone(self) -> Tensor:
        """Run the step on this GPU alone with the block maps of the reference, and keep them."""
        choose, self.maps = step.attention_reference.block_map, []

        def record(*arguments) -> Tensor:
            self.maps.append(choose(*arguments))
            return self.maps[-1]

        with _on(self.device), step.maps_from(record):
            return self.single()

    def record_single(self) -> None:
        """Record the step on this GPU alone."""
        self._works[SINGLE] = self._recorded(self.single)

    @torch.inference_mode()
    def single(self) -> Tensor:
        """Run the step on this GPU alone."""
        with patch.object(self.model, "ulysses", None, create=True):  # because it may be split already
            return step.velocity(self.model, self.inputs)

    def record_whole(self) -> None:
        """Record the step on all ranks, after the split."""
        self._works["whole"] = self._recorded(self.together)

    def release(self) -> None:
        """Drop the graphs, because NCCL cannot end while they are there."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        self._works, self._kept = {}, []

    def split(self) -> None:
        """Let the step run on all ranks from now on."""
        ulysses.split(self.model, ulysses.Ulysses(self.link, 0))

    @torch.inference_mode()
    def together(self, same_maps: bool = False) -> Tensor:
        """Run the step on all ranks; rank 0 gets the result."""
        taken = 0  # maps of this rank's heads that the blocks have asked for

        def own_heads(q: Tensor, *_) -> Tensor:
            nonlocal taken
            own = self.setup.arch.num_heads // self.link.group.size
            layer, begin = divmod(taken, own)
            begin += self.link.group.rank * own
            taken += q.shape[2]
            return self.maps[layer][:, begin : begin + q.shape[2]]

        self.model.ulysses.shared = True
        try:
            with _on(self.device), step.maps_from(own_heads) if same_maps else nullcontext():
                return self.model(**self.inputs, return_dict=False)[0]
        finally:
            self.model.ulysses.shared = False

    def exchanges(self) -> None:
        """Run only the exchanges of a step."""
        for call, arguments in self.calls:
            call(*arguments)

    def prepare(self) -> None:
        """Record a graph of each kind; on a CPU the works stay functions."""
        group = self.link.group
        exchange, memory = group.exchange, group.peers.memory if group.peers else None
        spare: dict[tuple, tuple] = {}  # one pair of lists for each size, because a step reuses its memory, too
        scratch = torch.empty(0, dtype=torch.uint8, device=self.device)  # what copies read

        def note(received: list[Tensor], sent: list[Tensor]) -> Any:
            key = tuple(x.nbytes for x in (*received, *sent))
            spare.setdefault(key, tuple([x.clone() for x in both] for both in (received, sent)))
            self.calls.append((lambda *lists: exchange(*lists).wait(), spare[key]))
            return exchange(received, sent)

        def noted(name: str) -> Callable:
            real = getattr(memory, name)

            def call(*arguments) -> None:
                self.calls.append((real, arguments))
                real(*arguments)

            return call

        def noted_copy(rank: int, to: int, to_pitch: int, source: int, pitch: int, *size: int) -> None:
            nonlocal scratch
            real, (width, rows) = type(memory).copy, size
            if width == FLAG.itemsize:  # whose value counts
                self.calls.append((real, (memory, rank, to, to_pitch, source, pitch, *size)))
                real(memory, rank, to, to_pitch, source, pitch, *size)
                return
            if scratch.numel() < pitch * rows:
                scratch = torch.empty(pitch * rows, dtype=torch.uint8, device=self.device)
            self.calls.append((lambda: real(memory, rank, to, to_pitch, scratch.data_ptr(), pitch, *size), ()))
            real(memory, rank, to, to_pitch, source, pitch, *size)

        of_memory = ("fork", "join", "wait") if memory else ()
        self.together()
        with ExitStack() as notes:
            notes.enter_context(patch.object(group, "exchange", note))
            for name in of_memory:
                notes.enter_context(patch.object(memory, name, noted(name)))
            if memory:
                notes.enter_context(patch.object(memory, "copy", noted_copy))
            self.together()
        with ExitStack() as silence:
            silence.enter_context(patch.object(group, "exchange", lambda *_: _Done()))
            for name in (*of_memory, *(["copy"] if memory else [])):
                silence.enter_context(patch.object(memory, name, lambda *_: None))
            if memory:
                silence.enter_context(patch.object(group.peers, "parts", partial(own_parts, group.peers)))
            self._works["compute"] = self._recorded(self.together)
        self._works["exchange"] = self._recorded(self.exchanges)
        self.record_whole()

    def _recorded(self, work: Callable[[], Any]) -> Callable[[], Any]:
        if self.device == "cpu":
            return work
        work()  # warm, because a graph can only launch what is compiled and connected
        torch.cuda.synchronize(self.device)
        self._recorder = self._recorder or CudaRecorder(self.device)
        with _on(self.device), torch.inference_mode():
            text = self.inputs["encoder_hidden_states"]
            self._kept.append(fused_transformer.prepare_prompt(self.model, text))
            replay, out = self._recorder.record(work)
        self._kept.append((replay, out))  # because a pool whose graphs are all gone takes no new one

        def replayed() -> Any:
            replay()
            return out

        return replayed

    def result(self, kind: str) -> Any:
        """Run a work once, and return its result. The next run may overwrite it."""
        return self._works[kind]()

    @torch.inference_mode()
    def run(self, kind: str, runs: int) -> list[float]:
        """Run a work several times, and return the milliseconds of each time on this rank."""
        with _on(self.device):
            return times(self._works[kind], self.device, runs)


def own_parts(peers: Peers, window: Window, *places) -> Parts:
    """Compute `Peers.parts` with every part in this rank's window."""
    own = Window(dict.fromkeys(window.addresses, window.addresses[peers.rank]), window.own)
    return Peers.parts(peers, own, *places)


def times(work: Callable[[], Any], device: str, runs: int) -> list[float]:
    """Return the milliseconds of each of several runs."""
    if device == "cpu":
        return [1e3 * harness._seconds(work) for _ in range(runs)]
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for begin, end in marks:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in marks]


def _on(device: str):
    return nullcontext() if device == "cpu" else torch.cuda.device(device)


def peak_gib(device: str) -> float | None:
    """Return the most GiB that torch has allocated on a GPU since the peak was reset, None on a CPU."""
    return None if device == "cpu" else torch.cuda.max_memory_allocated(device) / 2**30


def serve_step(member: ranks.Member, setup: step.Setup) -> None:
    """Be another rank of `step_jobs`."""
    rank = Rank(setup, member, member.device)
    rank.alone()
    rank.split()
    member.ready()
    for command, arguments in member.commands():
        getattr(rank, command)(*arguments)


def limit_of(setup: step.Setup) -> float:
    """Return the largest allowed error of a step on several GPUs against one."""
    return SAGE_STEP_BOUND if "sagesla" in setup.attention or setup.linears == "int8" else LIMIT


@contextmanager
def team_of(gpus: int, target: Callable, *arguments: Any) -> Iterator[ranks.Team]:
    """Start ranks, and end them after the context. Call `join` of the team when this rank has loaded."""
    team = ranks.start(gpus, members.device_of, target, *arguments)
    try:
        yield team
    finally:
        team.close()


def on_all(team: ranks.Team, own: Any, command: str, *arguments: Any) -> Any:
    """Run a method of `own` here and of its like on all other ranks, and return the result of this rank."""
    with team.together():
        team.tell(command, *arguments)
        return getattr(own, command)(*arguments)


def step_jobs(setup: step.Setup, gpus: int, *, runs: int, warmup: int) -> Iterator[Job]:
    """Yield a job for one GPU, one for all GPUs, and one for each part of a step on all GPUs."""
    with team_of(gpus, serve_step, setup) as team:
        rank = Rank(setup, team, members.device_of(0))
        ref, own_ref = rank.alone(), rank.single()
        rank.record_single()
        rank.split()
        team.join()

        told = partial(on_all, team, rank)
        out = told("together", True)
        own = told("together")
        error = harness.relative_error(out, ref)
        own_error = harness.relative_error(own, own_ref)
        what = f"against one GPU, same block maps, all layers; each with its own maps {own_error:.2e}"
        check = Check(error=error, limit=limit_of(setup), what=what)
        told("prepare")
        peak = peak_gib(rank.device)
        measured: dict[str, list[float]] = {kind: [] for kind in (SINGLE, *KINDS)}
        for _ in range(ROUNDS):
            for kind, found in measured.items():
                run = rank.run if kind == SINGLE else partial(told, "run")
                run(kind, max(1, warmup))
                found += run(kind, -(-runs // ROUNDS))
        told("release")
        shape = "x".join(map(str, setup.size))
        for kind, found in measured.items():
            timing = Timing(ms=median(found), ms_min=min(found), n=len(found), first_ms=found[0], peak_gib=peak)
            yield Job(
                work=setup.work, shape=shape, mode=MODES[kind], weights="random",
                run=lambda timing=timing: (timing, check), gpus=1 if kind == SINGLE else gpus,
            )  # fmt: skip
        spent = {kind: median(found) for kind, found in measured.items()}
        whole, compute, exchange = (spent[kind] for kind in KINDS)
        parts = f"compute {compute:.1f} + exchange {exchange:.1f} + waiting {whole - compute - exchange:.1f}"
        faster = f"one GPU {spent[SINGLE]:.1f} ms, so {spent[SINGLE] / whole:.2f} times as fast"
        print(f"{gpus} GPUs: {whole:.1f} ms = {parts}; {faster}")


def _vae(base_dim: int, device: str) -> nn.Module:
    with _on(device):
        vae = nn.Module.to(
            vae_benchmark.random_vae(base_dim, device), torch.float32 if device == "cpu" else torch.bfloat16
        )
        fused_vae.fuse(vae)
        if device != "cpu":
            backends.load_kernels(device)
    return vae


@torch.inference_mode()
def serve_vae(member: ranks.Member, base_dim: int) -> None:
    """Be another rank of `vae_jobs`."""
    vae = _vae(base_dim, member.device)
    member.ready()
    with _on(member.device):
        clips = {}
        for command, arguments in member.commands():
            if command == "strips":
                strips.follow(vae, clips, *arguments, member.group)
            else:
                clips[arguments[0]]()


def worst_row(out: Tensor, ref: Tensor) -> float:
    """Return the largest error of a row over that of the median row, of frames or latents (B, C, T, H, W)."""
    rows = (out.float() - ref.float()).square().mean((0, 1, 2, 4)).sqrt()
    return (rows.max() / rows.median().clamp(min=1e-6)).item()


def vae_jobs(size: tuple[int, int, int], gpus: int, *, base_dim: int, runs: int, warmup: int) -> Iterator[Job]:
    """Yield jobs of decoding and of encoding: each on one GPU, and on all GPUs."""
    with team_of(gpus, serve_vae, base_dim) as team:
        device = members.device_of(0)
        vae = _vae(base_dim, device)
        team.join()
        for work, make_input in (
            (vae_benchmark.decode, vae_benchmark.latents), (vae_benchmark.encode, vae_benchmark.pictures),
        ):  # fmt: skip
            vae.strips = None
            clip = make_input(vae, size)
            with _on(device):
                ref = work(vae, clip)
                for count in (1, gpus):
                    vae.strips = None if count == 1 else strips.Strips(team)
                    out = work(vae, clip)
                    to_one = vae_benchmark.psnr(out, ref, peak=2)
                    seam = worst_row(out, ref)
                    check = Check(
                        error=harness.relative_error(out, ref) if to_one >= PSNR and seam <= SEAM else torch.inf,
                        limit=harness.WORST,
                        what=f"against one GPU, PSNR {to_one:.1f} dB, at least {PSNR}; the worst row's error is "
                        f"{seam:.2f} times the median row's, at most {SEAM}",
                    )
                    timing = harness.measure(partial(work, vae, clip), device, runs=runs, warmup=warmup)
                    yield Job(
                        work=f"vae {work.__name__}, base_dim {base_dim}", shape="x".join(map(str, size)), mode="fused",
                        weights="random", run=lambda timing=timing, check=check: (timing, check), gpus=count,
                    )  # fmt: skip
