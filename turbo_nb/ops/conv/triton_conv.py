"""The convolutions and norms of Wan's VAE in Triton, over clips with a rim of zeros around each picture.

    kernel      grid                               a program loads                   and stores
    _norm_silu  tiles of 4096 elements, B          its pixels, or those before       its pixels
    _conv       tiles of rows and columns of each  for each tap and each part of     a tile of pixels by output
                frame, B, 4 phases of upsampling   the channels: a tile of x and     channels, zero in the rim, plus
                                                   one or two of the weight          bias and residual

With the rim, (B, T, H + 2, W + 2, C) is a matrix of pixels. Each tap of a convolution multiplies the same matrix from
another row on, so the convolution is an implicit GEMM. Its tiles come by tensor descriptors, without padding,
transposing or masks. A pixel's row number is int32 (`aligned` checks it); offsets of elements are int64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import tuning
from ..launch import aligned, launch, takes_descriptors

NORM_ELEMENTS = 4096  # of a program of the norm


@triton.jit
def _norm_silu(
    x, gamma, before, out, rows, lead, factor,
    C: tl.constexpr, BEFORE: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None]
    mask = (column < C) & (row < rows + lead)
    at = (batch * rows + row - lead) * C + column
    value = tl.load(x + at, mask=mask & (row >= lead), other=0.0).to(tl.float32)
    value *= factor / tl.maximum(tl.sqrt(tl.sum(value * value, 1)), 1e-12)[:, None]
    value *= tl.load(gamma + column, mask=column < C, other=0.0).to(tl.float32)
    if SILU:
        value *= tl.sigmoid(value)
    if BEFORE:
        past = tl.load(before + (batch * lead + row) * C + column, mask=mask & (row < lead), other=0.0)
        value = tl.where(row < lead, past.to(tl.float32), value)
    tl.store(out + (batch * (rows + lead) + row) * C + column, value.to(out.dtype.element_ty), mask=mask)


def rms_norm_silu(x: Tensor, gamma: Tensor, before: Tensor | None = None, silu: bool = True) -> Tensor:
    """Compute `reference.rms_norm_silu`."""
    x, gamma, channels = x.contiguous(), gamma.contiguous(), x.shape[-1]
    lead = 0 if before is None else before.shape[1]
    out = torch.empty(x.shape[0], lead + x.shape[1], *x.shape[2:], dtype=x.dtype, device=x.device)
    frame = x.shape[2] * x.shape[3]
    block = triton.next_power_of_2(channels)
    tile = max(1, NORM_ELEMENTS // block)
    launch(
        _norm_silu, (triton.cdiv(out.shape[1] * frame, tile), x.shape[0]), x, gamma,
        x if before is None else before.contiguous(), out, x.shape[1] * frame, lead * frame, channels**0.5,
        C=channels, BEFORE=lead > 0, SILU=silu, ROWS=tile, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _clear_rim(x, height, width, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write zeros to the rim of one frame; height and width are those with the rim."""
    at, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None]
    side = at - 2 * width  # beyond the upper and the lower line
    row = tl.where(side < 0, at // width * (height - 1), side // 2 + 1)
    across = tl.where(side < 0, at % width, side % 2 * (width - 1))
    pixel = (tl.program_id(1).to(tl.int64) * height + row) * width + across
    mask = (at < 2 * (width + height) - 4) & (column < C)
    tl.store(x + pixel * C + column, tl.zeros((ROWS, BLOCK), x.dtype.element_ty), mask=mask)


def clear_rim(x: Tensor) -> None:
    """Write zeros to the rim of a clip (B, T, H + 2, W + 2, C), in place."""
    batch, time, height, width, channels = x.shape
    block = triton.next_power_of_2(channels)
    rows = max(1, NORM_ELEMENTS // block)
    grid = triton.cdiv(2 * (height + width) - 4, rows), batch * time
    launch(_clear_rim, grid, x, height, width, C=channels, ROWS=rows, BLOCK=block)


@triton.jit
def _store(
    value, bias, residual, out, columns, row, rows, frame, inside, valid,
    N: tl.constexpr, SPLIT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Write a tile of sums to `rows` of the frame, or of the SPLIT frames, that begin at `row`."""
    mask = valid[:, None] & (columns < N)[None]
    value += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None]
    width: tl.constexpr = N // SPLIT
    at = (row + (columns // width * frame)[None] + rows[:, None]) * width + (columns % width)[None]
    if RESIDUAL:
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, tl.where(inside[:, None], value, 0.0).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["frames", "height", "width"])
def _conv(
    x, weight, weight_2, bias, residual, out, frames, height, width,
    N: tl.constexpr, C: tl.constexpr, TAPS_T: tl.constexpr, TAPS: tl.constexpr, UP: tl.constexpr, SPLIT: tl.constexpr,
    RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BN_2: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (N + BN + BN_2 - 1) // (BN + BN_2)
    column, pixels = tl.program_id(0) % tiles * (BN + BN_2), tl.program_id(0) // tiles
    # the same tile of one frame after the other, because the next two frames find its pixels in the cache
    time, first = pixels % frames, pixels // frames * BM
    batch, phase = tl.program_id(1), tl.program_id(2)
    across, frame = width + 2, (height + 2) * (width + 2)
    top, left = 1 - phase // 2, 1 - phase % 2  # pixels that the kernel reaches up and left
    if not UP:
        top, left = TAPS // 2, TAPS // 2
    start = (batch * (frames + TAPS_T - 1) + time) * frame + first - top * across - left
    total = tl.zeros((BM, BN), tl.float32)
    if BN_2:
        total_2 = tl.zeros((BM, BN_2), tl.float32)
    for k in range(TAPS_T * TAPS * TAPS * (C // BK)):
        tap = k // (C // BK)
        shift = tap // (TAPS * TAPS) * frame + tap // TAPS % TAPS * across + tap % TAPS
        rows = x.load([start + shift, k % (C // BK) * BK])
        total = tl.dot(rows, tl.trans(weight.load([phase * N + column, k * BK])), total)
        if BN_2:
            total_2 = tl.dot(rows, tl.trans(weight_2.load([phase * N + column + BN, k * BK])), total_2)

    at = first + tl.arange(0, BM)
    i, j = at // across, at % across
    valid, inside = at < frame, (i > 0) & (i <= height) & (j > 0) & (j <= width)
    if UP:  # the rim of the small picture becomes the rim of the large one
        i, j = 2 * i - top, 2 * j - left
        valid &= (i >= 0) & (i < 2 * height + 2) & (j >= 0) & (j < 2 * width + 2)
        at = i * (2 * width + 2) + j
        frame = (2 * height + 2) * (2 * width + 2)
    row = (batch * frames + time).to(tl.int64) * SPLIT * frame
    columns = column + tl.arange(0, BN)
    _store(total, bias, residual, out, columns, row, at, frame, inside, valid, N, SPLIT, RESIDUAL)
    if BN_2:
        columns = column + BN + tl.arange(0, BN_2)
        _store(total_2, bias, residual, out, columns, row, at, frame, inside, valid, N, SPLIT, RESIDUAL)


@triton.jit(do_not_specialize=["pixels", "frames", "height", "width"])
def _conv_by_pointers(
    x, weight, bias, residual, out, pixels, frames, height, width,
    N: tl.constexpr, C: tl.constexpr, TAPS_T: tl.constexpr, TAPS: tl.constexpr, UP: tl.constexpr, SPLIT: tl.constexpr,
    RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BN_2: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    phases: tl.constexpr = 4 if UP else 1
    depth: tl.constexpr = TAPS_T * TAPS * TAPS * C
    second: tl.constexpr = BN_2 if BN_2 else BN
    x = tl.make_tensor_descriptor(x, [pixels, C], [C, 1], [BM, BK])
    weight_1 = tl.make_tensor_descriptor(weight, [phases * N, depth], [depth, 1], [BN, BK])
    weight_2 = tl.make_tensor_descriptor(weight, [phases * N, depth], [depth, 1], [second, BK])
    _conv(
        x, weight_1, weight_2, bias, residual, out, frames, height, width,
        N, C, TAPS_T, TAPS, UP, SPLIT, RESIDUAL, BM, BN, BN_2, BK,
    )  # fmt: skip


def _launch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, out: Tensor, **meta) -> Tensor:
    """Launch `_conv`. weight: (N, taps · C), or (4 · N, taps · C) for the four phases of upsampling."""
    batch, _, height, width, channels = x.shape
    split, columns = meta["SPLIT"], out.shape[-1] * meta["SPLIT"]
    frames = out.shape[1] // split
    x, weight, bias = aligned(x.view(-1, channels)), aligned(weight), bias.contiguous()
    added = out if residual is None else residual.contiguous()

    def launched(how: tuning.Launch) -> Tensor:
        rows, first, second, depth = how.tile
        grid = triton.cdiv(height * width, rows) * frames * triton.cdiv(columns, first + second), batch, 1
        if meta["UP"]:
            grid = *grid[:2], 4
        kernel, matrices, pixels = _conv_by_pointers, (x, weight), (x.shape[0],)
        if takes_descriptors(x):
            tiles = (x, rows), (weight, first), (weight, second or first)
            kernel, pixels = _conv, ()
            matrices = [TensorDescriptor.from_tensor(matrix, [side, depth]) for matrix, side in tiles]
        launch(
            kernel, grid, *matrices, bias, added, out, *pixels, frames, height - 2, width - 2,
            N=columns, C=channels, RESIDUAL=residual is not None, BM=rows, BN=first, BN_2=second, BK=depth,
            num_warps=how.warps, num_stages=how.stages, **meta,
        )  # fmt: skip
        return out

    return tuning.run("conv", (columns, channels), x, launched)


def rimmed_conv(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, split: int = 1) -> Tensor:
    """Compute `reference.rimmed_conv` for channels in multiples of 16; copies a weight unless it is channels last."""
    taps_t, taps = weight.shape[2:4]
    batch, time, height, width, _ = x.shape
    shape = batch, (time - taps_t + 1) * split, height, width, weight.shape[0] // split
    matrix = weight.permute(0, 2, 3, 4, 1).reshape(weight.shape[0], -1)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    return _launch(x.contiguous(), matrix, bias, residual, out, TAPS_T=taps_t, TAPS=taps, UP=False, SPLIT=split)


def normed_conv(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, before: Tensor) -> Tensor:
    """Compute `reference.normed_conv`."""
    return rms_norm_silu(rimmed_conv(x, weight, bias), gamma, before)


def phases(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights (N, C, 3, 3) of a convolution after doubling, for the small picture: (4 N, 4 C).

    There are four convolutions of 2×2 taps, one for each of the four new pixels. Two of a row's three taps read the
    same pixel of the small picture, so their weights are added up.
    """
    a, b, c = weight.float().unbind(2)
    rows = torch.stack([torch.stack([a, b + c], 2), torch.stack([a + b, c], 2)])  # (2, N, C, 2, 3)
    a, b, c = rows.unbind(4)
    both = torch.stack([torch.stack([a, b + c], 4), torch.stack([a + b, c], 4)], 1)  # (2, 2, N, C, 2, 2)
    return both.permute(0, 1, 2, 4, 5, 3).reshape(4 * weight.shape[0], -1).to(dtype)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `reference.upsample_conv` as the four convolutions of `phases`."""
    batch, time, height, width, _ = x.shape
    shape = batch, time, 2 * height - 2, 2 * width - 2, weight.shape[0]
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    matrix = phases(weight, x.dtype)
    return _launch(x.contiguous(), matrix, bias, None, out, TAPS_T=1, TAPS=2, UP=True, SPLIT=1)
