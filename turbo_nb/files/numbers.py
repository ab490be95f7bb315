"""Number formats: how a weight file stores the numbers of its tensors.

`encode` finds the tensors that are stored in another format than bf16, fp16, fp32 or fp64, and puts an `Encoded` in
their place. Its key is the tensor's name with the end `.weight`, whatever the file calls it. An `Encoded` keeps the
file's bytes, and decodes them to float32 when it is asked to.

A tensor of integers or of fp8 is never taken for a plain weight. Either its format is in `FORMATS`, or `encode` raises
an error that names the format.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, first_line
from ..ops.linear8.reference import TILE, int8_dequantize
from ..values import shown
from .gguf_file import GGUFTensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
ADVICE = "Take the model's bf16, fp8 or int8 file, or a GGUF file."


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """How one family of programs stores a weight in 8 bits: `data` times `scale`.

    Args:
        name: who writes it.
        data: the end of the data's name.
        scale: the end of the scale's name; None for data without a scale.
        dtypes: of the data.
        ignored: ends of names that the weight does not depend on.
    """

    name: str
    data: str
    scale: str | None
    dtypes: tuple[torch.dtype, ...]
    ignored: tuple[str, ...] = ()


INT8_OR_FP8 = (torch.int8, *FP8)
ACTIVATIONS = ("scale_input", "input_scale", "output_scale")  # scales of activations
# The first format whose data and scale a module has is the module's format.
FORMATS = (
    NumberFormat(name="TurboDiffusion", data="int8_weight", scale="scale", dtypes=(torch.int8,)),
    NumberFormat(name="quanto", data="weight._data", scale="weight._scale", dtypes=INT8_OR_FP8, ignored=ACTIVATIONS),
    NumberFormat(name="SGLang", data="weight", scale="weight_scale_inv", dtypes=INT8_OR_FP8),
    NumberFormat(
        name="LightX2V, ComfyUI", data="weight", scale="weight_scale", dtypes=INT8_OR_FP8,
        ignored=("comfy_quant", *ACTIVATIONS),
    ),
    NumberFormat(name="ComfyUI, kijai", data="weight", scale="scale_weight", dtypes=INT8_OR_FP8, ignored=ACTIVATIONS),
    NumberFormat(name="unscaled fp8", data="weight", scale=None, dtypes=FP8, ignored=("comfy_quant", *ACTIVATIONS)),
)  # fmt: skip
# Ends of names that only formats without a loader have, and the name of that format
REFUSED = {
    "weight_scale_2": "NVFP4",
    "weight.absmax": "bitsandbytes' 4-bit or 8-bit format",
    "weight.SCB": "bitsandbytes' 8-bit format",
    "SCB": "bitsandbytes' 8-bit format",
    "weight._shift": "quanto's 4-bit format",
    "qweight": "a 4-bit format (AWQ, GPTQ or SVDQuant)",
    "wscales": "SVDQuant",
}
COMFY = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")  # the formats of `comfy_quant` that can be decoded
BLOCKS = 1 << 16  # of a GGUF tensor that are decoded at once
MARKER = "scaled_fp8"  # an empty tensor that says that fp8 weights have scales
KNOWN = {end for one in FORMATS for end in (one.data, one.scale, *one.ignored) if end}
ENDS = sorted({*REFUSED, *KNOWN}, key=len, reverse=True)
SPLIT = re.compile(rf"(.+)\.({'|'.join(map(re.escape, ENDS))})")


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tensor in a number format that has to be decoded.

    Args:
        format: "int8 tiles", "int8 rows", "fp8", "GGUF Q8_0" and others.
        shape: of the decoded tensor.
        data: the numbers: int8 or fp8 of `shape`, or the bytes of GGUF blocks.
        scale: float32: (), (N,) for each row, or (⌈N/128⌉, ⌈K/128⌉) for each tile of (N, K). None: no scale.
    """

    format: str
    shape: torch.Size
    data: Tensor
    scale: Tensor | None = None

    @property
    def ndim(self) -> int:
        """The number of dimensions of the decoded tensor."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def is_int8(self) -> bool:
        """Whether `int8` gives the file's own bytes."""
        return self.data.dtype is torch.int8 and self.ndim == 2

    def numel(self) -> int:
        """Return the number of elements of the decoded tensor."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Return True, because the decoded tensor is."""
        return True

    def decode(self, device: torch.device | str | None = None) -> Tensor:
        """Return the tensor in float32.

        Args:
            device: where to decode. None: where the bytes are.
        """
        data = self.data.to(device or self.data.device)
        if data.is_meta:  # a file of which only the head was read
            return torch.empty(self.shape, device="meta")
        if self.format.startswith("GGUF"):
            return _decode_gguf(data, self.format.removeprefix("GGUF ")).reshape(self.shape)
        if self.scale is None:
            return data.float()
        scale = self.scale.to(data.device, torch.float32)
        if scale.ndim == 2:
            return int8_dequantize(data.float(), scale)
        return data.float().mul_(scale.reshape(-1, *[1] * (self.ndim - 1)))

    def int8(self) -> tuple[Tensor, Tensor] | None:
        """Return the file's bytes as 8-bit linears take them; None for other formats.

        Returns:
            q (N, K) int8, and the scale of each row (N,), or of each tile, in float32.
        """
        if not self.is_int8:
            return None
        scale = self.scale.float()
        return self.data, scale.expand(self.shape[0]).contiguous() if scale.numel() == 1 and scale.ndim < 2 else scale

    def fp8(self) -> tuple[Tensor, Tensor | None] | None:
        """Return the file's fp8 numbers and their scale, () or (N,); None for other formats."""
        if self.data.dtype not in FP8 or (self.scale is not None and self.scale.ndim == 2):
            return None
        return self.data, self.scale


def encode(tensors: Mapping[str, Any], path: object, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Put an `Encoded` in place of every tensor that is not stored as plain floats.

    Args:
        tensors: of a model, by any names. A GGUF file has `GGUFTensor`s among them.
        path: of the file, for errors.
        metadata: of the header of a safetensors file.

    Returns:
        Tensors and `Encoded`s. The key of an encoded weight ends in `.weight`.

    Raises:
        CheckpointError: a number format is not supported, or a scale does not fit its weight.
    """
    _check_metadata(metadata or {}, path)
    result: dict[str, Any] = {}
    modules: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        match = SPLIT.fullmatch(name)
        if isinstance(tensor, GGUFTensor):
            if not _has_decoder(tensor.type_name):
                raise _refused(name, f"GGUF {tensor.type_name}", path)
            shape = torch.Size(tensor.shape)
            result[name] = Encoded(f"GGUF {tensor.type_name}", shape, tensor.data)
        elif match:
            modules.setdefault(match[1], {})[match[2]] = tensor
        elif tensor.dtype in FP8 and name != MARKER:
            result[name] = Encoded("fp8", tensor.shape, tensor)
        elif name != MARKER:
            result[name] = tensor
    for module, parts in modules.items():
        result |= _encode_module(module, parts, path)
    _check_scales(result, tensors, path)
    return result


def summary(tensors: Mapping[str, Any]) -> str:
    """Return the number formats of the linears, the most used first, such as "int8 tiles" or "GGUF Q4_K and Q6_K"."""
    count: dict[str, int] = {}
    for tensor in tensors.values():
        if isinstance(tensor, Encoded) or tensor.is_floating_point():
            name = tensor.format if isinstance(tensor, Encoded) else str(tensor.dtype).removeprefix("torch.")
            count[name] = count.get(name, 0) + tensor.numel()
    encoded = [name for name in count if " " in name or name == "fp8"]
    names = sorted(encoded or count, key=count.get, reverse=True)
    if names and names[0].startswith("GGUF"):
        return "GGUF " + " and ".join(name.removeprefix("GGUF ") for name in names)
    return " and ".join(names if encoded else names[:1]) or "no numbers"


def _encode_module(module: str, parts: dict[str, Any], path: object) -> dict[str, Any]:
    """The entries of one module: its weight, and whatever no number format takes"""
    names = {end: f"{module}.{end}" for end in parts}
    for end, what in REFUSED.items():
        if end in parts:
            raise _refused(names[end], what, path)
    _check_comfy(names.get("comfy_quant", ""), parts.get("comfy_quant"), path)
    for one in FORMATS:
        if one.data not in parts or (one.scale is not None and one.scale not in parts):
            continue
        data, scale = parts[one.data], parts.get(one.scale)
        if data.dtype in FLOATS and one.scale is None:
            break
        if scale is not None and scale.dtype not in FLOATS:
            raise _refused(names[one.scale], "MXFP8 or another format of blocks", path)
        if data.dtype not in one.dtypes:
            continue
        if one.scale is not None or not _scaled(parts):
            weight = _scaled_weight(names[one.data], data, names.get(one.scale), scale, path)
            rest = parts.keys() - {one.data, one.scale, *one.ignored}
            return {f"{module}.weight": weight} | {names[end]: parts[end] for end in rest}
    for end in dict.fromkeys(one.data for one in FORMATS):
        if end not in parts or (end == "weight" and parts[end].dtype in FLOATS):
            continue
        dtype = str(parts[end].dtype).removeprefix("torch.")
        if parts[end].dtype not in INT8_OR_FP8:
            raise _refused(names[end], dtype, path)
        scales = ", ".join(f".{one.scale}" for one in FORMATS if one.data == end and one.scale)
        raise CheckpointError(
            f"{names[end]} in {str(path)!r} is {dtype} without a scale. Expected a tensor {scales} beside it. "
            "Download the file again."
        )
    return {names[end]: tensor for end, tensor in parts.items() if end not in ACTIVATIONS}


def _scaled(parts: Mapping[str, Any]) -> bool:
    return any(one.scale in parts for one in FORMATS if one.scale)


def _scaled_weight(name: str, data: Tensor, scale_name: str | None, scale: Tensor | None, path: object) -> Encoded:
    """Raises CheckpointError for a scale that does not fit the data"""
    kind = "int8" if data.dtype is torch.int8 else "fp8"
    if scale is None:
        return Encoded(kind, data.shape, data)
    rows = data.shape[0] if data.ndim else 0
    tiles = tuple(-(-side // TILE) for side in data.shape) if data.ndim == 2 else None
    shape = tuple(scale.shape)
    if scale_name.endswith((".scale", "scale_inv")) and shape == tiles:
        return Encoded(f"{kind} tiles", data.shape, data, scale)
    if scale.numel() == 1:
        return Encoded(f"{kind} with one scale", data.shape, data, scale.reshape(()))
    if shape == (rows,) or shape == (rows, *[1] * (data.ndim - 1)):
        return Encoded(f"{kind} rows", data.shape, data, scale.reshape(-1))
    if shape == tiles:
        return Encoded(f"{kind} tiles", data.shape, data, scale)
    if tiles and len(shape) == 2 and shape[0] == rows and data.shape[1] % shape[1] == 0:
        raise _refused(scale_name, f"MXFP8 or another format of blocks, here of {data.shape[1] // shape[1]}", path)
    raise CheckpointError(
        f"{scale_name} in {str(path)!r} has shape {shape}. Expected (), ({rows},), ({rows}, 1) or {tiles} for {name} "
        f"of shape {tuple(data.shape)}. Download the file again."
    )


def _check_scales(result: Mapping[str, Any], tensors: Mapping[str, Any], path: object) -> None:
    """Raise CheckpointError where some fp8 matrices of a file have scales, and another one lacks it"""
    fp8 = {name: one for name, one in result.items() if isinstance(one, Encoded) and one.format.startswith("fp8")}
    bare = [name for name, one in fp8.items() if one.scale is None and one.ndim == 2 and name.endswith(".weight")]
    if bare and (MARKER in tensors or any(one.scale is not None for one in fp8.values())):
        raise CheckpointError(
            f"{bare[0]} in {str(path)!r} is fp8 without a scale, and the file's other weights have one. Expected a "
            "scale for each fp8 weight. Download the file again."
        )


def _check_metadata(metadata: Mapping[str, str], path: object) -> None:
    """Raise CheckpointError where ComfyUI's header metadata names a format that cannot be decoded"""
    text = metadata.get("_quantization_metadata")
    if text is None:
        return
    try:
        layers = json.loads(text).get("layers", {})
        formats = [(name, dict(layer)) for name, layer in layers.items()]
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"_quantization_metadata in {str(path)!r} is {shown(text)} ({first_line(error)}). Expected JSON with "
            "layers. Download the file again."
        ) from error
    for name, layer in formats:
        _check_format(name, layer, path)


def _check_comfy(name: str, tensor: Tensor | None, path: object) -> None:
    """Raise CheckpointError where ComfyUI's note on a weight names a format that cannot be decoded"""
    if tensor is None or tensor.is_meta:
        return
    try:
        layer = dict(json.loads(bytes(tensor.to(torch.uint8).flatten().tolist())))
    except (RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name} in {str(path)!r} is not readable ({first_line(error)}). Expected JSON that names a number format. "
            "Download the file again."
        ) from error
    _check_format(name, layer, path)


def _check_format(name: str, layer: Mapping[str, Any], path: object) -> None:
    kind = layer.get("format")
    if kind not in COMFY:
        raise _refused(name, {"nvfp4": "NVFP4", "mxfp8": "MXFP8"}.get(str(kind), shown(kind)), path)
    if rotated := [key for key, value in layer.items() if "rot" in str(key) and value]:
        raise _refused(name, f"{kind} of rotated weights ({rotated[0]})", path)


def _refused(name: str, what: str, path: object) -> CheckpointError:
    known = ", ".join(["bf16", "fp16", "fp32", "int8 and fp8 with scales", "fp8", "quanto's int8", "GGUF"])
    return CheckpointError(
        f"{name} in {str(path)!r} has the number format {what}, which turbo_nb cannot load. Expected one of {known}. "
        f"{ADVICE}"
    )


@cache
def _has_decoder(type_name: str) -> bool:
    """Return whether the gguf package decodes one of its formats. Some are only used while a model runs."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[type_name]
    _, width = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros(width, np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _decode_gguf(data: Tensor, type_name: str) -> Tensor:
    """Decode the bytes of a GGUF tensor: with diffusers' torch code, else with the gguf package's NumPy code"""
    import gguf
    from diffusers.quantizers.gguf.utils import dequantize_functions

    kind = gguf.GGMLQuantizationType[type_name]
    if (decode := dequantize_functions.get(kind)) is None:
        return torch.from_numpy(gguf.quants.dequantize(data.cpu().numpy(), kind)).to(data.device)
    block, width = gguf.GGML_QUANT_SIZES[kind]
    blocks = data.reshape(-1, width)
    out = torch.empty(len(blocks), block, device=data.device)
    for begin in range(0, len(blocks), BLOCKS):  # some at a time, because there are several temporaries
        part = slice(begin, begin + BLOCKS)
        out[part] = decode(blocks[part], block, width, dtype=torch.float32)
    return out
