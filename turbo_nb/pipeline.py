"""A prompt becomes frames: `load_pipeline()` and `generate()`.

The pipeline is diffusers' `WanPipeline` or `WanImageToVideoPipeline`, unchanged, with our scheduler; `generate`
encodes, denoises and decodes one after the other, so that each can be timed and shown. Importing this module is cheap:
torch and diffusers are loaded with the first model.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from . import catalog
from .errors import CheckpointError, InputError
from .files import resolve
from .runtime import place, plan
from .text import embedding_cache, prompt_encoder

if TYPE_CHECKING:
    import torch
    from diffusers import WanImageToVideoPipeline, WanPipeline
WARM_UP_TOLD = 2.0  # seconds of compiling that are worth a line


def find_spec(model: "str | Path | tuple[str | Path, str | Path]") -> catalog.ModelSpec:
    """The spec of what `load_pipeline` takes as `model`; a name is found without torch. Raises what finding raises."""
    if model == "auto":
        model, _ = resolve.choose()
    if catalog.is_name(model):
        return catalog.find(str(model))
    return resolve.spec_of(model)


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
    the best text-to-video model that was downloaded and fits the GPU, nano on a CPU; see `resolve.choose`.
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
    from .machine import probe

    if attention_type not in sla.ATTENTION_TYPES:
        raise InputError(f"attention_type is {attention_type!r}; it is one of {', '.join(sla.ATTENTION_TYPES)}")
    if model != "auto" and checkpoint is None and catalog.is_name(model):
        catalog.find(str(model))  # an unknown name is found before torch is loaded
    device = probe.device_of(device)
    if attention_type == "sagesla":
        machine = probe.Machine() if device == "cpu" else None
        backends.choose("sagesla", machine, attention_backend).require()
    import torch
    from diffusers import WanPipeline

    from .checkpoint import load_text_encoder, load_tokenizer, load_transformer, load_vae
    from .fused.transformer import fuse
    from .fused.vae import fuse as fuse_vae
    from .linear import is_quantized
    from .scheduler import RCMScheduler

    if model == "auto" and checkpoint is None:
        model, quant_linear = resolve.choose(device=device, memory=memory, quant_linear=quant_linear)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # CPUs are slower in bf16
    found = resolve.resolve(
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
        budget=memory or probe.free_memory(device),
        host_budget=probe.free_memory("cpu"),
        device=device,
        fused=plan.fused_on(),
        name=memory_plan,
    )
    (on_plan or _tell)(chosen)
    tokens = load_tokenizer(found.tokenizer)  # first, as the quickest to be wrong
    transformers = [
        load_transformer(
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
            fuse(transformer)
    parts = {
        "tokenizer": tokens,
        "text_encoder": None,
        "vae": load_vae(found.vae, device=device if chosen.offload == "none" else "cpu", dtype=dtype),
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
    pipeline.encoder = prompt_encoder.PromptEncoder(
        pipeline,
        lambda where: load_text_encoder(found.text_encoder, device=where, dtype=dtype),
        embedding_cache.cache_for(found.text_encoder.path, found.tokenizer, dtype)
        if embedding_cache.is_cached(text_cache)
        else None,
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

    from .fused.transformer import warm_up

    begin = time.perf_counter()
    with suppress(torch.OutOfMemoryError), _current(device):  # the clip itself has a next plan
        warm_up(transformer, (1 + (frames - 1) // 4, height // 8, width // 8))
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
    place.apply(chosen, pipeline)


def _no_lora(*args, **kwargs):
    raise CheckpointError(
        "a LoRA cannot be added to int8 linears; merge it into the bf16 file first (turbo-nb convert IN OUT --lora "
        "FILE) and load that, with quant_linear=True if it should be 8-bit"
    )
