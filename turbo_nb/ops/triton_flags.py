"""A Triton kernel that waits for flags of other GPUs."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@triton.jit
def _wait(flags, given_up, COUNT: tl.constexpr):
    stop = tl.cast(given_up, tl.int64).to(tl.pointer_type(tl.int32))
    for number in range(COUNT):
        arrived = tl.atomic_cas(flags + number, 1, 0, sem="acquire", scope="sys")
        stopped = 0
        while (arrived == 0) & (stopped == 0):
            arrived = tl.atomic_cas(flags + number, 1, 0, sem="acquire", scope="sys")
            stopped = tl.load(stop, volatile=True)


def wait(flags: Tensor, given_up: Tensor) -> None:
    """Wait until all flags are 1, and set each to 0. Later work on the stream sees what was written before a flag.

    Args:
        flags: int32, on the GPU.
        given_up: an int32 of pinned memory, 0. Anything else ends the wait.
    """
    launch(_wait, (1,), flags, given_up.data_ptr(), COUNT=flags.numel(), num_warps=1)
