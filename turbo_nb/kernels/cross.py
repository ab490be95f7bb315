"""Cross-attention to a padded prompt in Triton: the equal keys of the padding count as one of more weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sparse_linear import LOG2_E, attend

BLOCK_Q = BLOCK_K = 64


@triton.jit
def _cross(
    q, k, v, repeats, out, length, keys, heads, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    q += batch.to(tl.int64) * q_b + head * q_h
    k += batch.to(tl.int64) * k_b + head * k_h
    v += batch.to(tl.int64) * v_b + head * v_h
    rows, columns = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, D)
    queries = tl.load(q + rows[:, None] * q_l + columns, mask=rows[:, None] < length, other=0.0)
    repeated = tl.load(repeats + batch)
    last = keys - 1
    keys -= repeated - 1
    weight = tl.log2(repeated.to(tl.float32))
    result, total = tl.zeros((BLOCK_Q, D), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    largest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    for first in range(0, keys, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K)
        valid = at[:, None] < keys
        # the last one speaks for the padding: 8-bit tiles that it shares with the prompt make the first ones coarser
        source = tl.where(at == keys - 1, last, at)
        key = tl.load(k + source[:, None] * k_l + columns, mask=valid, other=0.0)
        value = tl.load(v + source[:, None] * v_l + columns, mask=valid, other=0.0)
        added = tl.where(at < keys - 1, 0.0, tl.where(at < keys, weight, -float("inf")))
        score = tl.dot(queries, tl.trans(key)) * scale + added[None]
        largest, total, result = attend(score, 1.0, value, largest, total, result)
    at = ((batch.to(tl.int64) * length + rows[:, None]) * heads + head) * D + columns
    tl.store(out + at, (result / total[:, None]).to(out.dtype.element_ty), mask=rows[:, None] < length)


def repeats(text: Tensor) -> Tensor:
    """How many equal rows end each prompt's embedding (B, S, C): (B,) int32, 1 where the last one is unlike the rest"""
    same = (text == text[:, -1:]).all(-1).flip(1)  # (B, S), from the last on
    return same.int().cumprod(1).sum(1).int()


def cross_attention(q: Tensor, k: Tensor, v: Tensor, repeats: Tensor) -> Tensor:
    """`reference.cross_attention`, whose last `repeats` (B,) int32 keys and values are equal: (B, L, H, D)"""
    batch, length, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = (stride for x in (q, k, v) for stride in x.stride()[:3])
    _cross[(triton.cdiv(length, BLOCK_Q), batch * heads)](
        q, k, v, repeats, out, length, k.shape[1], heads, dim**-0.5 * LOG2_E, *strides,
        BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, D=dim, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
