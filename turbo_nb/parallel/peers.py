"""Memory of the other GPUs of this machine: a rank writes its rows to where another rank reads them.

    window     memory of each rank that all ranks have mapped
    parts      where a kernel writes its result into the windows of all ranks
    send       a copy engine writes rows into a rank's window, on a stream of its own for that rank
    deliver    a flag follows the rows on the same streams, and later work waits for the flags of all ranks

A kernel that writes there needs no other transfer. A copy engine takes no multiprocessor from the kernels beside it,
and its rows may lie apart. So nothing is packed, and a tensor travels while the next one is computed. NCCL's kernels
need multiprocessors and contiguous tensors.

A flag is 1 when it has arrived, and the rank that waits for it sets it to 0. Two channels of flags take turns: a rank
sends on one only after it has received from all ranks on the other. So no flag and no row is overwritten before it is
read.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from ..ops.launch import only_compiles
from ..ops.parts import Parts

MEETS = 25.0  # seconds until all ranks are at the same place
LOOKS = 0.001  # seconds between two looks at whether they are
REFUSED = "windows/refused"  # a key of the store
CHANNELS = 2
FLAG = torch.int32
TRIAL = 1 << 16  # bytes that each rank sends first, to find out whether the others get them


class Memory(Protocol):
    """Memory that processes share, and copies into it; tests have one for the CPU. Addresses are numbers."""

    def allocate(self, nbytes: int) -> tuple[int, Tensor]:
        """Return the address of memory that other processes can map, and that memory as bytes."""

    def handle(self, address: int) -> bytes:
        """Return what another process maps memory with."""

    def map(self, handle: bytes) -> int:
        """Return the address of another process's memory."""

    def free(self, address: int, own: bool) -> None:
        """Give memory back, this process's own or another's."""

    def fork(self) -> None:
        """Let later copies wait for the work that has begun."""

    def copy(self, rank: int, to: int, to_pitch: int, source: int, pitch: int, width: int, rows: int) -> None:
        """Begin to copy rows of `width` bytes, `pitch` bytes apart. The copies to one rank keep their order."""

    def join(self) -> None:
        """Let later work wait for the copies."""

    def wait(self, flags: Tensor) -> None:
        """Let later work wait until all flags are 1, and set them to 0."""

    def synchronize(self) -> None:
        """Wait until all work and all copies are done."""

    def give_up(self) -> None:
        """Let nothing wait for a flag any more."""


@dataclass
class Window:
    """Memory of each rank that all ranks write into.

    Attributes:
        addresses: rank → address of its memory, in this process.
        own: this rank's memory, as bytes.
    """

    addresses: dict[int, int]
    own: Tensor = field(repr=False)

    def view(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return the first bytes of this rank's memory as a tensor."""
        return self.own[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)


class Peers:
    """The windows of a group. `works` makes them usable.

    Args:
        store: through which the ranks exchange handles.
        rank, size: as in `group.Group`.
        memory: of this rank's device.

    Attributes:
        given_up: whether this rank waits for no other one any more.
        grown: how often a window has grown. Addresses in a CUDA graph are outdated after that.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, memory: Memory):
        self.rank, self.size, self.memory, self.grown = rank, size, memory, 0
        self.given_up, self._store, self._met = False, store, 0
        self._windows: dict[str, Window] = {}
        self._tables: dict[tuple, Tensor] = {}
        self._one: int | None = None  # the address of a 1, which is copied to where another rank waits for it

    def window(self, name: str, nbytes: int) -> Window:
        """Return a window of at least `nbytes`. All ranks ask for the same windows, in the same order.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        found = self._windows.get(name)
        if found is None or found.own.numel() < nbytes:
            if found:
                self.grown += 1
                self._drop(name)
            address, own = self.memory.allocate(nbytes)
            found = self._windows[name] = Window({self.rank: address}, own)
            for rank, handle in enumerate(self._meet(self.memory.handle(address))):
                if rank != self.rank:
                    found.addresses[rank] = self.memory.map(handle)
        return found

    def send(self, window: Window, rank: int, at: int, to_pitch: int, rows: Tensor) -> None:
        """Begin to write the rows of a tensor into a rank's window, after the work that `memory.fork` saw.

        Args:
            at: the byte of the window at which the first row goes.
            to_pitch: bytes from row to row in the window.
            rows: (rows, …), a view whose rows are contiguous. It must live until `deliver`.
        """
        width, item = rows[0].numel(), rows.element_size()
        to = window.addresses[rank] + at
        self.memory.copy(rank, to, to_pitch, rows.data_ptr(), rows.stride(0) * item, width * item, rows.shape[0])

    def parts(self, window: Window, begins: Sequence[Sequence[int]], pitch: int, bounds: Sequence[int] = ()) -> Parts:
        """Return where a kernel writes parts into the windows of all ranks. `deliver` waits for that, too.

        Args:
            begins: clip → rank → the byte of its window at which its part begins.
            pitch, bounds: as in `Parts`, bounds empty for None.
        """
        addresses = [[window.addresses[rank] + at for rank, at in enumerate(of_clip)] for of_clip in begins]
        return Parts(self._table(addresses), pitch, self._table([bounds])[0] if bounds else None)

    def _table(self, numbers: Sequence[Sequence[int]]) -> Tensor:
        """Return numbers on this GPU, int64. They are kept, because a recorded step cannot fetch them"""
        key = tuple(map(tuple, numbers))
        if key not in self._tables:
            self._tables[key] = torch.tensor(numbers, dtype=torch.int64, device=self._flags.own.device)
        return self._tables[key]

    def deliver(self, channel: int) -> None:
        """Let later work wait for what all ranks have sent to this one since they delivered last."""
        self.memory.fork()  # because the flags must follow what kernels have written
        if not only_compiles():  # else no kernel waits for the flags, and the next step would find them
            self._raise_flags(channel)
        self.memory.join()
        self.memory.wait(self._flags_of(channel))

    def _raise_flags(self, channel: int) -> None:
        """Begin to copy a flag to each rank, after what was sent to it"""
        for rank in range(self.size):
            to = self._flags.addresses[rank] + (channel * self.size + self.rank) * FLAG.itemsize
            self.memory.copy(rank, to, FLAG.itemsize, self._one, FLAG.itemsize, FLAG.itemsize, 1)

    def _flags_of(self, channel: int) -> Tensor:
        return self._flags.view(FLAG, CHANNELS, self.size)[channel]

    def works(self) -> bool:
        """Return whether all ranks get what they send each other. Call it once, on all ranks, before all else.

        Raises:
            RuntimeError, OSError: this machine refuses it, or another rank does.
        """
        self._one, one = self.memory.allocate(FLAG.itemsize)
        one.view(FLAG).fill_(1)
        self._flags = self.window("flags", CHANNELS * self.size * FLAG.itemsize)
        self._flags.own.zero_()
        window = self.window("trial", self.size * TRIAL)
        window.own.zero_()
        self._meet()
        sent = torch.full((2, TRIAL), self.rank + 1, dtype=torch.uint8, device=window.own.device)
        self.memory.fork()
        for rank in range(self.size):  # half of each row, so that rows lie apart
            self.send(window, rank, self.rank * TRIAL, TRIAL // 2, sent[:, : TRIAL // 2])
        for channel in range(CHANNELS):
            self._raise_flags(channel)
        self._meet()
        expected = torch.arange(1, self.size + 1, dtype=torch.uint8).repeat_interleave(TRIAL)
        arrived = torch.equal(window.own[: expected.numel()].cpu(), expected)
        if arrived and (arrived := bool(self._flags.view(FLAG, CHANNELS, self.size).all())):
            for channel in range(CHANNELS):
                self.memory.wait(self._flags_of(channel))
            arrived = not self._flags.own.any()
        self._meet()
        return arrived

    def give_up(self) -> None:
        """Let this rank wait for no other one any more, because it has ended."""
        self.given_up = True
        self.memory.give_up()

    def refuse(self) -> None:
        """Let no other rank wait for this one, which cannot share memory."""
        self._store.set(REFUSED, b"-")

    def __del__(self):  # not earlier, because a step that has failed may still be under way
        for window in self._windows.values():
            for rank, address in window.addresses.items():
                with suppress(Exception):  # because the other rank may have ended
                    self.memory.free(address, own=rank == self.rank)
        if self._one is not None:
            with suppress(Exception):
                self.memory.free(self._one, own=True)

    def _drop(self, name: str) -> None:
        """Give a window back on all ranks"""
        addresses = self._windows[name].addresses
        self._meet()
        for rank in addresses.keys() - {self.rank}:
            self.memory.free(addresses.pop(rank), own=False)
        self._meet()  # because memory that another process has mapped must not be freed
        self.memory.free(addresses.pop(self.rank), own=True)
        del self._windows[name]

    def _meet(self, said: bytes = b"-") -> list[bytes]:
        """Wait until all ranks are here and have nothing under way. Return what each of them says"""
        self.memory.synchronize()
        self._met += 1
        keys = [f"windows/{self._met}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], said)
        end = time.monotonic() + MEETS
        while not self._store.check(keys):  # `wait` would print a warning of the socket
            if self.given_up or self._store.check([REFUSED]) or time.monotonic() > end:
                raise RuntimeError("another rank did not come to where memory is shared")
            time.sleep(LOOKS)
        return [self._store.get(key) for key in keys]
