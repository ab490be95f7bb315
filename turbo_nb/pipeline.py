"""`load_pipeline()`: resolve → plan → load → fuse → place.

The result is `WanPipeline` or `WanImageToVideoPipeline` of `wan.py`: those of diffusers, with our scheduler. Its one
attribute of ours is `pipeline.turbo_nb`, a `LoadedModel`. Importing this module is cheap: torch and diffusers are
imported with the first model.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from . import backends
from .catalog import ModelSpec
from .errors import InputError
from .files import hub
from .files.resolve import ResolvedModel, resolve
from .machine import phases, probe
from .machine.beside import Beside
from .machine.garbage import uncollected
from .runtime.place import place, transformers
from .runtime.plan import Plan
from .runtime.stages import current_device
from .settings import LoadOptions, accepts, options
from .text import embedding_cache
from .text.prompt_encoder import PromptEncoder

if TYPE_CHECKING:
    from diffusers import WanImageToVideoPipeline, WanPipeline

    from .files.lora import Applied
    from .parallel.ranks import Member, Team
    from .runtime.graphs import StepGraphs
    from .tiny_decoder import TinyDecoder

WARM_UP_LOGGED = 2.0  # seconds of warm-up from which on it is logged, because kernels were compiled in them
SAMPLES = 32  # elements of each tensor that a fingerprint of the weights reads

log = logging.getLogger("turbo_nb")


@dataclass(kw_only=True, eq=False)
class LoadedModel:
    """What `load_pipeline` knows of the pipeline that it made, at `pipeline.turbo_nb`.

    Args:
        resolved: the model, its files and how it was loaded.
        pipeline: diffusers' pipeline.
        prompt_encoder: encodes prompts, and keeps the text encoder where the plan says.
        plan: the memory plan in effect.
        load_seconds: what loading took without downloads; None once a clip has reported it.
        graphs: the CUDA graphs of its steps. None: no clip was made yet.
        team: the ranks on the other GPUs. None: one GPU makes the clips.
        lock: held while a clip is made, because two threads cannot share the scheduler and the weights.
    """

    resolved: ResolvedModel
    pipeline: "WanPipeline | WanImageToVideoPipeline" = field(repr=False)
    prompt_encoder: PromptEncoder = field(repr=False)
    plan: Plan
    load_seconds: float | None = None
    graphs: "StepGraphs | None" = field(default=None, repr=False)
    team: "Team | None" = field(default=None, repr=False)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _tiny_decoder: "TinyDecoder | None" = field(default=None, repr=False)
    _loaded_on: str = "cpu"
    _weights_at_load: str = field(default="", repr=False)

    @classmethod
    def of(cls, pipeline: "WanPipeline | WanImageToVideoPipeline") -> "LoadedModel":
        """Return the LoadedModel of a pipeline. Raises InputError for one that `load_pipeline` did not make."""
        model = getattr(pipeline, "turbo_nb", None)
        if not isinstance(model, cls):
            raise InputError(
                f"pipeline is a {type(pipeline).__name__}. Expected one that turbo_nb.load_pipeline returned."
            )
        return model

    @property
    def spec(self) -> ModelSpec:
        """The model and its defaults."""
        return self.resolved.spec

    @property
    def device(self) -> str:
        """Where the model runs."""
        return self.plan.device

    @property
    def attention(self) -> dict:
        """The attention and the linears that the transformers have now: attention_type, sla_topk, quant_linear."""
        from .linear import is_quantized
        from .sla import attention_type, topk_of

        first = transformers(self.pipeline)[0]
        return {
            "attention_type": attention_type(first),
            "sla_topk": topk_of(first),
            "quant_linear": is_quantized(first),
        }

    @property
    def identity(self) -> dict:
        """What a clip of this model depends on now, with changes since it was loaded (top-k, fused weights)."""
        from .sla import attention_type, topk_of

        weights = self._fingerprint()
        changed = {} if weights == self._weights_at_load else {"weights": weights}
        each = [(attention_type(one), topk_of(one)) for one in transformers(self.pipeline)]
        if len(set(each)) > 1:
            changed["experts"] = each
        return self.resolved.identity | self.attention | changed

    def follow(self, plan: Plan) -> None:
        """Put the parts where a plan says, after the memory of the earlier one is given back."""
        if self.team:
            self.team.tell("follow", plan)
        self.pipeline.maybe_free_model_hooks()
        if self.graphs:
            self.graphs.release()
        probe.release_memory()
        self.plan = plan
        self.prompt_encoder.place(plan.text_encoder, plan.device)
        place(self.pipeline, plan)

    def tiny_decoder(self) -> "TinyDecoder":
        """Return the tiny decoder, which is loaded, and downloaded where it is missing, at the first call.

        Raises:
            InputError: it does not fit the VAE.
            CheckpointError, DownloadError: its file cannot be used or fetched.
        """
        import torch

        from . import checkpoint
        from .video.preview import is_wan21

        with self.lock:
            if self._tiny_decoder is None:
                resolved = self.resolved.decoding("tiny")
                if not is_wan21(self.pipeline.vae.config):
                    raise InputError(
                        f"decoder is 'tiny'. Expected full for {self.spec.name}, whose VAE has latents of its own."
                    )
                self.resolved = resolved.fetch()
                dtype = torch.float32 if self.device == "cpu" else torch.float16
                self._tiny_decoder = checkpoint.load_tiny_decoder(
                    self.resolved.tiny_decoder, device=self.device, dtype=dtype
                )
            return self._tiny_decoder

    def drop_graphs(self) -> bool:
        """Drop the CUDA graphs of the steps for good, because memory ran out. Returns whether one existed."""
        if self.team:
            self.team.tell("drop_graphs")
        return self.graphs is not None and self.graphs.out_of_memory()

    @property
    def ended(self) -> bool:
        """Whether the ranks on the other GPUs have ended, so that only a new load makes clips."""
        return bool(self.team and self.team.failure)

    def check_ranks(self) -> None:
        """Raise TurboNbError where the ranks on the other GPUs have ended."""
        if self.team:
            self.team.check()

    def merge(self, resolved: ResolvedModel) -> None:
        """Merge the LoRAs of `resolved`, the same model with other LoRAs; errors as those of `set_loras`."""
        from .files import lora

        if any(getattr(one, "peft_config", None) for one in transformers(self.pipeline)):
            raise InputError(
                "pipeline is one with a LoRA that diffusers has attached. Expected none beside those of set_loras, "
                "which reads weights from the model's file. Call its unload_lora_weights() first."
            )
        with self.lock:
            before, was_changed = self.resolved, self._fingerprint() != self._weights_at_load
            try:
                self._reload(before.loras, resolved.loras)
                lora.require_changed(resolved.loras)
            except BaseException:
                self._reload(resolved.loras, before.loras)
                raise
            if self.team:
                self.team.tell("merge", resolved.options.loras)
            self.resolved = resolved
            if not was_changed:
                self._weights_at_load = self._fingerprint()

    def _reload(self, before: Sequence["Applied"], after: Sequence["Applied"]) -> None:
        """Read the tensors again that a LoRA of `before` or `after` touches, unless the same LoRAs touch them alike"""
        from . import checkpoint
        from .files import lora

        self.pipeline.maybe_free_model_hooks()  # so that no weights that are written are copies on the GPU
        for number, model in enumerate(transformers(self.pipeline)):
            old, new = ([one for one in loras if one.applies_to(number)] for loras in (before, after))
            checkpoint.reload_tensors(
                model,
                self.resolved.transformers[number],
                lora.differing(old, new),
                new,
                device=self._loaded_on,
                run_device=self.device,
            )

    def _fingerprint(self) -> str:
        """Hash evenly spaced elements of every tensor of the transformers and the VAE"""
        import hashlib

        import torch

        digest = hashlib.sha256()
        with torch.no_grad():
            for module in (*transformers(self.pipeline), self.pipeline.vae):
                samples: dict[str, list[torch.Tensor]] = {}
                for tensor in module.state_dict().values():
                    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
                    step = max(1, flat.numel() // SAMPLES)
                    samples.setdefault(str(tensor.device), []).append(flat[::step][:SAMPLES].double())
                for parts in samples.values():
                    digest.update(torch.cat(parts).cpu().numpy().tobytes())
        return digest.hexdigest()


@accepts(LoadOptions)
def load_pipeline(
    options: LoadOptions,
    *,
    clip: tuple[int, int, int] | None = None,
    prompts: Sequence[str] = (),
    on_plan: Callable[[Plan], None] | None = None,
    on_progress: Callable[[hub.Progress], None] | None = None,
    on_compile: Callable[[int, int], None] | None = None,
) -> "WanPipeline | WanImageToVideoPipeline":
    """Load a model as a diffusers pipeline with an `RCMScheduler`.

    Args:
        {options}
        clip: width, height and frames that the memory plan is chosen for. None: the model's own.
        prompts: the prompts to come, if they are known. The text encoder is not loaded while the embeddings of all
            of them are on disk.
        on_plan: called with the memory plan before anything is loaded. None: the plan is logged.
        on_progress: called as bytes of a download arrive.
        on_compile: called as on_compile(done, total) while kernels are compiled, from a thread of its own.

    Returns:
        The pipeline; `pipeline.turbo_nb` is its `LoadedModel`.

    Raises:
        UnknownModelError, InputError, BackendError: an option cannot be used; found before any download.
        DownloadError: a file cannot be fetched.
        CheckpointError: a file is not what it was taken for.
    """
    more = {"on_plan": on_plan, "on_progress": on_progress, "on_compile": on_compile}
    return load(resolve(options), clip=clip, prompts=prompts, **more)


def set_loras(pipeline: "WanPipeline | WanImageToVideoPipeline", loras: Any = ()) -> None:
    """Give a loaded model other LoRAs, or other strengths, without loading it again.

    The weights that a LoRA touches are read again from the model's file. All other weights stay. If this raises, the
    model has the LoRAs that it had before.

    Args:
        pipeline: what `load_pipeline` returned.
        loras: all LoRAs that the model is to have, as `loras` of `load_pipeline`. An empty list and strengths of 0 give
            the weights of the file back, bit by bit.

    Raises:
        InputError: a LoRA or a strength cannot be used, or diffusers has attached a LoRA to the pipeline.
        CheckpointError: a file is missing, is not a LoRA, does not fit the model, or changes nothing.
    """
    model = LoadedModel.of(pipeline)
    with model.lock:
        model.merge(model.resolved.with_loras(options(LoadOptions)["loras"].check("loras", loras)))


def load(
    resolved: ResolvedModel,
    *,
    clip: tuple[int, int, int] | None = None,
    prompts: Sequence[str] = (),
    on_plan: Callable[[Plan], None] | None = None,
    on_progress: Callable[[hub.Progress], None] | None = None,
    on_compile: Callable[[int, int], None] | None = None,
    remake: Callable[[LoadOptions], ResolvedModel] = resolve,
) -> "WanPipeline | WanImageToVideoPipeline":
    """Load a model that `files.resolve.resolve` found; arguments, result and errors as those of `load_pipeline`.

    Other ranks find the model with `remake`, a function of a module.
    """
    backends.check_variables()
    resolved.plan(clip)  # a plan that does not suit the device is an error before the download
    resolved = resolved.fetch(on_progress)
    plan = resolved.plan(clip)
    (on_plan or (lambda plan: log.info("%s", plan)))(plan)

    begin = time.perf_counter()
    phases.mark("download and plan")
    if resolved.gpus < 2:
        return _load(resolved, plan, clip, prompts, on_compile, begin)
    from .parallel import members, ranks

    team = ranks.start(resolved.gpus, members.device_of, _serve, remake, resolved.pinned, plan, clip)
    try:
        pipeline = _load(resolved, plan, clip, prompts, on_compile, begin, team)
        team.join()
        if plan.device != "cpu" and plan.offload == "none" and plan.fits:
            from .runtime import warm_up

            with current_device(plan.device):
                size = clip or (*resolved.spec.size, resolved.spec.num_frames)
                warm_up.together(pipeline, size, on_compile)
    except BaseException:
        team.close()
        raise
    team.drop_graphs = partial(_drop_graphs, weakref.ref(pipeline.turbo_nb))
    weakref.finalize(pipeline, team.close)
    pipeline.turbo_nb.load_seconds = time.perf_counter() - begin
    return pipeline


def _serve(
    member: "Member",
    remake: Callable[[LoadOptions], ResolvedModel],
    options: LoadOptions,
    plan: Plan,
    clip: tuple[int, int, int] | None,
) -> None:
    """Load a model on another rank, and run rank 0's commands"""
    from .parallel import members

    resolved = remake(replace(options, device=member.device))
    model = _load(resolved, plan.for_rank(member.device), clip, (), None, 0, member).turbo_nb
    member.ready()
    members.follow(model, member)


def _drop_graphs(model: "weakref.ref[LoadedModel]") -> None:
    if (alive := model()) and alive.graphs:
        alive.graphs.release()


def _load(
    resolved: ResolvedModel,
    plan: Plan,
    clip: tuple[int, int, int] | None,
    prompts: Sequence[str],
    on_compile: Callable[[int, int], None] | None,
    begin: float,
    link: "Team | Member | None" = None,
) -> "WanPipeline | WanImageToVideoPipeline":
    """Load a model on this rank; link: with the other ranks"""
    device = plan.device if plan.offload == "none" else "cpu"
    size = clip or (*resolved.spec.size, resolved.spec.num_frames)
    with _Compiler(device, size, on_compile) as compiler:
        pipeline, encoder = _modules(resolved, plan, prompts, device, compiler)
        model = pipeline.turbo_nb = LoadedModel(
            resolved=resolved, pipeline=pipeline, prompt_encoder=encoder, plan=plan, _loaded_on=device
        )
        if link:
            from .parallel import members

            model.team = members.split(pipeline, link)
        phases.mark("make the pipeline")
        encoder.place(plan.text_encoder, plan.device)
        phases.mark("load the text encoder")
        place(pipeline, plan)
        phases.mark("place")
        compiler.finish(pipeline)
    phases.mark("warm up")
    model._weights_at_load = model._fingerprint()
    phases.mark("fingerprint")
    model.load_seconds = time.perf_counter() - begin
    return pipeline


def _modules(resolved: ResolvedModel, plan: Plan, prompts: Sequence[str], device: str, compiler: "_Compiler") -> tuple:
    """Load and fuse the modules; return the pipeline and its prompt encoder"""
    with uncollected():
        import torch

        from . import checkpoint, wan
        from .files import lora
        from .fused import transformer as fused_transformer
        from .fused import vae as fused_vae
        from .runtime.block_stream import StreamedEncoder
        from .scheduler import RCMScheduler

    make = wan.WanImageToVideoPipeline if resolved.spec.task == "i2v" else wan.WanPipeline
    phases.mark("import diffusers")
    dtype = backends.number_format(plan.device)
    parts = {
        "tokenizer": checkpoint.load_tokenizer(resolved.tokenizer),  # first, because it is the quickest to fail
        "text_encoder": None,
        "scheduler": RCMScheduler(resolved.spec.sigma_max),
    }
    phases.mark("load the tokenizer")
    parts["vae"] = checkpoint.load_vae(resolved.vae, device=device, dtype=dtype)
    fused_vae.fuse(parts["vae"])
    compiler.vae(parts["vae"], resolved.spec.task == "i2v")
    phases.mark("load the VAE")
    experts = [
        checkpoint.load_transformer(
            contents,
            attention_type=resolved.attention_type,
            sla_topk=resolved.sla_topk,
            quant_linear=resolved.quant_linear,
            attention_backend=resolved.attention_backend,
            device=device,
            dtype=dtype,
            run_device=plan.device,
            loras=[one for one in resolved.loras if one.applies_to(number)],
        )
        for number, contents in enumerate(resolved.transformers)
    ]
    lora.require_changed(resolved.loras)
    phases.mark("load the transformer")
    if plan.device != "cpu":
        for expert in experts:
            fused_transformer.fuse(expert, plan.device)
    compiler.transformer(experts[0])
    phases.mark("fuse")
    if resolved.spec.task == "i2v":
        pipeline = make(
            **parts, transformer=experts[0], transformer_2=experts[1], boundary_ratio=resolved.spec.boundary
        )
    else:
        pipeline = make(**parts, transformer=experts[0])
    pipeline.set_progress_bar_config(disable=True)
    text_dtype = torch.float32 if dtype is torch.float16 else dtype  # because umT5 exceeds float16
    cached = embedding_cache.uses_cache(resolved.options.text_cache)
    tokenizer = getattr(resolved.tokenizer, "path", resolved.tokenizer)
    encoder = PromptEncoder(
        pipeline,
        lambda where: checkpoint.load_text_encoder(
            resolved.text_encoder, device=where, dtype=text_dtype, in_16_bits=dtype is torch.float16
        ),
        StreamedEncoder,
        embedding_cache.open_cache(resolved.text_encoder.path, tokenizer, text_dtype) if cached else None,
        prompts,
    )
    return pipeline, encoder


class _Compiler(Beside):
    """Compiles the kernels of a clip's size beside the loading of the next part, and logs it where that took long.

    device: "cpu" compiles nothing, because the parts are not on the GPU yet, or never will be.
    """

    def __init__(self, device: str, size: tuple[int, int, int], on_compile: Callable[[int, int], None] | None):
        self._device, self._size, self._on_compile = device, size, on_compile

    def vae(self, model: Any, encodes: bool) -> None:
        """Begin with the VAE: its decoder, and its encoder where it encodes."""
        if self._device != "cpu":
            from .runtime import warm_up

            self.start(self._run, "VAE", warm_up.vae, model, encodes)

    def transformer(self, model: Any) -> None:
        """Begin with the transformer."""
        if self._device != "cpu":
            from .runtime import warm_up

            self.start(self._run, "transformer", warm_up.transformer, model, self._on_compile)

    def finish(self, pipeline: "WanPipeline | WanImageToVideoPipeline") -> None:
        """Wait for both, and time how to launch the kernels where that was not done on this GPU before."""
        self.wait()
        if self._device != "cpu":
            from .runtime import warm_up

            self._run("pipeline", warm_up.choose_launches, pipeline, self._on_compile)

    def _run(self, name: str, compile_kernels: Callable, model: Any, *more: Any) -> None:
        import torch

        begin = time.perf_counter()
        with suppress(torch.OutOfMemoryError), current_device(self._device):  # the clip itself falls back to a plan
            compile_kernels(model, self._size, *more)
        if (seconds := time.perf_counter() - begin) > WARM_UP_LOGGED:
            log.info("compiled the %s's kernels for this GPU in %.0f s; later starts find them", name, seconds)
