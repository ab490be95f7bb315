"""The guard around every launch of a Triton or Gluon kernel: `launch(kernel, grid, …)` in place of `kernel[grid](…)`.

- Triton launches on torch's current GPU, so `launch` makes the tensors' own GPU the current one.
- All tensors must be on that GPU, because a kernel that gets another card's address crashes the process.
- Kernels compute the offset of an element in int64, because a tensor may have more than 2³¹ elements. Numbers of rows
  (tokens, pixels) and coordinates in a tensor descriptor stay int32, so `aligned` limits these to `MAX_ROWS`.
- Kernels that need contiguous channels or aligned rows get them from `channels_inside` and `aligned`.
- Kernels that load tiles by tensor descriptors have a twin, `…_by_pointers`, for GPUs before sm_90. It makes the same
  descriptors inside the kernel, because Triton then sees that rows are contiguous and aligned. So it loads 16 bytes at
  a time, ahead of their use. From descriptors of the host it loads single elements there, when they are used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from ..errors import InputError

MAX_ROWS = 2**31 - 2**16  # because the last tile of rows may reach past the end
MAX_GRID = 65_535  # of the second and third side of a CUDA grid
ALIGNMENT = 16  # bytes, of the base and of every row of a tensor descriptor
PLAIN = {int, float, bool, type(None)}
COPY_ENGINE_FROM = 9  # major compute capability; this engine loads the tiles of tensor descriptors


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Launch a kernel on the GPU that its tensors are on.

    Args:
        kernel: a Triton or Gluon kernel.
        grid: programs along each side.
        arguments: those of the kernel: tensors, tensor descriptors and numbers.
        options: constants of the kernel, num_warps and num_stages.

    Raises:
        InputError: the tensors are on several devices, or have more heads or clips than a launch takes.
    """
    if _compiling_only.get():
        _compile(kernel, grid, arguments, options)
        return
    if max(grid[1:], default=0) > MAX_GRID:
        raise InputError(
            f"{kernel.__name__} has {max(grid[1:]):,} heads or clips at once. Expected at most {MAX_GRID:,}. "
            "Use a smaller batch."
        )
    # torch.compile guards the device itself. With one GPU, Triton refuses tensors of the CPU.
    if torch.compiler.is_compiling() or _gpu_count() < 2:
        kernel[grid](*arguments, **options)
        return
    device = _device(kernel, arguments)
    if device < 0 or device == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, **options)


_compiling_only: ContextVar[bool] = ContextVar("compiling_only", default=False)


@contextmanager
def compiling_only() -> Iterator[None]:
    """Let launches of this thread compile their kernel and compute nothing. Outputs keep what their memory held."""
    token = _compiling_only.set(True)
    try:
        yield
    finally:
        _compiling_only.reset(token)


def only_compiles() -> bool:
    """Return whether launches of this thread only compile."""
    return _compiling_only.get()


def _compile(kernel, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
    for x in arguments:
        if isinstance(x, Tensor) and x.dtype is torch.int32:
            x.zero_()  # because torch may use them as indices
    kernel.warmup(*arguments, grid=grid, **options)


_gpu_count = cache(torch.cuda.device_count)


def _device(kernel, arguments: tuple) -> int:
    """Return the GPU of all tensors, -1 for the CPU. Raises InputError where they are on several devices."""
    tensors = [x if isinstance(x, Tensor) else x.base for x in arguments if type(x) not in PLAIN]
    devices = sorted({tensor.get_device() for tensor in tensors})
    if len(devices) > 1:
        raise InputError(
            f"tensors of {kernel.__name__} are on devices {devices}. Expected one device. Move them to the same GPU."
        )
    return devices[0]


def takes_descriptors(x: Tensor) -> bool:
    """Return whether kernels for x's GPU take tensor descriptors of the host; else their twin takes pointers."""
    return not x.is_cuda or _major(x.get_device()) >= COPY_ENGINE_FROM


@cache
def _major(gpu: int) -> int:
    return torch.cuda.get_device_capability(gpu)[0]


def channels_inside(x: Tensor) -> Tensor:
    """Return x with its last dimension contiguous: x itself, or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """Return x with contiguous channels and rows at multiples of 16 bytes, as a tensor descriptor needs it, or a copy.

    Raises:
        InputError: x has more than `MAX_ROWS` rows.
    """
    if max(x.shape) > MAX_ROWS:
        raise InputError(
            f"a tensor has {max(x.shape):,} rows. Expected at most {MAX_ROWS:,}. Make a shorter or smaller clip."
        )
    size = x.element_size()
    rows = x.stride(-1) == 1 and all(stride * size % ALIGNMENT == 0 for stride in x.stride()[:-1])
    if rows and (torch.compiler.is_compiling() or x.data_ptr() % ALIGNMENT == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)
