"""The meaning of every operation, in plain PyTorch that reads like the formula and runs anywhere.

Faster spellings live beside this file with the same signatures and are checked against it. Shapes: B batch, L tokens,
H heads, D head_dim; attention operands are (B, L, H, D), after norm and rotary embedding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_ELEMENTS = {"cpu": 1 << 27, "cuda": 1 << 29}  # most of an attention mask that are held at once
SUM_TOKENS = 16  # in a run that `rms_norm_rope` sums; every block has a multiple of it
LINEAR_ROWS = 64 * 128  # rows of an 8-bit linear's input that are held in float32 at once
V_LARGEST, P_LARGEST = 2.25, 448.0  # magnitudes that SageSLA scales v and the probabilities to, for e4m3
TILE, TILE_LEVELS = 128, 128  # side of a tile of an 8-bit linear, and its int8 levels on either side of zero


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


def _tiles(x: Tensor) -> Tensor:
    """(M, K), padded with zeros → (⌈M/128⌉, 128, ⌈K/128⌉, 128)"""
    rows, columns = x.shape
    return F.pad(x, (0, -columns % TILE, 0, -rows % TILE)).unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))


def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit form in tiles of 128×128 (TurboDiffusion): x (M, K) → q (M, K) int8, scale (⌈M/128⌉, ⌈K/128⌉) float32

    scale = max(amax, 10⁻⁸) / 128; q = x / scale to the nearest even, saturated to [−128, 127].
    """
    tiles = _tiles(x.float())
    amax = tiles.abs().amax((1, 3), keepdim=True).clamp(min=1e-8)
    q = (tiles * (TILE_LEVELS / amax)).round().clamp(-TILE_LEVELS, TILE_LEVELS - 1).to(torch.int8)
    return q.flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]].contiguous(), (amax / TILE_LEVELS)[:, 0, :, 0]


def int8_dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `int8_quantize`: q (M, K), scale (⌈M/128⌉, ⌈K/128⌉) → (M, K) float32"""
    rows, columns = q.shape
    tiles = scale.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    return q.float() * tiles


def int8_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · dequantised wᵀ + bias with both operands in 8 bits (TurboDiffusion): x (…, K), w_q (N, K) → (…, N)

    x is quantised as `int8_quantize` does. Each 128 deep slice is an exact integer product, scaled and summed in
    float32; the sum goes to x's dtype, and the bias is added there.
    """
    out = torch.cat([_int8_product(rows, w_q, w_scale) for rows in x.reshape(-1, x.shape[-1]).split(LINEAR_ROWS)])
    if bias is not None:
        out = out + bias.to(x.dtype)
    return out.unflatten(0, x.shape[:-1])


def _int8_product(x: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    """x (M, K) · dequantised wᵀ → (M, N)"""
    q, scale = int8_quantize(x)
    out = torch.zeros(x.shape[0], w_q.shape[0], device=x.device)
    for index, begin in enumerate(range(0, x.shape[1], TILE)):
        deep = slice(begin, begin + TILE)
        product = q[:, deep].float() @ w_q[:, deep].float().T  # integers below 2²⁴: exact
        across = scale[:, index].repeat_interleave(TILE)[: x.shape[0], None]
        down = w_scale[:, index].repeat_interleave(TILE)[None, : w_q.shape[0]]
        out.addcmul_(product, across * down)
    return out.to(x.dtype)


class Rows(NamedTuple):
    """Rows in 8 bits: q (…, K) int8, scale (…) float32, and the dtype that they were quantised from."""

    q: Tensor
    scale: Tensor
    dtype: torch.dtype


def row_quantize(x: Tensor, gelu: bool = False) -> Rows:
    """8-bit form of x (…, K), or of its GELU (tanh), with one scale a row (LLM.int8(), arXiv:2208.07339)

    scale = max(amax, 10⁻⁸) / 127; q = x / scale to the nearest even.
    """
    value = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    scale = value.abs().amax(-1).clamp(min=1e-8) / 127
    return Rows((value / scale[..., None]).round().to(torch.int8), scale, x.dtype)


def row_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · (w_q · w_scale)ᵀ + bias with x in 8 bits: x (…, K), w_q (N, K) → (…, N)

    x is quantised as `row_quantize` does; everything after the integer product is float32, rounded once to x's dtype.
    """
    return torch.cat(
        [row_product(row_quantize(rows), w_q, w_scale, bias) for rows in x.reshape(-1, x.shape[-1]).split(LINEAR_ROWS)]
    ).unflatten(0, x.shape[:-1])


def row_product(x: Rows, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """What follows the quantisation in `row_linear`"""
    out = (x.q.float() @ w_q.float().T) * x.scale[..., None] * w_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)


def rms_norm_silu(x: Tensor, gamma: Tensor, before: Tensor | None = None, silu: bool = True) -> Tensor:
    """x · √C / ‖x‖ · gamma over the channels, then SiLU, after the frames `before`: (B, T, …, C) → (B, t + T, …, C)

    gamma has C elements; before (B, t, …, C), None for no frames.
    """
    out = F.normalize(x.float(), dim=-1) * x.shape[-1] ** 0.5 * gamma.float().flatten()
    out = (F.silu(out) if silu else out).to(x.dtype)
    return out if before is None else torch.cat([before, out], dim=1)


def rimmed_conv(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, split: int = 1) -> Tensor:
    """Convolution and residual of a clip in a rim of zeros: (B, T + kt − 1, H + 2, W + 2, C) → (B, T, H + 2, W + 2, N)

    weight (N, C, kt, k, k) with k 3 or 1, bias (N,); residual as the result. With split 2 the halves of the N channels
    are two frames, one after the other: (B, 2T, H + 2, W + 2, N / 2).
    """
    rim = 0 if weight.shape[-1] == 3 else 1  # of the input that the kernel does not read
    inner = x[:, :, rim : x.shape[2] - rim, rim : x.shape[3] - rim].permute(0, 4, 1, 2, 3)
    out = F.conv3d(inner, weight, bias).permute(0, 2, 3, 4, 1)
    if split > 1:
        out = out.unflatten(-1, (split, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
    out = F.pad(out, (0, 0, 1, 1, 1, 1))
    return out if residual is None else out + residual


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Pictures twice as large, by repeating pixels, then convolved: (B, T, H + 2, W + 2, C) → (B, T, 2H + 2, 2W + 2, N)

    The pictures have a rim of zeros. weight (N, C, 3, 3), bias (N,).
    """
    inner = x[:, :, 1:-1, 1:-1].flatten(0, 1).permute(0, 3, 1, 2)
    out = F.conv2d(F.interpolate(inner, scale_factor=2, mode="nearest-exact"), weight, bias, padding=1)
    return F.pad(out.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).unflatten(0, x.shape[:2])
