"""8-bit linears: the weights are stored in 8 bits, the activations are quantised on the way.

`Int8Linear` has the tensors of upstream's checkpoints, one scale per tile of 128×128 (TurboDiffusion). `empty_linears`
puts it into a transformer. The kernels need one scale per row of the weight and of the activations:
`to_per_row_scales` converts the weights. That is faster, and more exact, because one large value makes only its own
row coarse.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from . import backends
from .errors import InputError
from .ops.linear8 import reference as linear8_reference
from .ops.linear8.reference import TILE, QuantizedRows, int8_dequantize, row_quantize

__all__ = [
    "Int8Linear",
    "dequantize",
    "empty_linears",
    "frozen",
    "has_per_row_scales",
    "int8_dequantize",
    "int8_linear",
    "int8_quantize",
    "is_quantized",
    "project",
    "quantize",
    "row_linear",
    "row_quantize",
    "to_per_row_scales",
    "to_tile_scales",
]


def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix with one scale per tile of 128×128 (TurboDiffusion).

    Args:
        x: (M, K).

    Returns:
        q (M, K) int8 and scale (⌈M/128⌉, ⌈K/128⌉) float32.

    Raises:
        InputError: x is not a matrix.
    """
    if x.ndim != 2:
        raise InputError(f"x has shape {tuple(x.shape)}. Expected a matrix (rows, columns).")
    return linear8_reference.int8_quantize(x)


def int8_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a weight quantised in tiles; x is quantised in tiles, too.

    Args:
        x: (…, K).
        w_q, w_scale: the weight (N, K), from `int8_quantize`.
        bias: (N,).

    Returns:
        (…, N) in x's dtype.

    Raises:
        InputError: the shapes do not fit.
    """
    tiles = tuple(-(-side // TILE) for side in w_q.shape)
    if w_q.ndim != 2 or x.shape[-1] != w_q.shape[1]:
        raise InputError(f"x is {tuple(x.shape)} and w_q {tuple(w_q.shape)}. Expected equal last dimensions.")
    if tuple(w_scale.shape) != tiles:
        raise InputError(f"w_scale has shape {tuple(w_scale.shape)}. Expected {tiles} for w_q {tuple(w_q.shape)}.")
    return backends.function("tile_linear", x)(x, w_q, w_scale, bias)


def row_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x (…, K) by a weight (N, K) with scales (N,), plus bias (N,): (…, N) in x's dtype."""
    if quantize_rows := backends.kernel("row_quantize", x):
        return _product(x.get_device())(quantize_rows(x), w_q, w_scale, bias)
    return linear8_reference.row_linear(x, w_q, w_scale, bias)


def _product(gpu: int):
    """Return the product of quantised rows on a GPU."""
    return backends.choose("linear", gpu).function


def has_per_row_scales(linears: Sequence[nn.Module]) -> bool:
    """Return whether all of these linears are in 8 bits with one scale per row, so that they take quantised rows."""
    return all(type(linear) is Int8Linear and linear.scale.ndim == 1 for linear in linears)


def project(linears: Sequence[nn.Module], x: Tensor | QuantizedRows) -> Iterator[Tensor]:
    """Yield each linear of x (B, L, K): (B, L, N). Quantises x once for all 8-bit linears.

    x may be `QuantizedRows` only if `has_per_row_scales(linears)`.
    """
    rows = x if isinstance(x, QuantizedRows) else None
    if rows is None and has_per_row_scales(linears) and (quantize_rows := backends.kernel("row_quantize", x)):
        rows = quantize_rows(x)
    for linear in linears:
        if rows is None:
            yield linear(x)
        else:
            yield _product(rows.q.get_device())(rows, linear.int8_weight, linear.scale, linear.bias)


class Int8Linear(nn.Module):
    """A linear layer with upstream's tensors: int8_weight (out, in), scale (⌈out/128⌉, ⌈in/128⌉), bias (out,).

    After `to_per_row_scales` scale is (out,).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=torch.bfloat16):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        tiles = -(-out_features // TILE), -(-in_features // TILE)
        self.int8_weight = frozen(torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.scale = frozen(torch.zeros(tiles, device=device))
        self.bias = frozen(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        apply = row_linear if self.scale.ndim == 1 else int8_linear
        return apply(x, self.int8_weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def takes_rows(device: torch.device | str) -> bool:
    """Return whether the 8-bit linears of a device take per-row scales: where the kernels run."""
    return torch.device(device).type == "cuda" and backends.choose("row_quantize", device).uses_triton


def quantize(weight: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Quantise a weight (N, K) for a device: per-row scales where the kernels run, else tile scales.

    The weight itself may be on another device, because offload loads it on the CPU.
    """
    if takes_rows(device):
        return row_quantize(weight)[:2]
    return int8_quantize(weight)


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weight of q (N, K) with per-row scales (N,) or tile scales."""
    return q.float() * scale[:, None] if scale.ndim == 1 else int8_dequantize(q, scale)


@torch.no_grad()
def to_per_row_scales(module: nn.Module, device: torch.device | str | None = None) -> None:
    """Give every row of the 8-bit weights in `module` its own scale, in place.

    This rounds a weight of 8 bits to 8 bits again. Measured, it costs less than finer activations gain.

    Args:
        device: where to compute. None: where each weight is. The weights stay where they are.
    """
    for linear in module.modules():
        if type(linear) is Int8Linear and linear.scale.ndim == 2:
            home = linear.int8_weight.device
            weight = int8_dequantize(*(x.to(device or home) for x in (linear.int8_weight, linear.scale)))
            q, scale, _ = row_quantize(weight)
            linear.int8_weight, linear.scale = frozen(q.to(home)), frozen(scale.to(home))


@torch.no_grad()
def to_tile_scales(module: nn.Module) -> None:
    """Undo `to_per_row_scales`, except for its rounding: the weights in `module` get upstream's tile scales again."""
    for linear in module.modules():
        if type(linear) is Int8Linear and linear.scale.ndim == 1:
            weight = dequantize(linear.int8_weight, linear.scale)
            linear.int8_weight, linear.scale = map(frozen, int8_quantize(weight))


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a parameter that is not trained.

    Not a buffer, because diffusers' group offload moves only parameters both ways.
    """
    return nn.Parameter(tensor, requires_grad=False)


def empty_linears(transformer: nn.Module, quantized: bool | Callable[[str], bool], dtype: torch.dtype) -> int:
    """Replace the blocks' linears, except `proj_l`, by linears without storage. Return how many.

    Upstream quantises exactly these. Call it before the weights are loaded.

    Args:
        transformer: changed in place.
        quantized: whether the new linears are in 8 bits, or a function that tells it by a weight's name.
        dtype: of plain weights and of biases.
    """
    found = [
        (parent, name, f"{path}.{name}.weight", child)
        for path, parent in transformer.named_modules()
        for name, child in parent.named_children()
        if f"{path}.".startswith("blocks.") and type(child) in (nn.Linear, Int8Linear) and name != "proj_l"
    ]
    for parent, name, weight, child in found:
        in_8_bits = quantized(weight) if callable(quantized) else quantized
        kind = Int8Linear if in_8_bits else nn.Linear
        setattr(parent, name, kind(child.in_features, child.out_features, child.bias is not None, "meta", dtype))
    return len(found)


def is_quantized(transformer: nn.Module) -> bool:
    """Return whether the transformer has 8-bit linears."""
    return any(isinstance(module, Int8Linear) for module in transformer.modules())
