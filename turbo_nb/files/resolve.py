"""What `LoadOptions` mean on this machine: the only owner of "auto".

`resolve` turns a name, a path or "auto" into one frozen `ResolvedModel`: the model, its files, the device, the number
format and the reasons. The command line, the pipeline, batches, the generator, the doctor and the time estimate receive
that object. `resolve` downloads nothing; `ResolvedModel.fetch` does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from .. import backends, catalog, layerwise
from ..catalog import HubFile, ModelSpec
from ..errors import CheckpointError, InputError, warn
from ..machine import environment, probe
from ..runtime import plan
from ..settings import LoadOptions, LoRAFile, Weights
from . import hub, layouts, lora, recognise, vocabulary
from .fingerprint import fingerprint
from .recognise import Contents

OFFLOADS = ("none", "model", "group")  # from fast to slow


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model as it will be loaded.

    Args:
        spec: the model and its defaults.
        transformers: one, or (high-noise, low-noise). A HubFile is not downloaded yet.
        vae, text_encoder, tokenizer: the other parts. A text encoder can have its tokenizer in its file.
        device: where the model runs, such as "cpu" or "cuda:0".
        memory: bytes of the device that a plan may use. host_memory: bytes of main memory.
        attention_type, attention_backend, sla_topk: the attention that the transformers get.
        quant_linear: whether their linears are 8-bit.
        reason: why this model was taken.
        options: what was asked for.
        loras: those that are merged into the transformers.
    """

    spec: ModelSpec
    transformers: tuple[Contents | HubFile, ...]
    vae: Contents | HubFile
    text_encoder: Contents | HubFile
    tokenizer: Path | Contents | HubFile
    device: str
    memory: float
    host_memory: float
    attention_type: str
    attention_backend: str | None
    sla_topk: float
    quant_linear: bool
    reason: str
    options: LoadOptions = field(repr=False)
    loras: tuple[lora.Applied, ...] = ()

    @property
    def downloads(self) -> tuple[HubFile, ...]:
        """Files that are not here yet."""
        parts = (*self.transformers, self.vae, self.text_encoder, self.tokenizer)
        return tuple(part for part in parts if isinstance(part, HubFile))

    def fetch(self, on_progress: Callable[[hub.Progress], None] | None = None) -> "ResolvedModel":
        """Download the parts that are missing.

        Args:
            on_progress: called as bytes arrive.

        Returns:
            The same model with all its parts here.

        Raises:
            DownloadError: a file cannot be fetched.
            CheckpointError: a file is not what it should be.
        """
        if not self.downloads:
            return self
        if all(isinstance(part, HubFile) for part in self.transformers):  # as one plan with one check of the disk
            hub.fetch(self.spec, quantised=self.quant_linear, on_progress=on_progress)

        def here(part: Contents | Path | HubFile) -> Contents | Path:
            if not isinstance(part, HubFile):
                return part
            path = hub.part(part, on_progress=on_progress)
            return path if part.path == "/" else recognise.read(path)

        found = replace(
            self,
            transformers=tuple(map(here, self.transformers)),
            vae=here(self.vae),
            text_encoder=here(self.text_encoder),
            tokenizer=here(self.tokenizer),
        )
        found.check()
        return found

    def check(self) -> None:
        """Raise CheckpointError where a part that is here is not what it was taken for, or does not fit the others."""
        for part, kind in (*((part, "transformer") for part in self.transformers), (self.vae, "vae"),
                           (self.text_encoder, "text encoder")):  # fmt: skip
            if isinstance(part, Contents):
                recognise.require(part, kind, self.spec if kind == "transformer" else None)
        recognise.require_fit([part for part in (*self.transformers, self.vae, self.text_encoder)
                               if isinstance(part, Contents)])  # fmt: skip
        vocabulary.require_fit(self.tokenizer, self.text_encoder)

    @cached_property
    def sizes(self) -> plan.Sizes:
        """Bytes of the parts as they will be loaded; of parts that are not here yet an estimate from their shapes."""
        item = 4 if self.device == "cpu" else 2  # bytes of a number: float32 or bfloat16
        parts = {"transformer": self.transformers[0], "text_encoder": self.text_encoder, "vae": self.vae}
        counts = {
            name: sum(tensor.numel() for tensor in part.tensors.values()) * item
            for name, part in parts.items()
            if isinstance(part, Contents)
        }
        if "text_encoder" in counts:
            dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
            counts["text_encoder"] = layerwise.size(self.text_encoder.tensors, dtype)
        if "transformer" in counts and self.quant_linear:
            counts["transformer"] *= 1.03 / item  # a byte for each weight, and the scales
        sizes = plan.sizes(self.spec, quantised=self.quant_linear)
        return replace(sizes, **counts, experts=len(self.transformers))

    def plan(self, size: tuple[int, int, int] | None = None) -> plan.Plan:
        """Choose the memory plan.

        Args:
            size: width, height and frames of the clip. None: the model's own.

        Raises:
            InputError: the plan that was asked for does not suit the device.
        """
        return plan.choose(
            self.sizes,
            self.spec.arch,
            *(size or (*self.spec.size, self.spec.num_frames)),
            budget=self.memory,
            host_budget=self.host_memory,
            device=self.device,
            fused=plan.fused_on(self.device),
            name=self.options.memory_plan,
        )

    @cached_property
    def identity(self) -> dict:
        """What a clip depends on.

        Files count by their content: a moved file is the same, a changed one is not. A model of the catalogue, and the
        parts that come with it, count by its name.
        """
        named = _name_or_paths(self.options) == (str(self.options.model), ())
        parts = {name: getattr(self, name) for name in ("vae", "text_encoder", "tokenizer")}
        return (
            {
                "model": self.spec.name if named else [_content(part) for part in self.transformers],
                "attention_type": self.attention_type,
                "sla_topk": None if self.attention_type == "original" else self.sla_topk,
                "quant_linear": self.quant_linear,
            }
            | {
                name: None if named and getattr(self.options, name) is None else _content(part)
                for name, part in parts.items()
            }
            | lora.identity(self.loras)
        )

    def with_loras(self, asked: tuple[LoRAFile, ...], *, quiet: bool = False) -> "ResolvedModel":
        """Return the same model with other LoRAs. A LoRA that the model already has is not read again.

        Args:
            asked: as in `LoadOptions.loras`.
            quiet: do not warn of keys that match no tensor, because loading will.

        Raises:
            InputError: a LoRA is for one of two experts, and the model has one.
            CheckpointError: a file is missing, is not a LoRA, or does not fit the model.
        """
        loras = lora.choose(asked, len(self.transformers), self.loras)
        for one in loras:
            part = next(part for number, part in enumerate(self.transformers) if one.applies_to(number))
            lora.fit(one.lora, _shapes(part, self.spec), quiet=quiet)
        return replace(self, loras=loras, options=replace(self.options, loras=asked))


def _content(part: Contents | Path | HubFile) -> str:
    """Return what a part's content is known by; a file of the Hub by its address"""
    if isinstance(part, HubFile):
        return f"{part.repo}/{part.path}"
    return fingerprint(part.path if isinstance(part, Contents) else part)


def _shapes(part: Contents | HubFile, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of a transformer's tensors by name; of one that is not here yet those of the released model"""
    from ..checkpoint import shapes_of

    tensors = part.tensors if isinstance(part, Contents) else None
    return shapes_of(spec.arch) if tensors is None else {name: tuple(one.shape) for name, one in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A released model in one number format, with the plan that it would get on a device for a clip of its own size."""

    spec: ModelSpec
    quantized: bool
    plan: plan.Plan

    @property
    def downloaded(self) -> bool:
        """Whether all files are in the cache and checked."""
        return hub.cached(self.spec, quantised=self.quantized) is not None

    @property
    def rank(self) -> tuple:
        """What is better sorts first: a plan that fits, less offload, and plain linears."""
        return not self.plan.fits, OFFLOADS.index(self.plan.offload), self.quantized


def candidates(
    spec: ModelSpec,
    *,
    memory: float,
    host_memory: float | None,
    device: str = "cuda",
    quant_linear: bool | str = "auto",
) -> list[Candidate]:
    """Return the number formats in which a released model can be loaded, the best first.

    Args:
        spec: the model.
        memory: bytes of the device. host_memory: bytes of main memory; None: as many as it takes.
        quant_linear: True or False: only files with 8-bit linears, or only plain ones.
    """
    given = {"budget": memory, "host_budget": host_memory, "fused": plan.fused_on(device), "device": device}
    return sorted(
        (
            Candidate(spec=spec, quantized=quantized, plan=plan.for_model(spec, quantised=quantized, **given))
            for quantized in ((False, True) if quant_linear == "auto" else (quant_linear,))
        ),
        key=lambda one: one.rank,
    )


def suitable(*, memory: float, host_memory: float | None, quant_linear: bool | str = "auto") -> list[Candidate]:
    """Return the released text-to-video models that fit a GPU without streaming blocks, the best first.

    A larger model is better. Of one model, `candidates` gives the order.
    """
    return [
        one
        for spec in reversed(catalog.MODELS.values())  # the catalogue goes from small to large
        if spec.files and spec.task == "t2v"
        for one in candidates(spec, memory=memory, host_memory=host_memory, quant_linear=quant_linear)
        if one.plan.fits and one.plan.offload != "group"
    ]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Which model, number format and device some options mean. No file was opened for it.

    Args:
        spec: the model. None: the tensors in `paths` tell.
        paths: files or folders of the transformers that were given, or ship with the package.
        quantized: whether the linears are 8-bit; "auto": as the files have them.
        device, memory, host_memory, reason: as in `ResolvedModel`.
    """

    spec: ModelSpec | None
    paths: tuple[Path, ...]
    quantized: bool | str
    device: str
    memory: float
    host_memory: float
    reason: str


def decide(options: LoadOptions, *, to_download: bool = False, host_memory: float | None = None) -> Decision:
    """Decide what some options mean on this machine.

    Args:
        options: what was asked for.
        to_download: let "auto" be the best model that fits, and not the best that is downloaded.
        host_memory: bytes of main memory that may be used. None: what is free.

    Raises:
        UnknownModelError, InputError: an option cannot be used.
        BackendError: SageSLA cannot run here.
    """
    name, paths = _name_or_paths(options)
    spec = catalog.find(name) if name not in (None, "auto") else None  # an unknown name fails before torch is imported
    device = probe.device_of(options.device)
    memory = options.memory or probe.free_memory(device)
    host_memory, quantized = host_memory or probe.free_memory("cpu"), options.quant_linear
    if options.attention_type == "sagesla":
        backends.choose("sagesla", device, options.attention_backend).require()
    if options.attention_backend not in (None, "auto") and options.attention_type != "sagesla":
        raise InputError(
            f"attention_backend is {options.attention_backend!r}. Expected none for attention_type "
            f"{options.attention_type or 'sla'!r}, because it chooses what runs SageSLA."
        )
    reason = "its files were given" if paths else "it was asked for by name"
    if name == "auto":
        spec, quantized, reason = _auto(device, memory, host_memory, quantized, to_download)
    if not paths and spec.folder:
        paths = (spec.folder / "transformer",)
    if not paths and quantized == "auto":
        ordered = candidates(spec, memory=memory, host_memory=host_memory, device=device)
        quantized = next((one for one in ordered if one.downloaded and not to_download), ordered[0]).quantized
    return Decision(
        spec=spec, paths=paths, quantized=quantized, device=device, memory=memory, host_memory=host_memory,
        reason=reason,
    )  # fmt: skip


def resolve(options: LoadOptions | None = None, *, host_memory: float | None = None) -> ResolvedModel:
    """Find out what some options mean on this machine, and read the files that are here. Downloads nothing.

    Args:
        options: what was asked for. None: the defaults.
        host_memory: bytes of main memory that may be used. None: what is free.

    Returns:
        The model, its files and how it will be loaded.

    Raises:
        UnknownModelError, InputError: an option cannot be used.
        CheckpointError: a file is not what it was taken for.
        BackendError: SageSLA cannot run here.
    """
    options = options or LoadOptions()
    decision = decide(options, host_memory=host_memory)
    spec, paths, quantized = decision.spec, decision.paths, decision.quantized
    if paths:
        transformers = tuple(map(recognise.read, paths))
        recognise.require(transformers[0], "transformer", spec)
        recognise.require_experts(transformers)
        spec = spec or _spec_of(transformers[0], paths[0])
    else:
        transformers = tuple(map(_here_or_hub, spec.quant_files if quantized else spec.files))
    experts = 2 if spec.task == "i2v" else 1
    if len(transformers) != experts:
        raise InputError(
            f"checkpoint is {', '.join(str(path) for path in paths)}. Expected {experts} "
            f"file{'s (high-noise, low-noise)' if experts > 1 else ''} for {spec.name}."
        )
    near = paths[:1]
    text_encoder = _part(options.text_encoder, "text_encoder", catalog.TEXT_ENCODER, near, spec)
    own_encoder = isinstance(text_encoder, Contents) and text_encoder.path != hub.find(catalog.TEXT_ENCODER)
    near_tokenizer = (*near, text_encoder.path) if own_encoder else near
    found = ResolvedModel(
        spec=spec,
        transformers=transformers,
        vae=_part(options.vae, "vae", catalog.VAE, near, spec),
        text_encoder=text_encoder,
        tokenizer=_part(options.tokenizer, "tokenizer", catalog.TOKENIZER, near_tokenizer, spec, text_encoder),
        device=decision.device,
        memory=decision.memory,
        host_memory=decision.host_memory,
        attention_type=options.attention_type or _attention_type(transformers),
        attention_backend=options.attention_backend,
        sla_topk=spec.sla_topk if options.sla_topk is None else options.sla_topk,
        quant_linear=_is_quantized(transformers) if quantized == "auto" else quantized,
        reason=decision.reason,
        options=options,
    )
    found.check()
    return found.with_loras(options.loras, quiet=True) if options.loras else found


def download_model(
    model: str = "auto",
    *,
    quantised: bool | None = None,
    on_plan: Callable[[hub.DownloadPlan], None] | None = None,
    on_progress: Callable[[hub.Progress], None] | None = None,
) -> hub.Files | None:
    """Download a released model.

    Args:
        model: its name; "auto" is the best text-to-video model that fits this machine.
        quantised: take the files with 8-bit linears, or the plain ones. None: those that suit this GPU.
        on_plan: called with the plan before the first byte.
        on_progress: called as bytes arrive. None: a progress bar is drawn.

    Returns:
        Where the files lie; None for a model that ships with the package.

    Raises:
        UnknownModelError: the name is not known.
        DownloadError: a file cannot be fetched, or the disk is too small.
    """
    if not catalog.is_name(model):
        raise InputError(f"model is {str(model)!r}, a path. Expected the name of a released model.")
    found = decide(LoadOptions(model=model, quant_linear="auto" if quantised is None else quantised), to_download=True)
    wanted = {"spec": found.spec, "quantised": found.quantized is True}
    planned = hub.plan(**wanted)
    if on_plan:
        on_plan(planned)
    if not planned.files:
        return None
    if on_progress:
        return hub.fetch(**wanted, planned=planned, on_progress=on_progress)
    with hub.progress_bars() as show:
        return hub.fetch(**wanted, planned=planned, on_progress=show)


def _auto(
    device: str, memory: float, host_memory: float, quant_linear: bool | str, to_download: bool
) -> tuple[ModelSpec, bool | str, str]:
    """Return the spec, the number format and the reason that "auto" stands for"""
    if device == "cpu":
        return catalog.NANO, quant_linear, "auto: the embedded model runs on a CPU"
    fits = suitable(memory=memory, host_memory=host_memory, quant_linear=quant_linear)
    here = next((one for one in fits if to_download or one.downloaded), None)
    if fits and here is not fits[0]:
        best = fits[0]
        if here is None or best.spec is not here.spec:
            warn(
                f"model auto takes {here.spec.name if here else catalog.NANO.name}; this GPU could run "
                f"{best.spec.name}, which is not downloaded. Run: turbo-nb download {best.spec.name}"
                f"{' --quant' if best.quantized else ''}",
                stacklevel=3,
            )
    if here is None:
        why = "no released model that fits is downloaded" if fits else "no released model fits"
        return catalog.NANO, quant_linear, f"auto: {why} ({memory / plan.GB:.1f} GB)"
    best = "the best model" if to_download else "the best downloaded model"
    return here.spec, here.quantized, f"auto: {best} that fits {memory / plan.GB:.1f} GB"


def _attention_type(transformers: tuple[Contents | HubFile, ...]) -> str:
    """Return the attention of a model that no other was asked for; the released files have SLA's projections"""
    here = [part for part in transformers if isinstance(part, Contents)]
    return recognise.attention_of(min(here, key=lambda part: part.sla)) if here else "sla"


def _is_quantized(transformers: tuple[Contents | HubFile, ...]) -> bool:
    return any(isinstance(part, Contents) and part.quantized for part in transformers)


def _pair(weights: Weights) -> tuple[Path, ...]:
    return tuple(map(Path, weights)) if isinstance(weights, tuple | list) else (Path(weights),)


def _name_or_paths(options: LoadOptions) -> tuple[str | None, tuple[Path, ...]]:
    """Return a name of the catalogue (or "auto", or None), and the paths of transformers"""
    model = options.model
    if options.checkpoint is not None:
        return (None if str(model) == "auto" else str(model)), _transformers(_pair(options.checkpoint))
    if not isinstance(model, tuple) and catalog.is_name(model):
        return str(model), ()
    return None, _transformers(_pair(model))


def _transformers(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """The paths, or the transformers in one folder"""
    return layouts.transformers(paths[0]) if len(paths) == 1 and environment.is_dir(paths[0]) else paths


def _part(
    given: str | Path | None, name: str, file: HubFile, near: tuple[Path, ...], spec: ModelSpec,
    inside: Contents | HubFile | None = None,
):  # fmt: skip
    """Return a part that was given, lies near the transformer, is inside another part, ships with the model, or is on
    the Hub
    """
    if given is not None:
        path = layouts.part(Path(given), name)
    else:
        places = (layouts.near(one, name, own_layout=bool(spec.folder)) for one in near)
        path, shipped = next((place for place in places if place), None), spec.folder and spec.folder / name
        if path in (None, shipped) and vocabulary.has_tokenizer(inside):
            return inside
        path = path or shipped
    if path is None:
        return _here_or_hub(file)
    return vocabulary.find(path) if name == "tokenizer" else recognise.read(path)


def _here_or_hub(file: HubFile) -> Contents | Path | HubFile:
    """Return a Hub file's contents (or a tokenizer's folder) if it is in the cache and checked, else the file"""
    path = hub.find(file)
    if path is None:
        return file
    return path if file.path == "/" else recognise.read(path)


def _spec_of(contents: Contents, path: Path) -> ModelSpec:
    """Return the spec of the first model with this shape; for another shape, Wan's defaults for its task"""
    if known := catalog.of_arch(contents.arch):
        return known
    if contents.arch.task is None:
        raise CheckpointError(
            f"{str(path)!r} is {contents}. Expected 16 input channels (text-to-video) or 36 (image-to-video)."
        )
    return catalog.unnamed(layouts.name_of(path), contents.arch, contents.arch.task)
