"""The measurements of notebook 03: the blocks that sparse-linear attention keeps, its two branches, and its cost.

A forward hook computes them while a real clip is made. It keeps averages only, because q, k and v are large.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, generation, sla
from ..errors import InputError
from ..ops.attention import reference as attention_reference
from ..ops.compare import psnr, relative_error
from ..pipeline import LoadedModel
from ..rope import VideoSize
from ..runtime.place import transformers
from ..settings import MAX_STEPS


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
    """A `Run` compared with a baseline.

    Args:
        psnr: in dB, infinity for the same frames.
        ssim: from −1 to 1, which means the same frames.
        peak_bytes: of GPU memory while denoising, None on a CPU.
    """

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
        layers: to record, from 0.
        steps: to record, from 0.
        fine_block: tokens of a block in `LayerView.fine`.
        settings: as for `generate`.

    Returns:
        The video, and a `LayerView` by (layer, step).

    Raises:
        InputError: the attention is another one, or a layer or step does not exist.
    """
    blocks, wanted = pipe.transformer.blocks, set(steps)
    count = settings.setdefault("num_steps", MAX_STEPS)
    if sla.attention_type(pipe.transformer) != "sla":
        raise InputError(
            f"attention_type is {sla.attention_type(pipe.transformer)!r}. Expected 'sla'. Load the pipeline with it."
        )
    for name, asked, existing in (("layers", set(layers), len(blocks)), ("steps", wanted, count)):
        if not asked or not asked <= set(range(existing)):
            raise InputError(f"{name} is {sorted(asked)}. Expected one or more of 0 to {existing - 1}.")
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
    one, two = baseline.video.frames, other.video.frames
    return Point(
        label=other.label, kind=other.kind, topk=1.0 if other.topk is None else other.topk, kept=other.kept,
        step_seconds=other.step_seconds, psnr=psnr(one, two), ssim=ssim(one, two),
        peak_bytes=other.video.peaks.get("denoise"),
    )  # fmt: skip


def sweep(
    pipe, prompt: str, baseline: Run, topks: Iterable[float], *, done: Iterable[Point] = (), **settings
) -> list[Point]:
    """Compare SLA and SageSLA at every topk with a baseline.

    Args:
        pipe: what `load_pipeline` returned.
        prompt: of the clips.
        baseline: a run of the same prompt.
        topks: shares of key blocks.
        done: earlier points. A topk that keeps as many blocks as one of these gives the same clip, and reuses it.
        settings: as for `generate`.
    """
    known, size, points = list(done), grid_of(pipe, baseline.video), []
    for kind in ("sla", "sagesla"):
        for topk in topks:
            with attention(pipe, kind, topk):
                kept = _kept(pipe.transformer.blocks[0].attn1.processor.sla, size)
            same = next((point for point in known if (point.kind, point.kept) == (kind, kept)), None)
            point = same or compare(baseline, run(pipe, prompt, kind, topk, **settings))
            known.append(point)
            points.append(replace(point, topk=topk))
    return points


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
