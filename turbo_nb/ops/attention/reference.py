"""Self-attention and cross-attention in plain PyTorch: reads like the formula, runs anywhere.

The kernels beside this file have the same signatures and are tested against it. Shapes: B batch, L tokens, H heads,
D head_dim. q, k and v are (B, L, H, D), after norm and rotary embedding.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..norms.reference import runs

Sums = tuple[Tensor | None, Tensor | None]  # of q and of k over runs of tokens
MASK_ELEMENTS = {"cpu": 1 << 27, "cuda": 1 << 29}  # largest attention mask in memory at once
V_LARGEST, P_LARGEST = 2.25, 448.0  # magnitudes that SageSLA scales v and the probabilities to, for fp8 e4m3


def block_means(x: Tensor, block: int) -> Tensor:
    """Return the mean of each block of tokens: (B, L, H, D) → (B, H, ⌈L/block⌉, D) float32."""
    length, x = x.shape[1], runs(x, block)
    count = torch.full((x.shape[1], 1), float(block), device=x.device)
    count[-1] = length - (x.shape[1] - 1) * block
    return x.sum(2).transpose(1, 2) / count


def kept_count(topk: float, blocks: int) -> int:
    """Return how many of `blocks` key blocks a share `topk` keeps, at least 1: with 0 upstream returns NaN."""
    return max(1, int(min(topk, 1) * blocks))


@torch.no_grad()
def block_map(q: Tensor, k: Tensor, topk: float, block_q: int, block_k: int) -> Tensor:
    """Choose the key blocks that each query block attends to (SLA, arXiv:2509.24006).

    The score of a pair of blocks is the product of its mean q and its mean k, less k's mean over the sequence. Each
    query block keeps its best max(1, int(topk · K_blocks)) key blocks.

    Args:
        q, k: (B, L, H, D).
        topk: share of the key blocks, above 0 and at most 1.
        block_q, block_k: tokens of a query block and of a key block.

    Returns:
        (B, H, Q_blocks, K_blocks) bool.
    """
    pooled_q = block_means(q, block_q).to(q.dtype)
    pooled_k = block_means(k - k.mean(1, keepdim=True), block_k).to(k.dtype)
    score = pooled_q @ pooled_k.transpose(-1, -2)
    kept = score.topk(kept_count(topk, score.shape[-1]), dim=-1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, kept, True)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, block_q: int, block_k: int) -> Tensor:
    """Compute softmax attention over the kept key blocks, scale D^-½.

    Args:
        q, k, v: (B, L, H, D).
        block_map: (B, H, Q_blocks, K_blocks) bool.
        block_q, block_k: tokens of a query block and of a key block.

    Returns:
        (B, L, H, D). Works on a few query blocks at a time, because a mask of L × L would not fit in memory.
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
    """Compute `sparse_attention` in 8 bits (SageAttention2, arXiv:2411.10958; SpargeAttn, arXiv:2502.18137).

    q, and k less its mean over the sequence, are int8 with one scale per block. v is fp8 e4m3 with one scale per
    channel. The probabilities are e4m3 in the product with v and float32 in the denominator. The online softmax takes
    the kept blocks one after the other; every row of block_map keeps equally many.
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
    """Return blocks of tokens, padded with zeros: (B, L, H, D) → (B, H, ⌈L/block⌉, block, D) float32."""
    return F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % block)).transpose(1, 2).unflatten(2, (-1, block))


def _int8_blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return `_blocks` as int8 numbers (half away from zero) in float32, and their scales (B, H, ⌈L/block⌉)."""
    blocks = _blocks(x, block)
    scale = blocks.abs().amax((-1, -2)) / 127 + 1e-7
    scaled = blocks / scale[..., None, None]
    return (scaled + 0.5 * scaled.sign()).trunc(), scale


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute φ(q) · φ(k)ᵀv / (10⁻⁵ + φ(q) · Σφ(k)), φ = softmax over D (SLA, arXiv:2509.24006): (B, L, H, D)."""
    phi_q, phi_k = (x.float().softmax(-1).to(x.dtype) for x in (q, k))
    state = torch.einsum("blhd,blhe->bhde", phi_k, v)
    numerator = torch.einsum("blhd,bhde->blhe", phi_q, state)
    denominator = 1e-5 + torch.einsum("blhd,bhd->blh", phi_q, phi_k.sum(1))
    return numerator / denominator[..., None]


def sparse_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk: float, block_q: int, block_k: int,
    sums: Sums = (None, None), *, attend=None,
) -> Tensor:  # fmt: skip
    """Compute SLA (arXiv:2509.24006): sparse attention plus the projected linear attention.

    Args:
        q, k, v: (B, L, H, D).
        weight, bias: `proj_l`, (D, D) and (D,), cast to q's dtype.
        topk: share of the key blocks that each query block attends to.
        block_q, block_k: tokens of a query block and of a key block.
        sums: of q and k over runs of tokens, from `norms.reference.rms_norm_rope`. Kernels may pool these instead of q
            and k; here they are not used.
        attend: (q, k, v, block_map, block_q, block_k) → (B, L, H, D), the sparse part. None: `sparse_attention`.

    Returns:
        (B, L, H, D) in q's dtype.
    """
    kept = block_map(q, k, topk, block_q, block_k)
    sparse = (attend or sparse_attention)(q, k, v, kept, block_q, block_k)
    linear = F.linear(linear_attention(q, k, v), weight.to(q.dtype), bias.to(q.dtype))
    return (sparse + linear).to(q.dtype)


# SageSLA: SLA whose sparse part is in 8 bits
sage_linear_attention = partial(sparse_linear_attention, attend=sage_sparse_attention)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, repeats: int = 1) -> Tensor:
    """Compute softmax attention to the prompt and its padding, scale D^-½.

    Args:
        q: (B, L, H, D).
        k, v: (B, S, H, D).
        repeats: how many equal rows of k and v their last row stands for.

    Returns:
        (B, L, H, D).
    """
    if repeats > 1:
        k, v = (torch.cat([x, x[:, -1:].expand(-1, repeats - 1, -1, -1)], 1) for x in (k, v))
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def picture_attention(qkv: Tensor) -> Tensor:
    """Compute softmax attention of one head within each picture, scale C^-½.

    Args:
        qkv: (B, L, 3C), queries, keys and values of L pixels.

    Returns:
        (B, L, C).
    """
    q, k, v = qkv[:, None].chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v)[:, 0]
