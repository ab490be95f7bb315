"""The last kernel of SLA and SageSLA for Hopper, in Gluon; the kernels before it are those of `triton_sla`.

One program per multiprocessor. It computes tile after tile, a tile being 128 query rows of one head:

    warp 8: producer, `_fetch`                 warps 0-3 and 4-7: consumers, `_attend`, 64 query rows each
    ──────────────────────────────             ───────────────────────────────────────────────────────────
    q of the tile                 ── TMA ──►   load q into registers; SageSLA: round it to int8, one scale per 64 rows
    for each pair of kept blocks:              for each pair j of kept key blocks:
      k of the pair               ── TMA ──►     start S(j) = q · k(j)ᵀ
      v of the pair               ── TMA ──►     start out += P(j-1) · v(j-1), which overlaps with the
                                                 online softmax P(j) = exp2(S(j) - max)
    state of the head, (128, 128) ── TMA ──►   out += P(last) · v(last); out += φ(q) · state; write out

    barrier           the consumers wait until            the producer waits until
    q_ready[slot]     both halves of q have arrived
    k_ready[stage]    both blocks of k have arrived
    v_ready[stage]    both blocks of v have arrived
    s_ready           the state has arrived
    q_free[slot]                                          both consumers have read q
    k_free[stage]                                         both consumers have finished S(j)
    v_free[stage]                                         both consumers have finished P(j) · v(j)
    s_free                                                both consumers have finished φ(q) · state

The copy engine arrives at a `ready` barrier when its bytes are there, so its count is 1. Each consumer arrives at a
`free` barrier once, so its count is 2. A barrier's phase changes with every use: n-th use of a stage, phase n & 1.

    registers per thread   240 for a consumer, 24 for the producer
    shared memory          q 32 KiB (SageSLA reads q twice: 2 slots, 64), k 64 (int8: 32), v 64, state 32: 192 KiB

Products are asynchronous: the tensor cores compute P(j-1) · v(j-1) during the softmax of pair j (FlashAttention-3,
arXiv:2407.08608). Both branches share one accumulator, because registers are scarce.
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

from ..hopper_tools import init_barriers, load, multiprocessors, own_tiles
from ..launch import aligned, launch
from ..parts import Parts
from . import triton_sage, triton_sla
from .reference import Sums

BLOCKS = (128, 64, 128)  # block_q, block_k and head_dim of this kernel
ROWS = gl.constexpr(64)  # query rows of a consumer, and keys of a block
DIM = gl.constexpr(128)  # head_dim
STAGES = gl.constexpr(2)  # pairs of blocks in shared memory
STATE_BYTES = gl.constexpr(128 * 128 * 2)


@gluon.jit
def _fetch_pair(x, first, second, column, buffer, ready, stage):
    mbarrier.expect(ready.index(stage), 2 * ROWS * DIM * x.dtype.primitive_bitwidth // 8)
    load(x, [first, column], ready.index(stage), buffer.index(2 * stage))
    load(x, [second, column], ready.index(stage), buffer.index(2 * stage + 1))


@gluon.jit
def _fetch(queries, keys, values, states, all_kept, blocks, heads, n, buffers, ready, free, WIDE: gl.constexpr):
    offset: gl.constexpr = gl.int64 if WIDE else gl.int32
    q_buffer, k_buffer, v_buffer, s_buffer = buffers
    q_ready, k_ready, v_ready, s_ready = ready
    q_free, k_free, v_free, s_free = free
    Q_STAGES: gl.constexpr = q_buffer.shape[0] // 2
    pairs = (n + 1) // 2
    for done in range(own_tiles(blocks * heads)):
        tile = gl.program_id(0) + done * gl.num_programs(0)
        block, head = tile % blocks, tile // blocks
        kept = all_kept + tile.to(offset) * n
        slot, phase = done % Q_STAGES, (done // Q_STAGES + 1) & 1
        mbarrier.wait(q_free.index(slot), phase)
        _fetch_pair(queries, block * 2 * ROWS, block * 2 * ROWS + ROWS, head * DIM, q_buffer, q_ready, slot)
        for j in range(pairs):
            at = done * pairs + j
            stage, phase = at % STAGES, (at // STAGES + 1) & 1
            first = gl.load(kept + 2 * j) * ROWS
            second = gl.load(kept + gl.minimum(2 * j + 1, n - 1)) * ROWS
            mbarrier.wait(k_free.index(stage), phase)
            _fetch_pair(keys, first, second, head * DIM, k_buffer, k_ready, stage)
            mbarrier.wait(v_free.index(stage), phase)
            _fetch_pair(values, first, second, head * DIM, v_buffer, v_ready, stage)
        mbarrier.wait(s_free, (done + 1) & 1)
        mbarrier.expect(s_ready, STATE_BYTES)
        load(states, [head * DIM, 0], s_ready, s_buffer)


@gluon.jit
def _scores(queries, k_buffer, k_ready, j, layout: gl.constexpr):
    """Start the products with pair j of key blocks; `warpgroup_mma_wait` gives them."""
    mbarrier.wait(k_ready.index(j % STAGES), (j // STAGES) & 1)
    nothing = gl.zeros([ROWS, ROWS], gl.int32 if queries.dtype == gl.int8 else gl.float32, layout)
    first, second = k_buffer.index(2 * (j % STAGES)), k_buffer.index(2 * (j % STAGES) + 1)
    score_1 = warpgroup_mma(queries, first.permute((1, 0)), nothing, use_acc=False, is_async=True)
    score_2 = warpgroup_mma(queries, second.permute((1, 0)), nothing, use_acc=False, is_async=True)
    return score_1, score_2


@gluon.jit
def _weighted(p_1, p_2, v_buffer, v_ready, j, result, use_acc):
    """Start result + the products with pair j of value blocks."""
    mbarrier.wait(v_ready.index(j % STAGES), (j // STAGES) & 1)
    result = warpgroup_mma(p_1, v_buffer.index(2 * (j % STAGES)), result, use_acc=use_acc, is_async=True)
    return warpgroup_mma(p_2, v_buffer.index(2 * (j % STAGES) + 1), result, is_async=True)


@gluon.jit
def _scales(scale, factors, j, n, SAGE: gl.constexpr):
    """Return the scales of the scores of pair j, in units of log₂."""
    if not SAGE:
        return scale, scale
    return scale * gl.load(factors + 2 * j), scale * gl.load(factors + gl.minimum(2 * j + 1, n - 1))


@gluon.jit
def _softmax(score_1, score_2, largest, total, scale_1, scale_2, kept, j, n, length):
    """Compute one step of the online softmax, in units of log₂."""
    score_1, score_2 = score_1.to(gl.float32), score_2.to(gl.float32)
    if 2 * j + 2 >= n:  # the last block may be ragged, and the last pair may lack its second block
        within = gl.arange(0, ROWS, gl.SliceLayout(0, score_1.type.layout))
        end_1 = length - gl.load(kept + 2 * j) * ROWS
        end_2 = gl.where(2 * j + 1 < n, length - gl.load(kept + n - 1) * ROWS, 0)
        score_1 = gl.where((within < end_1)[None, :], score_1, -float("inf"))
        score_2 = gl.where((within < end_2)[None, :], score_2, -float("inf"))
    following = gl.maximum(largest, gl.maximum(gl.max(score_1, 1) * scale_1, gl.max(score_2, 1) * scale_2))
    p_1 = gl.exp2(score_1 * scale_1 - following[:, None])
    p_2 = gl.exp2(score_2 * scale_2 - following[:, None])
    shrink = gl.exp2(largest - following)
    return p_1, p_2, following, total * shrink + gl.sum(p_1 + p_2, 1), shrink


@gluon.jit
def _attend(group, operands, sizes, whole_scale, buffers, ready, free, WIDE: gl.constexpr, RANKS: gl.constexpr):
    offset: gl.constexpr = gl.int64 if WIDE else gl.int32
    all_kept, all_factors, norm, bias, out, parts, bounds = operands
    blocks, heads, length, n, out_stride = sizes
    q_buffer, k_buffer, v_buffer, s_buffer = buffers
    SAGE: gl.constexpr = k_buffer.dtype == gl.int8
    Q_STAGES: gl.constexpr = q_buffer.shape[0] // 2
    depth: gl.constexpr = 32 if SAGE else 16
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, depth])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    weight: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    query: gl.constexpr = gl.DotOperandLayout(0, score_layout, depth // 8)
    score_row: gl.constexpr = gl.SliceLayout(1, score_layout)
    row: gl.constexpr = gl.SliceLayout(1, layout)
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    q_ready, k_ready, v_ready, s_ready = ready
    q_free, k_free, v_free, s_free = free
    dtype: gl.constexpr = q_buffer.dtype
    pairs = (n + 1) // 2
    columns = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    for done in range(own_tiles(blocks * heads)):
        tile, at = gl.program_id(0) + done * gl.num_programs(0), done * pairs
        block, head = tile % blocks, tile // blocks
        kept = all_kept + tile.to(offset) * n
        slot = done % Q_STAGES
        mbarrier.wait(q_ready.index(slot), (done // Q_STAGES) & 1)
        own = q_buffer.index(2 * slot + group)
        scale, factors = whole_scale, all_factors
        if not SAGE:
            queries = own.load(query)
            mbarrier.arrive(q_free.index(slot))
        else:  # the rows of this consumer in int8, half away from zero
            wide = own.load(layout).to(gl.float32)
            q_scale = gl.max(gl.max(gl.abs(wide), 1), 0) / 127 + 1e-7
            wide = wide * (1 / q_scale) + gl.where(wide < 0, -0.5, 0.5)
            queries, scale = gl.convert_layout(wide.to(gl.int8), query), scale * q_scale
            factors += tile.to(offset) * n
        largest = gl.full([ROWS], -float("inf"), gl.float32, score_row)
        total = gl.zeros([ROWS], gl.float32, score_row)
        result = gl.zeros([ROWS, DIM], gl.float32, layout)

        score_1, score_2 = _scores(queries, k_buffer, k_ready, at, score_layout)
        score_1, score_2 = warpgroup_mma_wait(0, deps=[score_1, score_2])
        mbarrier.arrive(k_free.index(at % STAGES))
        scale_1, scale_2 = _scales(scale, factors, 0, n, SAGE)
        score_1, score_2, largest, total, shrink = _softmax(
            score_1, score_2, largest, total, scale_1, scale_2, kept, 0, n, length
        )
        p_1, p_2 = gl.convert_layout(score_1.to(dtype), weight), gl.convert_layout(score_2.to(dtype), weight)
        for j in range(1, pairs):
            score_1, score_2 = _scores(queries, k_buffer, k_ready, at + j, score_layout)
            result = _weighted(p_1, p_2, v_buffer, v_ready, at + j - 1, result, j > 1)
            scale_1, scale_2 = _scales(scale, factors, j, n, SAGE)
            score_1, score_2 = warpgroup_mma_wait(2, deps=[score_1, score_2])
            mbarrier.arrive(k_free.index((at + j) % STAGES))
            score_1, score_2, largest, total, shrink = _softmax(
                score_1, score_2, largest, total, scale_1, scale_2, kept, j, n, length
            )
            result, p_1, p_2 = warpgroup_mma_wait(0, deps=[result, p_1, p_2])
            mbarrier.arrive(v_free.index((at + j - 1) % STAGES))
            result *= gl.convert_layout(shrink, row)[:, None]
            p_1, p_2 = gl.convert_layout(score_1.to(dtype), weight), gl.convert_layout(score_2.to(dtype), weight)
        result = _weighted(p_1, p_2, v_buffer, v_ready, at + pairs - 1, result, pairs > 1)

        if SAGE:  # loaded here, because registers are scarce before
            phi = own.load(layout).to(gl.float32)
            mbarrier.arrive(q_free.index(slot))
        else:
            phi = gl.convert_layout(queries, layout).to(gl.float32)
        phi = gl.exp(phi - gl.max(phi, 1)[:, None])
        phi = (phi * (1 / gl.sum(phi, 1))[:, None]).to(dtype)
        share = 1e-5 + gl.sum(phi.to(gl.float32) * gl.load(norm + head * DIM + columns)[None, :], 1)
        phi = gl.convert_layout(phi, weight)
        result, p_1, p_2 = warpgroup_mma_wait(0, deps=[result, p_1, p_2])
        mbarrier.arrive(v_free.index((at + pairs - 1) % STAGES))
        # one accumulator for both branches, so both are scaled by `share` and divided at the end
        result *= (share / gl.convert_layout(total, row))[:, None]
        mbarrier.wait(s_ready, done & 1)
        result = warpgroup_mma(phi, s_buffer, result, is_async=True)
        result, phi = warpgroup_mma_wait(0, deps=[result, phi])
        mbarrier.arrive(s_free)
        result = result * (1 / share)[:, None] + gl.load(bias + columns).to(gl.float32)[None, :]
        result = gl.convert_layout(result.to(dtype), stored)
        rows = ((block * 2 + group) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, stored))).to(offset)
        within = (head * DIM + gl.arange(0, DIM, gl.SliceLayout(0, stored)))[None, :]
        if RANKS == 0:
            gl.store(out + rows[:, None] * out_stride + within, result, mask=(rows < length)[:, None])
        else:
            for rank in range(RANKS):
                begin, end = gl.load(bounds + rank).to(offset), gl.load(bounds + rank + 1).to(offset)
                to = gl.multiple_of(gl.load(parts + rank).to(out.dtype), 16)
                inside = (rows >= begin) & (rows < end)
                gl.store(to + (rows - begin)[:, None] * out_stride + within, result, mask=inside[:, None])


@gluon.jit
def _sparse_linear(
    queries, keys, values, states, kept, factors, norm, bias, out, parts, bounds, blocks, heads, length, n, scale,
    out_stride, WIDE: gl.constexpr, RANKS: gl.constexpr,
):  # fmt: skip
    Q_STAGES: gl.constexpr = 2 if keys.dtype == gl.int8 else 1
    q_buffer = gl.allocate_shared_memory(queries.dtype, [2 * Q_STAGES, ROWS, DIM], queries.layout)
    k_buffer = gl.allocate_shared_memory(keys.dtype, [2 * STAGES, ROWS, DIM], keys.layout)
    v_buffer = gl.allocate_shared_memory(values.dtype, [2 * STAGES, ROWS, DIM], values.layout)
    s_buffer = gl.allocate_shared_memory(states.dtype, [DIM, DIM], states.layout)
    buffers = (q_buffer, k_buffer, v_buffer, s_buffer)
    ready = (init_barriers(STAGES, 1), init_barriers(STAGES, 1), init_barriers(STAGES, 1), init_barriers(1, 1).index(0))
    free = (init_barriers(STAGES, 2), init_barriers(STAGES, 2), init_barriers(STAGES, 2), init_barriers(1, 2).index(0))
    fence_async_shared()
    operands, sizes = (kept, factors, norm, bias, out, parts, bounds), (blocks, heads, length, n, out_stride)
    gl.warp_specialize(
        [
            (_attend, (0, operands, sizes, scale, buffers, ready, free, WIDE, RANKS)),
            (_attend, (1, operands, sizes, scale, buffers, ready, free, WIDE, RANKS)),
            (_fetch, (queries, keys, values, states, kept, blocks, heads, n, buffers, ready, free, WIDE)),
        ],
        [4, 1],
        [240, 24],
    )


LAYOUT = gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16)  # the same for fp16 and for the state
LAYOUT_INT8 = gl.NVMMASharedLayout.get_default_for([64, 128], gl.int8)


def sparse_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk: float, block_q: int, block_k: int,
    sums: Sums = (None, None), to: Parts | None = None,
) -> Tensor | None:  # fmt: skip
    """Compute `triton_sla.sparse_linear_attention`, by that function where `BLOCKS` differ."""
    if (block_q, block_k, q.shape[-1]) != BLOCKS:
        return triton_sla.sparse_linear_attention(q, k, v, weight, bias, topk, block_q, block_k, sums, to)
    kept = triton_sla.kept_blocks(q, k, topk, block_q, block_k, sums)
    return sparse_linear(q, k, v, kept, *triton_sla.linear_state(k, v, weight), bias, to=to)


def sage_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk: float, block_q: int, block_k: int,
    sums: Sums = (None, None), to: Parts | None = None,
) -> Tensor | None:  # fmt: skip
    """Compute `triton_sage.sage_linear_attention` with a scale for every 64 rows of q.

    Calls that function where `BLOCKS` differ.
    """
    if (block_q, block_k, q.shape[-1]) != BLOCKS:
        return triton_sage.sage_linear_attention(q, k, v, weight, bias, topk, block_q, block_k, sums, to)
    kept, state, norm, k8, scale = triton_sage.prepare(q, k, v, weight, topk, block_q, block_k, sums)
    return sparse_linear(q, k8, v, kept, state, norm, bias, scale, to)


def sparse_linear(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, state: Tensor, norm: Tensor, bias: Tensor,
    k_scale: Tensor | None = None, to: Parts | None = None,
) -> Tensor | None:  # fmt: skip
    """Run the kernel.

    Args:
        q, k, v: (B, L, H, 128); views are copied unless one head's channels follow the other's.
        kept: (B, H, ⌈L/128⌉, n) int32, the kept blocks of 64 keys.
        state: (B·H, 128, 128), norm: (B·H, 128), from `triton_sla.linear_state`.
        bias: of `proj_l`, (128,).
        k_scale: (B, H, K_blocks) float32, the scales of a k in int8: the result is SageSLA. None: k is not in int8.
        to: where the result goes. None: into a new tensor.

    Returns:
        (B, L, H, 128) contiguous, in q's dtype; None with `to`.
    """
    batch, length, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if to is None else q  # of the parts' type
    pitch = heads * dim if to is None else to.pitch
    blocks, bias = kept.shape[2], bias.contiguous()
    factors = norm  # a placeholder, because SLA reads no factors
    if k_scale is not None:
        factors = k_scale.gather(2, kept.flatten(2).long()).view(kept.shape)
    programs = min(blocks * heads, multiprocessors(q.device))
    # only long clips get int64 offsets, because they cost a seventh of this kernel's time (H100, 1.3B at 480p)
    wide = max(length * pitch, kept[0].numel()) >= 2**31
    for b in range(batch):
        of_head = slice(b * heads, (b + 1) * heads)
        queries, keys, values = (
            TensorDescriptor.from_tensor(aligned(x[b].flatten(1)), [64, dim], layout)
            for x, layout in ((q, LAYOUT), (k, LAYOUT if k_scale is None else LAYOUT_INT8), (v, LAYOUT))
        )
        states = TensorDescriptor.from_tensor(state[of_head].flatten(0, 1), [dim, dim], LAYOUT)
        launch(
            _sparse_linear, (programs,), queries, keys, values, states, kept[b], factors[b], norm[of_head], bias,
            out[b], *((out, out) if to is None else (to.addresses[b], to.bounds)), blocks, heads, length, kept.shape[3],
            dim**-0.5 * triton_sla.LOG2_E, pitch, WIDE=wide, RANKS=0 if to is None else to.ranks, num_warps=4,
        )  # fmt: skip
    return out if to is None else None
