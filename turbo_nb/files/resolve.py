"""What `LoadOptions` mean on this machine: the only owner of "auto".

`resolve` turns a name, a path, a reference to the Hub or "auto" into one frozen `ResolvedModel`: the model, its files,
the device and the reasons. The command line, the pipeline, batches, the generator, the doctor and the time estimate
receive that object. `resolve` downloads no weights; `ResolvedModel.fetch` does. Of files that a reference names
`resolve` reads the heads, so a file that cannot be loaded is refused before it is downloaded.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import constants

from .. import backends, catalog, layerwise
from ..catalog import HubFile, ModelSpec
from ..errors import CheckpointError, DownloadError, InputError, warn
from ..machine import environment, probe
from ..runtime import plan
from ..settings import LoadOptions, LoRAFile, Weights
from . import hub, layouts, lora, recognise, reference, remote, vocabulary
from .fingerprint import fingerprint
from .recognise import Contents

DEFAULTS = {"vae": catalog.VAE, "text_encoder": catalog.TEXT_ENCODER, "tokenizer": catalog.TOKENIZER}
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
        heads: what the files are that a reference names and that are not here, by their heads.
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
    heads: dict[HubFile, Contents] = field(default_factory=dict, repr=False)

    @property
    def downloads(self) -> tuple[HubFile, ...]:
        """Files that are not here yet."""
        parts = (*self.transformers, self.vae, self.text_encoder, self.tokenizer)
        return tuple(dict.fromkeys(part for part in parts if isinstance(part, HubFile)))

    def fetch(self, on_progress: Callable[[hub.Progress], None] | None = None) -> "ResolvedModel":
        """Download the parts that are missing, as one plan with one check of the disk.

        The transformers come first. Each is read when it is here, and a file that cannot be loaded ends the download.

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
        parts: dict[HubFile, Contents | Path] = {}

        def read(file: HubFile, path: Path) -> None:
            parts[file] = path if file.kind == "tokenizer" else recognise.read(path)
            if file in self.transformers:
                recognise.require(parts[file], "transformer", self.spec)

        hub.fetch(hub.plan(self.spec.name, self.downloads), on_progress=on_progress, on_part=read)

        def here(part: Contents | Path | HubFile) -> Contents | Path:
            return parts[part] if isinstance(part, HubFile) else part

        found = replace(
            self,
            transformers=tuple(map(here, self.transformers)),
            vae=here(self.vae),
            text_encoder=here(self.text_encoder),
            tokenizer=here(self.tokenizer),
            heads={},
        )
        found.check()
        if self.heads:
            recognise.require_experts(found.transformers)
        return found

    def check(self) -> None:
        """Raise CheckpointError where a part is not what it was taken for, or does not fit the others.

        A part of the catalogue that is not here is not checked.
        """
        parts = [self._known(part) for part in (*self.transformers, self.vae, self.text_encoder)]
        kinds = [*["transformer"] * len(self.transformers), "vae", "text encoder"]
        for part, kind in zip(parts, kinds, strict=True):
            if part:
                recognise.require(part, kind, self.spec if kind == "transformer" else None)
        recognise.require_fit([part for part in parts if part])
        vocabulary.require_fit(self.tokenizer, parts[-1])

    def _known(self, part: Contents | HubFile) -> Contents | None:
        """What is known of a part, by itself or by its head"""
        return self.heads.get(part) if isinstance(part, HubFile) else part

    @cached_property
    def sizes(self) -> plan.Sizes:
        """Bytes of the parts as they will be loaded; of parts that are not here yet an estimate from their shapes."""
        item = 4 if self.device == "cpu" else 2  # bytes of a number: float32 or bfloat16
        parts = {"transformer": self.transformers[0], "text_encoder": self.text_encoder, "vae": self.vae}
        counts = {
            name: sum(tensor.numel() for tensor in part.tensors.values()) * item
            for name, given in parts.items()
            if (part := self._known(given))
        }
        if "text_encoder" in counts:
            dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
            counts["text_encoder"] = layerwise.size(self._known(self.text_encoder).tensors, dtype)
        if "transformer" in counts and self.quant_linear:
            counts["transformer"] *= 1.03 / item  # a byte for each weight, and the scales
        sizes = plan.sizes(self.spec, quantized=self.quant_linear)
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

        Files count by their content: a moved file is the same, a changed one is not. Files of the Hub count by their
        commit, here or not. A model of the catalogue, and the parts that come with it, count by its name.
        """
        named = not _asked(self.options)[1]
        usual = {name: file if getattr(self.options, name) is None else None for name, file in DEFAULTS.items()}
        return (
            {
                "model": self.spec.name if named else [_content(part) for part in self.transformers],
                "attention_type": self.attention_type,
                "sla_topk": None if self.attention_type == "original" else self.sla_topk,
                "quant_linear": self.quant_linear,
            }
            | {
                name: None if named and default else _content(getattr(self, name), default)
                for name, default in usual.items()
            }
            | lora.identity(self.loras)
        )

    def with_loras(self, asked: tuple[LoRAFile, ...], *, quiet: bool = False) -> "ResolvedModel":
        """Return the same model with other LoRAs. A LoRA that the model already has is not read again.

        A LoRA that a reference names is downloaded, because its numbers tell whether it can be merged.

        Args:
            asked: as in `LoadOptions.loras`.
            quiet: do not warn of keys that match no tensor, because loading will.

        Raises:
            InputError: a LoRA is for one of two experts, and the model has one.
            CheckpointError: a file is missing, is not a LoRA, or does not fit the model.
            DownloadError: a file cannot be fetched.
        """
        paths = [local(one.file) for one in asked]
        here = [one if path == Path(one.file) else replace(one, file=str(path))
                for one, path in zip(asked, paths, strict=True)]  # fmt: skip
        loras = lora.choose(here, len(self.transformers), self.loras)
        for one in loras:
            part = next(part for number, part in enumerate(self.transformers) if one.applies_to(number))
            lora.fit(one.lora, _shapes(self._known(part), self.spec), quiet=quiet)
        return replace(self, loras=loras, options=replace(self.options, loras=asked))


def _content(part: Contents | Path | HubFile, default: HubFile | None = None) -> str:
    """Return what a part's content is known by; a file of the Hub by its reference, the usual one by its name"""
    path = part.path if isinstance(part, Contents) else part
    file = part if isinstance(part, HubFile) else hub.origin(path)
    if file is None:
        return fingerprint(path)
    return file.name if default and file.name == default.name else str(file)


def _shapes(contents: Contents | None, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of a transformer's tensors by name; those of the released model where nothing is known of its file"""
    from ..checkpoint import shapes_of

    if contents is None:
        return shapes_of(spec.arch)
    return {name: tuple(one.shape) for name, one in contents.tensors.items()}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A released model in one number format, with the plan that it would get on a device for a clip of its own size."""

    spec: ModelSpec
    quantized: bool
    plan: plan.Plan

    @property
    def downloaded(self) -> bool:
        """Whether all files are in the cache and checked."""
        return hub.cached(self.spec.needs(self.quantized)) is not None

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
            Candidate(spec=spec, quantized=quantized, plan=plan.for_model(spec, quantized=quantized, **given))
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
        spec: the model. None: the tensors in `given` tell.
        given: files or folders of the transformers that were given, or ship with the package.
        quantized: whether the linears are 8-bit; "auto": as the files have them.
        device, memory, host_memory, reason: as in `ResolvedModel`.
    """

    spec: ModelSpec | None
    given: tuple[Path | HubFile, ...]
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
    name, given = _asked(options)
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
    reason = "its files were given" if given else "it was asked for by name"
    if name == "auto":
        spec, quantized, reason = _auto(device, memory, host_memory, quantized, to_download)
    if not given and spec.folder:
        given = (spec.folder / "transformer",)
    if not given and quantized == "auto":
        ordered = candidates(spec, memory=memory, host_memory=host_memory, device=device)
        quantized = next((one for one in ordered if one.downloaded and not to_download), ordered[0]).quantized
    return Decision(
        spec=spec, given=given, quantized=quantized, device=device, memory=memory, host_memory=host_memory,
        reason=reason,
    )  # fmt: skip


def resolve(options: LoadOptions | None = None, *, host_memory: float | None = None) -> ResolvedModel:
    """Find out what some options mean on this machine, and read the files that are here. Downloads no weights.

    Args:
        options: what was asked for. None: the defaults.
        host_memory: bytes of main memory that may be used. None: what is free.

    Returns:
        The model, its files and how it will be loaded.

    Raises:
        UnknownModelError, InputError: an option cannot be used.
        CheckpointError: a file is not what it was taken for.
        DownloadError: a reference names something that neither the Hub nor the cache has.
        BackendError: SageSLA cannot run here.
    """
    options = options or LoadOptions()
    decision = decide(options, host_memory=host_memory)
    spec, given, quantized, near = decision.spec, decision.given, decision.quantized, ()
    heads: dict[HubFile, Contents] = {}
    if given:
        files, near, name = _located(given)
        transformers = tuple(_read_part(file, heads) for file in files)
        known = [heads[part] if isinstance(part, HubFile) else part for part in transformers]
        recognise.require(known[0], "transformer", spec)
        recognise.require_experts(known)
        spec = spec or _spec_of(known[0], files[0], name)
    else:
        transformers = known = tuple(map(_here_or_hub, spec.quant_files if quantized else spec.files))
    experts = 2 if spec.task == "i2v" else 1
    if len(transformers) != experts:
        raise InputError(
            f"checkpoint is {', '.join(map(str, given))}. Expected {experts} "
            f"file{'s (high-noise, low-noise)' if experts > 1 else ''} for {spec.name}."
        )
    parts = {name: _part(getattr(options, name), name, near, spec, heads) for name in ("vae", "text_encoder")}
    encoder = parts["text_encoder"]
    near_tokenizer = near
    if isinstance(encoder, Contents) and hub.origin(encoder.path) is None:
        near_tokenizer = (*near, encoder.path)
    found = ResolvedModel(
        spec=spec,
        transformers=transformers,
        **parts,
        tokenizer=_part(options.tokenizer, "tokenizer", near_tokenizer, spec, heads, inside=encoder),
        device=decision.device,
        memory=decision.memory,
        host_memory=decision.host_memory,
        attention_type=options.attention_type or _attention_type(known),
        attention_backend=options.attention_backend,
        sla_topk=spec.sla_topk if options.sla_topk is None else options.sla_topk,
        quant_linear=_is_quantized(known) if quantized == "auto" else quantized,
        reason=decision.reason,
        options=options,
        heads=heads,
    )
    found.check()
    return found.with_loras(options.loras, quiet=True) if options.loras else found


def download_model(
    model: str = "auto",
    *,
    quantized: bool | None = None,
    on_plan: Callable[[hub.DownloadPlan], None] | None = None,
    on_progress: Callable[[hub.Progress], None] | None = None,
) -> hub.Files | Path | None:
    """Download a released model, or what a reference to the Hub names.

    Args:
        model: its name; "auto" is the best text-to-video model that fits this machine. Or a reference, such as
            "owner/repo" or "owner/repo/file.safetensors"; of a transformer the other parts come, too.
        quantized: take the files with 8-bit linears, or the plain ones. None: those that suit this GPU.
        on_plan: called with the plan before the first byte.
        on_progress: called as bytes arrive. None: a progress bar is drawn.

    Returns:
        Where the files lie. Of a file that is not a model its path. None for a model that ships with the package.

    Raises:
        UnknownModelError: the name is not known.
        CheckpointError: a file cannot be loaded.
        DownloadError: a file cannot be fetched, or the disk is too small.
    """
    name, given = _asked(LoadOptions(model=model))
    if any(isinstance(one, Path) for one in given):
        raise InputError(
            f"model is {str(model)!r}, a path. Expected the name of a released model or {reference.FORMS}."
        )
    if given and quantized is not None:
        raise InputError(f"quantized is {quantized}. Expected None with a reference, which names its files.")
    if given:
        name, parts = _parts_of_reference(given[0])
    else:
        wanted = "auto" if quantized is None else quantized
        found = decide(LoadOptions(model=model, quant_linear=wanted), to_download=True)
        name, parts = found.spec.name, found.spec.needs(found.quantized is True)
    planned = hub.plan(name, [part for part in parts if isinstance(part, HubFile)])
    if on_plan:
        on_plan(planned)
    if not planned.files:
        return None

    def judge(file: HubFile, path: Path) -> None:
        if file.commit and file.kind == "weights":  # the files of the catalogue are known
            recognise.read(path)

    with hub.progress_bars() if on_progress is None else nullcontext(on_progress) as show:
        paths = hub.fetch(planned, on_progress=show, on_part=judge)
    found = [paths.get(part, part) for part in parts]
    return hub.Files.of(found) if len(found) > len(DEFAULTS) else found[0]


def _parts_of_reference(given: HubFile) -> tuple[str, tuple[HubFile | Path, ...]]:
    """Return the name of what a reference names, and all parts of a model; of a file that is something else the file"""
    files, near, name = _located((given,), fresh=True)
    try:
        contents = remote.read(files[0])
    except DownloadError:  # of a Hub that sends no parts of files: `fetch` reads the file when it is here
        return name, files
    if contents.kind != "transformer":
        return name, files
    recognise.require(contents, "transformer")
    spec = _spec_of(contents, files[0], name)
    parts = (
        _near(part, near, spec) or (spec.folder / part if spec.folder else default)
        for part, default in DEFAULTS.items()
    )
    return name, (*files, *parts)


def local(
    given: str | Path, *, option: str = "lora", on_progress: Callable[[hub.Progress], None] | None = None
) -> Path:
    """Return the path of a file that was given as a path or as a reference, which is downloaded and checked.

    Args:
        given: a path, which may not exist; or a reference to a file, or to a repository with one weight file.
        option: its name, for errors.
        on_progress: called as bytes arrive.

    Raises:
        InputError, CheckpointError: the reference does not name one file.
        DownloadError: the file cannot be fetched.
    """
    place = reference.read(given, option, constants.ENDPOINT)
    if not isinstance(place, HubFile):
        return place
    (file, *_), _, _ = _located((place,), "LoRA")
    return hub.find(file) or hub.fetch(hub.plan(str(file), [file]), on_progress=on_progress)[file]


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


def _attention_type(transformers: Sequence[Contents | HubFile]) -> str:
    """Return the attention of a model that no other was asked for; the released files have SLA's projections"""
    here = [part for part in transformers if isinstance(part, Contents)]
    return recognise.attention_of(min(here, key=lambda part: part.sla)) if here else "sla"


def _is_quantized(transformers: Sequence[Contents | HubFile]) -> bool:
    return any(isinstance(part, Contents) and part.quantized for part in transformers)


def _asked(options: LoadOptions) -> tuple[str | None, tuple[Path | HubFile, ...]]:
    """Return a name of the catalogue (or "auto", or None), and the paths and references of transformers"""
    model, checkpoint = options.model, options.checkpoint
    if checkpoint is not None:
        return (None if str(model) == "auto" else str(model)), _places(checkpoint, "checkpoint")
    found = _places(model, "model")
    return (found[0], ()) if isinstance(found[0], str) else (None, found)


def _places(weights: Weights, option: str) -> tuple[str | Path | HubFile, ...]:
    """Return what was given: one name, path or reference, or two paths or references"""
    if isinstance(weights, tuple | list):
        return tuple(reference.read(one, "checkpoint", constants.ENDPOINT) for one in weights)
    return (reference.read(weights, option, constants.ENDPOINT),)


@dataclass(frozen=True)
class _Beside:
    """The folder of a repository that a model lies in, and the names of the repository's files"""

    folder: HubFile
    names: Collection[str]


def _located(
    given: tuple[Path | HubFile, ...], part: str = "transformer", fresh: bool = False
) -> tuple[tuple[Path | HubFile, ...], tuple[Path | _Beside, ...], str | None]:
    """Return the files or folders of a part, where its other parts may lie, and the name that references give it.

    A reference gets the commit that the cache has of its revision, if all of the part is there, or with `fresh` what
    the Hub has.
    """
    files, near, names = [], (), []
    for one in given:
        if isinstance(one, Path):
            files += layouts.transformers(one) if len(given) == 1 and environment.is_dir(one) else [one]
            near = near or (files[0],)
            continue
        found, listed = _of_reference(one, part, fresh)
        files += found
        folder = found[0].path.rstrip("/").rpartition("/")[0]
        near = near or (_Beside(replace(found[0], path=f"{folder}/"), listed.files),)
        names.append(str(replace(one, commit=listed.commit)))
    return tuple(files), near, " + ".join(names) or None


def _of_reference(given: HubFile, part: str, fresh: bool) -> tuple[tuple[HubFile, ...], hub.Listing]:
    """Return the files of a part that a reference names, and the names in its repository"""
    if not fresh and (known := hub.known_names(given)):
        try:
            found = reference.find(replace(given, commit=known.commit), known.files, part)
        except CheckpointError:
            found = ()  # the Hub may have it by now
        if hub.cached(found):
            return found, known
    try:
        listed = hub.listing(given)
    except DownloadError as error:
        raise DownloadError(f"{error} No file or folder here is called {given.name!r}.") from error
    return reference.find(replace(given, commit=listed.commit), listed.files, part), listed


def _part(
    given: str | Path | None, part: str, near: tuple[Path | _Beside, ...], spec: ModelSpec,
    heads: dict[HubFile, Contents], inside: Contents | HubFile | None = None,
) -> Contents | Path | HubFile:  # fmt: skip
    """Return a part that was given, lies near the transformer, is inside another part, ships with the model, or is on
    the Hub
    """
    if given is None:
        place, shipped = _near(part, near, spec), spec.folder and spec.folder / part
        if place in (None, shipped) and _has_tokenizer(inside, heads):
            return inside
        place = place or shipped
    else:
        place = reference.read(given, part, constants.ENDPOINT)
        place = layouts.part(place, part) if isinstance(place, Path) else place
    if place is None:
        return _here_or_hub(DEFAULTS[part])
    if isinstance(place, Path):
        return vocabulary.find(place) if part == "tokenizer" else recognise.read(place)
    (file,) = (place,) if given is None else _of_reference(place, part, False)[0]
    found = _read_part(file, heads)
    if part == "tokenizer" and file.kind != "tokenizer" and not _has_tokenizer(found, heads):
        raise CheckpointError(
            f"tokenizer is {str(file)!r}. Expected a tokenizer, or a text encoder with one in its file."
        )
    return found


def _has_tokenizer(part: Contents | HubFile | None, heads: dict[HubFile, Contents]) -> bool:
    return vocabulary.has_tokenizer(heads.get(part) if isinstance(part, HubFile) else part)


def _near(part: str, near: tuple[Path | _Beside, ...], spec: ModelSpec) -> Path | HubFile | None:
    """Return a part that lies near one of some files, or in their repository; else None"""
    places = (
        layouts.near(one, part, own_layout=bool(spec.folder))
        if isinstance(one, Path)
        else reference.beside(one.folder, one.names, part)
        for one in near
    )
    return next((place for place in places if place), None)


def _here_or_hub(file: HubFile) -> Contents | Path | HubFile:
    """Return a Hub file's contents (or a tokenizer's folder) if it is in the cache and checked, else the file"""
    path = hub.find(file)
    if path is None:
        return file
    return path if file.kind == "tokenizer" else recognise.read(path)


def _read_part(file: Path | HubFile, heads: dict[HubFile, Contents]) -> Contents | Path | HubFile:
    """Return the contents of a path, or of a reference if it is in the cache; else the reference, with its head read"""
    if isinstance(file, Path):
        return recognise.read(file)
    found = _here_or_hub(file)
    if found is file and file.kind == "weights":
        heads[file] = remote.read(file)
    return found


def _spec_of(contents: Contents, file: Path | HubFile, name: str | None) -> ModelSpec:
    """Return the spec of the first model with this shape; for another shape, Wan's defaults for its task.

    A model that is known by a reference has that as its name, so that the metadata of its clips show where it is from.
    """
    if isinstance(file, HubFile) and (known := catalog.of_file(file)) and known.arch == contents.arch:
        return known
    if known := catalog.of_arch(contents.arch):
        return replace(known, name=name) if name else known
    if contents.arch.task is None:
        raise CheckpointError(
            f"{str(file)!r} is {contents}. Expected 16 input channels (text-to-video) or 36 (image-to-video)."
        )
    return catalog.unnamed(name or layouts.name_of(file), contents.arch, contents.arch.task)
