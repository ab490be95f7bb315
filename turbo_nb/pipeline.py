"""A prompt becomes frames: `load_pipeline()` and `generate()`.

The pipeline is diffusers' `WanPipeline`, unchanged, with our scheduler; `generate` encodes, denoises and decodes one
after the other, so that each can be timed and shown. Importing this module is cheap: torch and diffusers are
loaded with the first model.
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from . import catalog, media
from .errors import InputError, TurboNbError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import WanPipeline

MAX_STEPS = 4
MAX_SEED = 2**63 - 1
TEXT_LENGTH = 512  # tokens that a prompt is padded to


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines a clip, checked."""

    model: str
    prompt: str
    seed: int
    num_steps: int
    num_frames: int
    width: int
    height: int
    sigma_max: float
    ode: bool
    noise_device: str


@dataclass(frozen=True, kw_only=True)
class Video:
    """A finished clip.

    frames (T, H, W, 3) uint8 at `fps` a second; timings in seconds for text, denoise and decode; settings as in
    `Settings`, with attention and versions.
    """

    frames: "np.ndarray"
    fps: int
    timings: dict[str, float]
    settings: dict = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write an mp4 that carries the settings. Raises OutputError if it cannot be written."""
        return media.write_mp4(path, self.frames, self.fps, self.settings)


def check_settings(
    spec: catalog.ModelSpec,
    prompt: str,
    *,
    num_frames: int | None = None,
    num_steps: int = 4,
    seed: int = 0,
    resolution: str | None = None,
    aspect_ratio: str | None = None,
    sigma_max: float | None = None,
    ode: bool = False,
    noise_device: str = "cpu",
) -> Settings:
    """Settings with the model's defaults filled in. Raises InputError for the first that cannot be used."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError('the prompt is empty; say what to show, such as "a small green square growing"')
    num_frames = spec.num_frames if num_frames is None else num_frames
    if num_frames < 1 or num_frames % 4 != 1:
        near = 4 * max(0, round((num_frames - 1) / 4)) + 1
        raise InputError(f"num_frames is {num_frames}; it is 4n + 1 (1, 5, 9, …), such as {near}")
    if num_steps not in range(1, MAX_STEPS + 1):
        raise InputError(f"num_steps is {num_steps}; rCM models take 1 to {MAX_STEPS} steps")
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed is {seed}; it is a whole number from 0 to {MAX_SEED}")
    sigma_max = spec.sigma_max if sigma_max is None else sigma_max
    if not (math.isfinite(sigma_max) and sigma_max > math.tan(1.5)):
        raise InputError(
            f"sigma_max is {sigma_max}; it is a number above {math.tan(1.5):.1f}, such as {spec.sigma_max:g}"
        )
    if noise_device not in ("cpu", "cuda"):
        raise InputError(
            f"noise_device is {noise_device!r}; it is cpu (the same clip everywhere) or cuda (upstream's seeds)"
        )
    width, height = catalog.size_of(spec, resolution, aspect_ratio)
    return Settings(
        model=spec.name, prompt=prompt, seed=seed, num_steps=num_steps, num_frames=num_frames,
        width=width, height=height, sigma_max=float(sigma_max), ode=ode, noise_device=noise_device,
    )  # fmt: skip


def load_pipeline(
    model: str = "auto", *, attention_type: str = "sla", sla_topk: float | None = None, device: str = "auto"
) -> "WanPipeline":
    """A diffusers `WanPipeline` with an `RCMScheduler` and the attention asked for; `.spec` holds the model's defaults.

    model: a name of the catalogue, "auto", or a folder of diffusers layout. attention_type: "sla" or "original" (dense
    attention). sla_topk: share of key blocks, None for the model's own. device: "auto", "cpu", "cuda", "cuda:1", …

    Raises UnknownModelError, CheckpointError, InputError, or BackendError.
    """
    spec = catalog.find(model)
    import torch
    from diffusers import WanPipeline

    from . import checkpoint
    from .scheduler import RCMScheduler

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"device is {device!r}, and torch sees no GPU here; use --device cpu, or a CUDA build of torch"
        )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # CPUs are slower in bf16
    transformer = checkpoint.load_transformer(
        spec.folder / "transformer",
        attention_type=attention_type,
        sla_topk=spec.sla_topk if sla_topk is None else sla_topk,
        device=device,
        dtype=dtype,
    )
    pipeline = WanPipeline(
        tokenizer=checkpoint.load_tokenizer(spec.folder / "tokenizer"),
        text_encoder=checkpoint.load_text_encoder(spec.folder / "text_encoder", device=device, dtype=dtype),
        vae=checkpoint.load_vae(spec.folder / "vae", device=device, dtype=dtype),
        scheduler=RCMScheduler(spec.sigma_max),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.spec = spec
    return pipeline


def generate(
    pipeline: "WanPipeline",
    prompt: str,
    *,
    image=None,
    num_frames: int | None = None,
    num_steps: int = 4,
    seed: int = 0,
    resolution: str | None = None,
    aspect_ratio: str | None = None,
    sigma_max: float | None = None,
    ode: bool = False,
    noise_device: str = "cpu",
    on_stage: "Callable[[str], None] | None" = None,
    on_step: "Callable[[int, int, torch.Tensor], None] | None" = None,
) -> Video:
    """Make a clip. None stands for the model's own value.

    on_stage(name) is called as "text", "denoise" and "decode" begin; on_step(done, total, latents) after every step,
    latents (1, C, T, H, W). What these raise ends the run, which is how to cancel it.

    Raises InputError for settings that cannot be used, TurboNbError if the model's output is not finite.
    """
    if image is not None:
        raise InputError(f"{pipeline.spec.name} makes videos from text alone; leave image out")
    settings = check_settings(
        pipeline.spec, prompt, num_frames=num_frames, num_steps=num_steps, seed=seed, resolution=resolution,
        aspect_ratio=aspect_ratio, sigma_max=sigma_max, ode=ode, noise_device=noise_device,
    )  # fmt: skip
    if not pipeline.spec.understands(prompt):
        warnings.warn(
            f"{pipeline.spec.name} only knows moving shapes, such as 'a large red circle moving from left to right on "
            "a black background'; this prompt gives some video, but not of what it says",
            stacklevel=2,
        )
    import torch

    from .scheduler import RCMScheduler
    from .sla import attention_type

    if noise_device == "cuda" and not torch.cuda.is_available():
        raise InputError("noise_device is 'cuda', and torch sees no GPU here; leave it at cpu")
    timings, on_stage = {}, on_stage or (lambda name: None)

    def stage(name: str, work: Callable):
        on_stage(name)
        begin = time.perf_counter()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        timings[name] = time.perf_counter() - begin
        return result

    def denoise() -> torch.Tensor:
        scheduler = pipeline.scheduler = RCMScheduler(settings.sigma_max, settings.ode)
        scheduler.seed(settings.seed, settings.noise_device)
        latents_shape = (
            1,
            pipeline.transformer.config.in_channels,
            1 + (settings.num_frames - 1) // pipeline.vae_scale_factor_temporal,
            settings.height // pipeline.vae_scale_factor_spatial,
            settings.width // pipeline.vae_scale_factor_spatial,
        )

        def after_step(_, index: int, timestep, tensors: dict) -> dict:
            if on_step:
                on_step(index + 1, settings.num_steps, tensors["latents"])
            return {}

        return pipeline(
            prompt_embeds=embeds,
            latents=scheduler.start_latents(latents_shape),
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            num_inference_steps=settings.num_steps,
            guidance_scale=1.0,
            output_type="latent",
            callback_on_step_end=after_step,
        ).frames

    with torch.inference_mode():
        embeds, _ = stage(
            "text",
            lambda: pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH),
        )
        latents = stage("denoise", denoise)
        if not latents.isfinite().all():
            raise TurboNbError(
                "the model's output is not finite (NaN or Inf); nothing was written. Try another seed or dtype"
            )
        frames = stage("decode", lambda: decode(pipeline, latents))
    sla = attention_type(pipeline.transformer)
    details = {
        "attention_type": sla,
        "sla_topk": pipeline.transformer.blocks[0].attn1.processor.sla.topk if sla == "sla" else None,
        "device": pipeline.device.type,
        "fps": pipeline.spec.fps,
        "versions": {name: version(name) for name in ("turbo-nb", "torch", "diffusers", "transformers")},
    }
    return Video(frames=frames, fps=pipeline.spec.fps, timings=timings, settings=asdict(settings) | details)


def decode(pipeline: "WanPipeline", latents: "torch.Tensor") -> "np.ndarray":
    """Latents (1, C, T, H, W) → frames (4T − 3, 8H, 8W, 3) uint8, as `WanPipeline` itself decodes them."""
    import torch

    vae = pipeline.vae
    mean, std = (
        torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    sample = vae.decode(latents.to(vae.device, vae.dtype) * std + mean, return_dict=False)[0]
    frames = sample[0].float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)  # (3, T, H, W)
    return frames.permute(1, 2, 3, 0).cpu().numpy()
