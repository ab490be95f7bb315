"""Upstream's compiled extension by our kernels: linears in tiles of 128×128, and norms of float32 rows.

The norms are PyTorch's own. Unlike upstream's they read nothing past the end of a weight and count no padded column.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .support import require_no_gradient, supplies, unsupported

HALF = (torch.float16, torch.bfloat16)


@supplies("turbo_diffusion_ops.quant_cuda")
def quant_cuda(x: Tensor, output: Tensor | None, output_scale: Tensor | None, /) -> tuple[Tensor, Tensor]:
    """Quantise x (M, K) bf16 or fp16: (M, K) int8 and (⌈M/128⌉, ⌈K/128⌉) float32, in the outputs where given."""
    if x.dtype not in HALF:
        raise unsupported("turbo_diffusion_ops.quant_cuda", "the input's dtype", x.dtype, "torch.bfloat16 or float16")
    require_no_gradient("turbo_diffusion_ops.quant_cuda", x)
    q, scale = backends.function("tile_quantize", x)(x)
    return (q, scale) if output is None else (output.copy_(q), output_scale.copy_(scale))


@supplies("turbo_diffusion_ops.gemm_cuda")
def gemm_cuda(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, /) -> None:
    """Write a · bᵀ into out (M, N) bf16 or fp16; a (M, K) and b (N, K) and their scales are from `quant_cuda`."""
    if out.dtype not in HALF:
        raise unsupported("turbo_diffusion_ops.gemm_cuda", "the output's dtype", out.dtype, "torch.bfloat16 or float16")
    out.copy_(backends.function("tile_product", out)(a, a_scale, b, b_scale, out.dtype))


@supplies("turbo_diffusion_ops.rms_norm_cuda")
def rms_norm_cuda(x: Tensor, eps: float, weight: Tensor | None, output: Tensor | None, /) -> Tensor:
    """Compute RMSNorm of x (M, N) float32: (M, N) float32, in output where given."""
    normed = F.rms_norm(_float32("rms_norm_cuda", x), x.shape[-1:], weight, eps)
    return normed if output is None else output.copy_(normed)


@supplies("turbo_diffusion_ops.layer_norm_cuda")
def layer_norm_cuda(
    x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, output: Tensor | None, /
) -> Tensor:
    """Compute LayerNorm of x (M, N) float32: (M, N) float32, in output where given."""
    normed = F.layer_norm(_float32("layer_norm_cuda", x), x.shape[-1:], weight, bias, eps)
    return normed if output is None else output.copy_(normed)


def _float32(call: str, x: Tensor) -> Tensor:
    if x.dtype is not torch.float32:
        raise unsupported(f"turbo_diffusion_ops.{call}", "the input's dtype", x.dtype, "torch.float32")
    return x
