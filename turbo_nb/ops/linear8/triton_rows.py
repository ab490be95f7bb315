"""8-bit linears in Triton, with one scale a row: `reference.row_quantize` and `reference.row_product`.

    kernel         grid                            a program loads                    and stores
    _row_quantize  rows                            a row of x                         the row in int8 and its scale
    _row_product   one or two per multiprocessor   tiles of a (x) and b (the          its tiles of out, one after
                   (8 warps)                       weight) by tensor descriptors      the other, by a descriptor

No scale is inside the sum, so the whole depth is one integer product (LLM.int8(), arXiv:2208.07339). The scales and
the bias are the epilogue.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import tuning
from ..launch import aligned, launch, takes_descriptors
from . import reference
from .reference import QuantizedRows

NEAREST_EVEN = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it rounds a float32 below 2²² to an integer


@triton.jit
def row_scale(largest):
    """Return the scale of a row from its largest magnitude."""
    return tl.maximum(largest, 1e-8) * (1 / 127)


@triton.jit
def rounded(value, scale):
    """Round float32 values / scale to the nearest int8."""
    return (value * (1 / scale) + NEAREST_EVEN - NEAREST_EVEN).to(tl.int8)


@triton.jit
def _part(x, columns, width, GELU: tl.constexpr):
    value = tl.load(x + columns, mask=columns < width, other=0.0).to(tl.float32)
    if GELU:  # the tanh form
        value = value / (1 + tl.exp(-1.5957691216057308 * (value + 0.044715 * value * value * value)))
    return value


@triton.jit
def _row_quantize(x, q, scale, width, GELU: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first, rest = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    value_1, value_2 = _part(x + row * width, first, width, GELU), _part(x + row * width, rest, width, GELU)
    its_scale = row_scale(tl.maximum(tl.max(tl.abs(value_1), 0), tl.max(tl.abs(value_2), 0)))
    tl.store(q + row * width + first, rounded(value_1, its_scale), mask=first < width)
    tl.store(q + row * width + rest, rounded(value_2, its_scale), mask=rest < width)
    tl.store(scale + row, its_scale)


@triton.jit
def _row_product(
    a, b, out, a_scale, b_scale, bias, rows, columns, depth,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * tiles_n) * GROUP  # tiles that run at the same time share rows of a and b
        size = tl.minimum(tiles_m - first, GROUP)
        down = (first + tile % (GROUP * tiles_n) % size) * BLOCK_M
        across = tile % (GROUP * tiles_n) // size * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for k in range(tl.cdiv(depth, BLOCK_K)):
            left, right = a.load([down, k * BLOCK_K]), b.load([across, k * BLOCK_K])
            total = tl.dot(left, tl.trans(right), total, out_dtype=tl.int32)
        at_row, at_column = down + tl.arange(0, BLOCK_M), across + tl.arange(0, BLOCK_N)
        left_scale = tl.load(a_scale + at_row, mask=at_row < rows, other=0.0)
        right_scale = tl.load(b_scale + at_column, mask=at_column < columns, other=0.0)
        result = total.to(tl.float32) * left_scale[:, None] * right_scale[None]
        if BIAS:
            result += tl.load(bias + at_column, mask=at_column < columns, other=0.0).to(tl.float32)[None]
        out.store([down, across], result.to(out.dtype))


@triton.jit
def _row_product_by_pointers(
    a, b, out, a_scale, b_scale, bias, rows, columns, depth,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    a = tl.make_tensor_descriptor(a, [rows, depth], [depth, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(b, [columns, depth], [depth, 1], [BLOCK_N, BLOCK_K])
    out = tl.make_tensor_descriptor(out, [rows, columns], [columns, 1], [BLOCK_M, BLOCK_N])
    _row_product(
        a, b, out, a_scale, b_scale, bias, rows, columns, depth, BIAS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP
    )  # fmt: skip


def row_quantize(x: Tensor, gelu: bool = False) -> QuantizedRows:
    """Compute `reference.row_quantize`: x (…, K) → int8 (…, K) and float32 scales (…)."""
    x = x.contiguous()
    width = x.shape[-1]
    q, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(x.shape[:-1], device=x.device)
    first = triton.next_power_of_2(width + 1) // 2  # two powers of 2 waste fewer lanes than one: 8960 is 8192 + 1024
    rest = max(16, triton.next_power_of_2(width - first))
    launch(
        _row_quantize, (scale.numel(),), x, q, scale, width,
        GELU=gelu, FIRST=first, REST=rest, num_warps=min(16, max(1, first // 512)),
    )  # fmt: skip
    return QuantizedRows(q, scale, x.dtype)


def fits_descriptors(x: QuantizedRows, w_q: Tensor) -> bool:
    """Return whether rows of x, the weight and the result begin at multiples of 16 bytes, as descriptors need."""
    return x.q.shape[-1] % 16 == 0 and w_q.shape[0] % 8 == 0


def row_product(x: QuantizedRows, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `reference.row_product`: (…, N) in the dtype that x was quantised from."""
    if not fits_descriptors(x, w_q):
        return reference.row_product(x, w_q, w_scale, bias)
    depth, columns, rows = x.q.shape[-1], w_q.shape[0], x.scale.numel()
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.q.device)
    matrices = [aligned(y.contiguous()) for y in (x.q.reshape(rows, depth), w_q, out)]
    scales = x.scale.contiguous(), w_scale.contiguous(), None if bias is None else bias.contiguous()

    def launched(how: tuning.Launch) -> Tensor:
        down, across, deep, occupancy = how.tile
        programs = triton.cdiv(rows, down) * triton.cdiv(columns, across)
        if x.q.is_cuda:
            programs = min(programs, occupancy * torch.cuda.get_device_properties(x.q.device).multi_processor_count)
        kernel, operands = _row_product_by_pointers, matrices
        if takes_descriptors(x.q):
            tiles = [down, deep], [across, deep], [down, across]
            kernel, operands = _row_product, map(TensorDescriptor.from_tensor, matrices, tiles)
        launch(
            kernel, (programs,), *operands, *scales, rows, columns, depth,
            BIAS=bias is not None, BLOCK_M=down, BLOCK_N=across, BLOCK_K=deep, GROUP=8,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        return out

    return tuning.run("row_product", (columns, depth), x.q, launched).unflatten(0, x.scale.shape)
