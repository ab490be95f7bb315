"""Weights in main memory, packed into a few pinned pieces, in groups that a GPU gets with one or two copies each."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from .pinned import pinned_empty

PIECE = 2**29  # bytes; a power of two, because torch rounds pinned memory up to one
ALIGNED = 512  # bytes; each tensor begins at a multiple, as in memory of CUDA's allocator


@dataclass(eq=False)
class Group:
    """Tensors that are copied together.

    Args:
        ranges: the bytes of all of them in main memory.
        places: tensor → its data in main memory, the number of its range, and where it begins there.
    """

    ranges: list[Tensor] = field(default_factory=list)
    places: dict[Tensor, tuple[Tensor, int, int]] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Bytes that copies of the ranges take one after the other."""
        return sum(aligned(part.nbytes) for part in self.ranges)

    def bind(
        self, tensors: Iterable[Tensor], copies: Sequence[Tensor], device: torch.device,
        moved: list[tuple[Tensor, Tensor]],
    ) -> bool:  # fmt: skip
        """Give tensors their data in copies of the ranges on a device. Return whether all have it there.

        Tensors that were added or replaced after packing, such as a LoRA's, are copied one by one. `moved` gets each
        tensor and the data that it had.
        """
        whole = True
        for tensor in tensors:
            moved.append((tensor, tensor.data))
            data, number, start = self.places.get(tensor, (None, None, None))
            if data is not None and data.data_ptr() == tensor.data_ptr():
                tensor.data = _part(copies[number], start, tensor)
            else:
                tensor.data, whole = tensor.data.to(device), False
        return whole


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module, each once."""
    return list(dict.fromkeys((*module.parameters(), *module.buffers())))


def pack(groups: Sequence[Sequence[Tensor]], pin: bool) -> list[Group]:
    """Move tensors into pieces of main memory.

    Args:
        groups: the tensors, in the order of their use. A tensor that is not dense stays where it is.
        pin: whether to pin the pieces. After a first refusal of the system no piece is pinned.
    """
    packed, pieces, size = [Group() for _ in groups], [[]], 0
    for group, tensors in zip(packed, groups, strict=True):
        for tensor in tensors:
            if not _is_dense(tensor):
                continue
            if pieces[-1] and size + aligned(tensor.nbytes) > PIECE:
                pieces.append([])
                size = 0
            pieces[-1].append((group, tensor, size))
            size += aligned(tensor.nbytes)
    for content in filter(None, pieces):
        _, last, start = content[-1]
        piece = pinned_empty(start + last.nbytes, pin=pin)
        pin = piece.is_pinned()
        for group, members in groupby(content, key=lambda one: one[0]):
            members = list(members)
            begin, (_, last, end) = members[0][2], members[-1]
            group.ranges.append(piece[begin : end + last.nbytes])
            for _, tensor, start in members:  # this frees the old memory before the next piece is allocated
                data = _part(piece, start, tensor)
                data.copy_(tensor.data)
                tensor.data = data
                group.places[tensor] = data, len(group.ranges) - 1, start - begin
    return packed


def unpacked(groups: Sequence[Sequence[Tensor]]) -> list[Group]:
    """Return groups whose tensors stay in the memory that they have, such as that of a mapped file."""
    return [
        Group(
            ranges=[tensor.data.reshape(-1).view(torch.uint8) for tensor in dense],
            places={tensor: (tensor.data, number, 0) for number, tensor in enumerate(dense)},
        )
        for dense in ([one for one in tensors if one.is_contiguous() and _is_dense(one)] for tensors in groups)
    ]


def aligned(size: int) -> int:
    """Return the next multiple of ALIGNED."""
    return math.ceil(size / ALIGNED) * ALIGNED


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor's elements lie side by side, in whatever order of strides"""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == extent


def _part(piece: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the bytes of a piece from `start` on as a tensor of this dtype, shape and strides"""
    return piece[start : start + like.nbytes].view(like.dtype).as_strided(like.shape, like.stride())
