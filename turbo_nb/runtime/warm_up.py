"""Compile the kernels of a clip before its first step, all at the same time.

A block of the transformer and the VAE run once with launches that only compile (`ops.launch.compiling_only`). They have
the clip's shapes and alignments, because kernels are specialised for these. Triton's AsyncCompileMode hands each
compilation to a thread. Most of the work is in LLVM, ptxas and the C compiler, which run beside Python. Triton keeps
what it compiles on disk. `vae` runs beside the loading of the transformer, and `transformer` beside that of the text
encoder. `choose_launches` runs alone, because it times.
`together` compiles what several ranks run, after all of them have loaded.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers import WanImageToVideoPipeline

from ..fused import transformer as fused_transformer
from ..fused import vae as fused_vae
from ..ops import tuning
from ..ops.launch import compiling_only
from . import tune

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

QUIET = 1.0  # seconds of compilation before progress is reported, because kernels on disk take less
THREADS = min(32, os.cpu_count() or 1)  # about 40 kernels are compiled


def transformer(
    model: torch.nn.Module,
    size: tuple[int, int, int],
    on_compile: Callable[[int, int], None] | None = None,
) -> None:
    """Compile a transformer's kernels for the current GPU.

    Args:
        model: fused, and on the GPU.
        size: width, height and frames of the clip.
        on_compile: called as on_compile(done, total) when a kernel is compiled, once this takes a second.

    Raises:
        OutOfMemoryError: the clip's tensors do not fit.
    """
    with compiling(on_compile) as together:
        fused_transformer.warm_up(model, _latents(size))
        if together:
            fused_transformer.warm_up(model, _latents(size), recorded=True)


def vae(model: torch.nn.Module, size: tuple[int, int, int], encodes: bool = False) -> None:
    """Compile the kernels of a VAE for the current GPU; the other arguments and errors are those of `transformer`.

    encodes: those of its encoder, too, for image-to-video.
    """
    with compiling() as together:
        if together:
            _code(model, _latents(size), encodes)


def choose_launches(
    pipeline: "DiffusionPipeline",
    size: tuple[int, int, int],
    on_compile: Callable[[int, int], None] | None = None,
) -> None:
    """Time how to launch the kernels on the current GPU, unless that was done before (`tune`).

    The arguments and errors are those of `transformer`, for a pipeline whose transformer and VAE are on the GPU.
    """
    gpu = torch.cuda.current_device()
    if _async_mode() is None or not tune.wanted(gpu):
        return

    def compile_work(work: Callable[[], None]) -> None:
        with compiling(on_compile):
            work()

    if tune.tune(gpu, partial(_sample, pipeline, _latents(size)), compile_work):
        transformer(pipeline.transformer, size, on_compile)
        vae(pipeline.vae, size, _encodes(pipeline))


@torch.inference_mode()
def _sample(pipeline: "DiffusionPipeline", latents: tuple[int, int, int]) -> None:
    """Run what a clip's time goes into, once: a block, and the VAE on one latent frame after the first"""
    fused_transformer.warm_up(pipeline.transformer, latents, recorded=True)
    length, height, width = latents
    coder, frames = pipeline.vae, min(2, length)
    z = torch.empty(1, coder.config.z_dim, frames, height, width, device=coder.device, dtype=coder.dtype)
    z.normal_(generator=torch.Generator(coder.device).manual_seed(0))
    parts = fused_vae.chunks(coder, z, 1)
    if frames > 1:
        with tuning.trying(None):  # because the first frame has other, smaller shapes
            next(parts)
    for _ in parts:
        pass


def together(
    pipeline: "DiffusionPipeline",
    size: tuple[int, int, int],
    on_compile: Callable[[int, int], None] | None = None,
) -> None:
    """Compile what several ranks run, on all of them at the same time, and run it once.

    Their kernels have other shapes than those of one GPU, and write into other GPUs' memory.

    Args:
        pipeline: its transformer and VAE are split.
        size: width, height and frames of the clip.
        on_compile: as that of `transformer`, with the kernels of this rank.
    """
    team = pipeline.turbo_nb.team
    with compiling(on_compile) as only_compiles:
        if only_compiles:
            with team.together():
                team.tell("compile")
            _run(pipeline, _latents(size))
    if only_compiles:
        team.finish("compiled")
    _run(pipeline, _latents(size))
    if pipeline.transformer.device.type == "cuda":
        torch.cuda.synchronize(pipeline.transformer.device)  # because loading ends when all ranks are through


@torch.inference_mode()
def _run(pipeline: "DiffusionPipeline", latents: tuple[int, int, int]) -> None:
    """Run a step, and the first chunks of the VAE"""
    model = pipeline.transformer
    given = {"device": model.device, "dtype": model.dtype}
    x = torch.zeros(1, model.config.in_channels, *latents, **given)
    text = fused_transformer.sample_text(model.config.text_dim, **given)
    model(x, torch.full((1,), 900.0, device=model.device), text, return_dict=False)
    _code(pipeline.vae, latents, _encodes(pipeline))


def _latents(size: tuple[int, int, int]) -> tuple[int, int, int]:
    width, height, frames = size
    return 1 + (frames - 1) // 4, height // 8, width // 8


@contextmanager
def compiling(on_compile: Callable[[int, int], None] | None = None) -> Iterator[bool]:
    """Let the launches inside only compile, all at the same time. Gives False for a Triton that cannot.

    on_compile: as that of `transformer`.
    """
    mode = _async_mode()
    if mode is None:
        yield False
        return
    # a kernel that fails to compile raises when it is launched
    with _Loading(THREADS) as executor, mode(executor, ignore_errors=True) as compilations:
        with compiling_only():
            yield True
        begin, futures = time.perf_counter(), list(compilations.raw_futures)
        for done, _ in enumerate(as_completed(futures), 1):
            if on_compile and time.perf_counter() - begin > QUIET:
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
def _code(vae: torch.nn.Module, latents: tuple[int, int, int], encodes: bool) -> None:
    """Decode a chunk of each length that the clip has, and encode such chunks where the clip begins with a picture"""
    time, height, width = latents
    frames = min(time, 1 + fused_vae.CHUNK + (time - 1) % fused_vae.CHUNK)
    given = {"device": vae.device, "dtype": vae.dtype}
    for _ in fused_vae.chunks(vae, torch.zeros(1, vae.config.z_dim, frames, height, width, **given)):
        pass
    if encodes:
        vae.encode(torch.zeros(1, 3, 4 * frames - 3, 8 * height, 8 * width, **given))


def _encodes(pipeline: "DiffusionPipeline") -> bool:
    return isinstance(pipeline, WanImageToVideoPipeline)


def _async_mode() -> type | None:
    """Return Triton's AsyncCompileMode, None where Triton does not have it"""
    try:
        from triton import AsyncCompileMode
    except ImportError:
        return None
    return AsyncCompileMode
