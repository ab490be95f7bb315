"""SLA in Triton: `reference.sparse_linear_attention` in five kernels, without a copy of q, k or v.

    q, k ──► _block_means ──► mean of each block ──► q̄ · k̄ᵀ (torch) ──► _keep_largest ──► kept (B, H, Q_blocks, n)
    k, v ──► _linear_state ──► Σ φ(k)ᵀv, Σ φ(k) of each chunk ──► _project_state: their sum · proj_lᵀ ──► state, norm
    q, k, v, kept, state, norm ──► _sparse_linear ──► out (B, L, H, D)

    kernel          grid                       a program loads                         and stores
    _block_means    blocks, B·H                a block of tokens, or its run sums      one mean (D,)
    _keep_largest   B·H·Q_blocks               a row of scores, 16 bits each           the n best columns, ascending
    _linear_state   chunks, B·H                its chunk of k and v, block by block    a (D, D) and a (D,) sum
    _project_state  D/16, B·H                  16 rows of these sums, and proj_l       16 rows of the state
    _sparse_linear  Q_blocks, B·H (8 warps)    its q, the kept blocks of k and v in    its block of out
                                               pairs, state, norm and the bias

k and v come through tensor descriptors: Hopper's and newer GPUs' copy engine (TMA) reads them. Older GPUs run the same
kernels through `_…_by_pointers` (`ops.launch` has the reason).
A head gets the same bits beside any other heads and clips, because several GPUs have some of the heads each. So the
chunks depend on the length alone, and no kernel of a library, which chooses by the number of heads, adds them up.
The linear branch is the epilogue of `_sparse_linear`. With k in int8 that kernel computes SageSLA (`triton_sage`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import tuning
from ..launch import aligned, channels_inside, launch, takes_descriptors
from ..norms.reference import SUM_TOKENS
from ..parts import Parts
from .reference import Sums, kept_count

LOG2_E = 1.4426950408889634
STATE_CHUNKS = 44  # of k and v: with three heads, one for each multiprocessor of an H100
STATE_ROWS = 16  # of a state that a program projects, the fewest that tensor cores take


@triton.jit
def _block_means(
    x, out, rows, length, heads, stride_b, stride_l, stride_h,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    block, batch, head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    row, columns = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64), tl.arange(0, D)
    x += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    tile = tl.load(x + row[:, None] * stride_l + columns, mask=row[:, None] < rows, other=0.0).to(tl.float32)
    count = tl.minimum(length - block * BLOCK * TOKENS, BLOCK * TOKENS)
    out += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block) * D
    tl.store(out + columns, tl.sum(tile, 0) / count)


@triton.jit
def _keep_largest(score, kept, columns, n, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    bits = tl.load(score + row * columns + at, mask=at < columns, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
    rank = tl.where(bits < 0, bits ^ 0x7FFF, bits)  # integers in the order of the 16-bit floats
    rank = tl.where(at < columns, rank, -32769)
    threshold = -32768  # becomes the largest number that at least n ranks reach, bit by bit
    for bit in range(16):
        higher = threshold + (32768 >> bit)
        threshold = tl.where(tl.sum((rank >= higher).to(tl.int32)) >= n, higher, threshold)
    above, equal = rank > threshold, rank == threshold
    spare = n - tl.sum(above.to(tl.int32))
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32)) <= spare))
    place = tl.cumsum(taken.to(tl.int32)) - 1
    tl.store(kept + row * n + place, at, mask=taken)


@triton.jit
def _softmax(x):
    x = tl.exp(x.to(tl.float32) - tl.max(x.to(tl.float32), 1)[:, None])
    return x * (1 / tl.sum(x, 1))[:, None]


@triton.jit
def _block(x, batch, index, head, BLOCK: tl.constexpr, D: tl.constexpr):
    """Load block `index` of x's descriptor: (BLOCK, D), zeros past the end."""
    return tl.reshape(x.load([batch, index * BLOCK, head, 0]), (BLOCK, D))


@triton.jit
def _linear_state(k, v, state, norm, length, heads, share, BLOCK: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr):
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    columns = tl.arange(0, D)
    total, sums = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    begin = tl.program_id(0) * share
    for index in tl.range(begin, tl.minimum(begin + share, tl.cdiv(length, BLOCK)), num_stages=STAGES):
        phi = _softmax(_block(k, batch, index, head, BLOCK, D))
        phi = tl.where((index * BLOCK + tl.arange(0, BLOCK) < length)[:, None], phi, 0.0).to(v.dtype)
        total = tl.dot(tl.trans(phi), _block(v, batch, index, head, BLOCK, D), total)
        sums += tl.sum(phi.to(tl.float32), 0)
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(state + at * D * D + columns[:, None] * D + columns, total)
    tl.store(norm + at * D + columns, sums)


@triton.jit
def int8(x):
    """Quantise a block x (rows, columns) float32: its int8 numbers, half away from zero, and its scale."""
    scale = tl.div_rn(tl.max(tl.max(tl.abs(x), 1), 0), 127.0) + 1e-7
    x = tl.div_rn(x, tl.zeros_like(x) + scale)
    return (x + tl.where(x < 0, -0.5, 0.5)).to(tl.int8), scale  # the cast truncates


@triton.jit
def attend(score, scale, value, largest, total, result):
    """Add one block of keys to the online softmax, in base 2.

    score (Q, K) and scale: of this block. value (K, D): its values. largest (Q,), total (Q,), result (Q, D): the
    state after the blocks before; returned with this block added.
    """
    following = tl.maximum(largest, tl.max(score, 1) * scale)
    p, shrink = tl.exp2(score * scale - following[:, None]), tl.exp2(largest - following)
    result = tl.dot(p.to(value.dtype), value, result * shrink[:, None])
    return following, total * shrink + tl.sum(p, 1), result


@triton.jit
def _scale(scale, k_scale, block):
    return scale if k_scale is None else scale * tl.load(k_scale + block)


@triton.jit
def _sparse_linear(
    q, k, v, kept, k_scale, state, norm, bias, out, parts, bounds, ranks, pitch, length, heads, n, scale, q_b, q_l, q_h,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    q += batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    kept += (row.to(tl.int64) * tl.num_programs(0) + block) * n
    rows, columns = (block * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64), tl.arange(0, D)
    own = tl.load(q + rows[:, None] * q_l + columns, mask=rows[:, None] < length, other=0.0)
    queries = own
    if k_scale is not None:  # SageSLA: q in int8 too, because k is
        queries, q_scale = int8(own.to(tl.float32))
        scale *= q_scale
        k_scale += row.to(tl.int64) * tl.cdiv(length, BLOCK_K)

    result, total = tl.zeros((BLOCK_Q, D), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    largest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    pairs = (n - 1) // 2 * 2 if PAIRS else 0  # the last kept block alone may be ragged
    for j in range(0, pairs, 2):
        first, second = tl.load(kept + j), tl.load(kept + j + 1)
        score_1 = tl.dot(queries, tl.trans(_block(k, batch, first, head, BLOCK_K, D))).to(tl.float32)
        score_2 = tl.dot(queries, tl.trans(_block(k, batch, second, head, BLOCK_K, D))).to(tl.float32)
        scale_1, scale_2 = _scale(scale, k_scale, first), _scale(scale, k_scale, second)
        following = tl.maximum(largest, tl.maximum(tl.max(score_1, 1) * scale_1, tl.max(score_2, 1) * scale_2))
        p_1 = tl.exp2(score_1 * scale_1 - following[:, None])
        p_2 = tl.exp2(score_2 * scale_2 - following[:, None])
        shrink = tl.exp2(largest - following)
        total = total * shrink + tl.sum(p_1 + p_2, 1)
        result = tl.dot(p_1.to(q.dtype.element_ty), _block(v, batch, first, head, BLOCK_K, D), result * shrink[:, None])
        result = tl.dot(p_2.to(q.dtype.element_ty), _block(v, batch, second, head, BLOCK_K, D), result)
        largest = following
    for j in range(pairs, n):
        index = tl.load(kept + j)
        score = tl.dot(queries, tl.trans(_block(k, batch, index, head, BLOCK_K, D))).to(tl.float32)
        score = tl.where((index * BLOCK_K + tl.arange(0, BLOCK_K) < length)[None], score, -float("inf"))
        value = _block(v, batch, index, head, BLOCK_K, D)
        largest, total, result = attend(score, _scale(scale, k_scale, index), value, largest, total, result)
    result = result / total[:, None]

    if PAIRS:
        phi = _softmax(own).to(own.dtype)
        summed = tl.load(norm + row * D + columns)
        share = 1e-5 + tl.sum(phi.to(tl.float32) * summed[None], 1)
        projected = tl.load(state + row.to(tl.int64) * D * D + columns[:, None] * D + columns)
        linear = tl.dot(phi, projected)
    else:  # a half of the channels at a time, which takes half of the shared memory
        top = tl.max(own.to(tl.float32), 1)
        factor = 1 / tl.sum(tl.exp(own.to(tl.float32) - top[:, None]), 1)
        share, linear = tl.zeros((BLOCK_Q,), tl.float32) + 1e-5, tl.zeros((BLOCK_Q, D), tl.float32)
        for part in tl.static_range(2):
            half = part * (D // 2) + tl.arange(0, D // 2)
            some = tl.load(q + rows[:, None] * q_l + half, mask=rows[:, None] < length, other=0.0)
            phi = (tl.exp(some.to(tl.float32) - top[:, None]) * factor[:, None]).to(own.dtype)
            share += tl.sum(phi.to(tl.float32) * tl.load(norm + row * D + half)[None], 1)
            projected = tl.load(state + row.to(tl.int64) * D * D + half[:, None] * D + columns)
            linear = tl.dot(phi, projected, linear)
    result += linear / share[:, None] + tl.load(bias + columns).to(tl.float32)[None]
    result = result.to(out.dtype.element_ty)
    if parts is None:
        at = ((batch * length + rows[:, None]) * heads + head) * D + columns
        tl.store(out + at, result, mask=rows[:, None] < length)
    else:
        for rank in range(ranks):
            begin, end = tl.load(bounds + rank), tl.load(bounds + rank + 1)
            to = tl.multiple_of(tl.load(parts + batch * ranks + rank).to(out.dtype), 16)
            at = (rows - begin)[:, None] * pitch + head * D + columns
            tl.store(to + at, result, mask=((rows >= begin) & (rows < end))[:, None])


@triton.jit
def _blocks(x, batches, length, heads, x_b, x_l, x_h, BLOCK: tl.constexpr, D: tl.constexpr):
    """Make the descriptor that `_block` reads"""
    return tl.make_tensor_descriptor(x, [batches, length, heads, D], [x_b, x_l, x_h, 1], [1, BLOCK, 1, D])


@triton.jit
def _project_state(state, norm, weight, out, total, chunks, D: tl.constexpr, ROWS: tl.constexpr):
    heads, head = tl.num_programs(1), tl.program_id(1).to(tl.int64)
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, D)
    summed, norms = tl.zeros((ROWS, D), tl.float32), tl.zeros((D,), tl.float32)
    for chunk in tl.range(chunks, num_stages=4):
        at = chunk * heads + head
        summed += tl.load(state + at * D * D + rows * D + columns)
        norms += tl.load(norm + at * D + columns)
    weights = tl.load(weight + columns[:, None] * D + columns).to(tl.float32)
    projected = tl.dot(summed, tl.trans(weights), input_precision="tf32x3")
    tl.store(out + head * D * D + rows * D + columns, projected.to(out.dtype.element_ty))
    if tl.program_id(0) == 0:
        tl.store(total + head * D + columns, norms)


@triton.jit
def _linear_state_by_pointers(
    k, v, state, norm, length, heads, share, batches, k_b, k_l, k_h, v_b, v_l, v_h,
    BLOCK: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    k = _blocks(k, batches, length, heads, k_b, k_l, k_h, BLOCK, D)
    v = _blocks(v, batches, length, heads, v_b, v_l, v_h, BLOCK, D)
    _linear_state(k, v, state, norm, length, heads, share, BLOCK, D, STAGES)


@triton.jit
def _sparse_linear_by_pointers(
    q, k, v, kept, k_scale, state, norm, bias, out, parts, bounds, ranks, pitch, length, heads, n, scale, q_b, q_l, q_h,
    batches, k_b, k_l, k_h, v_b, v_l, v_h,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    k = _blocks(k, batches, length, heads, k_b, k_l, k_h, BLOCK_K, D)
    v = _blocks(v, batches, length, heads, v_b, v_l, v_h, BLOCK_K, D)
    _sparse_linear(
        q, k, v, kept, k_scale, state, norm, bias, out, parts, bounds, ranks, pitch, length, heads, n, scale,
        q_b, q_l, q_h, BLOCK_Q, BLOCK_K, D, PAIRS,
    )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _with_blocks(by_descriptors, by_pointers, k: Tensor, v: Tensor, block: int) -> tuple:
    """Return the kernel for k's GPU, and its arguments for blocks of k and v: k, v and the last ones"""
    k, v = aligned(k), aligned(v)
    if not takes_descriptors(k):
        return by_pointers, (k, v, k.shape[0], *_strides(k), *_strides(v))
    return by_descriptors, [TensorDescriptor.from_tensor(x, [1, block, 1, x.shape[-1]]) for x in (k, v)]


def block_means(x: Tensor, block: int, sums: Tensor | None = None) -> Tensor:
    """Compute `reference.block_means`: (B, L, H, D) → (B, H, ⌈L/block⌉, D) float32.

    sums: of x over runs of tokens, as `norms.reference.rms_norm_rope` returns them; None: pool x itself.
    """
    batch, length, heads, dim = x.shape
    out = torch.empty(batch, heads, triton.cdiv(length, block), dim, device=x.device)
    tokens, x = (1, channels_inside(x)) if sums is None else (SUM_TOKENS, channels_inside(sums))
    launch(
        _block_means, (out.shape[2], batch * heads), x, out, x.shape[1], length, heads, *_strides(x),
        BLOCK=block // tokens, TOKENS=tokens, D=dim,
    )  # fmt: skip
    return out


def sequence_mean(means: Tensor, length: int, block: int) -> Tensor:
    """Return the mean of all tokens, from `block_means`: (B, H, 1, D) float32."""
    missing = means.shape[2] * block - length  # tokens that the last block lacks
    return (means.sum(2, keepdim=True) * block).sub_(means[:, :, -1:], alpha=missing).div_(length)


def kept_blocks(
    q: Tensor, k: Tensor, topk: float, block_q: int, block_k: int, sums: Sums = (None, None),
    means: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return the blocks that `reference.block_map` keeps, as ascending indices: (B, H, Q_blocks, n) int32.

    sums: of q and k over runs of tokens. means: `block_means` of k and their `sequence_mean`, None to compute them.
    """
    if means is None:
        means = block_means(k, block_k, sums[1])
        means = means, sequence_mean(means, k.shape[1], block_k)
    pooled_k = (means[0] - means[1]).to(k.dtype)
    return keep_largest(block_means(q, block_q, sums[0]).to(q.dtype) @ pooled_k.transpose(-1, -2), topk)


def keep_largest(score: Tensor, topk: float) -> Tensor:
    """Return the columns of the best share of each row, ascending: bf16 or fp16 (B, H, Q_blocks, K_blocks) → int32."""
    columns = score.shape[-1]
    n = kept_count(topk, columns)
    kept = torch.empty(*score.shape[:-1], n, dtype=torch.int32, device=score.device)
    block = triton.next_power_of_2(columns)
    launch(
        _keep_largest, (kept[..., 0].numel(),), score.contiguous(), kept, columns, n,
        BLOCK=block, num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip
    return kept


def linear_state(k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σφ(k)ᵀv · weightᵀ (B·H, D, D) in v's dtype and Σφ(k) (B·H, D) float32, over the sequence."""
    batch, length, heads, dim = k.shape

    def launched(how: tuning.Launch) -> tuple[Tensor, Tensor]:
        block = how.tile[0]
        blocks = triton.cdiv(length, block)
        share = triton.cdiv(blocks, STATE_CHUNKS)
        grid = triton.cdiv(blocks, share), batch * heads
        states = torch.empty(*grid, dim, dim, device=k.device)
        norms = torch.empty(*grid, dim, device=k.device)
        kernel, (keys, values, *more) = _with_blocks(_linear_state, _linear_state_by_pointers, k, v, block)
        launch(
            kernel, grid, keys, values, states, norms, length, heads, share, *more,
            BLOCK=block, D=dim, STAGES=how.stages, num_warps=how.warps,
        )  # fmt: skip
        state, norm = torch.empty_like(states[0], dtype=v.dtype), torch.empty_like(norms[0])
        launch(
            _project_state, (dim // STATE_ROWS, batch * heads), states, norms, weight, state, norm, grid[0],
            D=dim, ROWS=STATE_ROWS, num_warps=8,
        )  # fmt: skip
        return state, norm

    weight = weight.contiguous()
    return tuning.run("linear_state", (dim,), k, launched)


def sparse_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk: float, block_q: int, block_k: int,
    sums: Sums = (None, None), to: Parts | None = None,
) -> Tensor | None:  # fmt: skip
    """Compute `reference.sparse_linear_attention` for bf16 or fp16 and head_dim 64 or 128: (B, L, H, D) contiguous.

    to: write the result there, and return None.
    """
    kept = kept_blocks(q, k, topk, block_q, block_k, sums)
    state, norm = linear_state(k, v, weight)
    return sparse_linear(q, k, v, kept, state, norm, bias, block_q, block_k, to=to)


def sparse_linear(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, state: Tensor, norm: Tensor, bias: Tensor,
    block_q: int, block_k: int, k_scale: Tensor | None = None, to: Parts | None = None,
) -> Tensor | None:  # fmt: skip
    """Run the last kernel.

    Args:
        q, k, v: (B, L, H, D).
        kept: from `kept_blocks`.
        state, norm: from `linear_state`.
        bias: of `proj_l`, (D,).
        block_q, block_k: tokens of a query block and of a key block.
        k_scale: (B, H, K_blocks) float32, the scales of a k in int8: the result is SageSLA. None: k is not in int8.
        to: where the result goes. None: into a new tensor.

    Returns:
        (B, L, H, D) contiguous, in q's dtype; None with `to`.
    """
    batch, length, heads, dim = q.shape
    q = channels_inside(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if to is None else q  # of the parts' type
    parts = (None, None, 0, 0) if to is None else (to.addresses, to.bounds, to.ranks, to.pitch)
    kernel, (k, v, *more) = _with_blocks(_sparse_linear, _sparse_linear_by_pointers, k, v, block_k)
    bias = bias.contiguous()

    def launched(how: tuning.Launch) -> Tensor:
        launch(
            kernel, (kept.shape[2], batch * heads), q, k, v, kept, k_scale, state, norm, bias,
            out, *parts, length, heads, kept.shape[3], dim**-0.5 * LOG2_E, *_strides(q), *more,
            BLOCK_Q=block_q, BLOCK_K=block_k, D=dim, PAIRS=how.tile[0] == 2,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        return out if to is None else None

    return tuning.run("sla" if k_scale is None else "sagesla", (dim, block_q, block_k), q, launched)
