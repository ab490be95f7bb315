"""The convolutions of Wan's VAE for Hopper, in Gluon: those of `triton_conv` with less traffic from L2.

One program per multiprocessor. It computes tile after tile. A tile is 8 rows by 32 columns of a picture,
with all or some of the output channels:

    warp 8: producer, `_fetch`                    warps 0-3 and 4-7: consumers, `_multiply`, 8 × 16 pixels each
    ─────────────────────────────                 ──────────────────────────────────────────────────────────
    for each frame and each row of the taps,      for each of these steps:
    and each DEPTH of the channels:                 for each column x of the taps:
      a: pixels of the tile and 2 columns ─ TMA ►     sums (128, N) += a[x : x + 16] · bᵀ[x]
      b: weights of the 3 columns         ─ TMA ►   bias, residual or norm and SiLU, round       ─ TMA ► out

The pixels of a tile lie in shared memory column by column, 8 pixels each. A swizzled buffer repeats every 8 rows. The
tile that is one column further right is therefore the same buffer from another address on. The columns of the
taps read the same bytes, which come from L2 once. L2 limits the kernels of `triton_conv`.

    barrier          who waits        who arrives
    ready[stage]     consumers        the copy engine, when all bytes of a and b are there (count 1)
    free[stage]      producer         each consumer after its products (count 2)
    added[group]     a consumer       the copy engine, when its part of the residual is there (count 1)
"""

import torch
import torch.nn.functional as F
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
from . import triton_conv

HIGH = gl.constexpr(8)  # rows of a picture in a tile: the rows after which a swizzled buffer repeats
WIDE = gl.constexpr(16)  # columns of a consumer
GROUPS = gl.constexpr(2)  # consumers
DEPTH = 32  # channels of a step
# Output channels → columns of the two products, stages, columns stored at a time
TILES = {16: (16, 0, 4, 16), 96: (64, 32, 4, 32), 192: (128, 64, 3, 64)}
FEW = 16  # output channels that fewer ones are filled up to


@gluon.jit
def _place(tile, size, COLUMNS: gl.constexpr):
    """Return the frame, the first column and row, and the first output channel of a tile.

    The tiles of one place follow each other, frame by frame, because the next two frames read its pixels again.
    """
    frames, width, _, channels = size
    parts = gl.cdiv(channels, COLUMNS)
    channel, tile = tile % parts * COLUMNS, tile // parts
    time, tile = tile % frames, tile // frames
    across = gl.cdiv(width, GROUPS * WIDE)
    return time, tile % across * (GROUPS * WIDE), tile // across * HIGH, channel


@gluon.jit
def _count(size, COLUMNS: gl.constexpr):
    frames, width, height, channels = size
    return frames * gl.cdiv(channels, COLUMNS) * gl.cdiv(width, GROUPS * WIDE) * gl.cdiv(height, HIGH)


@gluon.jit
def _view(buffer, index, ROWS: gl.constexpr):
    """Return ROWS rows of a buffer of 8-row parts, from part `index` on."""
    layout: gl.constexpr = buffer.layout
    return buffer.index(index)._reinterpret(buffer.dtype, [ROWS, buffer.shape[2]], layout)


@gluon.jit
def _fetch(
    x, edge, weight, weight_2, size, buffers, barriers,
    C: gl.constexpr, TAPS_T: gl.constexpr, TAPS: gl.constexpr, BN_2: gl.constexpr,
):  # fmt: skip
    a_buffer, b_buffer, b2_buffer, _ = buffers
    ready, free, _ = barriers
    DEPTH: gl.constexpr = a_buffer.shape[2]
    BN: gl.constexpr = b_buffer.shape[1]
    STAGES: gl.constexpr = b_buffer.shape[0] // TAPS
    MORE: gl.constexpr = TAPS - 1
    COLS: gl.constexpr = GROUPS * WIDE + MORE
    PARTS: gl.constexpr = C // DEPTH
    BYTES: gl.constexpr = (COLS * HIGH + TAPS * (BN + BN_2)) * DEPTH * 2
    steps: gl.constexpr = TAPS_T * TAPS * PARTS
    for done in range(own_tiles(_count(size, BN + BN_2))):
        time, left, top, channel = _place(gl.program_id(0) + done * gl.num_programs(0), size, BN + BN_2)
        for k in range(steps):
            at = done * steps + k
            stage = at % STAGES
            tap, depth = k // PARTS, k % PARTS * DEPTH
            frame, row = time + tap // TAPS, top + tap % TAPS
            mbarrier.wait(free.index(stage), (at // STAGES + 1) & 1)
            mbarrier.expect(ready.index(stage), BYTES)
            for group in gl.static_range(GROUPS):
                part = a_buffer.index(stage * COLS + group * WIDE)
                part = part._reinterpret(a_buffer.dtype, [1, WIDE, HIGH, DEPTH], x.layout)
                load(x, [frame, left + group * WIDE, row, depth], ready.index(stage), part)
            part = a_buffer.index(stage * COLS + GROUPS * WIDE)
            part = part._reinterpret(a_buffer.dtype, [1, MORE, HIGH, DEPTH], edge.layout)
            load(edge, [frame, left + GROUPS * WIDE, row, depth], ready.index(stage), part)
            for column in gl.static_range(TAPS):
                k_at = (tap * TAPS + column) * C + depth
                load(weight, [channel, k_at], ready.index(stage), b_buffer.index(stage * TAPS + column))
                if BN_2:
                    load(weight_2, [channel + BN, k_at], ready.index(stage), b2_buffer.index(stage * TAPS + column))


@gluon.jit
def _halves(x):
    """Return the left and the right half of a matrix."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _columns(values, first, matrix):
    """Load the values of a matrix's columns, which are the output channels from `first` on: (1, N) float32."""
    layout: gl.constexpr = gl.SliceLayout(0, matrix.type.layout)
    return gl.load(values + first + gl.arange(0, matrix.shape[1], layout)).to(gl.float32)[None, :]


@gluon.jit
def _add_squares(total, value, bias, first):
    """Return total plus the sum over the columns of (value + bias)²."""
    layout: gl.constexpr = total.type.layout
    value += _columns(bias, first, value)
    return total + gl.convert_layout(gl.sum(value * value, 1), layout)


@gluon.jit
def _finish(value, group, use, place, lead, factor, vectors, residual, out, buffer, added, RESIDUAL: gl.constexpr):
    """Finish a part of the sums and write it.

    Add the bias. Then add the residual, or apply norm and SiLU with a factor for each row.
    lead: frames of `out` before the first one. use: how often this consumer's buffer was used before.
    """
    time, left, top, channel = place
    bias, gamma = vectors
    rows: gl.constexpr = value.shape[0]
    width: gl.constexpr = value.shape[1]
    own = buffer.index(group)
    tma.store_wait(0)
    if RESIDUAL:
        fence_async_shared()
        mbarrier.expect(added.index(group), rows * width * 2)
        load(residual, [time, left, top, channel], added.index(group), own)
    value += _columns(bias, channel, value)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, width], buffer.dtype)
    flat = own._reinterpret(buffer.dtype, [rows, width], layout)
    if RESIDUAL:
        mbarrier.wait(added.index(group), use & 1)
        value += flat.load(value.type.layout).to(gl.float32)
    if gamma is not None:
        down: gl.constexpr = gl.SliceLayout(1, value.type.layout)
        value *= gl.convert_layout(factor, down)[:, None]
        value *= _columns(gamma, channel, value)
        value /= 1 + gl.exp2(value * -1.4426950408889634)
    flat.store(value.to(buffer.dtype))
    fence_async_shared()
    store(out, [lead + time, left, top, channel], own)


@gluon.jit
def _multiply(
    group, result, size, buffers, barriers,
    C: gl.constexpr, TAPS_T: gl.constexpr, TAPS: gl.constexpr, BN_2: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    vectors, residual, out, lead, scale = result
    a_buffer, b_buffer, b2_buffer, out_buffer = buffers
    ready, free, added = barriers
    DEPTH: gl.constexpr = a_buffer.shape[2]
    BN: gl.constexpr = b_buffer.shape[1]
    STAGES: gl.constexpr = b_buffer.shape[0] // TAPS
    PART: gl.constexpr = out_buffer.shape[4]
    COLS: gl.constexpr = GROUPS * WIDE + TAPS - 1
    ROWS: gl.constexpr = WIDE * HIGH
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    layout_2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN_2 if BN_2 else 32, 16])
    row: gl.constexpr = gl.SliceLayout(1, layout)
    steps: gl.constexpr = TAPS_T * TAPS * (C // DEPTH)
    parts: gl.constexpr = (BN + BN_2) // PART
    for done in range(own_tiles(_count(size, BN + BN_2))):
        time, left, top, channel = _place(gl.program_id(0) + done * gl.num_programs(0), size, BN + BN_2)
        left += group * WIDE
        total = gl.zeros([ROWS, BN], gl.float32, layout)
        total_2 = gl.zeros([ROWS, BN_2 if BN_2 else 32], gl.float32, layout_2)
        for k in range(steps):
            at = done * steps + k
            stage = at % STAGES
            mbarrier.wait(ready.index(stage), (at // STAGES) & 1)
            for column in gl.static_range(TAPS):
                a = _view(a_buffer, stage * COLS + group * WIDE + column, ROWS)
                b = b_buffer.index(stage * TAPS + column).permute((1, 0))
                total = warpgroup_mma(a, b, total, is_async=True)
                if BN_2:
                    b2 = b2_buffer.index(stage * TAPS + column).permute((1, 0))
                    total_2 = warpgroup_mma(a, b2, total_2, is_async=True)
            if BN_2:
                total, total_2 = warpgroup_mma_wait(0, deps=[total, total_2])
            else:
                total = warpgroup_mma_wait(0, deps=[total])
            mbarrier.arrive(free.index(stage))
        use = done * parts
        place = time, left, top, channel
        factor = gl.zeros([ROWS], gl.float32, row)
        if parts > 1:
            first, second = _halves(total)
        if vectors[1] is not None:
            factor = _add_squares(factor, first, vectors[0], 0)
            factor = _add_squares(factor, second, vectors[0], PART)
            if BN_2:
                factor = _add_squares(factor, total_2, vectors[0], 2 * PART)
            factor = scale / gl.maximum(gl.sqrt(factor), 1e-12)
        if parts == 1:
            _finish(total, group, use, place, lead, factor, vectors, residual, out, out_buffer, added, RESIDUAL)
        else:
            _finish(first, group, use, place, lead, factor, vectors, residual, out, out_buffer, added, RESIDUAL)
            place = time, left, top, channel + PART
            _finish(second, group, use + 1, place, lead, factor, vectors, residual, out, out_buffer, added, RESIDUAL)
        if BN_2:
            place = time, left, top, channel + 2 * PART
            _finish(total_2, group, use + 2, place, lead, factor, vectors, residual, out, out_buffer, added, RESIDUAL)
    tma.store_wait(0)


@gluon.jit
def _conv(
    x, edge, weight, weight_2, bias, gamma, residual, out, lead, scale, frames, width, height,
    N: gl.constexpr, C: gl.constexpr, TAPS_T: gl.constexpr, TAPS: gl.constexpr, STAGES: gl.constexpr,
    BN: gl.constexpr, BN_2: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    DEPTH: gl.constexpr = weight.block_shape[1]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HIGH, DEPTH], x.dtype)
    a_buffer = gl.allocate_shared_memory(x.dtype, [STAGES * (GROUPS * WIDE + TAPS - 1), HIGH, DEPTH], layout)
    b_buffer = gl.allocate_shared_memory(x.dtype, [STAGES * TAPS, BN, DEPTH], weight.layout)
    b2_buffer = gl.allocate_shared_memory(x.dtype, [STAGES * TAPS, weight_2.block_shape[0], DEPTH], weight_2.layout)
    out_buffer = gl.allocate_shared_memory(out.dtype, [GROUPS, 1, WIDE, HIGH, out.block_shape[3]], out.layout)
    ready, free = init_barriers(STAGES, 1), init_barriers(STAGES, GROUPS)
    added = init_barriers(GROUPS, 1)
    fence_async_shared()
    result, size = ((bias, gamma), residual, out, lead, scale), (frames, width, height, N)
    buffers, barriers = (a_buffer, b_buffer, b2_buffer, out_buffer), (ready, free, added)
    gl.warp_specialize(
        [
            (_multiply, (0, result, size, buffers, barriers, C, TAPS_T, TAPS, BN_2, RESIDUAL)),
            (_multiply, (1, result, size, buffers, barriers, C, TAPS_T, TAPS, BN_2, RESIDUAL)),
            (_fetch, (x, edge, weight, weight_2, size, buffers, barriers, C, TAPS_T, TAPS, BN_2)),
        ],
        [4, 1],
        [240, 24],
    )


def _takes(weight: Tensor, taps: tuple[int, ...] = (3, 3, 3)) -> bool:
    columns = max(FEW, weight.shape[0])
    return weight.shape[2:] == taps and columns in TILES and weight.shape[1] % DEPTH == 0


def rimmed_conv(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, split: int = 1) -> Tensor:
    """Compute `reference.rimmed_conv`; copies a weight unless it is channels last.

    Returns:
        The clip; fewer than 16 channels are a view of 16.
    """
    few = weight.shape[0] < FEW
    if not _takes(weight) or (few and residual is not None):
        return triton_conv.rimmed_conv(x, weight, bias, residual, split)
    x, columns, taps = aligned(x), weight.shape[0], weight.shape[2:4]
    residual = None if residual is None else aligned(residual)
    matrix = weight.permute(0, 2, 3, 4, 1).reshape(columns, -1)
    if few:
        matrix, bias = F.pad(matrix, (0, 0, 0, FEW - columns)), F.pad(bias, (0, FEW - columns))
    shape = x.shape[0], x.shape[1] - 2, *x.shape[2:4], len(matrix)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    triton_conv.clear_rim(out)
    _launch(x, matrix, taps, bias, None, residual, out[:, :, 1:-1, 1:-1])
    return out[..., :columns]


def normed_conv(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, before: Tensor) -> Tensor:
    """Compute `reference.normed_conv`, in one kernel where a program has all output channels of its pixels."""
    columns, lead = weight.shape[0], before.shape[1]
    if not _takes(weight) or columns < FEW:
        return triton_conv.normed_conv(x, weight, bias, gamma, before)
    x, shape = aligned(x), (x.shape[0], lead + x.shape[1] - 2, *x.shape[2:4], columns)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    triton_conv.clear_rim(out)
    out[:, :lead] = before  # with its rim, which may have other ranks' rows
    matrix = weight.permute(0, 2, 3, 4, 1).reshape(columns, -1)
    _launch(x, matrix, weight.shape[2:4], bias, gamma, None, out[:, :, 1:-1, 1:-1])
    return out


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `reference.upsample_conv` as `triton_conv` does, with a launch for each of the four new pixels."""
    if not _takes(weight, (3, 3)) or weight.shape[0] < FEW:
        return triton_conv.upsample_conv(x, weight, bias)
    x, (batch, time, height, width, _) = aligned(x), x.shape
    shape = batch, time, 2 * height - 2, 2 * width - 2, weight.shape[0]
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    triton_conv.clear_rim(out)
    for phase, matrix in enumerate(triton_conv.phases(weight, x.dtype).chunk(4)):
        down, across = phase // 2, phase % 2
        pixels = out[:, :, 1 + down : -1 : 2, 1 + across : -1 : 2]
        _launch(x[:, :, down:, across:], matrix, (1, 2), bias, None, None, pixels)
    return out


def _launch(
    x: Tensor,
    weight: Tensor,
    taps: tuple[int, int],
    bias: Tensor,
    gamma: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    """Convolve x and write the last frames of `out`.

    Args:
        x: the clip (B, T + taps[0] − 1, …, C) from the first pixel on that a tap reads.
        weight: (N, taps · C), the taps in time, down and across.
        taps: in time; down and across.
        residual: with its rim.
        out: the pixels that are written, (B, t + T, H, W, N).
    """
    (taps_t, taps), (frames, height, width, columns), channels = taps, out.shape[1:], x.shape[-1]
    lead = frames - (x.shape[1] - taps_t + 1)
    first, second, stages, part = TILES[columns]
    matrix = aligned(weight)
    weights = [_descriptor(matrix, [n, DEPTH]) for n in (first, second or first)]
    high, wide, edge = HIGH.value, WIDE.value, taps - 1
    across, down = -(-width // (GROUPS.value * wide)), -(-height // high)
    added = out if residual is None else residual[:, :, 1:-1, 1:-1]
    tiles = (frames - lead) * across * down * -(-columns // (first + second))
    for own, result, other in zip(x, out, added, strict=True):
        launch(
            _conv, (min(tiles, multiprocessors(x.device)),), _clip(own, [1, wide, high, DEPTH]),
            _clip(own, [1, edge, high, DEPTH]), *weights, bias.contiguous(),
            None if gamma is None else gamma.contiguous(), _clip(other, [1, wide, high, part]),
            _clip(result, [1, wide, high, part]), lead, columns**0.5, frames - lead, width, height, N=columns,
            C=channels, TAPS_T=taps_t, TAPS=taps, STAGES=stages, BN=first, BN_2=second,
            RESIDUAL=residual is not None, num_warps=4,
        )  # fmt: skip


def _clip(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Describe pixels (T, H, W, C) column by column."""
    return _descriptor(x.permute(0, 2, 1, 3), block)


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))
