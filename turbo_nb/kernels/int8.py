"""8-bit linears in Triton: `reference.int8_quantize` and `reference.int8_linear`, exact in every integer product."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import TILE

NEAREST_EVEN = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it leaves a float32 below 2²² no bits after the point


@triton.jit
def _quantize(x, q, scale, rows, columns, x_row, TILE: tl.constexpr):
    down, across = tl.program_id(0), tl.program_id(1)
    at_row, at_column = down * TILE + tl.arange(0, TILE), across * TILE + tl.arange(0, TILE)
    mask = (at_row[:, None] < rows) & (at_column < columns)[None]
    tile = tl.load(x + at_row[:, None].to(tl.int64) * x_row + at_column, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.max(tl.abs(tile), 1), 0), 1e-8)
    rounded = (tile * tl.div_rn(128.0, largest) + NEAREST_EVEN) - NEAREST_EVEN
    rounded = tl.minimum(tl.maximum(rounded, -128.0), 127.0)
    tl.store(q + at_row[:, None].to(tl.int64) * columns + at_column, rounded.to(tl.int8), mask=mask)
    tl.store(scale + down * tl.num_programs(1) + across, largest * 0.0078125)


@triton.jit
def _product(
    a, a_scale, b, b_scale, bias, out, rows, columns, depth,
    BIAS: tl.constexpr, GELU: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n, tiles_k = tl.cdiv(rows, TILE), tl.cdiv(columns, BLOCK_N), tl.cdiv(depth, TILE)
    program = tl.program_id(0)  # programs that run together share rows of a and b
    first = program // (GROUP * tiles_n) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    down, across = first + program % (GROUP * tiles_n) % size, program % (GROUP * tiles_n) // size
    at_row, at_column, inner = (
        down * TILE + tl.arange(0, TILE),
        across * BLOCK_N + tl.arange(0, BLOCK_N),
        tl.arange(0, TILE),
    )
    a += tl.minimum(at_row, rows - 1)[:, None].to(tl.int64) * depth
    b += tl.minimum(at_column, columns - 1)[:, None].to(tl.int64) * depth
    a_scale += down * tiles_k
    b_scale += tl.minimum(at_column, columns - 1) // TILE * tiles_k
    total = tl.zeros((TILE, BLOCK_N), tl.float32)
    for k in range(tiles_k):
        deep = k * TILE + inner
        left = tl.load(a + deep, mask=(deep < depth)[None], other=0)
        right = tl.load(b + deep, mask=(deep < depth)[None], other=0)
        scale = tl.load(a_scale + k) * tl.load(b_scale + k)
        total += tl.dot(left, tl.trans(right), out_dtype=tl.int32).to(tl.float32) * scale[None]
    total = total.to(out.dtype.element_ty)
    if BIAS:
        added = tl.load(bias + at_column, mask=at_column < columns, other=0.0).to(out.dtype.element_ty)
        total += added[None]
    if GELU:  # the tanh form
        x = total.to(tl.float32)
        total = (x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))).to(out.dtype.element_ty)
    mask = (at_row[:, None] < rows) & (at_column < columns)[None]
    tl.store(out + at_row[:, None].to(tl.int64) * columns + at_column, total, mask=mask)


def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.int8_quantize`: x (M, K) → q (M, K) int8, scale (⌈M/128⌉, ⌈K/128⌉) float32"""
    x = x.contiguous()
    rows, columns = x.shape
    grid = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)
    q = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scale = torch.empty(grid, device=x.device)
    _quantize[grid](x, q, scale, rows, columns, columns, TILE=TILE, num_warps=8, enable_fp_fusion=False)
    return q, scale


def int8_product(
    q: Tensor, scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False,
    block_n: int = 64, num_warps: int = 4, num_stages: int = 3,
) -> Tensor:  # fmt: skip
    """What follows the quantisation of x in `reference.int8_linear`, and GELU (tanh) where asked: (M, N) in dtype"""
    rows, depth, columns = *q.shape, w_q.shape[0]
    out = torch.empty(rows, columns, dtype=dtype, device=q.device)
    _product[(triton.cdiv(rows, TILE) * triton.cdiv(columns, block_n),)](
        q, scale, w_q, w_scale, bias, out, rows, columns, depth,
        BIAS=bias is not None, GELU=gelu, TILE=TILE, BLOCK_N=block_n, GROUP=8,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def int8_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.int8_linear`: x (…, K), w_q (N, K) → (…, N) in x's dtype"""
    q, scale = int8_quantize(x.reshape(-1, x.shape[-1]))
    return int8_product(q, scale, w_q, w_scale, bias, x.dtype).unflatten(0, x.shape[:-1])
