"""8-bit linears in tiles of 128×128 (TurboDiffusion): weights are stored, activations quantised as they come.

`quantize_linears(transformer)` turns the linears of a transformer's blocks into `Int8Linear`, with the buffers of
upstream's quantised checkpoints; `dequantize_linears` turns them back.
"""

import torch
from torch import Tensor, nn

from .errors import InputError
from .kernels import reference
from .kernels.reference import TILE, int8_dequantize

__all__ = [
    "Int8Linear",
    "dequantize_linears",
    "empty_linears",
    "int8_dequantize",
    "int8_linear",
    "int8_quantize",
    "is_quantized",
    "quantize_linears",
]


def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) → q (M, K) int8 and scale (⌈M/128⌉, ⌈K/128⌉) float32, one for a tile of 128×128.

    Raises InputError for another number of dimensions.
    """
    if x.ndim != 2:
        raise InputError(f"x has shape {tuple(x.shape)}; int8_quantize takes a matrix (rows, columns)")
    return reference.int8_quantize(x)


def int8_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, K) times the quantised weight w_q (N, K), plus bias (N,) → (…, N) in x's dtype.

    Raises InputError where the shapes don't fit.
    """
    tiles = tuple(-(-side // TILE) for side in w_q.shape)
    if w_q.ndim != 2 or x.shape[-1] != w_q.shape[1]:
        raise InputError(f"x {tuple(x.shape)} and w_q {tuple(w_q.shape)} don't fit; their last dimensions are equal")
    if tuple(w_scale.shape) != tiles:
        raise InputError(f"w_scale has shape {tuple(w_scale.shape)}; for w_q {tuple(w_q.shape)} it is {tiles}")
    return reference.int8_linear(x, w_q, w_scale, bias)


class Int8Linear(nn.Module):
    """A linear layer with upstream's buffers: int8_weight (out, in), scale (⌈out/128⌉, ⌈in/128⌉), bias (out,)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=torch.bfloat16):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        tiles = -(-out_features // TILE), -(-in_features // TILE)
        self.register_buffer("int8_weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.zeros(tiles, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Int8Linear":
        """The 8-bit form of `linear`."""
        weight = linear.weight.detach()
        module = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta")
        module.int8_weight, module.scale = int8_quantize(weight)
        module.bias = None if linear.bias is None else linear.bias.detach()
        return module

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A linear with the weights that this one stands for, in `dtype`."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(int8_dequantize(self.int8_weight, self.scale).to(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.int8_weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _replace(module: nn.Module, kind: type[nn.Module], make) -> int:
    """Replace each `kind` inside `module`, but `proj_l`, by make(it); how many"""
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is kind and name != "proj_l"
    ]
    for parent, name, child in found:
        setattr(parent, name, make(child))
    return len(found)


def empty_linears(transformer: nn.Module, dtype: torch.dtype) -> int:
    """Put 8-bit linears without storage in the place of the blocks' linears; how many. In place."""

    def empty(linear: nn.Linear) -> Int8Linear:
        return Int8Linear(linear.in_features, linear.out_features, linear.bias is not None, "meta", dtype)

    return _replace(transformer.blocks, nn.Linear, empty)


def quantize_linears(transformer: nn.Module) -> int:
    """Quantise the linears of the transformer's blocks as upstream does (not `proj_l`); how many. In place."""
    return _replace(transformer.blocks, nn.Linear, Int8Linear.from_linear)


def dequantize_linears(transformer: nn.Module, dtype: torch.dtype = torch.bfloat16) -> int:
    """Turn the 8-bit linears of the transformer's blocks into plain ones in `dtype`; how many. In place."""
    return _replace(transformer.blocks, Int8Linear, lambda linear: linear.to_linear(dtype))


def is_quantized(transformer: nn.Module) -> bool:
    """Whether the transformer has 8-bit linears."""
    return any(isinstance(module, Int8Linear) for module in transformer.modules())
