"""The product of 8-bit rows for Hopper, in Gluon: `triton_rows.row_product` with larger tiles.

One program per multiprocessor. It computes tile after tile, a tile being 192 rows of x by 256 rows of the weight:

    warp 12: producer, `_fetch`           warps 0-3, 4-7 and 8-11: consumers, `_multiply`, 64 rows of x each
    ───────────────────────────           ──────────────────────────────────────────────────────────────
    for each 128 of the depth:            load the scales and the bias of the tile
      a: 3 × (64, 128)  ── TMA ──►        for each 128 of the depth:
      b: (256, 128)     ── TMA ──►          sums (64, 256) int32 += a · bᵀ
                                          for each 64 columns: scale, add the bias, round, ── TMA ──► out

    barrier          who waits        who arrives
    ready[stage]     consumers        the copy engine, when all bytes of a and b are there (count 1)
    free[stage]      producer         each consumer after its product (count 3)

    registers per thread   160 for a consumer, 128 of them its sums; 24 for the producer
    shared memory          a 72 KiB and b 96 KiB in 3 stages, scales and bias 6, out 2 × 3 × (64, 64) 48: 222 KiB

A tile is as large as the registers allow, because the bandwidth of L2 limits the sums. The results of one tile leave
through shared memory while the next tile is multiplied.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..hopper_tools import init_barriers, load, multiprocessors, own_tiles, store
from ..launch import aligned, launch
from . import reference
from .reference import QuantizedRows
from .triton_rows import fits_descriptors

ROWS = 64  # of a consumer
COLUMNS = 256
DEPTH = 128  # of a stage
PART = 64  # columns that are scaled and stored at a time
GROUPS = gl.constexpr(3)
STAGES = gl.constexpr(3)
BAND = gl.constexpr(8)  # tiles of rows that are finished before the next ones begin


@gluon.jit
def _place(tile, rows, columns, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Return the first row and column of a tile; tiles that run at the same time share rows of a and b."""
    down, across = gl.cdiv(rows, GROUPS * ROWS), gl.cdiv(columns, COLUMNS)
    first = tile // (BAND * across) * BAND
    size = gl.minimum(down - first, BAND)
    within = tile % (BAND * across)
    return (first + within % size) * (GROUPS * ROWS), within // size * COLUMNS


@gluon.jit
def _fetch(a, b, size, buffers, barriers):
    rows, columns, depth = size
    a_buffer, b_buffer, _, _, _ = buffers
    ready, free = barriers
    ROWS: gl.constexpr = a_buffer.shape[1]
    COLUMNS: gl.constexpr = b_buffer.shape[1]
    DEPTH: gl.constexpr = b_buffer.shape[2]
    steps = gl.cdiv(depth, DEPTH)
    for done in range(own_tiles(gl.cdiv(rows, GROUPS * ROWS) * gl.cdiv(columns, COLUMNS))):
        down, across = _place(gl.program_id(0) + done * gl.num_programs(0), rows, columns, ROWS, COLUMNS)
        for k in range(steps):
            at = done * steps + k
            stage = at % STAGES
            mbarrier.wait(free.index(stage), (at // STAGES + 1) & 1)
            mbarrier.expect(ready.index(stage), (GROUPS * ROWS + COLUMNS) * DEPTH)
            for group in gl.static_range(GROUPS):
                load(a, [down + group * ROWS, k * DEPTH], ready.index(stage), a_buffer.index(stage * GROUPS + group))
            load(b, [across, k * DEPTH], ready.index(stage), b_buffer.index(stage))


@gluon.jit
def _halves(x):
    """Return the left and the right half of a matrix."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _finish(total, left, right, shift, out, down, across, buffer, BIAS: gl.constexpr):
    layout: gl.constexpr = total.type.layout
    column: gl.constexpr = gl.SliceLayout(0, layout)
    result = total.to(gl.float32) * gl.convert_layout(left, gl.SliceLayout(1, layout))[:, None]
    result *= right.load(column)[None, :]
    if BIAS:
        result += shift.load(column)[None, :]
    tma.store_wait(1)  # until the last store from this buffer is done; the other buffer's may still run
    buffer.store(result.to(out.dtype))
    fence_async_shared()
    store(out, [down, across], buffer)


@gluon.jit
def _multiply(group, result, size, buffers, barriers, BIAS: gl.constexpr):
    out, a_scale, b_scale, bias = result
    rows, columns, depth = size
    a_buffer, b_buffer, scale_buffer, bias_buffer, out_buffer = buffers
    ready, free = barriers
    ROWS: gl.constexpr = a_buffer.shape[1]
    COLUMNS: gl.constexpr = b_buffer.shape[1]
    PART: gl.constexpr = out_buffer.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    line: gl.constexpr = gl.BlockedLayout([COLUMNS // 128], [32], [4], [0])
    own_scales, own_bias = scale_buffer.index(group), bias_buffer.index(group)
    steps = gl.cdiv(depth, b_buffer.shape[2])
    for done in range(own_tiles(gl.cdiv(rows, GROUPS * ROWS) * gl.cdiv(columns, COLUMNS))):
        down, across = _place(gl.program_id(0) + done * gl.num_programs(0), rows, columns, ROWS, COLUMNS)
        down += group * ROWS
        at_row = down + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        at_column = across + gl.arange(0, COLUMNS, line)
        left = gl.load(a_scale + at_row, mask=at_row < rows, other=0.0)
        right = gl.load(b_scale + at_column, mask=at_column < columns, other=0.0)
        if BIAS:
            shift = gl.load(bias + at_column, mask=at_column < columns, other=0.0)
        total = gl.zeros([ROWS, COLUMNS], gl.int32, layout)
        for k in range(steps):
            at = done * steps + k
            stage = at % STAGES
            mbarrier.wait(ready.index(stage), (at // STAGES) & 1)
            rows_of_a, rows_of_b = a_buffer.index(stage * GROUPS + group), b_buffer.index(stage)
            total = warpgroup_mma(rows_of_a, rows_of_b.permute((1, 0)), total, use_acc=k > 0, is_async=True)
            total = warpgroup_mma_wait(0, deps=[total])
            mbarrier.arrive(free.index(stage))
        own_scales.store(right)
        if BIAS:
            own_bias.store(shift.to(gl.float32))
        both = _halves(total)  # in parts, because scales and rounding need registers
        for part in gl.static_range(COLUMNS // PART):
            _finish(
                _halves(both[part // 2])[part % 2], left,
                own_scales.slice(part * PART, PART), own_bias.slice(part * PART, PART),
                out, down, across + part * PART, out_buffer.index(2 * group + part % 2), BIAS,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def _row_product(a, b, out, a_scale, b_scale, bias, rows, columns, depth, BIAS: gl.constexpr):
    ROWS: gl.constexpr = a.block_shape[0]
    COLUMNS: gl.constexpr = b.block_shape[0]
    DEPTH: gl.constexpr = a.block_shape[1]
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a_buffer = gl.allocate_shared_memory(a.dtype, [STAGES * GROUPS, ROWS, DEPTH], a.layout)
    b_buffer = gl.allocate_shared_memory(b.dtype, [STAGES, COLUMNS, DEPTH], b.layout)
    scale_buffer = gl.allocate_shared_memory(gl.float32, [GROUPS, COLUMNS], plain)
    bias_buffer = gl.allocate_shared_memory(gl.float32, [GROUPS, COLUMNS], plain)
    out_buffer = gl.allocate_shared_memory(out.dtype, [2 * GROUPS, ROWS, out.block_shape[1]], out.layout)
    ready, free = init_barriers(STAGES, 1), init_barriers(STAGES, GROUPS)
    fence_async_shared()
    result, size = (out, a_scale, b_scale, bias), (rows, columns, depth)
    buffers, barriers = (a_buffer, b_buffer, scale_buffer, bias_buffer, out_buffer), (ready, free)
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


LAYOUT = gl.NVMMASharedLayout.get_default_for([ROWS, DEPTH], gl.int8)
LAYOUT_OUT = gl.NVMMASharedLayout.get_default_for([ROWS, PART], gl.bfloat16)  # the same for fp16


def row_product(x: QuantizedRows, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `reference.row_product` of rows that were bf16 or fp16: (…, N)."""
    if not fits_descriptors(x, w_q):
        return reference.row_product(x, w_q, w_scale, bias)
    depth, columns, rows = x.q.shape[-1], w_q.shape[0], x.scale.numel()
    out = torch.empty(*x.scale.shape, columns, dtype=x.dtype, device=x.q.device)
    tiles = -(-rows // (GROUPS.value * ROWS)) * -(-columns // COLUMNS)
    launch(
        _row_product, (min(tiles, multiprocessors(x.q.device)),),
        TensorDescriptor.from_tensor(aligned(x.q.reshape(rows, depth)), [ROWS, DEPTH], LAYOUT),
        TensorDescriptor.from_tensor(aligned(w_q), [COLUMNS, DEPTH], LAYOUT),
        TensorDescriptor.from_tensor(out.view(rows, columns), [ROWS, PART], LAYOUT_OUT),
        x.scale.contiguous(), w_scale.contiguous(), None if bias is None else bias.contiguous(),
        rows, columns, depth, BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    return out
