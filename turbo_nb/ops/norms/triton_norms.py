"""The norms of a Wan block in Triton, each in one pass over its tokens, with the operations before and after it.

    kernel          grid           a program loads                             and stores
    _gated_norm     ⌈L/8⌉, B       gate, scale and shift once; 8 rows of x     y, and LayerNorm(y) · scale + shift in
                                   and branch, each row ahead of its use       16 bits, or in int8 with its scale
    _rms_norm_rope  ⌈L/16⌉, B      the weight once; 16 rows of x, and of cos   16 rows of out; the sum of these rows
                                   and sin, each row ahead of its use

Both are bound by memory: every tensor is read once and written once. Where several GPUs share a step, `_rms_norm_rope`
writes each GPU's heads into the memory of that GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..linear8.reference import QuantizedRows
from ..linear8.triton_rows import rounded, row_scale
from ..parts import Parts
from .reference import SUM_TOKENS

ROWS = 8  # of a program, which share one load of gate, scale and shift


@triton.jit
def _gated_norm(
    x, branch, gate, scale, shift, summed, out, out_scale, length, width, eps,
    BRANCH: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, columns = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < width
    if GATE:
        factor = tl.load(gate + batch * width + columns, mask=inside, other=0.0)
    if NORM:
        stretch = tl.load(scale + batch * width + columns, mask=inside, other=0.0)
        added = tl.load(shift + batch * width + columns, mask=inside, other=0.0)
    first = tl.program_id(0) * ROWS
    last = tl.minimum(first + ROWS, length) - 1
    at = (batch * length + first) * width + columns
    coming = tl.load(x + at, mask=inside, other=0.0)
    if BRANCH:
        coming_branch = tl.load(branch + at, mask=inside, other=0.0)
    for row in range(first, last + 1):
        at = (batch * length + row) * width + columns
        following = (batch * length + tl.minimum(row + 1, last)) * width + columns
        value = coming.to(tl.float32)
        coming = tl.load(x + following, mask=inside, other=0.0)
        if BRANCH:
            more = coming_branch.to(tl.float32)
            coming_branch = tl.load(branch + following, mask=inside, other=0.0)
            if GATE:
                more *= factor
            value = (value + more).to(summed.dtype.element_ty)
            tl.store(summed + at, value, mask=inside)
            value = value.to(tl.float32)
        if NORM:
            centred = tl.where(inside, value - tl.sum(value) / width, 0.0)
            normed = centred * tl.rsqrt(tl.sum(centred * centred) / width + eps) * stretch + added
            if QUANTIZE:
                its_scale = row_scale(tl.max(tl.where(inside, tl.abs(normed), 0.0), 0))
                normed = rounded(normed, its_scale)
                tl.store(out_scale + batch * length + row, its_scale)
            tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_rope(
    x, weight, cos, sin, out, sums, parts, sum_parts, length, width, eps, table_l, table_c,
    HALF: tl.constexpr, ROTATE: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    RANKS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    batch, columns = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < width
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0) * ROWS
    last = tl.minimum(first + ROWS, length) - 1
    coming = tl.load(x + (batch * length + first) * width + columns, mask=inside, other=0.0)
    turn = (tl.arange(0, BLOCK // 2) % HALF) * table_c
    if ROTATE:
        place = first.to(tl.int64) * table_l
        coming_c, coming_s = tl.load(cos + place + turn), tl.load(sin + place + turn)
    for row in range(first, last + 1):
        at = (batch * length + row) * width + columns
        following = tl.minimum(row + 1, last)
        value = coming.to(tl.float32)
        coming = tl.load(x + (batch * length + following) * width + columns, mask=inside, other=0.0)
        value *= tl.rsqrt(tl.sum(value * value) / width + eps) * factor
        if ROTATE:
            c, s = coming_c.to(tl.float32), coming_s.to(tl.float32)
            place = following.to(tl.int64) * table_l
            coming_c, coming_s = tl.load(cos + place + turn), tl.load(sin + place + turn)
            a, b = tl.split(tl.reshape(value, (BLOCK // 2, 2)))
            value = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (BLOCK,))
        rounded = value.to(out.dtype.element_ty)
        if parts is None:
            tl.store(out + at, rounded, mask=inside)
        else:
            _store(out, parts, row, rounded, RANKS, PART)
        total += rounded.to(tl.float32)
    if SUMS:
        if parts is None:
            tl.store(sums + (batch * tl.num_programs(0) + tl.program_id(0)) * width + columns, total, mask=inside)
        else:
            _store(sums, sum_parts, tl.program_id(0), total, RANKS, PART)


@triton.jit
def _store(like, parts, row, value, RANKS: tl.constexpr, PART: tl.constexpr):
    """Store a row: PART columns into each rank's part. `like` has the type of a pointer to a part."""
    columns = tl.arange(0, value.shape[0])
    for rank in tl.static_range(RANKS):
        address = tl.load(parts + tl.program_id(1) * RANKS + rank)
        to = tl.multiple_of(address.to(like.dtype), 16) + tl.cast(row, tl.int64) * PART
        within = columns - rank * PART
        tl.store(to + within, value, mask=(within >= 0) & (within < PART))


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def gated_norm(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    eps: float = 1e-6, quantize: bool = False,
) -> tuple[Tensor, Tensor | QuantizedRows | None]:  # fmt: skip
    """Compute `reference.gated_norm`."""
    batch, length, width = x.shape
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    gate, scale, shift = (
        None if t is None else t.float().expand(batch, width).contiguous() for t in (gate, scale, shift)
    )
    summed = x if branch is None else torch.empty_like(x)
    out = None if scale is None else torch.empty_like(x, dtype=torch.int8 if quantize else x.dtype)
    out_scale = torch.empty(batch, length, device=x.device) if quantize else None
    block = triton.next_power_of_2(width)
    launch(
        _gated_norm, (triton.cdiv(length, ROWS), batch), x, branch, gate, scale, shift, summed, out,
        out_scale, length, width, eps,
        BRANCH=branch is not None, GATE=gate is not None, NORM=out is not None, QUANTIZE=quantize,
        ROWS=ROWS, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return summed, QuantizedRows(out, out_scale, x.dtype) if quantize else out


def rms_norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float = 1e-6,
    sums: bool = False, to: tuple[Parts, Parts | None] | None = None,
) -> Tensor | tuple[Tensor, Tensor] | None:  # fmt: skip
    """Compute `reference.rms_norm_rope`. to: write the result and its sums there, and return None."""
    batch, length, width = x.shape
    x, weight = x.contiguous(), weight.contiguous()
    if cos is not None and cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    runs = triton.cdiv(length, SUM_TOKENS)
    out = torch.empty_like(x) if to is None else x  # of the parts' type
    summed = torch.empty(batch if to is None else 0, runs, width, device=x.device) if sums else None
    ranks, addresses = (1, (None, None)) if to is None else (to[0].ranks, [x and x.addresses for x in to])
    block = triton.next_power_of_2(width)
    strides = (0, 0) if cos is None else cos.stride()
    launch(
        _rms_norm_rope, (runs, batch), x, weight, cos, sin, out, summed, *addresses, length, width, eps, *strides,
        HALF=width // heads // 2, ROTATE=cos is not None, SUMS=sums, ROWS=SUM_TOKENS,
        BLOCK=block, RANKS=ranks, PART=width // ranks, num_warps=_warps(block),
    )  # fmt: skip
    if to is not None:
        return None
    out = out.unflatten(2, (heads, -1))
    return (out, summed.unflatten(2, (heads, -1))) if sums else out
