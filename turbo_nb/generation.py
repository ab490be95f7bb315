"""A prompt becomes frames: `load_pipeline()` and `generate()`.

The pipeline is diffusers' `WanPipeline` or `WanImageToVideoPipeline`, unchanged, with our scheduler; `generate`
encodes, denoises and decodes one after the other, so that each can be timed and shown. Importing this module is cheap:
torch and diffusers are loaded with the first model.
"""

import gc
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from . import catalog
from .errors import InputError, TurboNbError
from .machine import environment
from .pipeline import _apply, _current, find_spec
from .runtime import estimate
from .runtime.steps import _StepClock
from .settings import Settings, check_settings
from .text import prompt_encoder
from .video import images, mp4

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import WanImageToVideoPipeline, WanPipeline
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Video:
    """A finished clip.

    frames (T, H, W, 3) uint8 at `fps` a second; timings in seconds for text, denoise, decode, and where a plan moves
    experts to the GPU, switch, which denoise leaves out; steps: seconds of each step of denoise; peaks: the most bytes
    of GPU memory in each stage; settings as in `Settings`, with attention and versions.
    """

    frames: "np.ndarray"
    fps: int
    timings: dict[str, float]
    steps: tuple[float, ...] = ()
    peaks: dict[str, int] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)

    def save(self, path: "str | Path | mp4.Encoder") -> Path:
        """Write an mp4 that carries the settings. Raises OutputError if it cannot be written.

        path: also an encoder that was given the frames while they were decoded (`generate`'s on_frames); what this
        takes is then what is left of the writing.
        """
        begin = time.perf_counter()
        path = mp4.write_mp4(path, self.frames, self.fps, self.settings)
        written = dict(zip(("num_frames", "height", "width"), self.frames.shape, strict=False))  # a grid is larger
        estimate.remember(self.settings | written, {"write": time.perf_counter() - begin})
        return path

    @property
    def cost(self) -> float | None:
        """Dollars for the seconds of `timings`; None where TURBO_NB_PRICE_PER_HOUR is not set."""
        return environment.cost(sum(self.timings.values()))


def check_job(
    spec: catalog.ModelSpec, prompt: str, *, image=None, adaptive_resolution: bool = False, **settings
) -> Settings:
    """The settings that `generate` would work with, checked without a model. Raises what `generate` raises."""
    image = check_image(spec, image)
    adaptive_to = image.size if image and adaptive_resolution else None
    return check_settings(spec, prompt, adaptive_to=adaptive_to, **settings)


def check_clip(model, prompt: str, **settings) -> tuple[int, int, int]:
    """Width, height and frames of the clip that `generate` would make, checked before a model is loaded.

    model: as for `load_pipeline`. Raises what `generate` raises, and what finding a model raises.
    """
    checked = check_job(find_spec(model), prompt, **settings)
    return checked.width, checked.height, checked.num_frames


def generate(
    pipeline: "WanPipeline | WanImageToVideoPipeline",
    prompt: str,
    *,
    image: "str | Path | Image | np.ndarray | None" = None,
    num_frames: int | None = None,
    num_steps: int = 4,
    seed: int = 0,
    resolution: str | None = None,
    aspect_ratio: str | None = None,
    adaptive_resolution: bool = False,
    sigma_max: float | None = None,
    ode: bool = False,
    boundary: float | None = None,
    noise_device: str = "cpu",
    on_stage: "Callable[[str], None] | None" = None,
    on_step: "Callable[[int, int, torch.Tensor], None] | None" = None,
    on_frames: "Callable[[np.ndarray], None] | None" = None,
) -> Video:
    """Make a clip. None stands for the model's own value.

    image: where an image-to-video model begins, as a file, a PIL image or an array (H, W, 3) uint8; it is cropped to
    the size, or with adaptive_resolution the size takes its aspect. boundary: the noise level below which the low-noise
    expert works.

    on_stage(name) is called as "text", "denoise" and "decode" begin; on_step(done, total, latents) after every step,
    latents (1, C, T, H, W); on_frames(frames) with the clip's frames (t, H, W, 3) uint8, in turn, as they are decoded:
    `mp4.Encoder.add` takes them. What these raise ends the run, which is how to cancel it. If memory runs out, the
    next plan is taken, once, with a warning.

    Raises InputError for settings that cannot be used, TurboNbError if the model's output is not finite or memory runs
    out for good.
    """
    spec = pipeline.spec
    image = check_image(spec, image)
    settings = check_settings(
        spec, prompt, num_frames=num_frames, num_steps=num_steps, seed=seed, resolution=resolution,
        aspect_ratio=aspect_ratio, sigma_max=sigma_max, ode=ode, noise_device=noise_device, boundary=boundary,
        adaptive_to=image.size if image and adaptive_resolution else None,
    )  # fmt: skip
    if not spec.understands(prompt):
        warnings.warn(
            f"{spec.name} only knows moving shapes, such as 'a large red circle moving from left to right on "
            "a black background'; this prompt gives some video, but not of what it says",
            stacklevel=2,
        )
    if image:
        image, note = images.crop(image, settings.width, settings.height)
        if note:
            warnings.warn(
                note + ("" if adaptive_resolution else "; adaptive_resolution keeps its aspect"), stacklevel=2
            )
    import torch

    from .scheduler import RCMScheduler

    if noise_device == "cuda" and not torch.cuda.is_available():
        raise InputError("noise_device is 'cuda', and torch sees no GPU here; leave it at cpu")
    timings, peaks, fallen, on_stage = {}, {}, False, on_stage or (lambda name: None)
    on_gpu = pipeline.plan.device != "cpu"

    def stage(name: str, work: Callable):
        on_stage(name)
        begin = time.perf_counter()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(pipeline.plan.device)
        try:
            result = work()
        except torch.OutOfMemoryError:
            result = None  # outside of this clause, so that what the error holds on to can go
        if result is None:
            result = again(name, work)
        if on_gpu:
            torch.cuda.synchronize(pipeline.plan.device)
            peaks[name] = torch.cuda.max_memory_allocated(pipeline.plan.device)
        timings[name] = time.perf_counter() - begin
        return result

    def again(name: str, work: Callable):
        """Once more, with the next plan; once a run"""
        nonlocal fallen
        failed, following = pipeline.plan.name, None if fallen else pipeline.plan.next
        try:
            if following:
                warnings.warn(f"out of memory while at {name}; going on with {following}", stacklevel=5)
                fallen = True
                pipeline.maybe_free_model_hooks()
                gc.collect()
                prompt_encoder.empty_cache()
                _apply(pipeline, following)
                return work()
        except torch.OutOfMemoryError:
            failed = following.name
        raise TurboNbError(
            f"out of memory while at {name}, with plan {failed}; take fewer frames, a smaller resolution, or the "
            "int8 checkpoint"
        )

    clock, given = _StepClock(pipeline), 0

    def give(frames: "np.ndarray") -> None:
        nonlocal given
        if on_frames and len(frames) > given:  # fewer when decoding began again, with another plan
            on_frames(frames[given:])
            given = len(frames)

    def denoise() -> torch.Tensor:
        scheduler = pipeline.scheduler = RCMScheduler(settings.sigma_max, settings.ode)
        scheduler.seed(settings.seed, settings.noise_device)
        latents_shape = (
            1,
            pipeline.vae.config.z_dim,
            1 + (settings.num_frames - 1) // pipeline.vae_scale_factor_temporal,
            settings.height // pipeline.vae_scale_factor_spatial,
            settings.width // pipeline.vae_scale_factor_spatial,
        )

        def after_step(_, index: int, timestep, tensors: dict) -> dict:
            clock.mark("end")
            if on_step:
                on_step(index + 1, settings.num_steps, tensors["latents"])
            return {}

        with clock:
            return pipeline(
                **({"image": image} if image else {}),
                prompt_embeds=embeds.to(pipeline._execution_device),
                latents=scheduler.start_latents(latents_shape),
                height=settings.height,
                width=settings.width,
                num_frames=settings.num_frames,
                num_inference_steps=settings.num_steps,
                guidance_scale=1.0,
                output_type="latent",
                callback_on_step_end=after_step,
            ).frames

    if spec.task == "i2v":
        pipeline.register_to_config(boundary_ratio=settings.boundary)
    try:
        with torch.inference_mode(), _current(pipeline.plan.device):
            embeds = stage("text", lambda: pipeline.encoder(prompt))
            latents = stage("denoise", denoise)
            if pipeline.plan.offload == "model":
                timings["switch"] = clock.switch
                timings["denoise"] -= clock.switch
            if not latents.isfinite().all():
                raise TurboNbError(
                    "the model's output is not finite (NaN or Inf); nothing was written. Try another seed or dtype"
                )
            frames = stage("decode", lambda: decode(pipeline, latents, give))
    finally:
        pipeline.maybe_free_model_hooks()  # a run that was cancelled leaves nothing on the GPU either
    details = asdict(settings) | _how(pipeline)
    details |= {
        "fps": spec.fps,
        "versions": {name: _version(name) for name in ("turbo-nb", "torch", "diffusers", "transformers")},
    }
    topk, loaded_in = details["sla_topk"], vars(pipeline).pop("loaded_in", None)  # which is told once
    estimate.remember(
        details,
        timings | ({} if loaded_in is None else {"load": loaded_in}),
        steps=clock.steps,
        work=estimate.work_of(spec.arch, settings.width, settings.height, settings.num_frames, topk),
    )
    return Video(frames=frames, fps=spec.fps, timings=timings, steps=clock.steps, peaks=peaks, settings=details)


def outlook(pipeline: "WanPipeline | WanImageToVideoPipeline", prompt: str, **settings) -> estimate.Estimate | None:
    """How long `generate` will take with these arguments; None where nothing tells. Raises what `check_job` raises."""
    checked = asdict(check_job(pipeline.spec, prompt, **settings)) | _how(pipeline)
    return estimate.estimate(checked, pipeline.spec.arch, device=pipeline.plan.device)


def _how(pipeline) -> dict:
    """What a clip's time depends on beside its size: the pipeline's attention, linears and plan"""
    from .linear import is_quantized
    from .sla import attention_type, topk_of

    return {
        "attention_type": attention_type(pipeline.transformer),
        "sla_topk": topk_of(pipeline.transformer),
        "quant_linear": is_quantized(pipeline.transformer),
        "memory_plan": pipeline.plan.name,
        "device": pipeline.plan.device,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # turbo_nb run from a checkout that is not installed
        return "not installed"


def check_image(spec: catalog.ModelSpec, image) -> "Image | None":
    """The image that a clip begins with, opened. Raises InputError if the model takes none or needs one."""
    if spec.task == "t2v" and image is not None:
        raise InputError(f"{spec.name} makes videos from text alone; leave image out")
    if spec.task == "i2v" and image is None:
        raise InputError(f"{spec.name} makes videos from an image; give image (--image_path)")
    return None if image is None else images.load_image(image)


def decode(
    pipeline: "WanPipeline | WanImageToVideoPipeline",
    latents: "torch.Tensor",
    on_frames: "Callable[[np.ndarray], None]" = lambda frames: None,
) -> "np.ndarray":
    """Latents (1, C, T, H, W) → frames (4T − 3, 8H, 8W, 3) uint8, as `WanPipeline` itself decodes them.

    Frames of one chunk are copied from a GPU while the next is decoded. on_frames(frames) is called with all frames
    that are there, after each chunk.
    """
    import torch
    from diffusers.utils.accelerate_utils import apply_forward_hook

    from .fused.vae import chunks

    vae, count = pipeline.vae, 4 * latents.shape[2] - 3
    device = pipeline._execution_device
    mean, std = (
        torch.tensor(values, device=device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    frames, done, copies = None, 0, deque()

    def hand_on() -> None:
        end, copied = copies.popleft()
        if copied:
            copied.synchronize()
        on_frames(frames[:end].numpy())

    for sample in apply_forward_hook(chunks)(vae, latents.to(device, vae.dtype) * std + mean):
        part = sample[0].permute(1, 2, 3, 0).float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)
        if frames is None:
            frames = _main_memory(count, *part.shape[1:], pinned=part.is_cuda)
        frames[done : done + len(part)].copy_(part, non_blocking=True)
        done += len(part)
        copies.append((done, torch.cuda.current_stream(device).record_event() if part.is_cuda else None))
        if len(copies) > 1:  # one chunk behind: the GPU has its next one before this waits for it
            hand_on()
    hand_on()
    return frames.numpy()


def _main_memory(*shape: int, pinned: bool) -> "torch.Tensor":
    """uint8, page-locked where the system allows it"""
    import torch

    try:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError:
        return torch.empty(shape, dtype=torch.uint8)
