"""The meaning of every operation, in plain PyTorch that reads like the formula and runs anywhere.

Faster spellings live beside this file with the same signatures and are checked against it. Shapes: B batch, L tokens,
H heads, D head_dim; attention operands are (B, L, H, D), after norm and rotary embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear8.reference import Rows, row_quantize

SUM_TOKENS = 16  # in a run that `rms_norm_rope` sums; every block has a multiple of it


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """Rotate pairs of channels by an angle per token (RoFormer, arXiv:2104.09864); fp32 inside, `x`'s dtype outside.

    x (B, L, H, D), cos and sin (L, D/2). Pairs are (0, 1), (2, 3), … when interleaved, else (i, i + D/2).
    """
    cos, sin = cos.float()[:, None], sin.float()[:, None]  # (L, 1, D/2)
    if interleaved:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def rms_norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float = 1e-6, sums: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over all heads of x (B, L, H·D), then `apply_rotary_emb` unless cos is None: (B, L, H, D)

    sums: also the result's sums over runs of `SUM_TOKENS` tokens, (B, ⌈L/16⌉, H, D) float32, for `block_means`.
    """
    x = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype).unflatten(2, (heads, -1))
    x = x if cos is None else apply_rotary_emb(x, cos, sin)
    return (x, _runs(x, SUM_TOKENS).sum(2)) if sums else x


def gated_norm(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    eps: float = 1e-6, quantize: bool = False,
) -> "tuple[Tensor, Tensor | Rows | None]":  # fmt: skip
    """x + branch · gate, and its LayerNorm · scale + shift: x (B, L, C) → two of its shape and dtype

    gate, scale and shift are (B, C) or (C,); no branch adds nothing, no gate is 1; without a scale there is no norm.
    quantize: the second is in 8 bits, as `row_quantize` has it.
    """
    per_batch = [t if t is None or t.ndim == 1 else t[:, None] for t in (gate, scale, shift)]
    gate, scale, shift = (None if t is None else t.float() for t in per_batch)
    if branch is not None:
        x = (x.float() + branch.float() * (1 if gate is None else gate)).to(x.dtype)
    if scale is None:
        return x, None
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps) * scale + shift
    return x, row_quantize(normed)._replace(dtype=x.dtype) if quantize else normed.to(x.dtype)


def _runs(x: Tensor, size: int) -> Tensor:
    """Runs of tokens, padded with zeros: (B, L, H, D) → (B, ⌈L/size⌉, size, H, D) float32"""
    return F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))
