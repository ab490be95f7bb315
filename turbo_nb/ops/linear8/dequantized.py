"""8-bit linears on GPUs on which our kernels do not run: the weight becomes 16 bits for each product.

The activations are not quantised, so the result is more exact than that of `reference.int8_linear`. PyTorch's product
of 16-bit matrices adds up in float32, and a product of float32 matrices takes several times as long.
"""

import torch.nn.functional as F
from torch import Tensor

from .reference import int8_dequantize


def int8_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x · dequantised wᵀ + bias; arguments and result as those of `reference.int8_linear`."""
    return F.linear(x, int8_dequantize(w_q, w_scale).to(x.dtype), None if bias is None else bias.to(x.dtype))
