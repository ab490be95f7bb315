"""Rotary position embedding of Wan: three axes, interleaved pairs, and the part of flash_attn's interface that it uses.

Upstream calls `flash_attn.layers.rotary.apply_rotary_emb` and fails where flash_attn is missing;
`apply_rotary_emb_torch` takes its place, with the same arguments, and needs nothing but torch; `apply_rotary_emb` uses
whichever works.
"""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .errors import InputError
from .machine import probe
from .ops.norms import reference as norms_reference

THETA = 10000.0


class VideoSize(NamedTuple):
    """A clip in latent patches: frames, rows, columns."""

    T: int
    H: int
    W: int


def rope_freqs(video_size: VideoSize, head_dim: int) -> Tensor:
    """Angles of every token: (T·H·W, head_dim/2) float32, the columns of t, then h, then w.

    h and w get head_dim // 6 · 2 channels each, t the rest (Wan, arXiv:2503.20314). Raises InputError for a size below
    1 or a head_dim that is odd or below 6.
    """
    if min(video_size) < 1:
        raise InputError(
            f"video_size is {tuple(video_size)}; frames, rows and columns are each 1 or more latent patches"
        )
    if head_dim < 6 or head_dim % 2:
        raise InputError(f"head_dim is {head_dim}; rotary embedding over t, h and w takes an even number from 6 on")
    spatial = head_dim // 6 * 2
    axes = []
    for length, channels in zip(video_size, (head_dim - 2 * spatial, spatial, spatial), strict=True):
        rates = THETA ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        axes.append(torch.outer(torch.arange(length, dtype=torch.float64), rates))
    t, h, w = axes
    grid = (
        t[:, None, None].expand(*video_size, -1),
        h[None, :, None].expand(*video_size, -1),
        w[None, None].expand(*video_size, -1),
    )
    return torch.cat(grid, dim=-1).flatten(0, 2).float()


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True, inplace: bool = False
) -> Tensor:
    """Rotate pairs of channels of x (B, L, H, D) by cos and sin, each (L, D/2); x's dtype and shape, fp32 inside.

    Pairs are (0, 1), (2, 3), … when interleaved, else (i, i + D/2). With `inplace`, x itself takes the result.
    Raises InputError where the shapes don't fit.
    """
    if x.ndim != 4:
        raise InputError(f"x has shape {tuple(x.shape)}; expected (batch, tokens, heads, head_dim)")
    if x.shape[-1] % 2:
        raise InputError(f"x has head_dim {x.shape[-1]}; rotary embedding turns pairs of channels, so it must be even")
    table = (x.shape[1], x.shape[-1] // 2)
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tuple(tensor.shape) != table:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}; for x {tuple(x.shape)} it is (tokens, head_dim/2) = {table}"
            )
    out = norms_reference.apply_rotary_emb(x, cos, sin, interleaved)
    return x.copy_(out) if inplace else out


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True, inplace: bool = False) -> Tensor:
    """`apply_rotary_emb_torch`, by flash_attn where it works and x is of a GPU in bf16 or fp16."""
    fast = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    apply = (fast and _flash_attn()) or apply_rotary_emb_torch
    return apply(x, cos, sin, interleaved=interleaved, inplace=inplace)


def norm_rope(
    x: Tensor, norm: torch.nn.Module, cos: Tensor | None = None, sin: Tensor | None = None, sums: bool = False
) -> Tensor | tuple[Tensor, Tensor | None]:
    """RMSNorm over all heads of x (B, L, H, D), then the rotation by cos and sin, each (L, D/2), if given: x's shape.

    norm: an RMSNorm of width H·D. One Triton kernel where "block" has it, else one after the other. sums: also the
    sums that `reference.rms_norm_rope` tells of, where the kernel made them, else None.
    """
    if backends.on_triton("block", x):
        from .ops.norms.triton_norms import rms_norm_rope

        return rms_norm_rope(x.flatten(2), norm.weight, cos, sin, x.shape[2], norm.eps, sums)
    x = norm(x.flatten(2)).unflatten(2, x.shape[2:])
    x = x if cos is None else apply_rotary_emb(x, cos, sin)
    return (x, None) if sums else x


@cache
def _flash_attn() -> Callable | None:
    """flash_attn's function, or None where it is not there. Warns, once, where it is there and cannot be used."""
    if not probe.installed("flash_attn"):
        return None
    choice = backends.choose("rope")
    if choice.chosen == "flash_attn":
        return import_module("flash_attn.layers.rotary").apply_rotary_emb
    if not backends.asked_for("rope"):
        warnings.warn(f"RoPE runs in plain PyTorch: {dict(choice.passed_over)['flash_attn']}", stacklevel=3)
    return None


def rope_apply(x: Tensor, video_size: VideoSize, freqs: Tensor) -> Tensor:
    """Rotate x (B, T·H·W, H, D) by the angles of `rope_freqs(video_size, D)`. Raises InputError on another length."""
    tokens = video_size[0] * video_size[1] * video_size[2]
    if x.ndim != 4 or x.shape[1] != tokens:
        raise InputError(
            f"x has shape {tuple(x.shape)}; for video_size {tuple(video_size)} it is (batch, {tokens}, heads, head_dim)"
        )
    return apply_rotary_emb(x, freqs.cos(), freqs.sin())
