"""What the Gluon kernels share: names of the copy engine's calls in each Triton, and tiles that wait in line."""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # their names up to Triton 3.6
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def own_tiles(count):
    """How many of so many tiles are this program's, which takes one in every num_programs"""
    return (count - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has: one program each"""
    return torch.cuda.get_device_properties(device).multi_processor_count
