"""Compile the kernels of a clip before its first step, all at the same time.

A block of the transformer and the VAE run once with launches that only compile (`ops.launch.compiling_only`). They have
the clip's shapes and alignments, because kernels are specialised for these. Triton's AsyncCompileMode hands each
compilation to a thread. Most of the work is in LLVM, ptxas and the C compiler, which run beside Python. Triton keeps
what it compiles on disk.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

import torch

from ..fused import transformer as fused_transformer
from ..fused import vae as fused_vae
from ..ops.launch import compiling_only

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

QUIET = 1.0  # seconds of compilation before progress is reported, because kernels on disk take less
THREADS = min(32, os.cpu_count() or 1)  # about 40 kernels are compiled


def warm_up(
    pipeline: "DiffusionPipeline",
    size: tuple[int, int, int],
    on_compile: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compile the kernels of a clip for the current GPU.

    Args:
        pipeline: its transformer and VAE are fused, and on the GPU.
        size: width, height and frames of the clip.
        on_compile: called as on_compile(done, total) when a kernel is compiled, once this takes a second.

    Raises:
        OutOfMemoryError: the clip's tensors do not fit.
    """
    width, height, frames = size
    latents = 1 + (frames - 1) // 4, height // 8, width // 8
    mode = _async_mode()
    if mode is None:
        fused_transformer.warm_up(pipeline.transformer, latents)
        return
    # a kernel that fails to compile raises when it is launched
    with _Loading(THREADS) as executor, mode(executor, ignore_errors=True) as compilations:
        with compiling_only():
            fused_transformer.warm_up(pipeline.transformer, latents)
            fused_transformer.warm_up(pipeline.transformer, latents, recorded=True)
            _decode(pipeline.vae, latents)
        begin, futures = time.perf_counter(), list(compilations.raw_futures)
        for done, _ in enumerate(as_completed(futures), 1):
            if time.perf_counter() - begin > QUIET:
                on_compile(done, len(futures))


class _Loading(ThreadPoolExecutor):
    """Compiles kernels and loads them, because Triton's launcher of a kernel is C that the first launch compiles"""

    def submit(self, compile_kernel: Callable[[], Any]) -> Future:
        device = torch.cuda.current_device()

        def work() -> Any:
            with torch.cuda.device(device):
                kernel = compile_kernel()
                kernel.run  # noqa: B018 because the property loads
                return kernel

        return super().submit(work)


@torch.inference_mode()
def _decode(vae: torch.nn.Module, latents: tuple[int, int, int]) -> None:
    """Decode a chunk of each length that the clip has"""
    time, height, width = latents
    frames = min(time, 1 + fused_vae.CHUNK + (time - 1) % fused_vae.CHUNK)
    z = torch.zeros(1, vae.config.z_dim, frames, height, width, device=vae.device, dtype=vae.dtype)
    for _ in fused_vae.chunks(vae, z):
        pass


def _async_mode() -> type | None:
    """Return Triton's AsyncCompileMode, None where Triton does not have it"""
    try:
        from triton import AsyncCompileMode
    except ImportError:
        return None
    return AsyncCompileMode
