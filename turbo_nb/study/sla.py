"""What sparse-linear attention does to a real clip: which blocks it keeps, what its two branches give, what it costs.

Notebook 03 shows it. Everything is computed while a clip is made, inside a forward hook, and what is kept is small.
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
from ..rope import VideoSize
from ..settings import MAX_STEPS


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """One layer's attention at one step (both from 0).

    kept: share of heads that keep a block, (Q_blocks, K_blocks), at the layer's own block sizes; fine: the same by
    blocks of `fine_block` tokens. sparse, linear: root mean square of what each branch adds, per patch (T, H, W).
    error: rel. L2 of their sum against the layer's own output.
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
        """Of the two branches' energy, the linear one's part."""
        sparse, linear = self.sparse.square().sum(), self.linear.square().sum()
        return (linear / (sparse + linear)).item()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A clip made with one kind of attention. kept: share of the key blocks, 1 for dense attention."""

    label: str
    kind: str
    topk: float | None
    kept: float
    step_seconds: float
    video: generation.Video


@dataclass(frozen=True, kw_only=True)
class Point:
    """A `Run` against a baseline: PSNR in dB (inf where they are the same), SSIM from −1 to 1 (the same).

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


def sage_backend(pipe) -> str:
    """What runs SageSLA on the pipeline's device: a fast kernel, or "reference", which is slow and shows the 8 bits."""
    on_gpu = pipe.plan.device.startswith("cuda")
    return (on_gpu and backends.choose("sagesla").chosen) or "reference"


def label(pipe, kind: str) -> str:
    """The name of a kind of attention, for a legend; SageSLA says what runs it."""
    return {"original": "dense", "sla": "SLA", "sagesla": f"SageSLA ({sage_backend(pipe)})"}[kind]


def grid_of(pipe, video: generation.Video) -> VideoSize:
    """The clip in latent patches."""
    frames, height, width, _ = video.frames.shape
    _, patch_h, patch_w = pipe.transformer.config.patch_size
    scale = pipe.vae_scale_factor_spatial
    return VideoSize(
        1 + (frames - 1) // pipe.vae_scale_factor_temporal, height // scale // patch_h, width // scale // patch_w
    )


def look_inside(
    pipe, prompt: str, *, layers: Iterable[int], steps: Iterable[int], fine_block: int = 4, **settings
) -> tuple[generation.Video, dict[tuple[int, int], LayerView]]:
    """Make a clip and see into its attention: the video, and a `LayerView` by (layer, step), both from 0.

    The pipeline's attention must be "sla". settings: as for `generate`. Raises InputError for other attention, or
    for a layer or step that there is not.
    """
    blocks, wanted = pipe.transformer.blocks, set(steps)
    count = settings.setdefault("num_steps", MAX_STEPS)
    if sla.attention_type(pipe.transformer) != "sla":
        raise InputError(f"the pipeline's attention is {sla.attention_type(pipe.transformer)!r}; load it with 'sla'")
    for name, asked, there in (("layer", set(layers), len(blocks)), ("step", wanted, count)):
        if not asked or not asked <= set(range(there)):
            raise InputError(f"{name}s are {sorted(asked)}; they are one or more of 0 to {there - 1}")
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
    """kept, fine, sparse (L,), linear (L,) and error of a `LayerView`"""
    kept = sla.block_map(q, k, layer.topk, layer.block_q, layer.block_k)
    fine = sla.block_map(q, k, layer.topk, fine_block, fine_block)
    sparse = attention_reference.sparse_attention(q, k, v, kept, layer.block_q, layer.block_k)
    linear = F.linear(
        attention_reference.linear_attention(q, k, v), layer.proj_l.weight.to(q.dtype), layer.proj_l.bias.to(q.dtype)
    )
    error = ((sparse + linear).double() - out.double()).norm() / out.double().norm()
    maps = (x[0].float().mean(0).cpu() for x in (kept, fine))
    sizes = (x[0].float().square().mean((-1, -2)).sqrt().cpu() for x in (sparse, linear))
    return *maps, *sizes, error.item()


@contextmanager
def attention(pipe, kind: str, topk: float | None = None) -> Iterator[None]:
    """Another attention for a while: "original", "sla" or "sagesla"; afterwards the pipeline is as it was.

    topk: None for the model's own. Every transformer of the pipeline gets it.
    """
    experts = [expert for expert in (pipe.transformer, getattr(pipe, "transformer_2", None)) if expert is not None]
    layers = [block.attn1 for expert in experts for block in expert.blocks]
    before = [layer.processor for layer in layers]
    backend = sage_backend(pipe) if kind == "sagesla" else "auto"
    topk = pipe.spec.sla_topk if topk is None else topk
    try:
        for expert in experts:
            sla.set_attention_type(expert, kind, topk, backend=backend)
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)


def run(pipe, prompt: str, kind: str, topk: float | None = None, **settings) -> Run:
    """Make a clip with this attention, as `generate` does; a step's time is the median after the first.

    The first step is left out because kernels are compiled in it; with one step there is no other.
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
    """One run against another of the same prompt and seed."""
    one, two = baseline.video.frames, other.video.frames
    return Point(
        label=other.label, kind=other.kind, topk=1.0 if other.topk is None else other.topk, kept=other.kept,
        step_seconds=other.step_seconds, psnr=psnr(one, two), ssim=ssim(one, two),
        peak_bytes=other.video.peaks.get("denoise"),
    )  # fmt: skip


def sweep(
    pipe, prompt: str, baseline: Run, topks: Iterable[float], *, done: Iterable[Point] = (), **settings
) -> list[Point]:
    """SLA and SageSLA at every topk, each against the baseline.

    A topk that keeps as many blocks as one before, or as one of `done`, means the same clip: it is not made again.
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
    """The share of the key blocks that it keeps of a clip"""
    blocks = math.ceil(math.prod(size) / layer.block_k)
    return max(1, int(layer.topk * blocks)) / blocks


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two clips (T, H, W, 3) uint8, in dB; inf where they are the same."""
    mse = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if mse == 0 else float(10 * np.log10(255.0**2 / mse))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two clips (T, H, W, 3) uint8, the mean over frames of their brightness.

    Wang, Bovik, Sheikh, Simoncelli: Image quality assessment (IEEE TIP 13(4), 2004): a Gaussian window of 11 pixels
    with σ = 1.5, C₁ = (0.01 · 255)², C₂ = (0.03 · 255)², and only windows that lie wholly inside the frame.
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
    """What one layer's attention would hold at once if it kept its scores, calculated from the shapes, in bytes.

    The scores of dense attention and of the kept blocks, the block map, the linear branch's state (φ(k)ᵀv and Σφ(k)),
    and q, k and v for comparison. itemsize: bytes of a number. Fast kernels hold scores of one block only.
    """
    rows, columns = math.ceil(tokens / sla.BLOCK_Q), math.ceil(tokens / sla.BLOCK_K)
    kept = max(1, int(topk * columns))
    return {
        "scores, dense": heads * tokens * tokens * itemsize,
        "scores, kept blocks": heads * tokens * min(tokens, kept * sla.BLOCK_K) * itemsize,
        "q, k and v": 3 * tokens * heads * head_dim * itemsize,
        "block map": heads * rows * columns,
        "linear branch": heads * head_dim * (head_dim + 1) * itemsize,
    }


def busiest_patch(frames: np.ndarray, size: VideoSize) -> tuple[int, int, int]:
    """The patch (t, row, column) of the middle latent frame with the strongest contrast: where something is."""
    t = size.T // 2
    frame = frames[min(4 * t, len(frames) - 1)].astype(np.float64)
    patches = frame.reshape(size.H, frame.shape[0] // size.H, size.W, frame.shape[1] // size.W, 3)
    row, column = np.unravel_index(patches.std(axis=(1, 3)).sum(-1).argmax(), (size.H, size.W))
    return t, int(row), int(column)


def seen_from(view: LayerView, place: tuple[int, int, int]) -> Tensor:
    """Share of heads that keep each patch for the query patch at place (t, row, column): (T, H, W)"""
    size = VideoSize._make(view.sparse.shape)
    query = (place[0] * size.H + place[1]) * size.W + place[2]
    return view.fine[query // view.fine_block].repeat_interleave(view.fine_block)[: math.prod(size)].view(size)
