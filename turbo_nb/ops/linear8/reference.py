"""8-bit linears in plain PyTorch: reads like the formula, runs anywhere.

`int8_*` has one scale per tile of 128×128, as upstream's checkpoints have; `row_*` has one scale per row. The kernels
beside this file have the same signatures and are tested against it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR_ROWS = 64 * 128  # rows of the input that are in float32 at once
TILE, TILE_LEVELS = 128, 128  # side of a tile, and its int8 levels on either side of zero


def _tiles(x: Tensor) -> Tensor:
    """Return x (M, K), padded with zeros, as (⌈M/128⌉, 128, ⌈K/128⌉, 128)."""
    rows, columns = x.shape
    return F.pad(x, (0, -columns % TILE, 0, -rows % TILE)).unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))


def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x (M, K) with one scale per tile of 128×128 (TurboDiffusion).

    scale = max(amax, 10⁻⁸) / 128, and q = x / scale to the nearest even, saturated to [−128, 127].

    Returns:
        q (M, K) int8 and scale (⌈M/128⌉, ⌈K/128⌉) float32.
    """
    tiles = _tiles(x.float())
    amax = tiles.abs().amax((1, 3), keepdim=True).clamp(min=1e-8)
    q = (tiles * (TILE_LEVELS / amax)).round().clamp(-TILE_LEVELS, TILE_LEVELS - 1).to(torch.int8)
    return q.flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]].contiguous(), (amax / TILE_LEVELS)[:, 0, :, 0]


def int8_dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Return q · scale, the inverse of `int8_quantize`: (M, K) float32."""
    rows, columns = q.shape
    tiles = scale.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    return q.float() * tiles


def int8_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x · dequantised wᵀ + bias with both operands in 8 bits (TurboDiffusion).

    Each slice of 128 of the depth is an exact integer product, scaled and summed in float32. The bias is added in x's
    dtype.

    Args:
        x: (…, K), quantised by `int8_quantize`.
        w_q, w_scale: the weight (N, K), from `int8_quantize`.
        bias: (N,).

    Returns:
        (…, N) in x's dtype.
    """
    out = torch.cat([_int8_product(rows, w_q, w_scale) for rows in x.reshape(-1, x.shape[-1]).split(LINEAR_ROWS)])
    if bias is not None:
        out = out + bias.to(x.dtype)
    return out.unflatten(0, x.shape[:-1])


def _int8_product(x: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    """Compute x (M, K) · dequantised wᵀ: (M, N)."""
    return tile_product(*int8_quantize(x), w_q, w_scale, x.dtype)


def tile_product(q: Tensor, scale: Tensor, w_q: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute x · dequantised wᵀ of an x that is quantised already: (M, N) in dtype.

    Args:
        q, scale: x (M, K), from `int8_quantize`.
        w_q, w_scale: the weight (N, K), from `int8_quantize`.
    """
    out = torch.zeros(q.shape[0], w_q.shape[0], device=q.device)
    for index, begin in enumerate(range(0, q.shape[1], TILE)):
        deep = slice(begin, begin + TILE)
        product = q[:, deep].float() @ w_q[:, deep].float().T  # integers below 2²⁴: exact
        across = scale[:, index].repeat_interleave(TILE)[: q.shape[0], None]
        down = w_scale[:, index].repeat_interleave(TILE)[None, : w_q.shape[0]]
        out.addcmul_(product, across * down)
    return out.to(dtype)


class QuantizedRows(NamedTuple):
    """Rows in 8 bits: q (…, K) int8, scale (…) float32, and the dtype that they were quantised from."""

    q: Tensor
    scale: Tensor
    dtype: torch.dtype


def row_quantize(x: Tensor, gelu: bool = False) -> QuantizedRows:
    """Quantise x (…, K), or its GELU (tanh), with one scale per row (LLM.int8(), arXiv:2208.07339).

    scale = max(amax, 10⁻⁸) / 127, and q = x / scale to the nearest even.
    """
    value = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    scale = value.abs().amax(-1).clamp(min=1e-8) / 127
    return QuantizedRows((value / scale[..., None]).round().to(torch.int8), scale, x.dtype)


def row_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x · (w_q · w_scale)ᵀ + bias with x in 8 bits.

    Args:
        x: (…, K), quantised by `row_quantize`.
        w_q, w_scale: the weight (N, K) int8 and its scales (N,).
        bias: (N,).

    Returns:
        (…, N) in x's dtype, rounded once: everything after the integer product is float32.
    """
    return torch.cat(
        [row_product(row_quantize(rows), w_q, w_scale, bias) for rows in x.reshape(-1, x.shape[-1]).split(LINEAR_ROWS)]
    ).unflatten(0, x.shape[:-1])


def row_product(x: QuantizedRows, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `row_linear` of rows that are quantised already."""
    out = (x.q.float() @ w_q.float().T) * x.scale[..., None] * w_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)
