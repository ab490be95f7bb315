"""SageSLA in Triton: sparse-linear attention whose q · kᵀ is a product of int8 (SageAttention2, arXiv:2411.10958).

k less its mean over the sequence is made int8 in one pass; q is, block by block, in the kernel that attends. Its
integers are exact in int32, the softmax and the linear branch are those of `sparse_linear`. The product with v is in
v's own 16 bits on every GPU: e4m3 there is what most of SageSLA's error comes from.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_sla


@triton.jit
def _int8_blocks(x, mean, out, scale, length, heads, x_b, x_l, x_h, BLOCK: tl.constexpr, D: tl.constexpr):
    block, row = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    rows, columns = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    valid = rows[:, None] < length
    x += batch.to(tl.int64) * x_b + head * x_h
    tile = tl.load(x + rows[:, None] * x_l + columns, mask=valid, other=0.0).to(tl.float32)
    centred = (tile - tl.load(mean + row * D + columns).to(tl.float32)[None]).to(x.dtype.element_ty)
    integers, factor = triton_sla.int8(tl.where(valid, centred.to(tl.float32), 0.0))
    at = ((batch.to(tl.int64) * length + rows[:, None]) * heads + head) * D + columns
    tl.store(out + at, integers, mask=valid)
    tl.store(scale + row * tl.num_programs(0) + block, factor)


def int8_blocks(x: Tensor, mean: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x (B, L, H, D) less mean (B, H, 1, D), in x's dtype, as int8 of x's shape and a scale for each block of tokens,
    (B, H, ⌈L/block⌉) float32"""
    batch, length, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(batch, heads, triton.cdiv(length, block), device=x.device)
    _int8_blocks[(scale.shape[2], batch * heads)](
        x, mean.to(x.dtype).contiguous(), out, scale, length, heads, x.stride(0), x.stride(1), x.stride(2),
        BLOCK=block, D=dim,
    )  # fmt: skip
    return out, scale


def sage_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk: float, block_q: int, block_k: int,
    gluon: bool = False, sums: triton_sla.Sums = (None, None),
) -> Tensor:  # fmt: skip
    """`reference.sparse_linear_attention` with `reference.sage_sparse_attention`, but for v and the probabilities,
    which stay in v's dtype; for bf16 or fp16 and head_dim 64 or 128: (B, L, H, D) contiguous

    gluon: as for `triton_sla.sparse_linear_attention`; q then has a scale for every 64 rows.
    """
    means = triton_sla.block_means(k, block_k, sums[1])
    mean = triton_sla.sequence_mean(means, k.shape[1], block_k)
    kept = triton_sla.kept_blocks(q, k, topk, block_q, block_k, sums, (means, mean))
    state, norm = triton_sla.linear_state(k, v, weight)
    k8, scale = int8_blocks(k, mean, block_k)
    return triton_sla.sparse_linear(q, k8, v, kept, state, norm, bias, block_q, block_k, gluon, scale)
