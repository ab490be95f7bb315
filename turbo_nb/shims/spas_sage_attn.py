"""The functions of SpargeAttn that upstream's SageSLA calls: 8-bit attention over the kept blocks.

Shapes are SpargeAttn's: q, k and v are (B, H, L, D). Two things are ours: v keeps the order of its tokens (SpargeAttn
permutes them for its kernel), and the probabilities stay in v's 16 bits. No product is left out, so the threshold for
that is not read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..ops.attention import reference
from .support import require_no_gradient, supplies, unsupported

BLOCK_K = 64  # keys that our kernel takes at a time


def _int8_blocks(x: Tensor, mean: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantise x (B, H, L, D) less its mean (B, H, 1, D): its shape in int8, and scales (B, H, ⌈L/block⌉)."""
    if backends.choose("sagesla", x.device).uses_triton:
        from ..ops.attention.triton_sage import int8_blocks

        q, scale = int8_blocks(x.transpose(1, 2), mean, block)
        return q.transpose(1, 2), scale
    blocks, scale = reference._int8_blocks((x - mean).transpose(1, 2), block)
    return blocks.flatten(2, 3)[:, :, : x.shape[2]].to(torch.int8), scale


@supplies("spas_sage_attn.utils.get_vanilla_qk_quant")
def get_vanilla_qk_quant(
    q: Tensor, k: Tensor, km: Tensor | None = None, BLKQ: int = 128, BLKK: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise q and k − km with one scale per block: q in int8, its scales, k in int8, its scales."""
    require_no_gradient("spas_sage_attn.utils.get_vanilla_qk_quant", q, k)
    mean = torch.zeros_like(k[:, :, :1]) if km is None else km
    return *_int8_blocks(q, torch.zeros_like(q[:, :, :1]), BLKQ), *_int8_blocks(k, mean, BLKK)


@supplies("spas_sage_attn.utils.block_map_lut_triton")
def block_map_lut_triton(block_map: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kept blocks of a map (B, H, Q_blocks, K_blocks), each as its distance from the one before.

    Returns:
        (B, H, Q_blocks, K_blocks) int32, the distances at the front, and how many each row keeps (B, H, Q_blocks).
    """
    kept = block_map != 0
    count = kept.sum(-1, dtype=torch.int32)
    index = kept.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    lut = index.diff(dim=-1, prepend=torch.zeros_like(index[..., :1])).to(torch.int32)
    return lut * (torch.arange(lut.shape[-1], device=lut.device) < count[..., None]), count


@supplies("spas_sage_attn._fused.transpose_pad_permute_cuda", tensor_layout=1)
def transpose_pad_permute_cuda(v: Tensor, output: Tensor, tensor_layout: int, /) -> None:
    """Write v (B, H, L, D) into output (B, H, D, L or more), zeros at its end."""
    output[..., : v.shape[2]] = v.transpose(2, 3)
    output[..., v.shape[2] :] = 0


@supplies("spas_sage_attn._fused.scale_fuse_quant_cuda", tensor_layout=1)
def scale_fuse_quant_cuda(
    v: Tensor, output: Tensor, scale: Tensor, num_tokens: int, scale_max: float, tensor_layout: int, /
) -> None:
    """Write v (B, H, D, L) into output in fp8 e4m3 and its scales (B, H, D) into scale; scale_max is the largest."""
    scale.copy_((v[..., :num_tokens].abs().amax(-1).float() / scale_max).clamp(min=1e-12))
    output.copy_(v / scale[..., None])


def _attention(
    call: str, q: Tensor, k: Tensor, v: Tensor, lut: Tensor, count: Tensor, q_scale: Tensor, k_scale: Tensor,
    sm_scale: float,
) -> Tensor:  # fmt: skip
    """Compute the attention of q to the kept blocks of k, both in int8: (B, H, L, D) in the dtype of v, 16 bits."""
    length, dim = q.shape[2:]
    if abs(sm_scale * dim**0.5 - 1) > 1e-6:
        raise unsupported(call, "sm_scale", sm_scale, f"{dim**-0.5}, the inverse root of head_dim")
    least, most = torch.stack(count.aminmax()).tolist()
    if least != most or not most:
        raise unsupported(call, "valid_block_num", (least, most), "one number for all query blocks")
    kept = lut[..., :most].cumsum(-1, dtype=torch.int32)
    block_q, block_k = (64 if x.shape[2] == -(-length // 64) else 128 for x in (q_scale, k_scale))
    q = (q * q_scale.repeat_interleave(block_q, 2)[:, :, :length, None]).to(v.dtype)
    choice = backends.choose("sagesla", q.device)
    choice.require()
    if choice.uses_triton:
        heads_last = (x.transpose(1, 2) for x in (q, k, v))
        return _kernel(*heads_last, kept, k_scale, block_q, block_k).transpose(1, 2)
    k = k * k_scale.repeat_interleave(block_k, 2)[:, :, :length, None]
    heads_last = (x.float().transpose(1, 2) for x in (q, k, v))
    block_map = torch.zeros_like(lut, dtype=torch.bool).scatter(-1, kept.long(), True)
    return reference.sparse_attention(*heads_last, block_map, block_q, block_k).transpose(1, 2).to(v.dtype)


def _kernel(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, k_scale: Tensor, block_q: int, block_k: int) -> Tensor:
    """Run SageSLA's kernel with a linear branch of zeros: q, k and v (B, L, H, D) → (B, L, H, D)."""
    from ..ops.attention.triton_sla import sparse_linear

    batch, length, heads, dim = q.shape
    if block_k > BLOCK_K:  # a block of 128 is two of 64 with the same scale
        kept = (kept[..., None] * 2 + torch.arange(2, device=q.device, dtype=kept.dtype)).flatten(-2)
        k_scale = k_scale.repeat_interleave(2, 2)[..., : -(-length // BLOCK_K)]
        k_scale = F.pad(k_scale.flatten(), (0, 1), value=1.0)  # because half of the last block may lie past the end
    state = torch.zeros(batch * heads, dim, dim, dtype=v.dtype, device=v.device)
    norm, bias = torch.zeros(batch * heads, dim, device=v.device), torch.zeros(dim, device=v.device)
    return sparse_linear(q, k, v, kept.contiguous(), state, norm, bias, block_q, BLOCK_K, k_scale.contiguous())


def _attention_to_fp8(
    call: str, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lut: Tensor, count: Tensor, q_scale: Tensor,
    k_scale: Tensor, v_scale: Tensor, sm_scale: float,
) -> None:  # fmt: skip
    """Write the attention into output; v (B, H, D, L or more) is fp8 with one scale per channel."""
    values = v[..., : k.shape[2]].to(output.dtype).transpose(2, 3)
    out = _attention(call, q, k, values, lut, count, q_scale, k_scale, sm_scale)
    output.copy_(out * v_scale[:, :, None])


FIXED = {"tensor_layout": 1, "is_causal": False, "qk_quant_gran": 1}
QATTN = "spas_sage_attn._qattn"
SM_90 = "qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale_sm90"
FP8 = "qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale_with_pv_threshold"
FP16 = "qk_int8_sv_f16_accum_f16_block_sparse_attn_inst_buf_with_pv_threshold"


@supplies(f"{QATTN}.{SM_90}", **FIXED)
def attention_sm90(
    q, k, v, output, lut, count, q_scale, k_scale, v_scale, tensor_layout, is_causal, qk_quant_gran, sm_scale, /
) -> None:
    """Run `_attention_to_fp8` with the arguments of the function for sm_90."""
    _attention_to_fp8(f"{QATTN}.{SM_90}", q, k, v, output, lut, count, q_scale, k_scale, v_scale, sm_scale)


@supplies(f"{QATTN}.{FP8}", **FIXED, return_lse=False)
def attention_fp8(
    q, k, v, output, lut, count, threshold, q_scale, k_scale, v_scale, tensor_layout, is_causal, qk_quant_gran,
    sm_scale, return_lse, /,
) -> None:  # fmt: skip
    """Run `_attention_to_fp8` with the arguments of the function for sm_89 and sm_100."""
    _attention_to_fp8(f"{QATTN}.{FP8}", q, k, v, output, lut, count, q_scale, k_scale, v_scale, sm_scale)


@supplies(f"{QATTN}.{FP16}", **FIXED, return_lse=False)
def attention_fp16(
    q, k, v, output, lut, count, threshold, q_scale, k_scale, tensor_layout, is_causal, qk_quant_gran, sm_scale,
    return_lse, /,
) -> None:  # fmt: skip
    """Write the attention into output; v (B, H, L, D) is fp16."""
    output.copy_(_attention(f"{QATTN}.{FP16}", q, k, v, lut, count, q_scale, k_scale, sm_scale))
