"""SageSLA in Triton: sparse-linear attention whose q · kᵀ is a product of int8 (SageAttention2, arXiv:2411.10958).

    k, mean ──► _int8_blocks ──► k8 int8, k_scale ──► triton_sla._sparse_linear, which quantises q block by block

    kernel        grid           a program loads              and stores
    _int8_blocks  blocks, B·H    a block of k, k's mean       the block in int8 and its scale

The integer product is exact in int32. The softmax, the product with v and the linear branch are those of SLA. v and the
probabilities stay in 16 bits, because most of SageSLA's error comes from their e4m3 form.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import channels_inside, launch
from ..parts import Parts
from . import triton_sla
from .reference import Sums


@triton.jit
def _int8_blocks(x, mean, out, scale, length, heads, x_b, x_l, x_h, BLOCK: tl.constexpr, D: tl.constexpr):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    rows, columns = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64), tl.arange(0, D)
    valid = rows[:, None] < length
    x += batch * x_b + head * x_h
    tile = tl.load(x + rows[:, None] * x_l + columns, mask=valid, other=0.0).to(tl.float32)
    centred = (tile - tl.load(mean + row * D + columns).to(tl.float32)[None]).to(x.dtype.element_ty)
    integers, factor = triton_sla.int8(tl.where(valid, centred.to(tl.float32), 0.0))
    at = ((batch * length + rows[:, None]) * heads + head) * D + columns
    tl.store(out + at, integers, mask=valid)
    tl.store(scale + row * tl.num_programs(0) + block, factor)


def int8_blocks(x: Tensor, mean: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantise x less its mean, block of tokens by block.

    Args:
        x: (B, L, H, D).
        mean: (B, H, 1, D), of x over the sequence.
        block: tokens of a block.

    Returns:
        (B, L, H, D) int8, and scales (B, H, ⌈L/block⌉) float32.
    """
    batch, length, heads, dim = x.shape
    x, out = channels_inside(x), torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(batch, heads, triton.cdiv(length, block), device=x.device)
    launch(
        _int8_blocks, (scale.shape[2], batch * heads), x, mean.to(x.dtype).contiguous(), out, scale, length, heads,
        x.stride(0), x.stride(1), x.stride(2), BLOCK=block, D=dim,
    )  # fmt: skip
    return out, scale


def prepare(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, topk: float, block_q: int, block_k: int, sums: Sums
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what the last kernel needs: `kept_blocks`, state and norm of `linear_state`, k in int8 and its scales."""
    means = triton_sla.block_means(k, block_k, sums[1])
    mean = triton_sla.sequence_mean(means, k.shape[1], block_k)
    kept = triton_sla.kept_blocks(q, k, topk, block_q, block_k, sums, (means, mean))
    return kept, *triton_sla.linear_state(k, v, weight), *int8_blocks(k, mean, block_k)


def sage_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk: float, block_q: int, block_k: int,
    sums: Sums = (None, None), to: Parts | None = None,
) -> Tensor | None:  # fmt: skip
    """Compute `reference.sage_linear_attention` with v and the probabilities in v's own dtype.

    For bf16 or fp16 and head_dim 64 or 128. Returns (B, L, H, D) contiguous. to: write it there, and return None.
    """
    kept, state, norm, k8, scale = prepare(q, k, v, weight, topk, block_q, block_k, sums)
    return triton_sla.sparse_linear(q, k8, v, kept, state, norm, bias, block_q, block_k, scale, to)
