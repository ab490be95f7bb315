"""The meaning of every operation, in plain PyTorch that reads like the formula and runs anywhere.

Faster spellings live beside this file with the same signatures and are checked against it. Shapes: B batch, L tokens,
H heads, D head_dim; attention operands are (B, L, H, D), after norm and rotary embedding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR_ROWS = 64 * 128  # rows of an 8-bit linear's input that are held in float32 at once
TILE, TILE_LEVELS = 128, 128  # side of a tile of an 8-bit linear, and its int8 levels on either side of zero


def _tiles(x: Tensor) -> Tensor:
    """(M, K), padded with zeros → (⌈M/128⌉, 128, ⌈K/128⌉, 128)"""
    rows, columns = x.shape
    return F.pad(x, (0, -columns % TILE, 0, -rows % TILE)).unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))


def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit form in tiles of 128×128 (TurboDiffusion): x (M, K) → q (M, K) int8, scale (⌈M/128⌉, ⌈K/128⌉) float32

    scale = max(amax, 10⁻⁸) / 128; q = x / scale to the nearest even, saturated to [−128, 127].
    """
    tiles = _tiles(x.float())
    amax = tiles.abs().amax((1, 3), keepdim=True).clamp(min=1e-8)
    q = (tiles * (TILE_LEVELS / amax)).round().clamp(-TILE_LEVELS, TILE_LEVELS - 1).to(torch.int8)
    return q.flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]].contiguous(), (amax / TILE_LEVELS)[:, 0, :, 0]


def int8_dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `int8_quantize`: q (M, K), scale (⌈M/128⌉, ⌈K/128⌉) → (M, K) float32"""
    rows, columns = q.shape
    tiles = scale.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    return q.float() * tiles


def int8_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · dequantised wᵀ + bias with both operands in 8 bits (TurboDiffusion): x (…, K), w_q (N, K) → (…, N)

    x is quantised as `int8_quantize` does. Each 128 deep slice is an exact integer product, scaled and summed in
    float32; the sum goes to x's dtype, and the bias is added there.
    """
    out = torch.cat([_int8_product(rows, w_q, w_scale) for rows in x.reshape(-1, x.shape[-1]).split(LINEAR_ROWS)])
    if bias is not None:
        out = out + bias.to(x.dtype)
    return out.unflatten(0, x.shape[:-1])


def _int8_product(x: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    """x (M, K) · dequantised wᵀ → (M, N)"""
    q, scale = int8_quantize(x)
    out = torch.zeros(x.shape[0], w_q.shape[0], device=x.device)
    for index, begin in enumerate(range(0, x.shape[1], TILE)):
        deep = slice(begin, begin + TILE)
        product = q[:, deep].float() @ w_q[:, deep].float().T  # integers below 2²⁴: exact
        across = scale[:, index].repeat_interleave(TILE)[: x.shape[0], None]
        down = w_scale[:, index].repeat_interleave(TILE)[None, : w_q.shape[0]]
        out.addcmul_(product, across * down)
    return out.to(x.dtype)


class Rows(NamedTuple):
    """Rows in 8 bits: q (…, K) int8, scale (…) float32, and the dtype that they were quantised from."""

    q: Tensor
    scale: Tensor
    dtype: torch.dtype


def row_quantize(x: Tensor, gelu: bool = False) -> Rows:
    """8-bit form of x (…, K), or of its GELU (tanh), with one scale a row (LLM.int8(), arXiv:2208.07339)

    scale = max(amax, 10⁻⁸) / 127; q = x / scale to the nearest even.
    """
    value = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    scale = value.abs().amax(-1).clamp(min=1e-8) / 127
    return Rows((value / scale[..., None]).round().to(torch.int8), scale, x.dtype)


def row_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · (w_q · w_scale)ᵀ + bias with x in 8 bits: x (…, K), w_q (N, K) → (…, N)

    x is quantised as `row_quantize` does; everything after the integer product is float32, rounded once to x's dtype.
    """
    return torch.cat(
        [row_product(row_quantize(rows), w_q, w_scale, bias) for rows in x.reshape(-1, x.shape[-1]).split(LINEAR_ROWS)]
    ).unflatten(0, x.shape[:-1])


def row_product(x: Rows, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """What follows the quantisation in `row_linear`"""
    out = (x.q.float() @ w_q.float().T) * x.scale[..., None] * w_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)
