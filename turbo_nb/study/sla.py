"""The measurements of notebook 03: the blocks that sparse-linear attention keeps, its two branches, and its cost.

A forward hook computes them while a real clip is made. It keeps averages only, because q, k and v are large.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import mean, median, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, generation, preparation, sla
from ..errors import InputError
from ..machine import probe
from ..ops.attention import reference as attention_reference
from ..ops.compare import psnr, relative_error
from ..pipeline import LoadedModel
from ..rope import VideoSize
from ..runtime.place import transformers
from ..settings import ClipSettings, build, options
from ..values import Whole, several

LARGEST_BLOCK = 4096  # tokens of a picture's block; a clip of a few seconds has 30,000 tokens
MAP_BYTES = 5  # at least, a pair of blocks and head: a score in 2 bytes, two masks, a tenth of the indices
SAME_FRAMES = 100.0  # dB that stand for an infinite PSNR in a difference


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """One layer's attention at one step.

    Args:
        layer: its number, from 0.
        step: its number, from 0.
        kept: share of heads that keep a block, (Q_blocks, K_blocks), at the layer's own block sizes.
        fine: the same for blocks of `fine_block` tokens.
        fine_block: tokens of a block of `fine`.
        sparse: root mean square of what the sparse branch adds to each patch, (T, H, W).
        linear: the same of the linear branch.
        error: rel. L2 error of the sum of both branches against the layer's own output.
    """

    layer: int
    step: int
    kept: Tensor
    fine: Tensor
    fine_block: int
    sparse: Tensor
    linear: Tensor
    error: float

    @property
    def linear_share(self) -> float:
        """The linear branch's share of the energy of both branches, from 0 to 1."""
        sparse, linear = self.sparse.square().sum(), self.linear.square().sum()
        return (linear / (sparse + linear)).item()

    def __str__(self) -> str:
        share = f"layer {self.layer}, step {self.step + 1}: linear {self.linear_share:4.0%} of the energy"
        return f"{share}, their sum misses the layer's output by {self.error:.1g}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A clip made with one kind of attention.

    Args:
        label: name for a legend.
        kind: "original", "sla" or "sagesla".
        topk: share of key blocks that was asked for, None for dense attention.
        kept: share of key blocks that was kept, 1 for dense attention.
        step_seconds: of a typical step.
        video: the clip.
    """

    label: str
    kind: str
    topk: float | None
    kept: float
    step_seconds: float
    video: generation.Video


@dataclass(frozen=True, kw_only=True)
class Point:
    """A `Run` compared with dense attention.

    Args:
        prompt: of both clips.
        seed: of both clips.
        psnr: in dB, infinity for the same frames.
        ssim: from −1 to 1, which means the same frames.
        peak_bytes: of GPU memory while denoising, None on a CPU.
    """

    prompt: str
    seed: int
    label: str
    kind: str
    topk: float
    kept: float
    step_seconds: float
    psnr: float
    ssim: float
    peak_bytes: int | None

    def __str__(self) -> str:
        what = f"{self.label:20} topk {self.topk:4.2f} keeps {self.kept:4.0%}"
        peak = "" if self.peak_bytes is None else f"   peak {self.peak_bytes / 2**30:.2f} GiB"
        return f"{what}{self.psnr:7.1f} dB   SSIM {self.ssim:.3f}{self.step_seconds * 1e3:8.0f} ms a step{peak}"


@dataclass(frozen=True, kw_only=True)
class Trend:
    """How the likeness to dense attention changes between two values of topk, over several clips.

    Args:
        label: name of the kind of attention.
        start: the first topk.
        end: the second topk.
        changes: PSNR at `end` minus PSNR at `start`, in dB, one for each clip.
    """

    label: str
    start: float
    end: float
    changes: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """ "rises" or "falls" where the mean change is over two standard errors, else "unclear"."""
        if len(self.changes) < 3:
            return "unclear"
        change, error = mean(self.changes), stdev(self.changes) / math.sqrt(len(self.changes))
        if abs(change) <= 2 * error:
            return "unclear"
        return "rises" if change > 0 else "falls"

    def __str__(self) -> str:
        if not any(self.changes):
            return f"{self.label}, topk {self.start:g} → {self.end:g}: as many blocks, so the same clips"
        rising = sum(change > 0 for change in self.changes)
        spread = f"{min(self.changes):+.1f} to {max(self.changes):+.1f}"
        return (
            f"{self.label}, topk {self.start:g} → {self.end:g}: {mean(self.changes):+.1f} dB on average ({spread}), "
            f"higher for {rising} of {len(self.changes)} clips: {self.verdict}"
        )


def sage_backend(pipe) -> str:
    """Return what runs SageSLA on the pipeline's device: a fast kernel, or "reference", which is slow."""
    device = LoadedModel.of(pipe).device
    return (device.startswith("cuda") and backends.choose("sagesla", device).chosen) or "reference"


def label(pipe, kind: str) -> str:
    """Return the name of a kind of attention for a legend, for SageSLA with its backend."""
    return {"original": "dense", "sla": "SLA", "sagesla": f"SageSLA ({sage_backend(pipe)})"}[kind]


def choices() -> str:
    """Return which kernels this machine runs SLA and SageSLA with, and which it rejected and why, line by line."""
    lines = []
    for choice in map(backends.choose, ("sla", "sagesla")):
        lines.append(f"{choice.operation}: {choice.chosen or 'no fast kernel'}")
        lines += [f"    not {name}: {reason}" for name, reason in choice.rejected]
    return "\n".join(lines)


def grid_of(pipe, video: generation.Video) -> VideoSize:
    """Return a clip's size in latent patches."""
    frames, height, width, _ = video.frames.shape
    return _grid(pipe, width, height, frames)


def _grid(pipe, width: int, height: int, frames: int) -> VideoSize:
    """Return a size in latent patches, of pixels and frames"""
    _, patch_h, patch_w = pipe.transformer.config.patch_size
    scale = pipe.vae_scale_factor_spatial
    return VideoSize(
        1 + (frames - 1) // pipe.vae_scale_factor_temporal, height // scale // patch_h, width // scale // patch_w
    )


def look_inside(
    pipe, prompt: str, *, layers: Iterable[int], steps: Iterable[int], fine_block: int = 4, **settings
) -> tuple[generation.Video, dict[tuple[int, int], LayerView]]:
    """Make a clip and record its attention.

    Args:
        pipe: what `load_pipeline` returned. Its attention must be "sla".
        prompt: of the clip.
        layers: to record, from 0. A single one needs no list.
        steps: the same of the steps.
        fine_block: tokens of a block in `LayerView.fine`.
        settings: as for `generate`.

    Returns:
        The video, and a `LayerView` by (layer, step).

    Raises:
        InputError: the attention is another one, or a layer or step does not exist. Or fine_block is not a number, or
            is so small that the map of the blocks does not fit into memory.
    """
    blocks, layers, wanted = pipe.transformer.blocks, several(layers), {*several(steps)}
    own = {name: value for name, value in settings.items() if name in options(ClipSettings)}
    clip = preparation.prepare(build(ClipSettings, own, prompt=prompt), LoadedModel.of(pipe).spec).clip
    fine_block = Whole(1, LARGEST_BLOCK, "Take 2, or 64 for a long clip.")("fine_block", fine_block)
    if sla.attention_type(pipe.transformer) != "sla":
        raise InputError(
            f"attention_type is {sla.attention_type(pipe.transformer)!r}. Expected 'sla'. Load the pipeline with it."
        )
    for name, asked, existing in (("layers", set(layers), len(blocks)), ("steps", wanted, clip.num_steps)):
        if not asked or not asked <= set(range(existing)):
            raise InputError(f"{name} is {sorted(asked)}. Expected one or more of 0 to {existing - 1}.")
    _require_memory(pipe, fine_block, clip.size)
    seen, done = [], 0

    def hook(layer: int):
        def see(module, inputs, out):
            if done in wanted:
                seen.append((layer, done, *_see(module, *inputs[:3], out, fine_block)))

        return see

    def after_step(number, total, latents):
        nonlocal done
        done = number

    handles = [blocks[layer].attn1.processor.sla.register_forward_hook(hook(layer)) for layer in sorted(set(layers))]
    try:
        video = generation.generate(pipe, prompt, on_step=after_step, **settings)
    finally:
        for handle in handles:
            handle.remove()
    size = grid_of(pipe, video)
    return video, {
        (layer, step): LayerView(
            layer=layer, step=step, kept=kept, fine=fine, fine_block=fine_block,
            sparse=sparse.view(size), linear=linear.view(size), error=error,
        )
        for layer, step, kept, fine, sparse, linear, error in seen
    }  # fmt: skip


def _require_memory(pipe, fine_block: int, size: tuple[int, int, int]) -> None:
    """Check that the map of a clip's blocks fits into memory.

    Args:
        size: of the clip: width, height, frames.

    Raises:
        InputError: the blocks are so small that the map does not fit.
    """
    device, heads = LoadedModel.of(pipe).device, pipe.transformer.config.num_attention_heads
    tokens = math.prod(_grid(pipe, *size))
    probe.release_memory()  # because memory that torch keeps for later counts as used
    free = probe.free_memory(device)
    least = math.ceil(tokens * math.sqrt(heads * MAP_BYTES / max(free, 1)))
    if fine_block < least:
        raise InputError(
            f"fine_block is {fine_block}. Expected at least {least}, because the map of smaller blocks for {tokens:,} "
            f"tokens takes more than the {free / 1e9:,.2f} GB that are free on {device}. Take {least}."
        )


def _see(layer: sla.SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor, out: Tensor, fine_block: int) -> tuple:
    """Return kept, fine, sparse (L,), linear (L,) and error of a `LayerView`"""
    kept = sla.block_map(q, k, layer.topk, layer.block_q, layer.block_k)
    fine = sla.block_map(q, k, layer.topk, fine_block, fine_block)
    sparse = attention_reference.sparse_attention(q, k, v, kept, layer.block_q, layer.block_k)
    linear = F.linear(
        attention_reference.linear_attention(q, k, v), layer.proj_l.weight.to(q.dtype), layer.proj_l.bias.to(q.dtype)
    )
    maps = (x[0].float().mean(0).cpu() for x in (kept, fine))
    sizes = (x[0].float().square().mean((-1, -2)).sqrt().cpu() for x in (sparse, linear))
    return *maps, *sizes, relative_error(sparse + linear, out)


@contextmanager
def attention(pipe, kind: str, topk: float | None = None) -> Iterator[None]:
    """Give every transformer of a pipeline another attention for a while.

    Args:
        pipe: what `load_pipeline` returned. It gets its own attention back at the end.
        kind: "original", "sla" or "sagesla".
        topk: share of key blocks. None: the model's own.
    """
    experts = transformers(pipe)
    layers = [block.attn1 for expert in experts for block in expert.blocks]
    before = [layer.processor for layer in layers]
    backend = sage_backend(pipe) if kind == "sagesla" else "auto"
    topk = own_topk(pipe) if topk is None else topk
    try:
        for expert in experts:
            sla.set_attention_type(expert, kind, topk, backend=backend)
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)


def own_topk(pipe) -> float:
    """Return the share of key blocks that the model was trained with."""
    return LoadedModel.of(pipe).spec.sla_topk


def run(pipe, prompt: str, kind: str, topk: float | None = None, **settings) -> Run:
    """Make a clip with an attention. The arguments are those of `attention` and `generate`.

    The time of a step is the median without the first step, because that one compiles kernels. A clip of one step has
    only that one.
    """
    marks = []

    def mark(number, total, latents):
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)
        marks.append(time.perf_counter())

    with attention(pipe, kind, topk):
        processor = pipe.transformer.blocks[0].attn1.processor
        video = generation.generate(pipe, prompt, on_step=mark, **settings)
    steps = np.diff(marks).tolist() or [video.timings["denoise"]]
    kept, used = 1.0, None
    if kind != "original":
        used, kept = processor.sla.topk, _kept(processor.sla, grid_of(pipe, video))
    return Run(label=label(pipe, kind), kind=kind, topk=used, kept=kept, step_seconds=median(steps), video=video)


def compare(baseline: Run, other: Run) -> Point:
    """Compare a run with a baseline of the same prompt and seed."""
    one, two, record = baseline.video.frames, other.video.frames, other.video.record
    return Point(
        prompt=record.prompt, seed=record.seed, label=other.label, kind=other.kind,
        topk=1.0 if other.topk is None else other.topk, kept=other.kept, step_seconds=other.step_seconds,
        psnr=psnr(one, two), ssim=ssim(one, two), peak_bytes=other.video.peaks.get("denoise"),
    )  # fmt: skip


def swept_kinds(pipe) -> tuple[str, ...]:
    """Return the kinds of attention that are fast enough for a sweep: SageSLA's reference is not."""
    return ("sla",) if sage_backend(pipe) == "reference" else ("sla", "sagesla")


def sweep(
    pipe,
    clips: Iterable[tuple[str, int]],
    topks: Iterable[float],
    *,
    kinds: Iterable[str] = ("sla", "sagesla"),
    done: Iterable[Run] = (),
    **settings,
) -> list[Point]:
    """Compare kinds of attention at every topk with dense attention, over several clips.

    Args:
        pipe: what `load_pipeline` returned.
        clips: prompt and seed of each clip.
        topks: shares of key blocks.
        kinds: "sla", "sagesla" or both.
        done: earlier runs with the same settings, dense ones among them. They are not made again.
        settings: as for `generate`, without the seed.

    Returns:
        A point for every clip, kind and topk. Values of topk that keep the same blocks share one clip.
    """  # fmt: skip
    topks, kinds, points = list(topks), list(kinds), []
    for prompt, seed in clips:
        of_clip = [run for run in done if (run.video.record.prompt, run.video.record.seed) == (prompt, seed)]
        baseline = next((run for run in of_clip if run.kind == "original"), None)
        baseline = baseline or run(pipe, prompt, "original", seed=seed, **settings)
        known = {(other.kind, other.kept): compare(baseline, other) for other in of_clip if other.kind != "original"}
        size = grid_of(pipe, baseline.video)
        for kind in kinds:
            for topk in topks:
                with attention(pipe, kind, topk):
                    key = kind, _kept(pipe.transformer.blocks[0].attn1.processor.sla, size)
                if key not in known:
                    known[key] = compare(baseline, run(pipe, prompt, kind, topk, seed=seed, **settings))
                points.append(replace(known[key], topk=topk))
    return points


def trends(points: Iterable[Point], start: float) -> list[Trend]:
    """Return how PSNR changes from one topk to each other one, over the clips that have both.

    Args:
        points: what `sweep` returned.
        start: the topk to compare with, as a rule the model's own.
    """
    table: dict[tuple[str, float], dict[tuple[str, int], float]] = {}
    for point in points:
        decibels = min(point.psnr, SAME_FRAMES)
        table.setdefault((point.label, point.topk), {})[point.prompt, point.seed] = decibels
    found = []
    for (label, topk), there in sorted(table.items()):
        here = table.get((label, start), {})
        changes = tuple(there[clip] - here[clip] for clip in there if clip in here)
        if topk != start and changes:
            found.append(Trend(label=label, start=start, end=topk, changes=changes))
    return found


def conclusion(found: Iterable[Trend]) -> str:
    """Return in words what trends say of a topk larger than the one they start from.

    Args:
        found: what `trends` returned. The trend of SLA that goes farthest decides.
    """
    larger = [trend for trend in found if trend.label == "SLA" and trend.end > trend.start]
    if not larger:
        return "No larger topk was tried."
    last = max(larger, key=lambda trend: trend.end)
    count = f"{len(last.changes)} clips"
    if last.verdict == "falls":
        return (
            f"For these {count}, more blocks than the model's own topk {last.start:g} lead away from dense attention. "
            "The linear branch learned to replace what the sparse branch leaves out. Where the sparse branch keeps it, "
            "that part counts twice."
        )
    if last.verdict == "rises":
        return f"For these {count}, more blocks than the model's own topk {last.start:g} lead towards dense attention."
    return f"These {count} do not decide whether a larger topk is nearer to dense attention. Try more prompts or seeds."


def _kept(layer: sla.SparseLinearAttention, size: VideoSize) -> float:
    """Return the share of a clip's key blocks that a layer keeps"""
    blocks = math.ceil(math.prod(size) / layer.block_k)
    return attention_reference.kept_count(layer.topk, blocks) / blocks


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the structural similarity of the brightness of two clips (T, H, W, 3) uint8, the mean over frames.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", IEEE TIP 13(4), 2004. The window is a Gaussian
    of 11 pixels with σ = 1.5, and lies inside the frame. C₁ = (0.01 · 255)² and C₂ = (0.03 · 255)².
    """
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)  # BT.601
    x, y = (torch.from_numpy(np.ascontiguousarray(clip)).double() @ weights for clip in (a, b))
    bell = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    bell = bell / bell.sum()

    def blur(clip: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(clip[:, None], bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def attention_bytes(tokens: int, heads: int, head_dim: int, topk: float, itemsize: int = 2) -> dict[str, int]:
    """Calculate how many bytes one layer's attention would hold if it kept all its scores.

    Fast kernels hold the scores of one block only.

    Args:
        tokens: of the clip.
        heads: of the layer.
        head_dim: channels of a head.
        topk: share of key blocks.
        itemsize: bytes of a number.

    Returns:
        Bytes by name. The state of the linear branch is φ(k)ᵀv and Σφ(k). q, k and v are for comparison.
    """
    rows, columns = math.ceil(tokens / sla.BLOCK_Q), math.ceil(tokens / sla.BLOCK_K)
    kept = attention_reference.kept_count(topk, columns)
    return {
        "scores, dense": heads * tokens * tokens * itemsize,
        "scores, kept blocks": heads * tokens * min(tokens, kept * sla.BLOCK_K) * itemsize,
        "q, k and v": 3 * tokens * heads * head_dim * itemsize,
        "block map": heads * rows * columns,
        "linear branch": heads * head_dim * (head_dim + 1) * itemsize,
    }


def busiest_patch(frames: np.ndarray, size: VideoSize) -> tuple[int, int, int]:
    """Return the patch (t, row, column) of the middle latent frame that has the strongest contrast."""
    t = size.T // 2
    frame = frames[min(4 * t, len(frames) - 1)].astype(np.float64)
    patches = frame.reshape(size.H, frame.shape[0] // size.H, size.W, frame.shape[1] // size.W, 3)
    row, column = np.unravel_index(patches.std(axis=(1, 3)).sum(-1).argmax(), (size.H, size.W))
    return t, int(row), int(column)


def seen_from(view: LayerView, place: tuple[int, int, int]) -> Tensor:
    """Return the share of heads that keep each patch for the query patch at (t, row, column): (T, H, W)."""
    size = VideoSize._make(view.sparse.shape)
    query = (place[0] * size.H + place[1]) * size.W + place[2]
    return view.fine[query // view.fine_block].repeat_interleave(view.fine_block)[: math.prod(size)].view(size)
