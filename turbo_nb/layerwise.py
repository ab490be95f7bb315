"""Layerwise casting of umT5: weights stay in 8 bits, and each layer casts its own weight while it works.

y = (x qᵀ) · scale is as exact as the file, because bf16 holds every fp8 and int8 number. diffusers' hook for layerwise
casting is not used here, for four reasons. UMT5's feed-forward casts activations to the dtype of `wo.weight`.
transformers takes the dtype of a model from its first parameter. The hook would cast all rows of the embedding for each
prompt. It also casts every weight back.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import vocabulary
from .files.numbers import FP8, Encoded
from .files.shapes import EMBEDDING, TIED
from .linear import frozen

LINEAR = re.compile(r"\.(SelfAttention\.[qkvo]|DenseReluDense\.w[io](_[01])?)\.weight$")
Stored = tuple[Tensor, Tensor | None]  # numbers, and their float32 scale: (), (rows,) or none


class StoredWeight(nn.Module):
    """A layer whose weight stays as the file stores it.

    Its tensors are bytes, so that `module.to(dtype)` does not round them.

    Args:
        data: the weight (rows, columns) in 8 bits or in floats.
        scale: (), for all rows, or (rows,). None: no scale.
    """

    weight = None  # because UMT5's feed-forward casts activations to the dtype of its last linear's `weight`

    def __init__(self, data: Tensor, scale: Tensor | None = None):
        super().__init__()
        self.stored_dtype = data.dtype
        self.stored = frozen(data.contiguous().view(torch.uint8))
        self.stored_scale = None if scale is None else frozen(scale.float().reshape(-1).view(torch.uint8))

    @property
    def scale(self) -> Tensor | None:
        """The scale (1,) or (rows,) in float32."""
        return None if self.stored_scale is None else self.stored_scale.view(torch.float32)

    def extra_repr(self) -> str:
        return f"{str(self.stored_dtype).removeprefix('torch.')}, scales={0 if self.scale is None else len(self.scale)}"


class StoredLinear(StoredWeight):
    """A linear without bias: x (…, columns) to (…, rows) in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, cast(self.stored.view(self.stored_dtype), x.dtype))
        return y if self.scale is None else (y * self.scale).to(x.dtype)


class StoredEmbedding(StoredWeight):
    """A table of embeddings: ids (…) to (…, columns) in `dtype`, or in that of a later `module.to(dtype)`."""

    def __init__(self, data: Tensor, scale: Tensor | None, dtype: torch.dtype):
        super().__init__(data, scale)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=data.device), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.stored).view(self.stored_dtype).to(self.like.dtype)
        if self.scale is None:
            return rows
        scale = self.scale if len(self.scale) == 1 else self.scale[ids][..., None]
        return (rows * scale).to(self.like.dtype)


def encoder_tensors(tensors: Mapping[str, Tensor | Encoded]) -> dict[str, Tensor | Encoded]:
    """Return the tensors of a text encoder's file without its tokenizer, and with its embedding under one name."""
    own = {name: tensor for name, tensor in tensors.items() if name not in (vocabulary.TENSOR, TIED)}
    if TIED in tensors:
        own.setdefault(EMBEDDING, tensors[TIED])
    return own


def stored_weights(tensors: Mapping[str, Tensor | Encoded], dtype: torch.dtype | None) -> dict[str, Stored]:
    """Return the weights of a text encoder that stay as the file stores them, by name.

    These are the linears in fp8 or in int8 with per-row scales. The embedding joins them if its file has such linears,
    and if it takes no more room than in `dtype`. Norms and position biases are small, and are always decoded.

    Args:
        tensors: of a text encoder, by transformers' names.
        dtype: of the activations. float16 keeps nothing, because products without their scale can overflow. None keeps
            nothing either.
    """
    if dtype in (None, torch.float16):
        return {}
    found = {name: _in_8_bits(tensor) for name, tensor in tensors.items() if LINEAR.search(name)}
    found = {name: stored for name, stored in found.items() if stored}
    table = tensors.get(EMBEDDING)
    if found and isinstance(table, Encoded):
        found |= {EMBEDDING: stored} if (stored := _in_8_bits(table)) else {}
    elif found and table is not None and table.dtype != dtype and table.itemsize <= dtype.itemsize:
        found[EMBEDDING] = table, None
    return found


def is_large(name: str) -> bool:
    """Return whether a tensor is one of the linears or the embedding, which are almost all of the encoder."""
    return name == EMBEDDING or LINEAR.search(name) is not None


def size(tensors: Mapping[str, Tensor | Encoded], dtype: torch.dtype) -> int:
    """Return the bytes of a text encoder that is loaded in `dtype`."""
    tensors = encoder_tensors(tensors)
    stored = stored_weights(tensors, dtype)
    return sum(
        sum(part.nbytes for part in stored[name] if part is not None)
        if name in stored
        else tensor.numel() * dtype.itemsize
        for name, tensor in tensors.items()
    )


def is_finite(data: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor Inf. Takes no memory of the tensor's size."""
    if not data.is_floating_point() or not data.numel():
        return True
    if data.itemsize > 1:
        return all(bool(extreme.isfinite()) for extreme in data.aminmax())
    first = 0x7C if data.dtype is torch.float8_e5m2 else 0x7F  # the first number that is not finite, without its sign
    return bool(data.view(torch.int8).amax() < first) and bool(data.view(torch.uint8).amax() < first + 0x80)


def is_zero(data: Tensor) -> bool:
    """Return whether all numbers of a matrix or kernel are zero. Of most others it reads the first row only."""
    data = data.view(torch.int8) if data.dtype in FP8 else data
    return not data[:1].any() and not data.any()


def cast(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `data.to(dtype)`; on a CPU in a third of the time for e4m3, because torch casts number by number."""
    if data.dtype is not torch.float8_e4m3fn or data.device.type != "cpu" or dtype.itemsize < 2:
        return data.to(dtype)
    # Put the sign, 4 bits of exponent and 3 of mantissa where bf16 has them. The exponents start at -7 and at -127.
    bits = data.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(-0x7810)
    return bits.view(torch.bfloat16).mul_(2.0**120).to(dtype)


def _in_8_bits(tensor: Tensor | Encoded) -> Stored | None:
    """The 8-bit numbers of a matrix and their scale, () or (rows,); None for another number format"""
    if not isinstance(tensor, Encoded) or tensor.ndim != 2:
        return None
    stored = tensor.fp8() or tensor.int8()
    return stored if stored and (stored[1] is None or stored[1].ndim < 2) else None
