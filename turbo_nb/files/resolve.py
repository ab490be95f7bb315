"""What `LoadOptions` mean on this machine, as one frozen object.

`resolve` turns a name, a path, a reference to the Hub or "auto" into one `ResolvedModel`: the model, its files, the
device and the reasons. The command line, the pipeline, batches, the generator, the doctor and the time estimate
receive that object. `resolve` downloads no weights; `ResolvedModel.fetch` does. Of files that a reference names
`resolve` reads the heads, so a file that cannot be loaded is refused before it is downloaded.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import constants

from .. import catalog, layerwise
from ..catalog import HubFile, ModelSpec
from ..errors import CheckpointError, InputError, warn
from ..machine import environment
from ..runtime import plan
from ..settings import LoadOptions, ResolvedClip
from ..tiny_decoder import LATENT_CHANNELS
from ..values import LoRAFile
from . import hub, hub_cache, layouts, locate, lora, recognise, reference, remote, shapes, vocabulary
from .decide import asked, decide, ranks_for
from .fingerprint import fingerprint
from .part_config import WRITERS, part_config
from .recognise import Contents

log = logging.getLogger("turbo_nb")
TINY_BYTES = 22_600_000  # of taew2_1.safetensors
DEFAULTS = {"vae": catalog.VAE, "text_encoder": catalog.TEXT_ENCODER, "tokenizer": catalog.TOKENIZER}


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
        tiny_decoder: that of `--decoder tiny`, where it is wanted.
        gpus: how many GPUs make a clip together.
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
    tiny_decoder: Contents | HubFile | None = None
    gpus: int = 1

    @property
    def downloads(self) -> tuple[HubFile, ...]:
        """Files that are not here yet."""
        parts = (*self.transformers, self.vae, self.text_encoder, self.tokenizer, self.tiny_decoder)
        return tuple(dict.fromkeys(part for part in parts if isinstance(part, HubFile)))

    @property
    def to_fetch(self) -> int:
        """Bytes of `downloads`, estimated from the shapes of the parts."""
        heads = {
            file: sum(one.numel() for one in head.tensors.values()) * (1 if head.quantized else 2)
            for file, head in self.heads.items()
        }
        known = plan.file_sizes(self.spec, quantized=self.quant_linear) | {catalog.TINY_DECODER: TINY_BYTES} | heads
        return int(sum(known.get(file, 0) for file in self.downloads))

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
        if isinstance(self.vae, Contents):
            from ..checkpoint import require_vae  # here, because diffusers has the shapes, and its import takes 2 s

            require_vae(self.vae)
        parts: dict[HubFile, Contents | Path] = {}

        def read(file: HubFile, path: Path) -> None:
            parts[file] = path if file.kind == "tokenizer" else recognise.read(path)
            if file in self.transformers:
                recognise.require(parts[file], "transformer", self.spec)

        planned = hub.plan(self.spec.name, self.downloads)
        if planned.to_fetch:
            log.info("%s", planned.line)
        hub.fetch(planned, on_progress=on_progress, on_part=read)

        def here(part: Contents | Path | HubFile | None) -> Contents | Path | None:
            return parts[part] if isinstance(part, HubFile) else part

        found = replace(
            self,
            transformers=tuple(map(here, self.transformers)),
            vae=here(self.vae),
            text_encoder=here(self.text_encoder),
            tokenizer=here(self.tokenizer),
            tiny_decoder=here(self.tiny_decoder),
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
        if tiny := self._known(self.tiny_decoder):
            recognise.require(tiny, "tiny decoder")
        parts = [self._known(part) for part in (*self.transformers, self.vae, self.text_encoder)]
        kinds = [*["transformer"] * len(self.transformers), "vae", "text encoder"]
        for part, kind in zip(parts, kinds, strict=True):
            if part:
                recognise.require(part, kind, self.spec if kind == "transformer" else None)
                part_config(part.path, WRITERS[kind], {})
        recognise.require_fit([part for part in parts if part])
        vocabulary.require_fit(self.tokenizer, parts[-1])

    def _known(self, part: Contents | HubFile | None) -> Contents | None:
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
            gpus=self.gpus,
        )

    def require_memory(self, clip: ResolvedClip, columns: int = 1) -> None:
        """Check that main memory can hold a clip, because the kernel kills a process that takes all of it.

        Args:
            clip: with its size.
            columns: clips side by side.

        Raises:
            InputError: this machine has less main memory, in all.
        """
        total, frames = environment.memory().total, clip.all_frames * columns
        if total is None:
            return
        needs = plan.main_memory(self.sizes, self.spec.arch, *clip.size, device=self.device, all_frames=frames)
        if needs > total:
            raise InputError(
                f"resolution is {clip.width}x{clip.height} with {frames} frames, which takes at least "
                f"{needs / plan.GB:,.0f} GB of main memory. Expected at most {total / plan.GB:,.0f} GB, which this "
                "machine has. Take a smaller size or fewer frames."
            )

    @property
    def pinned(self) -> LoadOptions:
        """Options for the same model in another process, which decides nothing by itself but the device."""
        named = not asked(self.options)[1]
        return replace(
            self.options,
            model=self.spec.name if named else self.options.model,
            attention_type=self.attention_type,
            sla_topk=self.sla_topk,
            quant_linear=self.quant_linear,
            gpus=1,
        )

    @cached_property
    def identity(self) -> dict:
        """What a clip depends on.

        Files count by their content: a moved file is the same, a changed one is not. Files of the Hub count by their
        commit, here or not. A model of the catalogue, and the parts that come with it, count by its name.
        """
        named = not asked(self.options)[1]
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
            | ({} if self.options.tiny_decoder is None else {"tiny_decoder": _content(self.tiny_decoder)})
            | lora.identity(self.loras)
        )

    def decoding(self, decoder: str) -> "ResolvedModel":
        """Return the same model with what a clip's decoder needs.

        Args:
            decoder: as in `ClipSettings.decoder`.

        Raises:
            InputError: the tiny decoder does not fit the model's VAE.
            CheckpointError: its file in the cache is damaged.
        """
        if decoder != "tiny":
            return self
        vae = self._known(self.vae)
        if self.spec.folder or (vae and vae.tensors["decoder.conv_in.weight"].shape[1] != LATENT_CHANNELS):
            raise InputError(
                f"decoder is 'tiny'. Expected full for {self.spec.name}, because the tiny decoder reads the latents of "
                "Wan2.1's VAE."
            )
        return replace(self, tiny_decoder=self.tiny_decoder or _here_or_hub(catalog.TINY_DECODER))

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
        loras = lora.choose(locate.local_loras(asked), len(self.transformers), self.loras)
        for one in loras:
            part = next(part for number, part in enumerate(self.transformers) if one.applies_to(number))
            lora.fit(one.lora, _shapes(self._known(part), self.spec), quiet=quiet)
        return replace(self, loras=loras, options=replace(self.options, loras=asked))


def _content(part: Contents | Path | HubFile, default: HubFile | None = None) -> str:
    """Return what a part's content is known by; a file of the Hub by its reference, the usual one by its name"""
    path = part.path if isinstance(part, Contents) else part
    file = part if isinstance(part, HubFile) else hub_cache.origin(path)
    if file is None:
        return fingerprint(path)
    return file.name if default and file.name == default.name else str(file)


def _shapes(contents: Contents | None, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of a transformer's tensors by name; those of the released model where nothing is known of its file"""
    if contents is None:
        head_dim = spec.arch.dim // spec.arch.num_heads
        return shapes.of_transformer(spec.arch, head_dim=head_dim, text_dim=shapes.TEXT_DIM, sla=True)
    return {name: tuple(one.shape) for name, one in contents.tensors.items()}


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
        files, near, name = locate.located(given)
        transformers = tuple(_read_part(file, heads) for file in files)
        known = [heads[part] if isinstance(part, HubFile) else part for part in transformers]
        recognise.require(known[0], "transformer", spec)
        recognise.require_experts(known)
        spec = spec or spec_of(known[0], files[0], name)
    else:
        transformers = known = tuple(map(_here_or_hub, spec.quant_files if quantized else spec.files))
    experts = 2 if spec.task == "i2v" else 1
    if len(transformers) != experts:
        raise InputError(
            f"checkpoint is {', '.join(map(str, given))}. Expected {experts} "
            f"file{'s (high-noise, low-noise)' if experts > 1 else ''} for {spec.name}. "
            f"{'Give both experts' if experts > 1 else 'Give one of the files'}."
        )
    parts = {
        name: _part(getattr(options, name), name, near, spec, heads, whole=transformers[0])
        for name in ("vae", "text_encoder")
    }
    encoder = parts["text_encoder"]
    near_tokenizer = near
    if isinstance(encoder, Contents) and hub_cache.origin(encoder.path) is None:
        near_tokenizer = (*near, encoder.path)
    found = ResolvedModel(
        spec=spec,
        transformers=transformers,
        **parts,
        tokenizer=_part(options.tokenizer, "tokenizer", near_tokenizer, spec, heads, inside=encoder),
        tiny_decoder=options.tiny_decoder and _part(options.tiny_decoder, "tiny_decoder", (), spec, heads),
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
        gpus=ranks_for(decision.gpus, spec.arch.num_heads),
    )
    if options.sla_topk is not None and found.attention_type == "original":
        warn(f"sla_topk is {options.sla_topk}, which dense attention does not use. Leave it out, or choose sla.")
    found.check()
    return found.with_loras(options.loras, quiet=True) if options.loras else found


def _part(
    given: str | Path | None, part: str, near: tuple[Path | locate.Beside, ...], spec: ModelSpec,
    heads: dict[HubFile, Contents], inside: Contents | HubFile | None = None, whole: Contents | HubFile | None = None,
) -> Contents | Path | HubFile:  # fmt: skip
    """Return a part that was given, or lies near the transformer, in its file (`whole`) or inside another part. Else it
    ships with the model, or is on the Hub.
    """
    kind = part.replace("_", " ")
    if given is None:
        place, shipped = locate.near(part, near, spec), spec.folder and spec.folder / part
        if place in (None, shipped) and _has_tokenizer(inside, heads):
            return inside
        if place in (None, shipped) and isinstance(whole, Contents) and kind in whole.others:
            return recognise.read(whole.path, kind)
        place = place or shipped
    else:
        place = reference.read(given, part, constants.ENDPOINT)
        place = layouts.part(place, part) if isinstance(place, Path) else place
    if place is None:
        return _here_or_hub(DEFAULTS[part])
    if isinstance(place, Path):
        return vocabulary.find(place) if part == "tokenizer" else recognise.read(place, kind)
    (file,) = (place,) if given is None else locate.of_reference(place, part, False)[0]
    found = _read_part(file, heads)
    if part == "tokenizer" and file.kind != "tokenizer" and not _has_tokenizer(found, heads):
        raise CheckpointError(
            f"tokenizer is {str(file)!r}. Expected a tokenizer, or a text encoder with one in its file."
        )
    return found


def _has_tokenizer(part: Contents | HubFile | None, heads: dict[HubFile, Contents]) -> bool:
    return vocabulary.has_tokenizer(heads.get(part) if isinstance(part, HubFile) else part)


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


def spec_of(contents: Contents, file: Path | HubFile, name: str | None) -> ModelSpec:
    """Return the spec of the first model with this shape; for another shape, Wan's defaults for its task.

    A model that is known by a reference has that as its name, so that the metadata of its clips show where it is from.

    Raises:
        CheckpointError: the number of input channels is that of no task.
    """
    if isinstance(file, HubFile) and (known := catalog.of_file(file)) and known.arch == contents.arch:
        return known
    if known := catalog.of_arch(contents.arch):
        return replace(known, name=name, license=None) if name else known
    if contents.arch.task is None:
        raise CheckpointError(
            f"{str(file)!r} is {contents}. Expected 16 input channels (text-to-video) or 36 (image-to-video)."
        )
    return catalog.unnamed(name or layouts.name_of(file), contents.arch, contents.arch.task)


def _attention_type(transformers: Sequence[Contents | HubFile]) -> str:
    """Return the attention of a model that no other was asked for; the released files have SLA's projections"""
    here = [part for part in transformers if isinstance(part, Contents)]
    return recognise.attention_of(min(here, key=lambda part: part.sla)) if here else "sla"


def _is_quantized(transformers: Sequence[Contents | HubFile]) -> bool:
    return any(isinstance(part, Contents) and part.quantized for part in transformers)
