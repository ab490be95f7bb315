"""SLA through PyTorch's own attention kernels, on gathered key blocks: for GPUs on which our kernels do not run.

Each query block attends to copies of its kept key blocks, so the work grows with them and no L × L mask exists. The
linear branch is in float32, because its sums over the sequence exceed float16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .reference import Sums

GATHERED = {"cpu": 1 << 26, "cuda": 1 << 28}  # bytes of keys, and as many of values, that are copied at a time


def sparse_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk: float, block_q: int, block_k: int,
    sums: Sums = (None, None),
) -> Tensor:  # fmt: skip
    """Compute `reference.sparse_linear_attention`: (B, L, H, D)."""
    kept = reference.block_map(q, k, topk, block_q, block_k)
    kept = kept.nonzero()[:, -1].view(*kept.shape[:3], -1)  # (B, H, Q_blocks, n), ascending
    out = sparse_attention(q, k, v, kept, block_q, block_k)
    weight, bias = weight.float(), bias.float()
    for head in range(q.shape[2]):  # one after the other, because float32 takes memory
        out[:, :, head] += F.linear(linear_attention(*(x[:, :, head].float() for x in (q, k, v))), weight, bias)
    return out


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block_q: int, block_k: int) -> Tensor:
    """Compute softmax attention over the kept key blocks, scale D^-½.

    Args:
        q, k, v: (B, L, H, D).
        kept: indices of key blocks (B, H, Q_blocks, n).
        block_q, block_k: tokens of a query block and of a key block.

    Returns:
        (B, L, H, D).
    """
    batch, length, heads, dim = q.shape
    queries, (keys, values) = _blocks(q, block_q).flatten(0, 2), (_blocks(x, block_k).flatten(0, 1) for x in (k, v))
    rows = torch.arange(batch * heads, device=q.device).repeat_interleave(kept.shape[2])[:, None]
    kept, within = kept.flatten(0, 2), torch.arange(block_k, device=q.device)
    share = max(1, GATHERED[q.device.type] // (kept.shape[1] * block_k * dim * q.element_size()))
    out = torch.empty_like(queries)
    for at in range(0, len(kept), share):
        part = slice(at, at + share)
        key, value = (x[rows[part], kept[part]].flatten(1, 2)[:, None] for x in (keys, values))
        mask = None
        if length % block_k:  # the last key block is filled up with zeros
            mask = (kept[part][..., None] * block_k + within < length).flatten(1)[:, None, None]
        out[part] = F.scaled_dot_product_attention(queries[part, None], key, value, attn_mask=mask)[:, 0]
    return out.view(batch, heads, -1, dim)[:, :, :length].transpose(1, 2).contiguous()


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute `reference.linear_attention` of one head in float32: (B, L, D)."""
    phi_q, phi_k = q.softmax(-1), k.softmax(-1)
    return phi_q @ (phi_k.mT @ v) / (1e-5 + phi_q @ phi_k.sum(1)[..., None])


def _blocks(x: Tensor, block: int) -> Tensor:
    """Return blocks of tokens, padded with zeros: (B, L, H, D) → (B, H, ⌈L/block⌉, block, D)."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % block))
    return x.transpose(1, 2).unflatten(2, (-1, block)).contiguous()
