"""What the Gluon kernels of Hopper share: the copy engine's calls, barriers, and each program's share of the tiles."""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # their names up to Triton 3.6
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def own_tiles(count):
    """Return how many of `count` tiles this program computes: one in every num_programs."""
    return (count - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def init_barriers(stages: gl.constexpr, count: gl.constexpr):
    """Return one barrier for each stage, whose phase ends after `count` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(barriers.index(stage), count=count)
    return barriers


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors of a GPU a kernel has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
