"""A prompt becomes an mp4 again and again, in one process that keeps everything loaded, or goes by a memory plan.

One row for each stage that `Video.timings` has; for a step of the denoising; for "write", what is left of the writing
when the last frame is decoded; and for "all", from the call of `generate` to the file on the disk, as a user waits for
it. Each is the median of the warm runs; first_ms is the very first run's. The check. The last run must give the first
one's frames again, and a picture that is not flat; how far a step is from float32 is what `step` checks.

With random weights (`random_sources`) the text, the steps and the decoding are the work of a real model, and the
pictures would be noise, which no video is and which x264 takes several times as long for. So in place of what the
transformer made, waves that are smooth in time and space are decoded, and of the steps the check sees only that they
end in finite numbers; it says how large the mp4 is.
"""

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from turbo_nb.errors import InputError
from turbo_nb.files import resolve
from turbo_nb.files.recognise import Contents
from turbo_nb.video import mp4

from . import harness, step
from .harness import Check, Job, Timing
from .vae import decode, random_vae

FLAT = 2  # standard deviation of 8-bit frames
SPREAD = 0.4  # standard deviation of a random VAE's pictures, in [-1, 1]
CELL = 6  # latent frames, rows and columns from one random value to the next
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


def jobs(
    model: str, random: str | None, prompt: str | None, device: str, load: dict, clip: dict,
    *, memory: float | None = None, runs: int, warmup: int,
) -> Iterator[Job]:  # fmt: skip
    """A job for each stage. random: a name of `step.MODELS` in place of a model with weights. prompt: None for one that
    suits the model. load, clip: as for `load_pipeline` and `generate`. memory: bytes of a smaller GPU than there is, to
    go by the plan for it; None leaves everything loaded. Raises what `load_pipeline` and `generate` raise, InputError
    for an unknown name."""
    load = load | {"device": device, "text_cache": False, "memory_plan": "resident" if memory is None else "auto"}
    load |= {"memory": memory} if device == "cpu" else {}
    with gpu_of(memory, device):
        pipeline = random_pipeline(random, load) if random else turbo_nb.load_pipeline(model, **load)
        prompt = pipeline.spec.example if prompt is None else prompt
        first, *before, last = (
            make(pipeline, prompt + " " * number, clip)  # the same text, and not a prompt that is remembered
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
            mode="as loaded" if memory is None else f"plan {pipeline.plan.name} in {memory / 1e9:g} GB",
            weights=f"random {random}" if random else pipeline.spec.name,
            run=lambda timing=timing: (timing, check),
        )


@contextmanager
def gpu_of(memory: float | None, device: str) -> Iterator[None]:
    """For a while a GPU has no more than `memory` bytes, and says so."""
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
    """A clip, seconds by stage, and bytes of its mp4."""

    video: turbo_nb.Video
    seconds: dict[str, float]
    size: int


def make(pipeline, prompt: str, clip: dict) -> Made:
    """A clip whose frames are encoded while others are decoded, and written."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        with mp4.Encoder(Path(folder) / "video.mp4", pipeline.spec.fps) as encoder:
            video = turbo_nb.generate(pipeline, prompt, **clip, on_frames=encoder.add)
            write = time.perf_counter()
            path = video.save(encoder)
            end = time.perf_counter()
        size = path.stat().st_size
    seconds = video.timings | {"step": median(video.steps), "write": end - write, "all": end - begin}
    return Made(video=video, seconds=seconds, size=size)


def random_pipeline(name: str, load: dict):
    """What `load_pipeline` makes of files with random weights; what its VAE decodes is smooth."""
    if name not in step.MODELS:
        raise InputError(f"random is {name!r}; it is one of {', '.join(step.MODELS)}")
    found = random_sources(name, load["device"], load["memory_plan"] != "resident")
    if load["device"] != "cpu":
        torch.cuda.empty_cache()  # of what was drawn
    with patch.object(resolve, "resolve", lambda *arguments, **options: found):
        pipeline = turbo_nb.load_pipeline(Path("random.pth"), **load)
    pipeline.vae.post_quant_conv.register_forward_pre_hook(lambda module, latents: (smooth(latents[0]),))
    return pipeline


def random_sources(name: str, device: str, in_main_memory: bool = False) -> resolve.Sources:
    """Files of a transformer of `step.MODELS` with Wan2.1's VAE and umT5-xxl as they would be read; random weights,
    and nano's tokenizer. Beside a transformer that reads narrower embeddings the other two are narrow as well.

    The weights are drawn on `device`, and stay there unless they are to be in main memory, as those of files are."""
    home = "cpu" if in_main_memory else device
    transformer = step.random_contents(name, device, home=home)
    arch, width = transformer.arch, transformer.text_dim
    config = UMT5_XXL
    if width != config["d_model"]:
        config = {"vocab_size": 384, "d_model": width, "d_kv": 32, "d_ff": 2 * width, "num_layers": 2, "num_heads": 2}
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**config, feed_forward_proj="gated-gelu"))
    generator = torch.Generator(device).manual_seed(0)
    tensors = {
        key: torch.ones(tensor.shape, dtype=torch.bfloat16, device=home)
        if tensor.ndim == 1  # a norm's
        else torch.randn(tensor.shape, dtype=torch.bfloat16, device=device, generator=generator).mul_(0.02).to(home)
        for key, tensor in encoder.state_dict().items()
        if key != "encoder.embed_tokens.weight"  # shared.weight
    }
    vae = random_vae(96 if config is UMT5_XXL else 8, device)
    spread_out(vae)
    return resolve.Sources(
        spec=catalog.of_arch(arch) or catalog.unnamed(name, arch, "t2v"),
        transformers=(transformer,),
        vae=Contents(path=transformer.path, kind="vae", layout="diffusers", tensors=vae.to(home).state_dict()),
        text_encoder=Contents(path=transformer.path, kind="text encoder", layout="diffusers", tensors=tensors),
        tokenizer=catalog.NANO.folder / "tokenizer",
    )


@torch.inference_mode()
def spread_out(vae: nn.Module) -> None:
    """Make what a random VAE decodes of smooth latents a video: frames that follow on one another, not a flicker, and
    pictures as varied as a video's. Each frame becomes one of the same latent frame; the work stays the same."""
    for module in vae.decoder.modules():
        if isinstance(module, nn.Conv3d):
            module.weight[:, :, :-1] = 0
        if hasattr(module, "time_conv"):
            for both in (module.time_conv.weight, module.time_conv.bias):
                both[: len(both) // 2] = both[len(both) // 2 :]
    latents = torch.empty(1, vae.config.z_dim, 2, 32, 32, device=vae.device)
    frames, last = decode(vae, smooth(latents)), vae.decoder.conv_out
    for _ in range(2):  # the first time may be clamped
        scale = SPREAD / frames.std((0, 2, 3, 4))
        last.weight.mul_(scale.view(-1, 1, 1, 1, 1))
        last.bias.sub_(frames.mean((0, 2, 3, 4))).mul_(scale)
        frames = decode(vae, smooth(latents))


def smooth(latents: Tensor) -> Tensor:
    """Random waves of the latents' shape (1, C, T, h, w), the same for the same shape"""
    generator = torch.Generator(latents.device).manual_seed(1)
    coarse = [2 + size // CELL for size in latents.shape[2:]]
    noise = torch.randn(*latents.shape[:2], *coarse, generator=generator, device=latents.device)
    return F.interpolate(noise, latents.shape[2:], mode="trilinear", align_corners=True).to(latents.dtype)
