"""The product of 8-bit linears for Hopper, in Gluon: `int8.row_product` with larger tiles than Triton's own can have.

The way from L2 bounds the sums, so a tile is as large as the registers allow: three groups of four warps hold 64×256
sums each, and a warp of its own fetches their operands. At small depth the scaling and storing of a tile count as much.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper import _load, _tiles
from .reference import Rows

ROWS = gl.constexpr(64)  # of a group
GROUPS = gl.constexpr(3)
COLUMNS = gl.constexpr(256)
DEPTH = gl.constexpr(128)
STAGES = gl.constexpr(3)
BAND = gl.constexpr(8)  # tiles of rows whose columns are done before the next ones'


@gluon.jit
def _place(tile, rows, columns):
    """Where a tile begins; tiles that run together share rows of a and b"""
    down, across = gl.cdiv(rows, GROUPS * ROWS), gl.cdiv(columns, COLUMNS)
    first = tile // (BAND * across) * BAND
    size = gl.minimum(down - first, BAND)
    within = tile % (BAND * across)
    return (first + within % size) * (GROUPS * ROWS), within // size * COLUMNS


@gluon.jit
def _fetch(a, b, size, buffers, barriers):
    rows, columns, depth = size
    a_buffer, b_buffer = buffers
    ready, free = barriers
    steps = gl.cdiv(depth, DEPTH)
    for done in range(_tiles(gl.cdiv(rows, GROUPS * ROWS) * gl.cdiv(columns, COLUMNS))):
        down, across = _place(gl.program_id(0) + done * gl.num_programs(0), rows, columns)
        for k in range(steps):
            at = done * steps + k
            stage = at % STAGES
            mbarrier.wait(free.index(stage), (at // STAGES + 1) & 1)
            mbarrier.expect(ready.index(stage), (GROUPS * ROWS + COLUMNS) * DEPTH)
            for group in gl.static_range(GROUPS):
                _load(a, [down + group * ROWS, k * DEPTH], ready.index(stage), a_buffer.index(stage * GROUPS + group))
            _load(b, [across, k * DEPTH], ready.index(stage), b_buffer.index(stage))


@gluon.jit
def _halves(x):
    """The left and the right half of a matrix"""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _finish(total, down, across, out, a_scale, b_scale, bias, rows, columns, BIAS: gl.constexpr):
    layout: gl.constexpr = total.type.layout
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    width: gl.constexpr = total.shape[1]
    at_row = down + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    at_column = across + gl.arange(0, width, gl.SliceLayout(0, layout))
    left = gl.load(a_scale + at_row, mask=at_row < rows, other=0.0)
    right = gl.load(b_scale + at_column, mask=at_column < columns, other=0.0)
    result = total.to(gl.float32) * left[:, None] * right[None, :]
    if BIAS:
        result += gl.load(bias + at_column, mask=at_column < columns, other=0.0).to(gl.float32)[None, :]
    result = gl.convert_layout(result.to(out.dtype.element_ty), stored)
    to_row = down + gl.arange(0, ROWS, gl.SliceLayout(1, stored))
    to_column = across + gl.arange(0, width, gl.SliceLayout(0, stored))
    at = out + to_row.to(gl.int64)[:, None] * columns + to_column[None, :]
    gl.store(at, result, mask=(to_row < rows)[:, None] & (to_column < columns)[None, :])


@gluon.jit
def _multiply(group, result, size, buffers, barriers, BIAS: gl.constexpr):
    out, a_scale, b_scale, bias = result
    rows, columns, depth = size
    a_buffer, b_buffer = buffers
    ready, free = barriers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    steps = gl.cdiv(depth, DEPTH)
    for done in range(_tiles(gl.cdiv(rows, GROUPS * ROWS) * gl.cdiv(columns, COLUMNS))):
        down, across = _place(gl.program_id(0) + done * gl.num_programs(0), rows, columns)
        total = gl.zeros([ROWS, COLUMNS], gl.int32, layout)
        for k in range(steps):
            at = done * steps + k
            stage = at % STAGES
            mbarrier.wait(ready.index(stage), (at // STAGES) & 1)
            rows_of_a, rows_of_b = a_buffer.index(stage * GROUPS + group), b_buffer.index(stage)
            total = warpgroup_mma(rows_of_a, rows_of_b.permute((1, 0)), total, use_acc=k > 0, is_async=True)
            total = warpgroup_mma_wait(0, deps=[total])
            mbarrier.arrive(free.index(stage))
        left, right = _halves(total)  # in quarters, so that scales and rounding need few registers
        for half in gl.static_range(2):
            one, two = _halves(left if half == 0 else right)
            column = across + half * (COLUMNS // 2)
            row = down + group * ROWS
            _finish(one, row, column, out, a_scale, b_scale, bias, rows, columns, BIAS)
            _finish(two, row, column + COLUMNS // 4, out, a_scale, b_scale, bias, rows, columns, BIAS)


@gluon.jit
def _row_product(a, b, out, a_scale, b_scale, bias, rows, columns, depth, BIAS: gl.constexpr):
    a_buffer = gl.allocate_shared_memory(a.dtype, [STAGES * GROUPS, ROWS, DEPTH], a.layout)
    b_buffer = gl.allocate_shared_memory(b.dtype, [STAGES, COLUMNS, DEPTH], b.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=GROUPS)
    fence_async_shared()
    result, size = (out, a_scale, b_scale, bias), (rows, columns, depth)
    buffers, barriers = (a_buffer, b_buffer), (ready, free)
    gl.warp_specialize(
        [
            (_multiply, (0, result, size, buffers, barriers, BIAS)),
            (_multiply, (1, result, size, buffers, barriers, BIAS)),
            (_multiply, (2, result, size, buffers, barriers, BIAS)),
            (_fetch, (a, b, size, buffers, barriers)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )


LAYOUT = gl.NVMMASharedLayout.get_default_for([64, 128], gl.int8)


def row_product(x: Rows, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`int8.row_product`"""
    depth, columns, rows = x.q.shape[-1], w_q.shape[0], x.scale.numel()
    out = torch.empty(*x.scale.shape, columns, dtype=x.dtype, device=x.q.device)
    tiles = -(-rows // (GROUPS.value * ROWS.value)) * -(-columns // COLUMNS.value)
    programs = min(tiles, torch.cuda.get_device_properties(x.q.device).multi_processor_count)
    _row_product[(programs,)](
        TensorDescriptor.from_tensor(x.q.view(rows, depth), [ROWS.value, DEPTH.value], LAYOUT),
        TensorDescriptor.from_tensor(w_q, [COLUMNS.value, DEPTH.value], LAYOUT),
        out, x.scale, w_scale, bias, rows, columns, depth, BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    return out
