"""The functions of flash_attn that Wan's code calls, in plain PyTorch and through its SDPA."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rope import apply_rotary_emb_torch
from .support import supplies, unsupported


@supplies("flash_attn.layers.rotary.apply_rotary_emb", seqlen_offsets=0, cu_seqlens=None, max_seqlen=None)
def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False, seqlen_offsets: int = 0,
    cu_seqlens: None = None, max_seqlen: None = None,
) -> Tensor:  # fmt: skip
    """Rotate x (B, L, H, D) by cos and sin (L or more, D/2)."""
    return apply_rotary_emb_torch(x, cos[: x.shape[1]], sin[: x.shape[1]], interleaved, inplace)


FIXED = {
    "dropout_p": 0.0, "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None, "deterministic": False,
    "return_attn_probs": False,
}  # fmt: skip


@supplies("flash_attn.flash_attn_func", **FIXED)
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """Compute attention of q (B, L, H, D) to k and v (B, S, H or a divisor of it, D): (B, L, H, D)."""
    if causal and q.shape[1] != k.shape[1]:  # flash_attn aligns the mask at the end, SDPA at the beginning
        raise unsupported("flash_attn.flash_attn_func", "causal", True, f"as many keys as queries, {q.shape[1]}")
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=softmax_scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


@supplies("flash_attn.flash_attn_varlen_func", **FIXED, block_table=None)
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: None = None,
) -> Tensor:  # fmt: skip
    """Compute `flash_attn_func` of sequences that stand one after the other: q (tokens, H, D) → (tokens, H, D).

    Args:
        cu_seqlens_q, cu_seqlens_k: where each sequence begins, and where the last one ends: (sequences + 1,) int32.
        max_seqlen_q, max_seqlen_k: tokens of the longest sequence; not needed here.
    """
    queries, keys = (bounds.diff().tolist() for bounds in (cu_seqlens_q, cu_seqlens_k))
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    each = [flash_attn_func(*(x[None] for x in part), softmax_scale=softmax_scale, causal=causal)[0] for part in parts]
    return torch.cat(each)
