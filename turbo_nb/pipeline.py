"""A prompt becomes frames: `load_pipeline()` and `generate()`.

The pipeline is diffusers' `WanPipeline` or `WanImageToVideoPipeline`, unchanged, with our scheduler; `generate`
encodes, denoises and decodes one after the other, so that each can be timed and shown. Importing this module is cheap:
torch and diffusers are loaded with the first model.
"""

import gc
import math
import operator
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from . import auto, catalog, environment, estimate, media, plan, text
from .errors import CheckpointError, InputError, TurboNbError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import WanImageToVideoPipeline, WanPipeline
    from PIL.Image import Image

MAX_STEPS = 4
WARM_UP_TOLD = 2.0  # seconds of compiling that are worth a line
MAX_SEED = 2**63 - 1


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
    boundary: float | None


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

    def save(self, path: "str | Path | media.Encoder") -> Path:
        """Write an mp4 that carries the settings. Raises OutputError if it cannot be written.

        path: also an encoder that was given the frames while they were decoded (`generate`'s on_frames); what this
        takes is then what is left of the writing.
        """
        begin = time.perf_counter()
        path = media.write_mp4(path, self.frames, self.fps, self.settings)
        written = dict(zip(("num_frames", "height", "width"), self.frames.shape, strict=False))  # a grid is larger
        estimate.remember(self.settings | written, {"write": time.perf_counter() - begin})
        return path

    @property
    def cost(self) -> float | None:
        """Dollars for the seconds of `timings`; None where TURBO_NB_PRICE_PER_HOUR is not set."""
        return environment.cost(sum(self.timings.values()))


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
    boundary: float | None = None,
    adaptive_to: tuple[int, int] | None = None,
) -> Settings:
    """Settings with the model's defaults filled in. Raises InputError for the first that cannot be used.

    adaptive_to: width and height of an image whose aspect the clip takes on, at the area of the resolution.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError('the prompt is empty; say what to show, such as "a small green square growing"')
    num_frames = _whole("num_frames", spec.num_frames if num_frames is None else num_frames)
    num_steps, seed = _whole("num_steps", num_steps), _whole("seed", seed)
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
    if boundary is not None and spec.boundary is None:
        raise InputError(f"boundary is {boundary}, and {spec.name} has no second expert to take over; leave it out")
    boundary = spec.boundary if boundary is None else boundary
    if boundary is not None and not 0 <= boundary <= 1:
        raise InputError(f"boundary is {boundary}; it is a noise level from 0 to 1, such as {spec.boundary or 0.9}")
    width, height = catalog.size_of(spec, resolution, aspect_ratio)
    if adaptive_to:
        width, height = catalog.adaptive_size(width * height, *adaptive_to)
    return Settings(
        model=spec.name, prompt=prompt, seed=seed, num_steps=num_steps, num_frames=num_frames,
        width=width, height=height, sigma_max=float(sigma_max), ode=ode, noise_device=noise_device, boundary=boundary,
    )  # fmt: skip


def _whole(name: str, value) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}; it is a whole number") from None


def find_spec(model: "str | Path | tuple[str | Path, str | Path]") -> catalog.ModelSpec:
    """The spec of what `load_pipeline` takes as `model`; a name is found without torch. Raises what finding raises."""
    if model == "auto":
        model, _ = auto.choose()
    if catalog.is_name(model):
        return catalog.find(str(model))
    from . import sources

    return sources.spec_of(model)


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


def load_pipeline(
    model: "str | Path | tuple[str | Path, str | Path]" = "auto",
    *,
    attention_type: str = "sla",
    sla_topk: float | None = None,
    quant_linear: bool | str = "auto",
    device: str = "auto",
    attention_backend: str | None = None,
    checkpoint: "str | Path | tuple[str | Path, str | Path] | None" = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    memory_plan: str = "auto",
    memory: float | None = None,
    clip: tuple[int, int, int] | None = None,
    prompts: Sequence[str] = (),
    text_cache: bool | None = None,
    on_plan: Callable[[plan.Plan], None] | None = None,
    on_progress: Callable | None = None,
) -> "WanPipeline | WanImageToVideoPipeline":
    """A diffusers pipeline with an `RCMScheduler` and the attention asked for; `.spec` holds the model's defaults,
    `.made_of` the arguments that determine what it makes.

    model: a name of the catalogue, a checkpoint, two of them (high-noise, low-noise), a diffusers folder, or "auto":
    the best text-to-video model that was downloaded and fits the GPU, nano on a CPU; see `auto.choose`.
    checkpoint: the file or files to take for a model given by name; vae, text_encoder, tokenizer: paths to take in
    place of the model's own (from the Hub, through its cache). attention_type: "sla", "sagesla" or "original" (dense
    attention); attention_backend: what runs SageSLA, as in `sla.SageSparseLinearAttention`. sla_topk: share of key
    blocks, None for the model's own. quant_linear: 8-bit linears as the file has them ("auto"), or True or False.
    device: "auto", "cpu", "cuda", "cuda:1", …; to call the pipeline itself, and not `generate`, on a GPU that is not
    torch's current one, do it within `torch.cuda.device(…)`: that is where Triton launches.

    The memory plan is chosen for a clip of (width, height, frames), None for the model's own, and for `memory` bytes,
    None for what is free; memory_plan asks for one by name. on_plan(plan) is called before anything is loaded; it is
    `pipeline.plan` afterwards. on_progress is told of downloads, as by `download.fetch`.

    prompts: those that will be made, if they are known: the text encoder is not loaded before one comes whose embedding
    is not in the cache on disk. text_cache: whether there is one; None asks TURBO_NB_TEXT_CACHE.

    Raises UnknownModelError, CheckpointError, InputError, DownloadError or BackendError.
    """
    from . import backends, sla

    if attention_type not in sla.ATTENTION_TYPES:
        raise InputError(f"attention_type is {attention_type!r}; it is one of {', '.join(sla.ATTENTION_TYPES)}")
    if model != "auto" and checkpoint is None and catalog.is_name(model):
        catalog.find(str(model))  # an unknown name is found before torch is loaded
    device = plan.device_of(device)
    if attention_type == "sagesla":
        machine = backends.Machine() if device == "cpu" else None
        backends.choose("sagesla", machine, attention_backend).require()
    import torch
    from diffusers import WanPipeline

    from . import checkpoint as loading
    from . import fuse, sources
    from .linear import is_quantized
    from .scheduler import RCMScheduler
    from .vae import fuse as fuse_vae

    if model == "auto" and checkpoint is None:
        model, quant_linear = auto.choose(device=device, memory=memory, quant_linear=quant_linear)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # CPUs are slower in bf16
    found = sources.resolve(
        model,
        checkpoint=checkpoint,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        quantised=None if quant_linear == "auto" else quant_linear,
        on_progress=on_progress,
    )
    spec, begin = found.spec, time.perf_counter()  # a download is not a part of loading
    size = clip or (*spec.size, spec.num_frames)
    chosen = plan.choose(
        _sizes(found, quant_linear, dtype),
        found.transformers[0].arch,
        *size,
        budget=memory or plan.free_memory(device),
        host_budget=plan.free_memory("cpu"),
        device=device,
        fused=plan.fused_on(),
        name=memory_plan,
    )
    (on_plan or _tell)(chosen)
    tokens = loading.load_tokenizer(found.tokenizer)  # first, as the quickest to be wrong
    transformers = [
        loading.load_transformer(
            contents,
            attention_type=attention_type,
            sla_topk=spec.sla_topk if sla_topk is None else sla_topk,
            quant_linear=quant_linear,
            attention_backend=attention_backend,
            device=device if chosen.offload == "none" else "cpu",
            dtype=dtype,
        )
        for contents in found.transformers
    ]
    for transformer in transformers:
        if chosen.device != "cpu":
            fuse.fuse(transformer)
    parts = {
        "tokenizer": tokens,
        "text_encoder": None,
        "vae": loading.load_vae(found.vae, device=device if chosen.offload == "none" else "cpu", dtype=dtype),
        "scheduler": RCMScheduler(spec.sigma_max),
        "transformer": transformers[0],
    }
    fuse_vae(parts["vae"])
    if spec.task == "i2v":
        from diffusers import WanImageToVideoPipeline

        pipeline = WanImageToVideoPipeline(**parts, transformer_2=transformers[1], boundary_ratio=spec.boundary)
    else:
        pipeline = WanPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.spec = spec
    pipeline.made_of = {
        "model": model, "checkpoint": checkpoint, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer,
        "attention_type": attention_type, "sla_topk": sla_topk, "quant_linear": quant_linear,
    }  # fmt: skip
    pipeline.encoder = text.PromptEncoder(
        pipeline,
        lambda where: loading.load_text_encoder(found.text_encoder, device=where, dtype=dtype),
        text.cache_for(found.text_encoder.path, found.tokenizer, dtype) if text.is_cached(text_cache) else None,
        prompts,
    )
    _apply(pipeline, chosen)
    if chosen.device != "cpu" and chosen.offload == "none":
        _warm_up(transformers[0], device, *size)
    if any(map(is_quantized, transformers)):
        pipeline.load_lora_weights = _no_lora
    pipeline.loaded_in = time.perf_counter() - begin
    return pipeline


def _current(device: str):
    """A context in which a GPU is torch's current one, which is where Triton launches"""
    import torch

    return nullcontext() if device == "cpu" else torch.cuda.device(device)


def _warm_up(transformer, device: str, width: int, height: int, frames: int) -> None:
    """Compile the kernels now, and tell of it where that took long"""
    import torch

    from . import fuse

    begin = time.perf_counter()
    with suppress(torch.OutOfMemoryError), _current(device):  # the clip itself has a next plan
        fuse.warm_up(transformer, (1 + (frames - 1) // 4, height // 8, width // 8))
        torch.cuda.synchronize()
    if (seconds := time.perf_counter() - begin) > WARM_UP_TOLD:
        print(f"compiled the kernels for this GPU in {seconds:.0f} s; later starts find them")


def _sizes(found, quant_linear: bool | str, dtype: "torch.dtype") -> plan.Sizes:
    """Bytes of the parts as they will be loaded"""
    one = found.transformers[0]
    in_8_bits = one.quantized if quant_linear == "auto" else quant_linear
    counts = [sum(t.numel() for t in part.tensors.values()) for part in (one, found.text_encoder, found.vae)]
    return plan.Sizes(
        transformer=counts[0] * (1.03 if in_8_bits else dtype.itemsize),
        experts=len(found.transformers),
        text_encoder=counts[1] * dtype.itemsize,
        vae=counts[2] * dtype.itemsize,
    )


def _tell(chosen: plan.Plan) -> None:
    """A plan that moves things is worth a line."""
    if chosen.name != "resident":
        print(chosen)


def _apply(pipeline, chosen: plan.Plan) -> None:
    pipeline.plan = chosen
    pipeline.encoder.follow(chosen)
    plan.apply(chosen, pipeline)


def _no_lora(*args, **kwargs):
    raise CheckpointError(
        "a LoRA cannot be added to int8 linears; merge it into the bf16 file first (turbo-nb convert IN OUT --lora "
        "FILE) and load that, with quant_linear=True if it should be 8-bit"
    )


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
    `media.Encoder.add` takes them. What these raise ends the run, which is how to cancel it. If memory runs out, the
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
        image, note = media.crop(image, settings.width, settings.height)
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
                text.empty_cache()
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


class _StepClock:
    """Times the steps of a denoising, hooked to the transformers of a pipeline for as long as it is entered.

    A kernel's launch returns before the kernel runs, so on a GPU perf_counter would time the launches. Waiting for the
    GPU at every step would empty its queue; an event in the stream between two kernels costs microseconds and is read
    after the stage, when all is done.
    """

    def __init__(self, pipeline):
        self._pipeline = pipeline

    def mark(self, name: str) -> None:
        """Where the work is now: a step is at its "call", at its "begin" (with its weights there) or at its "end"."""
        device = self._pipeline.plan.device
        if device == "cpu":
            self._marks[name].append(time.perf_counter())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        self._marks[name].append(event)

    def __enter__(self) -> None:
        self._marks, self._hooks = {"call": [], "begin": [], "end": []}, []
        for transformer in plan.transformers(self._pipeline):
            # between the two is what a plan has put around its forward to bring the weights
            for module, name in ((transformer, "call"), (transformer.rope, "begin")):
                hook = lambda *_, name=name: self.mark(name)  # noqa: E731
                self._hooks.append(module.register_forward_pre_hook(hook, prepend=True))

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def steps(self) -> tuple[float, ...]:
        """Seconds of each step, from the transformer's first kernel to the scheduler's last."""
        return self._between("begin", "end")

    @property
    def switch(self) -> float:
        """Seconds that steps waited for weights."""
        return sum(self._between("call", "begin"))

    def _between(self, first: str, last: str) -> tuple[float, ...]:
        pairs = zip(self._marks[first], self._marks[last], strict=True)
        return tuple(b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3 for a, b in pairs)


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
    return None if image is None else media.load_image(image)


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

    from .vae import chunks

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
