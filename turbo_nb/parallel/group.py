"""Exchanges of tensors between ranks: NCCL between GPUs, gloo between CPUs, and `peers` for the steps on GPUs.

The groups are objects of their own beside torch's default group. So they do not meet with a user's own use of
torch.distributed, with a second model, or with a group that failed.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..machine import probe
from .cuda_memory import CudaMemory
from .peers import Memory, Peers

logger = logging.getLogger("turbo_nb")
JOIN = timedelta(seconds=25)  # until all ranks have joined
LONGEST = timedelta(hours=1)  # of an exchange; `ranks.Team` finds a rank that hangs earlier
ABORTS = 2.0  # seconds that ending the exchanges may take
CTAS = 32  # multiprocessors that an exchange takes; with 16 it took half as long again on two H200
# The watchdog of NCCL would end the user's process. `ranks.Team` ends the exchange and raises an error instead.
NO_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


class Group:
    """The ranks of one model. `connect` makes it usable.

    Args:
        store: through which the ranks find each other.
        rank: the number of this process.
        size: how many ranks there are.
        device: of this rank, "cpu" or a GPU with its number.

    Attributes:
        exchanges: how many this rank has begun. A rank that falls behind for long is hung.
        begins: number of the exchange that it begins now; else None. That takes no time, so a rank that begins one for
            long is hung, too.
        peers: memory that the GPUs write for each other. None on a CPU, and where they cannot.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, device: str | torch.device):
        self.rank, self.size, self.device, self.exchanges = rank, size, torch.device(device), 0
        self._store, self._takes_lists, self.peers, self.begins = store, False, None, None
        if self.device.type == "cpu":
            self._group = dist.ProcessGroupGloo(store, rank, size, JOIN)
            with suppress(AttributeError):
                self._group._set_default_timeout(LONGEST)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = LONGEST
            options.config.min_ctas = options.config.max_ctas = CTAS
            with _without_watchdog():
                self._group = dist.ProcessGroupNCCL(store, rank, size, options)

    def connect(self) -> None:
        """Connect the ranks now, so that a fault is an error now. `abort` ends this, too."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # because NCCL and the driver cannot use what loading has left there
        self.sum(torch.zeros(1, device=self.device)).item()
        self._takes_lists = self._try_lists()
        if (memory := self._memory()) and not self._try_peers(memory):
            self.peers = None

    def _try_lists(self) -> bool:
        """Return whether the backend exchanges lists of tensors; NCCL does, and gloo does not"""
        parts = [
            torch.zeros(int(rank != self.rank), dtype=torch.uint8, device=self.device) for rank in range(self.size)
        ]
        try:
            self._group.alltoall([part.clone() for part in parts], parts).wait()
        except RuntimeError:
            if self.device.type == "cuda":
                raise
            return False
        return True

    def _try_peers(self, memory: Memory) -> bool:
        """Return whether all GPUs can write into each other's memory"""
        self.peers = Peers(self._store, self.rank, self.size, memory)  # now, so that `abort` finds it
        works = False
        try:
            works = self.peers.works()
        except Exception as error:  # of any library, because the steps can exchange without this
            if self.peers.given_up:
                raise
            self.peers.refuse()
            logger.info("GPUs cannot write into each other's memory: %s", error)
        refusals = self.sum(torch.tensor([float(not works)], device=self.device))
        return not refusals.item()

    def _memory(self) -> Memory | None:
        if self.device.type == "cpu" or probe.exchange() == "nccl":
            return None
        return CudaMemory(self.device, self.size)

    def exchange(self, received: Sequence[Tensor], sent: Sequence[Tensor]) -> "Arrival":
        """Begin to exchange contiguous tensors with all ranks; `wait()` of the result waits for them.

        Args:
            received: a tensor to write for each rank, in order. sent: a tensor for each rank. Empty ones are not
                exchanged. A rank's own ones must be empty, because a copy is faster.
        """
        received, sent = [*map(_bytes, received)], [*map(_bytes, sent)]
        if self._takes_lists:
            return Arrival(self._begin(self._group.alltoall, received, sent))
        both = [torch.empty(sum(map(len, received)), dtype=torch.uint8, device=self.device), torch.cat(sent)]
        work = self._begin(self._group.alltoall_base, *both, [*map(len, received)], [*map(len, sent)])
        return Arrival(work, received, both)

    def broadcast(self, x: Tensor) -> Tensor:
        """Copy rank 0's contiguous tensor into that of each other rank, and return it."""
        self._begin(self._group.broadcast, _bytes(x), 0).wait()
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Add up a tensor of all ranks, in place."""
        self._begin(self._group.allreduce, x).wait()
        return x

    def _begin(self, call: Callable, *arguments: Any) -> Any:
        self.exchanges += 1
        self.begins = self.exchanges
        try:
            return call(*arguments)
        finally:
            self.begins = None

    def gather(self, x: Tensor, counts: Sequence[int], everywhere: bool = False) -> Tensor | None:
        """Put the parts of all ranks together.

        Args:
            x: this rank's part, (counts[rank], …) contiguous.
            counts: rows of each rank's part.
            everywhere: on every rank, and not on rank 0 alone.

        Returns:
            (sum of counts, …) on rank 0, None on the other ranks; with everywhere on every rank.
        """
        receives = everywhere or self.rank == 0
        whole = x.new_empty((sum(counts) if receives else 0, *x.shape[1:]))
        parts = [*whole.split(counts)] if receives else [whole] * self.size
        if receives:
            parts[self.rank].copy_(x)
            parts[self.rank] = whole[:0]
        others = [rank != self.rank and (everywhere or rank == 0) for rank in range(self.size)]
        self.exchange(parts, [x if other else x[:0] for other in others]).wait()
        return whole if receives else None

    def abort(self) -> None:
        """End all exchanges, those that are under way too. Other ranks' part in them is not waited for.

        NCCL frees its memory only after the last CUDA graph with an exchange is gone. A thread waits for that, because
        the user may keep the graphs.
        """
        thread = threading.Thread(target=self._abort, daemon=True, name="turbo_nb abort")
        thread.start()
        thread.join(ABORTS)

    def _abort(self) -> None:
        if self.peers:
            with suppress(Exception):
                self.peers.give_up()
        with suppress(Exception):  # because the group may be broken already
            self._group.abort()

    def close(self) -> None:
        """Give the group's memory and threads back."""
        if self.device.type == "cuda":
            self.abort()


class Arrival:
    """An exchange that is under way.

    Args:
        work: of torch.
        received, buffers: what the bytes are copied to, and where they are, of a backend without lists.
    """

    def __init__(self, work: "dist.Work", received: Sequence[Tensor] = (), buffers: Sequence[Tensor] = ()):
        self._work, self._received, self._buffers = work, received, buffers

    def wait(self) -> None:
        """Let later work on this device wait for the exchange. On a CPU, wait for it."""
        self._work.wait()
        if self._buffers:
            for part, own in zip(self._received, self._buffers[0].split([*map(len, self._received)]), strict=True):
                part.copy_(own)


@contextmanager
def _without_watchdog() -> Iterator[None]:
    """Set `NO_WATCHDOG`, and nothing else, because NCCL's threads read the environment while it changes"""
    added = NO_WATCHDOG.keys() - os.environ.keys()
    for name in added:
        os.environ[name] = NO_WATCHDOG[name]
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _bytes(x: Tensor) -> Tensor:
    """Return a view of a contiguous tensor as bytes, because gloo does not know every dtype"""
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)  # of one element, too, whose stride may be 0


def shares(total: int, size: int, multiple: int = 1) -> list[int]:
    """Return size + 1 bounds that split `total` evenly, at multiples of a number (the end excepted)."""
    runs = -(-total // multiple)
    return [min(total, (runs * rank // size) * multiple) for rank in range(size + 1)]
