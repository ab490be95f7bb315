"""Blocks that work on a GPU while their weights are in main memory: each is copied there before its turn.

A stream of its own copies the next block while the GPU computes the one before. Events order the two, so the host
waits for neither. The memory on the GPU is allocated once: a cell for each block that stays there, and CELLS cells that
the other blocks share. A block that stays is copied at its first turn, which hides that copy as well.

diffusers' group offloading is not used, for three reasons. It streams all blocks of a model or none. The host waits for
the GPU before and after each block. And umT5 is a single group to it, with a table of embeddings of 2 GB.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..machine import probe
from .packed import Group, aligned, pack, tensors_of, unpacked

CELLS = 2  # one block works while the next one arrives
PIN_ROOM = 1.25  # free main memory that pinning takes, in sizes of the weights; some is lost at the ends of pieces


class BlockStream:
    """Copies blocks to a device around their forwards, until `remove`.

    Args:
        blocks: in the order of their work.
        groups: where the weights of each block are in main memory.
        keep: how many blocks stay on the device once they are there. The others are spread evenly between them.
        device: where the blocks work.
        again: whether the first block follows the last one, as in the steps of a clip.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], groups: Sequence[Group], keep: int, device: str | torch.device,
        again: bool = True,
    ):  # fmt: skip
        self._blocks, self._groups, self._device, self._again = list(blocks), list(groups), torch.device(device), again
        count = len(self._blocks)
        passing = count - min(keep, count)
        shared = {index * count // passing for index in range(passing)}
        self._home = {index: cell for cell, index in enumerate(sorted({*range(count)} - shared))}  # block → own cell
        self._count = len(self._home) + min(CELLS, passing)
        self._size = max((group.room for group in self._groups), default=0)  # bytes of a cell
        self._memory: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._reset()
        self._hooks = [
            hook
            for index, block in enumerate(self._blocks)
            for hook in (
                block.register_forward_pre_hook(lambda *_, index=index: self._enter(index)),
                block.register_forward_hook(lambda *_, index=index: self._leave(index)),
            )
        ]

    def _reset(self) -> None:
        self._spare = list(range(len(self._home), self._count))  # cells without a block
        self._cells: dict[int, int] = {}  # block → its cell
        self._copies: dict[int, list[Tensor]] = {}  # block → copies of its ranges
        self._arrived: dict[int, torch.cuda.Event] = {}  # block → after its copies
        self._done: dict[int, torch.cuda.Event] = {}  # cell → after the last block in it has worked
        # Block with its weights on the device → its tensors, and their data in main memory
        self._moved: dict[int, list[tuple[Tensor, Tensor]]] = {}
        # Block and cell → what `_moved` gets, and the data on the device; kept because the host needs 0.7 ms to find it
        self._known: dict[tuple[int, int], tuple[list[tuple[Tensor, Tensor]], list[Tensor]]] = {}

    @property
    def loaded(self) -> list[int]:
        """The blocks that are on the device, or on their way."""
        return sorted(self._cells)

    def begin(self) -> None:
        """Allocate the memory on the device, and begin to copy the first block."""
        if self._memory is None:
            self._memory = torch.empty(self._count * self._size, dtype=torch.uint8, device=self._device)
            if self._device.type == "cuda":
                self._stream = self._stream or torch.cuda.Stream(self._device)
                self._stream.wait_stream(torch.cuda.current_stream(self._device))  # the memory may be in use still
            self._fetch(0)

    def release(self) -> None:
        """Give the memory on the device back, after the device has waited for copies that are on their way."""
        for index in list(self._moved):
            self._unbind(index)
        if self._stream:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._memory = None
        self._reset()

    def remove(self) -> None:
        """Release, and let the blocks work where their weights are."""
        self.release()
        for hook in self._hooks:
            hook.remove()

    def _fetch(self, index: int) -> None:
        """Begin to copy a block that is not on the device"""
        cell = self._home[index] if index in self._home else self._spare.pop(0)
        self._cells[index] = cell
        copies, at = self._copies.setdefault(index, []), cell * self._size
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            if event := self._done.pop(cell, None):
                self._stream.wait_event(event)
            for part in self._groups[index].ranges:
                copies.append(self._memory[at : at + part.nbytes])
                copies[-1].copy_(part, non_blocking=True)
                at += aligned(part.nbytes)
            if self._stream:
                self._arrived[index] = self._stream.record_event()

    def _drop(self, index: int) -> None:
        """Let another block have the cell of a block"""
        cell = self._cells.pop(index)
        del self._copies[index]
        self._arrived.pop(index, None)
        self._spare.append(cell)
        if self._stream:
            self._done[cell] = torch.cuda.current_stream(self._device).record_event()

    def _enter(self, index: int) -> None:
        """Give a block its weights on the device"""
        self.begin()
        if index in self._home and index in self._moved:
            return
        if index in self._moved:  # because its last forward has failed
            self._unbind(index)
        if index not in self._cells:
            if index not in self._home and not self._spare:  # the blocks are called in another order
                self._drop(next(one for one in self._cells if one not in self._home and one not in self._moved))
            self._fetch(index)
        if event := self._arrived.pop(index, None):
            torch.cuda.current_stream(self._device).wait_event(event)
        self._bind(index)

    def _bind(self, index: int) -> None:
        key = index, self._cells[index]
        if key in self._known:
            self._moved[index], copies = self._known[key]
            for (tensor, _), data in zip(self._moved[index], copies, strict=True):
                tensor.data = data
            return
        moved = self._moved[index] = []
        try:
            whole = self._groups[index].bind(tensors_of(self._blocks[index]), self._copies[index], self._device, moved)
        except BaseException:
            self._unbind(index)
            raise
        if whole:
            self._known[key] = moved, [tensor.data for tensor, _ in moved]

    def _leave(self, index: int) -> None:
        """Give a block that does not stay its weights in main memory back, and begin to copy the next one"""
        if index not in self._home and index in self._moved:
            self._unbind(index)
            self._drop(index)
        following = self._next(index)
        if following is not None and (following in self._home or self._spare):
            self._fetch(following)

    def _unbind(self, index: int) -> None:
        for tensor, data in self._moved.pop(index):
            tensor.data = data

    def _next(self, index: int) -> int | None:
        """Return the next block after `index` that is not on the device. None: it needs no other"""
        count = len(self._blocks)
        following = range(index + 1, index + count if self._again else count)
        return next((one % count for one in following if one % count not in self._cells), None)


class StreamedEncoder:
    """umT5's encoder, whose blocks work on a GPU one by one while its weights are in main memory.

    The table of embeddings stays in main memory, where a prompt's rows are looked up. Results are those of an encoder
    that is on the GPU as a whole, bit by bit.

    Args:
        module: a `UMT5EncoderModel` in main memory.
        device: where it works.
        pin: whether to move the blocks into pinned memory, from which copies are several times faster. That takes
            seconds, and as much main memory as the blocks. Where less is free, they stay where they are.
    """

    def __init__(self, module: nn.Module, device: str | torch.device, pin: bool):
        self.module, device = module, torch.device(device)
        stack = module.encoder
        tensors = [tensors_of(block) for block in stack.block]
        size = sum(tensor.nbytes for block in tensors for tensor in block)
        pin = pin and device.type == "cuda" and probe.free_memory("cpu") > PIN_ROOM * size
        groups = pack(tensors, True) if pin else unpacked(tensors)
        self._blocks = BlockStream(stack.block, groups, 0, device, again=False)
        stack.final_layer_norm.to(device)

        def onto(where: torch.device):
            return lambda value: value.to(where) if isinstance(value, Tensor) else value

        def inputs(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            self._blocks.begin()
            return tuple(map(onto(device), args)), {name: onto(device)(value) for name, value in kwargs.items()}

        stack.register_forward_pre_hook(inputs, with_kwargs=True)
        stack.embed_tokens.register_forward_pre_hook(lambda _, args: tuple(map(onto(torch.device("cpu")), args)))
        stack.embed_tokens.register_forward_hook(lambda _, args, rows: rows.to(device))

    def release(self) -> None:
        """Give the memory on the GPU back."""
        self._blocks.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
