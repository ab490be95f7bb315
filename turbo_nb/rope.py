"""Rotary position embedding of Wan: three axes, interleaved pairs.

Upstream calls `flash_attn.layers.rotary.apply_rotary_emb` and fails where flash_attn is missing.
`apply_rotary_emb_torch` has the same arguments and needs torch only. `apply_rotary_emb` uses flash_attn where it works,
and warns once for each GPU where it is installed but does not work.
"""

import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .errors import InputError, warn
from .machine import probe
from .ops.norms import reference as norms_reference
from .values import wrong

THETA = 10000.0
MAX_HEAD_DIM = 1024  # far above the 128 of Wan; a table for a billion channels would fill the memory


class VideoSize(NamedTuple):
    """A clip in latent patches: frames, rows, columns."""

    T: int
    H: int
    W: int


def axis_channels(head_dim: int) -> dict[str, int]:
    """Return how many channels of a head turn with the frame t, the row h and the column w.

    Args:
        head_dim: channels of a head. h and w get head_dim // 6 · 2 channels each, t the rest.

    Raises:
        InputError: head_dim is odd, below 6 or above 1024.
    """
    if not isinstance(head_dim, int) or not 6 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        raise wrong(
            "head_dim", head_dim, f"an even number from 6 to {MAX_HEAD_DIM}, for rotation by t, h, w", "Take 128."
        )
    spatial = head_dim // 6 * 2
    return {"t": head_dim - 2 * spatial, "h": spatial, "w": spatial}


def rope_freqs(video_size: VideoSize, head_dim: int) -> Tensor:
    """Return the angles of every token (Wan, arXiv:2503.20314).

    Args:
        video_size: the clip in latent patches.
        head_dim: channels of a head, split as `axis_channels` says.

    Returns:
        (T·H·W, head_dim/2) float32, the columns of t, then h, then w.

    Raises:
        InputError: a side is below 1, or head_dim is one that `axis_channels` refuses.
    """
    if min(video_size) < 1:
        raise InputError(f"video_size is {tuple(video_size)}. Expected 1 or more latent patches on each side.")
    axes = []
    for length, channels in zip(video_size, axis_channels(head_dim).values(), strict=True):
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
    """Rotate pairs of channels by an angle per token, in plain PyTorch.

    Args:
        x: (B, L, H, D).
        cos, sin: (L, D/2).
        interleaved: pairs are (0, 1), (2, 3), …; else (i, i + D/2).
        inplace: write the result into x.

    Returns:
        x's shape and dtype, float32 inside.

    Raises:
        InputError: the shapes do not fit.
    """
    if x.ndim != 4:
        raise InputError(f"x has shape {tuple(x.shape)}. Expected (batch, tokens, heads, head_dim).")
    if x.shape[-1] % 2:
        raise InputError(f"x has head_dim {x.shape[-1]}. Expected an even number, because RoPE rotates pairs.")
    table = (x.shape[1], x.shape[-1] // 2)
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tuple(tensor.shape) != table:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}. Expected (tokens, head_dim/2) = {table} "
                f"for x {tuple(x.shape)}."
            )
    return norms_reference.apply_rotary_emb(x, cos, sin, interleaved, inplace)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True, inplace: bool = False) -> Tensor:
    """Compute `apply_rotary_emb_torch`, by flash_attn where it works and x is on a GPU in bf16 or fp16."""
    rotate = backends.kernel("rope", x)
    if rotate is None:
        if x.is_cuda:
            _warn_of_fallback(x.get_device())
        rotate = apply_rotary_emb_torch
    return rotate(x, cos, sin, interleaved=interleaved, inplace=inplace)


@cache
def _warn_of_fallback(gpu: int) -> None:
    """Warn once for each GPU where flash_attn is installed but does not work, unless TURBO_NB_ROPE is set."""
    reason = dict(backends.choose("rope", gpu).rejected).get("flash_attn")
    if reason and probe.installed("flash_attn") and not os.environ.get(backends.VARIABLES["rope"]):
        warn(f"RoPE runs in plain PyTorch: {reason}", stacklevel=3)


def norm_rope(
    x: Tensor, norm: torch.nn.Module, cos: Tensor | None = None, sin: Tensor | None = None, sums: bool = False
) -> Tensor | tuple[Tensor, Tensor | None]:
    """Compute RMSNorm over all heads, then the rotation.

    Args:
        x: (B, L, H, D).
        norm: an RMSNorm of width H·D.
        cos, sin: (L, D/2). None: no rotation.
        sums: also return the sums of `norms.reference.rms_norm_rope`, None where no kernel computed them.

    Returns:
        x's shape and dtype.
    """
    if kernel := backends.kernel("norm_rope", x):
        return kernel(x.flatten(2), norm.weight, cos, sin, x.shape[2], norm.eps, sums)
    x = norm(x.flatten(2)).unflatten(2, x.shape[2:])
    x = x if cos is None else apply_rotary_emb(x, cos, sin)
    return (x, None) if sums else x


def rope_apply(x: Tensor, video_size: VideoSize, freqs: Tensor) -> Tensor:
    """Rotate x (B, T·H·W, H, D) by the angles of `rope_freqs(video_size, D)`.

    Raises:
        InputError: x has another number of tokens.
    """
    tokens = video_size[0] * video_size[1] * video_size[2]
    if x.ndim != 4 or x.shape[1] != tokens:
        raise InputError(
            f"x has shape {tuple(x.shape)}. Expected (batch, {tokens}, heads, head_dim) "
            f"for video_size {tuple(video_size)}."
        )
    return apply_rotary_emb(x, freqs.cos(), freqs.sin())
