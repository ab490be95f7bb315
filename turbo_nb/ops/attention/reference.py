"""The meaning of every operation, in plain PyTorch that reads like the formula and runs anywhere.

Faster spellings live beside this file with the same signatures and are checked against it. Shapes: B batch, L tokens,
H heads, D head_dim; attention operands are (B, L, H, D), after norm and rotary embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..norms.reference import _runs

MASK_ELEMENTS = {"cpu": 1 << 27, "cuda": 1 << 29}  # most of an attention mask that are held at once
V_LARGEST, P_LARGEST = 2.25, 448.0  # magnitudes that SageSLA scales v and the probabilities to, for e4m3


def block_means(x: Tensor, block: int) -> Tensor:
    """Mean over blocks of tokens, the ragged last one over its own count: (B, L, H, D) → (B, H, ⌈L/block⌉, D)"""
    length, x = x.shape[1], _runs(x, block)
    count = torch.full((x.shape[1], 1), float(block), device=x.device)
    count[-1] = length - (x.shape[1] - 1) * block
    return x.sum(2).transpose(1, 2) / count


def kept_count(topk: float, blocks: int) -> int:
    """How many of `blocks` key blocks a share of `topk` is; upstream lets it be 0 on short clips, and returns NaN"""
    return max(1, int(min(topk, 1) * blocks))


@torch.no_grad()
def block_map(q: Tensor, k: Tensor, topk: float, block_q: int, block_k: int) -> Tensor:
    """Which key blocks each query block attends to (SLA, arXiv:2509.24006): (B, H, Q_blocks, K_blocks) bool.

    The score of a pair is the product of its pooled q and pooled k (less k's mean over the sequence). Each row keeps
    its best max(1, int(topk · K_blocks)) blocks, all of them from topk 1 on.
    """
    pooled_q = block_means(q, block_q).to(q.dtype)
    pooled_k = block_means(k - k.mean(1, keepdim=True), block_k).to(k.dtype)
    score = pooled_q @ pooled_k.transpose(-1, -2)
    kept = score.topk(kept_count(topk, score.shape[-1]), dim=-1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, kept, True)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, block_q: int, block_k: int) -> Tensor:
    """Softmax attention over the kept blocks only, scale D^-½: (B, L, H, D)

    Works through slabs of query blocks, so that no mask of L × L is held for a long clip.
    """
    batch, length, heads, _ = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    slab = max(1, MASK_ELEMENTS[q.device.type] // (batch * heads * block_q * length))
    out = []
    for begin in range(0, block_map.shape[2], slab):
        rows = q[:, :, begin * block_q : (begin + slab) * block_q]
        mask = block_map[:, :, begin : begin + slab].repeat_interleave(block_k, dim=3)[..., :length]
        mask = mask.repeat_interleave(block_q, dim=2)[:, :, : rows.shape[2]]
        out.append(F.scaled_dot_product_attention(rows, k, v, attn_mask=mask))
    return torch.cat(out, dim=2).transpose(1, 2)


def sage_sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, block_q: int, block_k: int) -> Tensor:
    """`sparse_attention` in 8 bits (SageAttention2, arXiv:2411.10958; SpargeAttn, arXiv:2502.18137): (B, L, H, D)

    q and k less its mean over the sequence are int8 with one scale a block, v is fp8 e4m3 with one scale a channel over
    the sequence, the probabilities are e4m3 in the product with v and float32 in the denominator. Keeps equally many
    blocks in every row of block_map, one after the other, each in a fresh float32 accumulator.
    """
    batch, length, heads, dim = q.shape
    q8, q_scale = _int8_blocks(q, block_q)
    k8, k_scale = _int8_blocks(k - k.mean(1, keepdim=True), block_k)
    v_scale = (v.float().abs().amax(1, keepdim=True) / V_LARGEST).clamp(min=1e-12)  # (B, 1, H, D)
    v8 = _blocks((v.float() / v_scale).to(torch.float8_e4m3fn).float(), block_k)
    kept = block_map.nonzero()[:, -1].view(*block_map.shape[:3], -1)  # (B, H, Q_blocks, n), ascending
    rows = torch.arange(batch, device=q.device)[:, None, None], torch.arange(heads, device=q.device)[None, :, None]
    within = torch.arange(block_k, device=q.device)

    largest = torch.full((*q8.shape[:4], 1), -torch.inf, device=q.device)
    total = torch.zeros_like(largest)
    out = torch.zeros_like(q8)
    for block in kept.unbind(-1):  # (B, H, Q_blocks)
        score = q8 @ k8[*rows, block].transpose(-1, -2)  # integers below 2²⁴: exact
        score = score * (q_scale * k_scale[*rows, block] * dim**-0.5)[..., None, None]
        padding = (block[..., None] * block_k + within >= length)[..., None, :]
        score = score.masked_fill(padding, -torch.inf)
        following = torch.maximum(largest, score.amax(-1, keepdim=True))
        p, shrink = (score - following).exp(), (largest - following).exp()
        p8 = (p * P_LARGEST).to(torch.float8_e4m3fn).float() / P_LARGEST
        out = out * shrink + p8 @ v8[*rows, block]
        total = total * shrink + p.sum(-1, keepdim=True)
        largest = following
    out = (out / total).flatten(2, 3)[:, :, :length].transpose(1, 2)  # (B, L, H, D)
    return (out * v_scale).to(q.dtype)


def _blocks(x: Tensor, block: int) -> Tensor:
    """Blocks of tokens, padded with zeros: (B, L, H, D) → (B, H, ⌈L/block⌉, block, D) float32"""
    return F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % block)).transpose(1, 2).unflatten(2, (-1, block))


def _int8_blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Blocks as integers of int8 (half away from zero) in float32, and a scale for each, (B, H, ⌈L/block⌉)"""
    blocks = _blocks(x, block)
    scale = blocks.abs().amax((-1, -2)) / 127 + 1e-7
    scaled = blocks / scale[..., None, None]
    return (scaled + 0.5 * scaled.sign()).trunc(), scale


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """φ(q) · φ(k)ᵀv / (10⁻⁵ + φ(q) · Σφ(k)) with φ = softmax over D (SLA, arXiv:2509.24006): (B, L, H, D)"""
    phi_q, phi_k = (x.float().softmax(-1).to(x.dtype) for x in (q, k))
    state = torch.einsum("blhd,blhe->bhde", phi_k, v)
    numerator = torch.einsum("blhd,bhde->blhe", phi_q, state)
    denominator = 1e-5 + torch.einsum("blhd,bhd->blh", phi_q, phi_k.sum(1))
    return numerator / denominator[..., None]


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    sparse_attention=sparse_attention,
) -> Tensor:
    """SLA (arXiv:2509.24006): sparse attention plus the projected linear attention, in q's dtype: (B, L, H, D)

    weight (D, D) and bias (D,) are `proj_l`; they are cast to q's dtype. With `sage_sparse_attention` it is SageSLA.
    """
    sparse = sparse_attention(q, k, v, block_map(q, k, topk, block_q, block_k), block_q, block_k)
    linear = F.linear(linear_attention(q, k, v), weight.to(q.dtype), bias.to(q.dtype))
    return (sparse + linear).to(q.dtype)


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention to the text, its padding too, scale D^-½: q (B, L, H, D), k, v (B, S, H, D) → (B, L, H, D)"""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
