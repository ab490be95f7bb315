"""Convolutions and norms of Wan's VAE in plain PyTorch: reads like the formula, runs anywhere.

The kernels beside this file have the same signatures and are tested against it. A clip is (B, T, H + 2, W + 2, C):
channels last, with a rim around each picture of H × W pixels. The rim is zero. Where the picture is a strip of a larger
one, the rim has the neighbours' rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_silu(x: Tensor, gamma: Tensor, before: Tensor | None = None, silu: bool = True) -> Tensor:
    """Compute x · √C / ‖x‖ · gamma over the channels, then SiLU, and prepend earlier frames.

    Args:
        x: (B, T, …, C).
        gamma: C elements.
        before: frames (B, t, …, C) that were normed already. None: no frames.
        silu: whether to apply SiLU.

    Returns:
        (B, t + T, …, C) in x's dtype.
    """
    out = F.normalize(x.float(), dim=-1) * x.shape[-1] ** 0.5 * gamma.float().flatten()
    out = (F.silu(out) if silu else out).to(x.dtype)
    return out if before is None else torch.cat([before, out], dim=1)


def rimmed_conv(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, split: int = 1) -> Tensor:
    """Convolve a clip and add a residual.

    Args:
        x: (B, T + kt − 1, H + 2, W + 2, C) with a rim of zeros.
        weight: (N, C, kt, k, k) with k 3 or 1.
        bias: (N,).
        residual: of the result's shape. None: add nothing.
        split: with 2, the halves of the N channels are two frames, one after the other.

    Returns:
        (B, T, H + 2, W + 2, N) with a rim of zeros; with split 2 (B, 2T, H + 2, W + 2, N / 2).
    """
    rim = 0 if weight.shape[-1] == 3 else 1  # pixels of the rim that a 1×1 kernel skips
    inner = x[:, :, rim : x.shape[2] - rim, rim : x.shape[3] - rim].permute(0, 4, 1, 2, 3)
    out = F.conv3d(inner, weight, bias).permute(0, 2, 3, 4, 1)
    if split > 1:
        out = out.unflatten(-1, (split, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
    out = F.pad(out, (0, 0, 1, 1, 1, 1))
    return out if residual is None else out + residual


def normed_conv(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, before: Tensor) -> Tensor:
    """Convolve a clip, apply `rms_norm_silu` to the result, and prepend the normed frames `before`.

    Returns:
        (B, t + T, H + 2, W + 2, N) with a rim of zeros.
    """
    return rms_norm_silu(rimmed_conv(x, weight, bias), gamma, before)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Double the pictures' sides by repeating pixels, then convolve.

    Args:
        x: (B, T, H + 2, W + 2, C) with a rim.
        weight: (N, C, 3, 3).
        bias: (N,).

    Returns:
        (B, T, 2H + 2, 2W + 2, N) with a rim of zeros.
    """
    doubled = F.interpolate(x.flatten(0, 1).permute(0, 3, 1, 2), scale_factor=2, mode="nearest-exact")
    out = F.conv2d(doubled[:, :, 1:-1, 1:-1], weight, bias)
    return F.pad(out.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).unflatten(0, x.shape[:2])
