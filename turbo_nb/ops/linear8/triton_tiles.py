"""8-bit linears in Triton, with one scale a tile of 128×128: `reference.int8_quantize` and `reference.tile_product`.

    kernel          grid          a program loads                          and stores
    _tile_quantize  tiles of x    its tile of x                            the tile in int8 and its scale
    _tile_product   tiles of out  its rows of x and of the weight, 128     its tile of out
                    (8 warps)     deep at a time, by tensor descriptors

The scales change every 128 steps of the depth. So each slice is an integer product of its own, which the kernel scales
and adds in float32. Rows with one scale each are faster (`triton_rows`); upstream's scripts need these numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import aligned, launch, takes_descriptors
from . import reference
from .triton_rows import NEAREST_EVEN

SIDE = tl.constexpr(reference.TILE)
GROUP = 8  # rows of tiles that run at the same time, because they share what they load


@triton.jit
def _tile_quantize(x, q, scale, rows, columns):
    down, across = tl.program_id(0), tl.program_id(1)
    at_row, at_column = (down * SIDE + tl.arange(0, SIDE)).to(tl.int64)[:, None], across * SIDE + tl.arange(0, SIDE)
    inside = (at_row < rows) & (at_column < columns)[None]
    value = tl.load(x + at_row * columns + at_column, mask=inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.max(tl.abs(value), 1), 0), 1e-8)
    value = value * tl.div_rn(128.0, largest) + NEAREST_EVEN - NEAREST_EVEN
    tl.store(q + at_row * columns + at_column, tl.minimum(value, 127.0).to(tl.int8), mask=inside)
    tl.store(scale + down.to(tl.int64) * tl.num_programs(1) + across, largest * (1 / 128))


@triton.jit
def _tile_product(a, b, out, a_scale, b_scale, tiles_m, tiles_n, tiles_k, GROUP: tl.constexpr):
    tile = tl.program_id(0)
    first = tile // (GROUP * tiles_n) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    down, across = first + tile % (GROUP * tiles_n) % size, tile % (GROUP * tiles_n) // size
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for k in range(tiles_k):
        left, right = a.load([down * SIDE, k * SIDE]), b.load([across * SIDE, k * SIDE])
        product = tl.dot(left, tl.trans(right), out_dtype=tl.int32).to(tl.float32)
        total += product * (tl.load(a_scale + down * tiles_k + k) * tl.load(b_scale + across * tiles_k + k))
    out.store([down * SIDE, across * SIDE], total.to(out.dtype))


@triton.jit
def _tile_product_by_pointers(
    a, b, out, a_scale, b_scale, tiles_m, tiles_n, tiles_k, rows, columns, depth, GROUP: tl.constexpr
):
    a = tl.make_tensor_descriptor(a, [rows, depth], [depth, 1], [SIDE, SIDE])
    b = tl.make_tensor_descriptor(b, [columns, depth], [depth, 1], [SIDE, SIDE])
    out = tl.make_tensor_descriptor(out, [rows, columns], [columns, 1], [SIDE, SIDE])
    _tile_product(a, b, out, a_scale, b_scale, tiles_m, tiles_n, tiles_k, GROUP)


def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference.int8_quantize`: x (M, K) → int8 (M, K) and float32 scales (⌈M/128⌉, ⌈K/128⌉)."""
    x = x.contiguous()
    tiles = tuple(triton.cdiv(side, reference.TILE) for side in x.shape)
    q, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(tiles, device=x.device)
    launch(_tile_quantize, tiles, x, q, scale, *x.shape, num_warps=8)
    return q, scale


def tile_product(q: Tensor, scale: Tensor, w_q: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `reference.tile_product`: (M, N) in dtype."""
    if q.shape[1] % 16 or w_q.shape[0] % 8:  # a row begins at a multiple of 16 bytes, as descriptors need
        return reference.tile_product(q, scale, w_q, w_scale, dtype)
    out = torch.empty(q.shape[0], w_q.shape[0], dtype=dtype, device=q.device)
    tiles = [triton.cdiv(side, reference.TILE) for side in (*out.shape, q.shape[1])]
    matrices = [aligned(x.contiguous()) for x in (q, w_q, out)]
    kernel, sides = _tile_product_by_pointers, (*out.shape, q.shape[1])
    if takes_descriptors(q):
        kernel, sides = _tile_product, ()
        matrices = (TensorDescriptor.from_tensor(x, [reference.TILE, reference.TILE]) for x in matrices)
    launch(
        kernel, (tiles[0] * tiles[1],), *matrices, scale.contiguous(), w_scale.contiguous(), *tiles, *sides,
        GROUP=GROUP, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out
