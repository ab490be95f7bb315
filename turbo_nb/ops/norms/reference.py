"""Norms, residuals and rotary embedding of a Wan block in plain PyTorch: reads like the formula, runs anywhere.

The kernels beside this file have the same signatures and are tested against it. Shapes: B batch, L tokens, H heads,
D head_dim, C = H·D.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear8.reference import QuantizedRows, row_quantize

SUM_TOKENS = 16  # of a run that `rms_norm_rope` sums; every block of attention is a multiple of it


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True, inplace: bool = False) -> Tensor:
    """Rotate pairs of channels by an angle per token (RoFormer, arXiv:2104.09864).

    Args:
        x: (B, L, H, D).
        cos, sin: (L, D/2).
        interleaved: pairs are (0, 1), (2, 3), …; else (i, i + D/2).
        inplace: write the result into x.

    Returns:
        x's shape and dtype, float32 inside.
    """
    # A pair (a, b) is the complex number a + ib. One complex product is several times faster than four real ones.
    pairs = x.float().unflatten(-1, (-1, 2)) if interleaved else x.float().unflatten(-1, (2, -1)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos.float(), sin.float())[:, None]
    pairs = torch.view_as_real(turned)
    out = (pairs if interleaved else pairs.mT).flatten(-2).to(x.dtype)
    return x.copy_(out) if inplace else out


def rms_norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float = 1e-6, sums: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute RMSNorm over all heads, then `apply_rotary_emb`.

    Args:
        x: (B, L, H·D).
        weight: of the norm, (H·D,).
        cos, sin: (L, D/2). None: no rotation.
        heads: H.
        eps: added to the mean square.
        sums: also return the result's sums over runs of `SUM_TOKENS` tokens, which attention pools into block means.

    Returns:
        (B, L, H, D) in x's dtype; with sums also (B, ⌈L/16⌉, H, D) float32.
    """
    x = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype).unflatten(2, (heads, -1))
    x = x if cos is None else apply_rotary_emb(x, cos, sin)
    return (x, runs(x, SUM_TOKENS).sum(2)) if sums else x


def gated_norm(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    eps: float = 1e-6, quantize: bool = False,
) -> "tuple[Tensor, Tensor | QuantizedRows | None]":  # fmt: skip
    """Compute y = x + branch · gate, and LayerNorm(y) · scale + shift.

    Args:
        x: (B, L, C).
        branch: (B, L, C). None: y = x.
        gate: (B, C) or (C,). None: 1.
        scale, shift: (B, C) or (C,). None: no norm.
        eps: added to the variance.
        quantize: return the norm in 8 bits, as `row_quantize` does.

    Returns:
        y and the norm, each of x's shape and dtype; None for no norm.
    """
    per_batch = [t if t is None or t.ndim == 1 else t[:, None] for t in (gate, scale, shift)]
    gate, scale, shift = (None if t is None else t.float() for t in per_batch)
    if branch is not None:
        x = (x.float() + branch.float() * (1 if gate is None else gate)).to(x.dtype)
    if scale is None:
        return x, None
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps) * scale + shift
    return x, row_quantize(normed)._replace(dtype=x.dtype) if quantize else normed.to(x.dtype)


def runs(x: Tensor, size: int) -> Tensor:
    """Return runs of tokens, padded with zeros: (B, L, H, D) → (B, ⌈L/size⌉, size, H, D) float32."""
    return F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))
