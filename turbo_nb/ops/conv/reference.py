"""The meaning of every operation, in plain PyTorch that reads like the formula and runs anywhere.

Faster spellings live beside this file with the same signatures and are checked against it. Shapes: B batch, L tokens,
H heads, D head_dim; attention operands are (B, L, H, D), after norm and rotary embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_silu(x: Tensor, gamma: Tensor, before: Tensor | None = None, silu: bool = True) -> Tensor:
    """x · √C / ‖x‖ · gamma over the channels, then SiLU, after the frames `before`: (B, T, …, C) → (B, t + T, …, C)

    gamma has C elements; before (B, t, …, C), None for no frames.
    """
    out = F.normalize(x.float(), dim=-1) * x.shape[-1] ** 0.5 * gamma.float().flatten()
    out = (F.silu(out) if silu else out).to(x.dtype)
    return out if before is None else torch.cat([before, out], dim=1)


def rimmed_conv(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, split: int = 1) -> Tensor:
    """Convolution and residual of a clip in a rim of zeros: (B, T + kt − 1, H + 2, W + 2, C) → (B, T, H + 2, W + 2, N)

    weight (N, C, kt, k, k) with k 3 or 1, bias (N,); residual as the result. With split 2 the halves of the N channels
    are two frames, one after the other: (B, 2T, H + 2, W + 2, N / 2).
    """
    rim = 0 if weight.shape[-1] == 3 else 1  # of the input that the kernel does not read
    inner = x[:, :, rim : x.shape[2] - rim, rim : x.shape[3] - rim].permute(0, 4, 1, 2, 3)
    out = F.conv3d(inner, weight, bias).permute(0, 2, 3, 4, 1)
    if split > 1:
        out = out.unflatten(-1, (split, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
    out = F.pad(out, (0, 0, 1, 1, 1, 1))
    return out if residual is None else out + residual


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Pictures twice as large, by repeating pixels, then convolved: (B, T, H + 2, W + 2, C) → (B, T, 2H + 2, 2W + 2, N)

    The pictures have a rim of zeros. weight (N, C, 3, 3), bias (N,).
    """
    inner = x[:, :, 1:-1, 1:-1].flatten(0, 1).permute(0, 3, 1, 2)
    out = F.conv2d(F.interpolate(inner, scale_factor=2, mode="nearest-exact"), weight, bias, padding=1)
    return F.pad(out.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).unflatten(0, x.shape[:2])
