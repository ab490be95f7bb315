"""GGUF files: a header of key-value pairs and tensor records, then the tensors' bytes.

The package `gguf` gives the number formats and their block sizes. Its reader is not used here: it makes an array for
every word of a vocabulary, and it does not end on a damaged length.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has the format.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, first_line

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 has 32-bit counts and was replaced within weeks
MAX_HEADER = 100_000_000  # bytes, the limit of safetensors; umT5's vocabulary needs 6 MB
MAX_DIMS = 8  # GGML has four, and files of Wan have a patch embedding of five
ALIGNMENT = 32  # bytes, unless general.alignment names another
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # ComfyUI's key for a tensor that was reshaped to fill blocks
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
PLAIN = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """A tensor in one of GGUF's quantised formats.

    Attributes:
        data: uint8 (bytes,), mapped from the file.
        quant_type: the number of the format, as `gguf.GGMLQuantizationType`.
        type_name: the name of the format, such as "Q8_0".
        shape: of the weight that the bytes decode to, (out, in) for a linear.
    """

    data: Tensor
    quant_type: int
    type_name: str
    shape: tuple[int, ...]


def read_gguf(path: Path) -> tuple[dict[str, Tensor | GGUFTensor], dict[str, str]]:
    """Read a GGUF file.

    Returns:
        The tensors by their names, and the header's single values as text. Arrays are left out.

    Raises:
        CheckpointError: the package gguf is missing, or the file uses what is not supported.
        ValueError, LookupError, struct.error: the file is damaged.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise CheckpointError(
            f"{str(path)!r} is a GGUF file, but the package gguf cannot be imported ({first_line(error)}). "
            "Expected it to be installed. Run: pip install gguf"
        ) from error
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        values, records, start = _header(data, path)
        size = len(data)
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # copy on write
    tensors: dict[str, Tensor | GGUFTensor] = {}
    end_before = 0
    for name, dims, number, offset in sorted(records, key=lambda record: record[3]):
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise CheckpointError(
                f"{name} in {str(path)!r} has GGUF's number format {number}. Expected one that the package gguf knows. "
                "Run: pip install -U gguf"
            ) from error
        block, width = GGML_QUANT_SIZES[kind]
        count = math.prod(dims)
        end = offset + count // block * width
        if (dims or (1,))[0] % block or offset < end_before or start + end > size:
            raise ValueError(f"{name} does not lie in its place")
        end_before = end
        shape = tuple(reversed(dims))  # GGUF's first dimension is the fastest
        original = values.get(ORIGINAL_SHAPE + name)
        if original is not None:
            shape = tuple(original)
            if math.prod(shape) != count or min(shape, default=1) < 0:
                raise ValueError(f"{name} has {count} numbers, but its original shape is {shape}")
        part = mapped[start + offset : start + end]
        if dtype := PLAIN.get(kind.name):
            if (start + offset) % dtype.itemsize:
                part = part.clone()
            tensors[name] = part.view(dtype).reshape(shape)
        else:
            tensors[name] = GGUFTensor(data=part, quant_type=number, type_name=kind.name, shape=shape)
    metadata = {key: str(value) for key, value in values.items() if not isinstance(value, tuple)}
    return tensors, metadata


def _header(data: mmap.mmap, path: Path) -> tuple[dict[str, Any], list[tuple[str, tuple, int, int]], int]:
    """Return the key-value pairs, a record of each tensor (name, dims, format, offset), and where the bytes start"""
    cursor = _Cursor(data)
    cursor.at = len(MAGIC)
    version = cursor.number("I")
    if version not in VERSIONS:
        order = " or of the other byte order" if not version & 0xFFFF else ""
        raise CheckpointError(
            f"{str(path)!r} is a GGUF file of version {version}{order}. Expected version 2 or 3. Take a newer file."
        )
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")

    def unique(found: dict, key: str) -> str:
        if not key:
            raise ValueError("a name is empty")
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        return key

    values: dict[str, Any] = {}
    for _ in range(value_count):
        key = unique(values, cursor.text())
        values[key] = cursor.value()
    records: dict[str, tuple] = {}
    for _ in range(tensor_count):
        name = unique(records, cursor.text())
        dims = cursor.numbers("Q", cursor.number("I", most=MAX_DIMS))
        records[name] = (name, dims, cursor.number("I"), cursor.number("Q"))
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= MAX_HEADER:
        raise ValueError(f"general.alignment is {alignment}")
    return values, list(records.values()), -(-cursor.at // alignment) * alignment


class _Cursor:
    """Reads little-endian values from the header, never further than MAX_HEADER."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > min(len(self.data), MAX_HEADER):
            raise ValueError("the header does not end")
        return self.data[start : self.at]

    def numbers(self, code: str, count: int) -> tuple:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def number(self, code: str, most: int | None = None) -> Any:
        (value,) = self.numbers(code, 1)
        if most is not None and value > most:
            raise ValueError(f"{value} where at most {most} can be")
        return value

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self) -> Any:
        """One value; a tuple for an array"""
        kind = self.number("I")
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind in SCALARS:
                return self.numbers(SCALARS[kind], count)
            read: Callable = {STRING: self.text}[kind]  # nested arrays are not in use
            return tuple(read() for _ in range(count))
        return self.text() if kind == STRING else self.number(SCALARS[kind])
