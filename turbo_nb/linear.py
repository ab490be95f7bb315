"""8-bit linears: weights are stored in 8 bits, activations quantised as they come.

`Int8Linear` has the tensors of upstream's quantised checkpoints, with one scale for a tile of 128×128 (TurboDiffusion);
`empty_linears` makes room for them in a transformer. For the kernels `to_rows` gives each row of the weight a scale of
its own, and so has each row of the activations: that is faster, and more exact, since one large value makes only
its own row coarse.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import backends
from .errors import InputError
from .ops.linear8 import reference as linear8_reference
from .ops.linear8.reference import TILE, Rows, int8_dequantize, row_quantize

__all__ = [
    "Int8Linear",
    "dequantize",
    "empty_linears",
    "held",
    "in_rows",
    "int8_dequantize",
    "int8_linear",
    "int8_quantize",
    "is_quantized",
    "project",
    "quantize",
    "row_linear",
    "row_quantize",
    "to_rows",
    "to_tiles",
]


def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) → q (M, K) int8 and scale (⌈M/128⌉, ⌈K/128⌉) float32, one for a tile of 128×128.

    Raises InputError for another number of dimensions.
    """
    if x.ndim != 2:
        raise InputError(f"x has shape {tuple(x.shape)}; int8_quantize takes a matrix (rows, columns)")
    return linear8_reference.int8_quantize(x)


def int8_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, K) times the quantised weight w_q (N, K), plus bias (N,) → (…, N) in x's dtype.

    Raises InputError where the shapes don't fit.
    """
    tiles = tuple(-(-side // TILE) for side in w_q.shape)
    if w_q.ndim != 2 or x.shape[-1] != w_q.shape[1]:
        raise InputError(f"x {tuple(x.shape)} and w_q {tuple(w_q.shape)} don't fit; their last dimensions are equal")
    if tuple(w_scale.shape) != tiles:
        raise InputError(f"w_scale has shape {tuple(w_scale.shape)}; for w_q {tuple(w_q.shape)} it is {tiles}")
    return linear8_reference.int8_linear(x, w_q, w_scale, bias)


def row_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, K) times the quantised weight w_q (N, K) with scales (N,), plus bias (N,) → (…, N) in x's dtype."""
    if backends.on_triton("linear", x):
        from .ops.linear8 import triton_rows

        return triton_rows.row_product(triton_rows.row_quantize(x), w_q, w_scale, bias, _on_gluon())
    return linear8_reference.row_linear(x, w_q, w_scale, bias)


def _on_gluon() -> bool:
    return backends.choose("linear").chosen == "gluon"


def in_rows(linears: Sequence[nn.Module]) -> bool:
    """Whether all of these take activations that are 8-bit rows already."""
    return all(type(linear) is Int8Linear and linear.scale.ndim == 1 for linear in linears)


def project(linears: Sequence[nn.Module], x: Tensor | Rows) -> list[Tensor]:
    """Each linear's x (B, L, K) → (B, L, N); 8-bit kernels quantise x once for all.

    x may be `Rows` where `in_rows` says so and "linear" is on Triton.
    """
    if isinstance(x, Rows) or (in_rows(linears) and backends.on_triton("linear", x)):
        from .ops.linear8 import triton_rows

        rows = x if isinstance(x, Rows) else triton_rows.row_quantize(x)
        return [
            triton_rows.row_product(rows, linear.int8_weight, linear.scale, linear.bias, _on_gluon())
            for linear in linears
        ]
    return [linear(x) for linear in linears]


class Int8Linear(nn.Module):
    """A linear layer with upstream's tensors: int8_weight (out, in), scale (⌈out/128⌉, ⌈in/128⌉), bias (out,).

    After `to_rows` scale is (out,).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=torch.bfloat16):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        tiles = -(-out_features // TILE), -(-in_features // TILE)
        self.int8_weight = held(torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.scale = held(torch.zeros(tiles, device=device))
        self.bias = held(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Int8Linear":
        """The 8-bit form of `linear`."""
        weight = linear.weight.detach()
        module = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta")
        module.int8_weight, module.scale = map(held, int8_quantize(weight))
        module.bias = None if linear.bias is None else held(linear.bias.detach())
        return module

    def forward(self, x: Tensor) -> Tensor:
        apply = row_linear if self.scale.ndim == 1 else int8_linear
        return apply(x, self.int8_weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) in 8 bits for what runs 8-bit linears here: scales of rows for the kernels, else of tiles"""
    if backends.on_triton("linear"):
        return row_quantize(weight)[:2]
    return int8_quantize(weight)


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight of q (N, K), with scales of rows (N,) or of tiles"""
    return q.float() * scale[:, None] if scale.ndim == 1 else int8_dequantize(q, scale)


@torch.no_grad()
def to_rows(module: nn.Module, device: torch.device | str | None = None) -> None:
    """Give every row of the 8-bit weights in `module` its own scale, in place; computed on `device`, if given.

    A weight of 8 bits rounded to 8 bits again: measured, that costs less than the finer activations bring.
    """
    for linear in module.modules():
        if type(linear) is Int8Linear and linear.scale.ndim == 2:
            home = linear.int8_weight.device
            weight = int8_dequantize(*(x.to(device or home) for x in (linear.int8_weight, linear.scale)))
            q, scale, _ = row_quantize(weight)
            linear.int8_weight, linear.scale = held(q.to(home)), held(scale.to(home))


@torch.no_grad()
def to_tiles(module: nn.Module) -> None:
    """`to_rows` undone, but for the rounding: the weights of `module` have upstream's scales again."""
    for linear in module.modules():
        if type(linear) is Int8Linear and linear.scale.ndim == 1:
            weight = dequantize(linear.int8_weight, linear.scale)
            linear.int8_weight, linear.scale = map(held, int8_quantize(weight))


def held(tensor: Tensor) -> nn.Parameter:
    """A parameter that is not trained: unlike buffers, diffusers' group offload moves these both ways"""
    return nn.Parameter(tensor, requires_grad=False)


def empty_linears(transformer: nn.Module, quantized: bool, dtype: torch.dtype) -> int:
    """Put linears without storage, 8-bit or plain, in the place of the blocks' linears (not `proj_l`); how many.

    In place, and before the weights are there: which ones upstream quantises is decided here.
    """
    found = [
        (parent, name, child)
        for parent in transformer.blocks.modules()
        for name, child in parent.named_children()
        if type(child) in (nn.Linear, Int8Linear) and name != "proj_l"
    ]
    for parent, name, child in found:
        kind = Int8Linear if quantized else nn.Linear
        setattr(parent, name, kind(child.in_features, child.out_features, child.bias is not None, "meta", dtype))
    return len(found)


def is_quantized(transformer: nn.Module) -> bool:
    """Whether the transformer has 8-bit linears."""
    return any(isinstance(module, Int8Linear) for module in transformer.modules())
