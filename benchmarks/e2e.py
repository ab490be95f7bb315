"""Make an mp4 from a prompt, again and again, with a model that stays loaded or follows a memory plan.

There is one row for each stage of `Video.timings`, and three more. "step" is one step of the denoising. "write" is the
time from the last decoded frame to the finished file. "all" is the time that a user waits: from the call of `generate`
to the file on the disk. Each row has the median of the warm runs, and first_ms is the time of the very first run.

The check: the last run gives the frames of the first run again, and the picture is not flat. `step` checks how far a
step is from float32.

With random weights (`random_model`) the text, the steps and the decoding are the work of a real model. But a
transformer with random weights makes noise, and x264 takes several times as long for noise as for a video. So the VAE
decodes smooth waves instead. Of the steps the check then sees only that their results are finite. The column `check`
gives the size of the mp4.
"""

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

import turbo_nb
from turbo_nb import catalog
from turbo_nb import pipeline as pipelines
from turbo_nb.errors import InputError
from turbo_nb.files import decide, resolve
from turbo_nb.files.recognise import Contents
from turbo_nb.machine import probe
from turbo_nb.settings import LoadOptions
from turbo_nb.video import mp4

from . import harness, step
from .harness import Check, Job, Timing
from .vae import decode, random_vae

FLAT = 2  # standard deviation of 8-bit frames, below which they count as flat
SPREAD = 0.4  # standard deviation of the pictures of a random VAE, in [-1, 1]
CELL = 6  # latent frames, rows and columns between two random values
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


def jobs(
    model: str, random: str | None, prompt: str | None, device: str, load: dict, clip: dict,
    *, memory: float | None = None, runs: int, warmup: int,
) -> Iterator[Job]:  # fmt: skip
    """Yield a job for each stage.

    Args:
        model: a name, a checkpoint or a folder.
        random: a name of `step.MODELS`, whose random weights replace the model. None: the model's own.
        prompt: None: the model's example.
        device: "cpu" or a GPU such as "cuda:0".
        load, clip: options of `load_pipeline` and of `generate`.
        memory: bytes of a smaller GPU, whose memory plan is used. None: everything stays loaded.

    Raises:
        InputError: a name is unknown. Also what `load_pipeline` and `generate` raise.
    """
    load = load | {"device": device, "text_cache": False, "memory_plan": "resident" if memory is None else "auto"}
    load |= {"memory": memory} if device == "cpu" else {}
    with gpu_of(memory, device):
        pipeline = random_pipeline(random, load) if random else turbo_nb.load_pipeline(model, **load)
        spec, plan = pipeline.turbo_nb.spec, pipeline.turbo_nb.plan
        prompt = spec.example if prompt is None else prompt
        first, *before, last = (
            make(pipeline, prompt + " " * number, clip)  # the same text, but not the cached prompt
            for number in range(1 + warmup + runs)
        )
    warm = [*before, last][warmup:]
    video = last.video
    frames, height, width, _ = video.frames.shape
    settings, spread = video.settings, video.frames.std()
    topk = "" if settings["sla_topk"] is None else f" {settings['sla_topk']:g}"
    linears = "int8" if settings["quant_linear"] else str(pipeline.transformer.dtype).removeprefix("torch.")
    out, ref = (torch.from_numpy(clip.video.frames.astype(np.float32)) for clip in (last, first))
    check = Check(
        error=harness.relative_error(out, ref) if spread >= FLAT else math.inf,
        limit=harness.WORST,
        what=f"the last run's frames against the first's; their standard deviation {spread:.1f}, {FLAT} is flat; an "
        f"mp4 of {last.size / 1e3:.0f} kB",
    )
    for stage in last.seconds:
        times = [1e3 * clip.seconds[stage] for clip in warm]
        peak = video.peaks.get(stage)
        timing = Timing(
            ms=median(times), ms_min=min(times), n=runs, first_ms=1e3 * first.seconds[stage],
            peak_gib=peak and peak / 2**30,
        )  # fmt: skip
        yield Job(
            work=f"{stage} of a clip, {settings['num_steps']} steps, {settings['attention_type']}{topk}, {linears}",
            shape=f"{width}x{height}x{frames}",
            mode="as loaded" if memory is None else f"plan {plan.name} in {memory / 1e9:g} GB",
            weights=f"random {random}" if random else spec.name,
            run=lambda timing=timing: (timing, check),
            gpus=plan.gpus,
        )


@contextmanager
def gpu_of(memory: float | None, device: str) -> Iterator[None]:
    """Let a GPU have and report at most `memory` bytes inside this context."""
    if memory is None or device == "cpu":
        yield
        return
    index = torch.device(device).index or 0
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1, memory / total), index)
    room = lambda device=None: (max(0, int(memory) - torch.cuda.memory_reserved(device)), int(memory))  # noqa: E731
    try:
        with patch.object(torch.cuda, "mem_get_info", room):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A clip, the seconds of its stages, and the bytes of its mp4."""

    video: turbo_nb.Video
    seconds: dict[str, float]
    size: int


def make(pipeline, prompt: str, clip: dict, **more) -> Made:
    """Make a clip and write it. Its frames are encoded while later frames are decoded. `more` goes to `generate`."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        with mp4.Encoder(Path(folder) / "video.mp4", pipeline.turbo_nb.spec.fps) as encoder:
            video = turbo_nb.generate(pipeline, prompt, **clip, on_frames=encoder.add, **more)
            write = time.perf_counter()
            path = video.save(encoder)
            end = time.perf_counter()
        size = path.stat().st_size
    seconds = video.timings | {"step": median(video.steps), "write": end - write, "all": end - begin}
    return Made(video=video, seconds=seconds, size=size)


def random_pipeline(name: str, load: dict, parts: "Parts | None" = None):
    """Load random weights as `load_pipeline` loads files. The VAE decodes smooth waves instead of its latents."""
    if name not in step.MODELS:
        raise InputError(f"random is {name!r}. Expected one of {', '.join(step.MODELS)}.")
    load = dict(load)
    size = load.pop("clip", None)
    found = random_model(name, LoadOptions(**load), parts)
    if found.device != "cpu":
        torch.cuda.empty_cache()  # because drawing the weights has left free blocks
    pipeline = pipelines.load(found, clip=size, remake=partial(random_model, name))
    pipeline.vae.post_quant_conv.register_forward_pre_hook(lambda module, latents: (smooth(latents[0]),))
    return pipeline


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The files of a model, as `recognise.read` returns them."""

    transformer: Contents
    vae: Contents
    text_encoder: Contents


def random_parts(name: str, device: str, home: str, int8: bool = False) -> Parts:
    """Return a transformer of `step.MODELS`, Wan2.1's VAE and umT5-xxl with random weights.

    Beside a transformer that reads narrower embeddings, the VAE and the text encoder are narrow as well.

    Args:
        name: of `step.MODELS`.
        device: where the weights are drawn.
        home: the device that keeps them.
        int8: whether the transformer's linears are in int8.
    """
    transformer = step.random_contents(name, device, home=home, int8=int8)
    config, width = UMT5_XXL, transformer.text_dim
    if width != config["d_model"]:
        config = {"vocab_size": 384, "d_model": width, "d_kv": 32, "d_ff": 2 * width, "num_layers": 2, "num_heads": 2}
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**config, feed_forward_proj="gated-gelu"))
    generator = torch.Generator(device).manual_seed(0)
    tensors = {
        key: torch.ones(tensor.shape, dtype=torch.bfloat16, device=home)
        if tensor.ndim == 1  # the weight of a norm
        else torch.randn(tensor.shape, dtype=torch.bfloat16, device=device, generator=generator).mul_(0.02).to(home)
        for key, tensor in encoder.state_dict().items()
        if key != "encoder.embed_tokens.weight"  # a view of shared.weight
    }
    vae = random_vae(96 if config is UMT5_XXL else 8, device)
    spread_out(vae)
    common = {"path": transformer.path, "names": "diffusers"}
    return Parts(
        transformer=transformer,
        vae=Contents(kind="vae", tensors=vae.to(home).state_dict(), **common),
        text_encoder=Contents(kind="text encoder", tensors=tensors, **common),
    )


def random_model(name: str, options: LoadOptions, parts: Parts | None = None) -> resolve.ResolvedModel:
    """Return a model of random parts with nano's tokenizer. Two experts have the same weights.

    Without parts, they are drawn on the options' device. They stay there if everything stays loaded, else they are in
    main memory.
    """
    device = options.device
    parts = parts or random_parts(name, device, device if options.memory_plan == "resident" else "cpu")
    arch = parts.transformer.arch
    spec = catalog.of_arch(arch) or catalog.unnamed(name, arch, arch.task)
    return resolve.ResolvedModel(
        spec=spec,
        transformers=(parts.transformer,) * (2 if spec.task == "i2v" else 1),
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=catalog.NANO.folder / "tokenizer",
        device=device,
        memory=options.memory or probe.free_memory(device),
        host_memory=probe.free_memory("cpu"),
        attention_type=options.attention_type or "sla",
        attention_backend=options.attention_backend,
        sla_topk=spec.sla_topk if options.sla_topk is None else options.sla_topk,
        quant_linear=options.quant_linear is True,
        reason="its weights are random",
        options=options,
        gpus=decide.ranks_for(probe.gpus_of(options.gpus, device), arch.num_heads),
    )


@torch.inference_mode()
def spread_out(vae: nn.Module) -> None:
    """Change a random VAE so that it decodes smooth latents to a smooth video with varied pictures.

    Every frame then comes from one latent frame, so the video does not flicker. The amount of work stays the same.
    """
    for module in vae.decoder.modules():
        if isinstance(module, nn.Conv3d):
            module.weight[:, :, :-1] = 0
        if hasattr(module, "time_conv"):
            for both in (module.time_conv.weight, module.time_conv.bias):
                both[: len(both) // 2] = both[len(both) // 2 :]
    side = 32 if vae.device.type == "cuda" else 12  # because a CPU takes seconds for more
    latents = torch.empty(1, vae.config.z_dim, 2, side, side, device=vae.device)
    frames, last = decode(vae, smooth(latents)), vae.decoder.conv_out
    for _ in range(2):  # twice, because the first frames may be clamped
        scale = SPREAD / frames.std((0, 2, 3, 4))
        last.weight.mul_(scale.view(-1, 1, 1, 1, 1))
        last.bias.sub_(frames.mean((0, 2, 3, 4))).mul_(scale)
        frames = decode(vae, smooth(latents))


def smooth(latents: Tensor) -> Tensor:
    """Return random waves of the latents' shape (1, C, T, h, w). The same shape gives the same waves."""
    generator = torch.Generator(latents.device).manual_seed(1)
    coarse = [2 + size // CELL for size in latents.shape[2:]]
    noise = torch.randn(*latents.shape[:2], *coarse, generator=generator, device=latents.device)
    return F.interpolate(noise, latents.shape[2:], mode="trilinear", align_corners=True).to(latents.dtype)
