"""`generate()`: a prompt becomes a clip in three stages, encode → denoise → decode.

Each stage is a plain function. `runtime.stages.StageRunner` times them, records their peak memory, and retries once
with the next memory plan.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .catalog import ModelSpec
from .errors import TurboNbError, warn
from .files.resolve import ResolvedModel
from .machine import environment
from .pipeline import LoadedModel
from .preparation import PreparedClip, named_extend_clip, prepare
from .records import IN_MEMORY, GraphRecord, VideoRecord, write
from .runtime import estimate, plan
from .runtime.compilations import compilations
from .runtime.pinned import pinned_empty
from .runtime.place import transformers
from .runtime.stages import StageRunner, current_device
from .runtime.steps import StepTimer, Tally
from .settings import ClipSettings, ResolvedClip, accepts
from .video import images, mp4

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import WanImageToVideoPipeline, WanPipeline
    from PIL.Image import Image

    from .scheduler import RCMScheduler
    from .tiny_decoder import TinyDecoder

UNTRAINED = {  # what no released model was trained for, and what may come of it
    "extend": "was not trained to extend clips, so movements may jump where two parts meet.",
    "last_image": "was not trained for a given last frame, so the movement may jump before it.",
}
PACKAGES = ("turbo-nb", "torch", "diffusers", "transformers")  # whose versions a clip records


@dataclass(frozen=True, kw_only=True)
class Video:
    """A finished clip.

    Args:
        frames: (T, H, W, 3) uint8.
        record: how it was made; the mp4 carries it.
    """

    frames: "np.ndarray" = field(repr=False)
    record: VideoRecord

    @property
    def fps(self) -> int:
        """Frames a second."""
        return self.record.fps

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage: text, denoise, decode, and switch, where a plan waits for weights in between."""
        return self.record.timings

    @property
    def steps(self) -> list[float]:
        """Seconds of each denoising step."""
        return self.record.steps

    @property
    def peaks(self) -> dict[str, float]:
        """Most bytes of GPU memory in each stage."""
        return self.record.peaks

    @property
    def graph(self) -> GraphRecord | None:
        """What CUDA graphs did: steps that they computed, or the reason why the steps were plain."""
        return self.record.graph

    @property
    def settings(self) -> dict:
        """How the clip was made, without what was measured: the same for the same clip."""
        return write(self.record.without_measurements())

    @property
    def cost(self) -> float | None:
        """Dollars for the seconds of `timings`; None where TURBO_NB_PRICE_PER_HOUR is not set."""
        return environment.cost(sum(self.timings.values()))

    def save(self, path: "str | Path | mp4.Encoder") -> Path:
        """Write an mp4 that carries `settings`.

        Args:
            path: the file; or an encoder that was given the frames while they were decoded (`generate`'s on_frames).

        Returns:
            The path of the file.

        Raises:
            OutputError: it cannot be written.
        """
        begin = time.perf_counter()
        path = mp4.write_mp4(path, self.frames, self.fps, self.settings)
        written = dict(zip(("num_frames", "height", "width"), self.frames.shape, strict=False))  # a grid is wider
        estimate.remember(asdict(self.record) | written, {"write": time.perf_counter() - begin})
        return path


@accepts(ClipSettings)
def generate(
    settings: ClipSettings,
    pipeline: "WanPipeline | WanImageToVideoPipeline",
    *,
    on_stage: Callable[[str], None] | None = None,
    on_step: "Callable[[int, int, torch.Tensor], None] | None" = None,
    on_frames: "Callable[[np.ndarray], None] | None" = None,
) -> Video:
    """Make a clip. None stands for the model's own value.

    A callback that raises ends the run: that is how to cancel it. If memory runs out, `generate` warns and goes on
    with the next memory plan.

    With extend, each part begins with the last frame of the part before it, which the clip has once. With extend_clip,
    the first part is a finished mp4, whose frames are decoded; writing them encodes them a second time. last_image is
    the last frame of the last part. Both pictures are cropped to the clip's aspect and resized.

    Args:
        pipeline: what `load_pipeline` returned.
        {options}
        on_stage: called with "text", "denoise" and "decode" as the stages begin.
        on_step: called as on_step(done, total, latents) after every step; latents (1, C, T, H, W).
        on_frames: called with frames (t, H, W, 3) uint8 as they are decoded, in order; `mp4.Encoder.add` takes them.

    Returns:
        The clip.

    Raises:
        InputError: a setting cannot be used.
        TurboNbError: the model's output is not finite, or memory ran out for good.
    """
    import numpy as np
    from PIL import Image

    model = LoadedModel.of(pipeline)
    prepared = prepare(settings, model.spec)
    model.resolved.require_memory(prepared.clip)
    clip, pictures = prepared.clip, _pictures(prepared, settings, model.spec)
    last, parts, record = pictures.pop("last_image", None), [], None
    if prepared.earlier:
        with named_extend_clip():
            parts.append(mp4.read_frames(settings.extend_clip, clip.width, clip.height))
    for number in range(clip.parts):
        own, given = replace(clip, seed=clip.seed + number), min(1, len(parts))
        if parts:
            pictures["image"] = Image.fromarray(parts[-1][-1])
        if last and number == clip.parts - 1:
            pictures["last_image"] = last
        # the frames of an earlier clip follow the first part's stages, which may fail
        before = parts[0] if prepared.earlier and not number else None
        video = _part(model, settings, own, pictures, on_stage, on_step, _in_order(on_frames, given, before))
        parts.append(video.frames[given:])  # without a frame that is there already
        record = _joined(record, video.record) if record else video.record
    if prepared.earlier:
        record = replace(record, parts=[*prepared.earlier.parts, _as_part(prepared.earlier)])
    return Video(frames=parts[0] if len(parts) == 1 else np.concatenate(parts), record=record)


def _part(
    model: LoadedModel,
    settings: ClipSettings,
    clip: ResolvedClip,
    pictures: "dict[str, Image]",
    on_stage: Callable | None,
    on_step: Callable | None,
    on_frames: Callable,
) -> Video:
    """Make the frames that the model makes at once; on_frames gets all of them so far, again and again"""
    import torch

    pipeline, tiny = model.pipeline, model.tiny_decoder() if settings.decoder == "tiny" else None
    runner, timer, graph = StageRunner(model, on_stage), StepTimer(pipeline, model.device), Tally()
    try:
        with (
            model.lock,
            torch.inference_mode(),
            current_device(model.device),
            compilations(model.device) as compiled,
        ):
            model.check_ranks()
            embedding = runner.run("text", lambda: encode(model, clip.prompt))
            latents = runner.run("denoise", lambda: denoise(model, embedding, clip, pictures, timer, on_step, graph))
            model.check_ranks()  # because a GPU that leaves an exchange has wrong numbers
            if model.plan.offload == "model":
                runner.timings |= {"denoise": runner.timings["denoise"] - timer.switch, "switch": timer.switch}
            frames = runner.run("decode", lambda: decode(pipeline, latents, on_frames, tiny))
            model.check_ranks()
    finally:
        pipeline.maybe_free_model_hooks()  # a cancelled run leaves nothing on the GPU either
    record = _record(model, clip, settings, runner, timer, graph)
    loading, model.load_seconds = model.load_seconds, None  # only the first clip reports it
    estimate.remember(
        asdict(record),
        record.timings | ({} if loading is None else {"load": loading}),
        steps=record.steps,
        work=estimate.work_of(model.spec.arch, *clip.size, record.sla_topk),
        warm=not compiled and not graph.captured,
    )
    return Video(frames=frames, record=record)


def _joined(first: VideoRecord, second: VideoRecord) -> VideoRecord:
    """Return the record of a clip that a part extends: its settings are those of the first part"""
    timings = {
        name: first.timings.get(name, 0) + second.timings.get(name, 0) for name in first.timings | second.timings
    }
    peaks = {name: max(first.peaks.get(name, 0), second.peaks.get(name, 0)) for name in first.peaks | second.peaks}
    return replace(first, timings=timings, peaks=peaks, steps=first.steps + second.steps)


def _as_part(earlier: VideoRecord) -> dict:
    """Return the record of a clip that is extended, as a part of another record"""
    return write(replace(earlier.without_measurements(), parts=[], versions={}))


def _pictures(prepared: PreparedClip, settings: ClipSettings, spec: ModelSpec) -> "dict[str, Image]":
    """Return the pictures, cropped to the clip's size.

    Warns of what is lost, of a prompt that the model cannot read, and of what the model was not trained for.
    """
    clip, cropped = prepared.clip, {}
    if not spec.understands(clip.prompt):
        warn(
            f"{spec.name} only knows moving shapes, so the video will not show what this prompt describes. An example "
            f"that it knows: {spec.example}",
            stacklevel=4,
        )
    for name, picture in prepared.pictures.items():
        cropped[name], note = images.crop(picture, clip.width, clip.height, name)
        if note:
            hint = "" if settings.adaptive_resolution or name != "image" else "; adaptive_resolution keeps its aspect"
            warn(note + hint, stacklevel=4)
    if settings.extend:
        warn(f"{spec.name} {UNTRAINED['extend']}", stacklevel=4)
    if "last_image" in cropped:
        warn(f"{spec.name} {UNTRAINED['last_image']}", stacklevel=4)
    return cropped


def encode(model: LoadedModel, prompt: str) -> "torch.Tensor":
    """Encode a prompt, or take its embedding from the cache: (1, 512, text_dim)."""
    return model.prompt_encoder(prompt)


def denoise(
    model: LoadedModel,
    embedding: "torch.Tensor",
    clip: ResolvedClip,
    pictures: "Mapping[str, Image]",
    timer: StepTimer,
    on_step: "Callable[[int, int, torch.Tensor], None] | None" = None,
    graph: Tally | None = None,
) -> "torch.Tensor":
    """Sample the latents of a clip.

    Args:
        model: what to sample with.
        embedding: of the prompt, (1, 512, text_dim).
        clip: its size, steps, noise levels and seed.
        pictures: the frames that are given, in the clip's size, as the pipeline calls them: image, last_image.
        timer: entered for the steps.
        on_step: as in `generate`.
        graph: gets what CUDA graphs did. None: every step is plain.

    Returns:
        Finite latents (1, C, T, H/8, W/8).

    Raises:
        TurboNbError: they are not finite.
    """
    from .scheduler import RCMScheduler

    pipeline = model.pipeline
    scheduler = RCMScheduler(clip.sigma_max, clip.ode)
    scheduler.seed(clip.seed, clip.noise_device)
    shape = (
        1,
        pipeline.vae.config.z_dim,
        1 + (clip.num_frames - 1) // pipeline.vae_scale_factor_temporal,
        clip.height // pipeline.vae_scale_factor_spatial,
        clip.width // pipeline.vae_scale_factor_spatial,
    )

    def after_step(_, index: int, timestep, tensors: dict) -> dict:
        timer.mark("end")
        if on_step:
            on_step(index + 1, clip.num_steps, tensors["latents"])
        return {}

    with _graphs(model, clip, timer, graph), timer, _sampling_as(pipeline, scheduler, clip.boundary):
        latents = pipeline(
            **pictures,
            prompt_embeds=embedding.to(pipeline._execution_device),
            latents=scheduler.start_latents(shape),
            height=clip.height,
            width=clip.width,
            num_frames=clip.num_frames,
            num_inference_steps=clip.num_steps,
            guidance_scale=1.0,
            output_type="latent",
            callback_on_step_end=after_step,
        ).frames
        if pipeline.interrupt:
            raise TurboNbError("the run was interrupted (pipeline._interrupt), so the clip is not finished.")
    if not latents.isfinite().all():
        model.check_ranks()
        raise TurboNbError(
            "the model's output is not finite (NaN or Inf), so nothing was written. Try another seed, or other files."
        )
    return latents


@contextmanager
def _sampling_as(
    pipeline: "WanPipeline | WanImageToVideoPipeline", scheduler: "RCMScheduler", boundary: float | None
) -> Iterator[None]:
    """Give a pipeline the scheduler and the boundary of a clip, and its own ones back afterwards"""
    before = pipeline.scheduler, pipeline.config.boundary_ratio
    try:
        pipeline.scheduler = scheduler
        pipeline.register_to_config(boundary_ratio=boundary)
        yield
    finally:
        pipeline.scheduler = before[0]
        pipeline.register_to_config(boundary_ratio=before[1])


def _graphs(model: LoadedModel, clip: ResolvedClip, timer: StepTimer, tally: Tally | None) -> AbstractContextManager:
    """Return a context in which CUDA graphs compute the steps of a clip, where they fit"""
    from .runtime import graphs

    if tally is None:
        return nullcontext()
    model.graphs = model.graphs or graphs.StepGraphs()
    fused = plan.fused_on(model.device)
    later = plan.after_denoise(model.plan, model.resolved.sizes, clip.width, clip.height, fused)
    models = transformers(model.pipeline)
    if model.team:
        from .parallel.ulysses import attention_of

        model.team.tell("graphs", later, [*map(attention_of, models)], model.team.clips.copy())
    return model.graphs.replacing(models, model.plan, tally, later=later, on_begin=lambda: timer.mark("begin"))


def decode(
    pipeline: "WanPipeline | WanImageToVideoPipeline",
    latents: "torch.Tensor",
    on_frames: "Callable[[np.ndarray], None]" = lambda frames: None,
    tiny: "TinyDecoder | None" = None,
) -> "np.ndarray":
    """Decode latents as `WanPipeline` itself does, or with a tiny decoder.

    Frames of one chunk are copied from a GPU while the next chunk is decoded. A VAE that may decode in tiles does so
    where memory runs out.

    Args:
        pipeline: whose VAE decodes.
        latents: (1, C, T, H, W).
        on_frames: called after each chunk with all frames so far.
        tiny: decodes in place of the VAE.

    Returns:
        Frames (4T − 3, 8H, 8W, 3) uint8.
    """
    import torch

    if pipeline.vae.use_tiling and not tiny:
        with suppress(torch.OutOfMemoryError):
            return _decode(pipeline, latents, on_frames, tiny)
        return _decode(pipeline, latents, on_frames, tiny, length=0)
    return _decode(pipeline, latents, on_frames, tiny)


def _decode(
    pipeline: "WanPipeline | WanImageToVideoPipeline",
    latents: "torch.Tensor",
    on_frames: "Callable[[np.ndarray], None]",
    tiny: "TinyDecoder | None",
    length: int | None = None,
) -> "np.ndarray":
    """Decode with chunks of a length, as that of `fused.vae.chunks`"""
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

    if tiny:
        samples = tiny.chunks(latents)
    else:
        samples = apply_forward_hook(chunks)(vae, latents.to(device, vae.dtype) * std + mean, length)
    for sample in samples:
        part = sample[0].permute(1, 2, 3, 0).float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)
        if frames is None:
            frames = pinned_empty((count, *part.shape[1:]), torch.uint8, pin=part.is_cuda)
        frames[done : done + len(part)].copy_(part, non_blocking=True)
        done += len(part)
        copies.append((done, torch.cuda.current_stream(device).record_event() if part.is_cuda else None))
        if len(copies) > 1:  # one chunk behind, so that the GPU has its next chunk before this thread waits
            hand_on()
    hand_on()
    return frames.numpy()


def _in_order(
    on_frames: "Callable[[np.ndarray], None] | None", given: int, before: "np.ndarray | None"
) -> "Callable[[np.ndarray], None]":
    """Return a function that takes all frames so far and hands on those after `given`, each once, even after a retry.

    It hands on the frames `before` them first.
    """

    def deliver(frames: "np.ndarray") -> None:
        nonlocal given, before
        if on_frames and before is not None:
            on_frames(before)
            before = None
        if on_frames and len(frames) > given:
            on_frames(frames[given:])
            given = len(frames)

    return deliver


def _record(
    model: LoadedModel, clip: ResolvedClip, settings: ClipSettings, runner: StageRunner, timer: StepTimer, graph: Tally
) -> VideoRecord:
    """Return how a clip was made"""
    return VideoRecord(
        **asdict(clip),
        **model.attention,
        loras=[one.record for one in model.resolved.loras],
        fps=model.spec.fps,
        memory_plan=model.plan.name,
        device=model.device,
        gpus=model.plan.gpus if model.plan.gpus > 1 else None,
        image=str(settings.image) if isinstance(settings.image, str | Path) else None,
        last_image=_origin(settings.last_image),
        timings=runner.timings,
        steps=list(timer.steps),
        peaks=runner.peaks,
        graph=graph.record,
        versions={name: environment.version(name) or "not installed" for name in PACKAGES},
    )


def _origin(picture: "str | Path | Image | np.ndarray | None") -> str | None:
    """Return where a picture came from"""
    return str(picture) if isinstance(picture, str | Path) else None if picture is None else IN_MEMORY


def outlook(
    model: LoadedModel | ResolvedModel, clip: ResolvedClip, memory_plan: str | None = None
) -> estimate.Estimate | None:
    """Estimate how long a clip will take.

    Args:
        model: loaded, or only resolved.
        clip: its size and steps.
        memory_plan: the name of the plan in effect. None: that of a loaded model, or not known.

    Returns:
        The estimate; None where nothing is known about this machine.
    """
    if isinstance(model, LoadedModel):
        how, memory_plan = model.attention, model.plan.name
    else:
        how = {name: getattr(model, name) for name in ("attention_type", "sla_topk", "quant_linear")}
    gpus = model.resolved.gpus if isinstance(model, LoadedModel) else model.gpus
    wanted = asdict(clip) | how | {"memory_plan": memory_plan, "gpus": gpus}
    found = estimate.estimate(wanted, model.spec.arch, device=model.device)
    return found and replace(found, seconds=found.seconds * clip.parts)
