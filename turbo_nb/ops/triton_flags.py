"""A Triton kernel that waits for flags of other GPUs."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@triton.jit
def _wait(flags, given_up, COUNT: tl.constexpr):
    for number in range(COUNT):
        arrived = tl.atomic_cas(flags + number, 1, 0, sem="acquire", scope="sys")
        stop = tl.load(given_up, volatile=True)
        while (arrived == 0) & (stop == 0):
            arrived = tl.atomic_cas(flags + number, 1, 0, sem="acquire", scope="sys")
            stop = tl.load(given_up, volatile=True)


def wait(flags: Tensor, given_up: Tensor) -> None:
    """Wait until all flags are 1, and set each to 0. Later work on the stream sees what was written before a flag.

    Args:
        flags: int32. given_up: an int32, 0; anything else ends the wait.
    """
    launch(_wait, (1,), flags, given_up, COUNT=flags.numel(), num_warps=1)
