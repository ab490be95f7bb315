"""Choices of model: what each means on this machine, which one is in memory, and what a clip of it will take."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .. import catalog, generation, pipeline, preparation, settings, sla
from ..errors import TurboNbError, collect_warnings
from ..files import lora
from ..files.resolve import ResolvedModel, resolve
from ..machine import probe
from ..pipeline import LoadedModel
from ..runtime.place import transformers
from ..settings import ClipSettings, LoadOptions
from . import colours
from .request import Outlook, Request


@dataclass(frozen=True)
class _Free:
    """The bytes of a device and of main memory that were free before the latest load, whatever its `memory` was"""

    device: str
    memory: float
    host_memory: float


class Choices:
    """Models by the options that choose them, each resolved once, and the one that is loaded.

    Args:
        load: `pipeline.load`, or what stands in for it.

    `model` is the loaded one, None before the first. `colours` are those of previews.
    """

    def __init__(self, load: Callable | None = None):
        self.model: LoadedModel | None = None
        self.colours = colours.Colours()
        self._load = load or pipeline.load
        self._known: dict[LoadOptions, tuple[ResolvedModel, tuple[str, ...]]] = {}  # and their warnings
        self._loras: tuple[lora.Applied, ...] = ()  # of the latest choice
        self._loaded: LoadOptions | None = None  # what `model` is, as `_identity` describes it
        self._before: _Free | None = None
        self._tokenizers: dict[Any, Any] = {}

    def resolve(self, options: LoadOptions) -> ResolvedModel:
        """Find out what a choice of model means here, once for each choice. Raises what `files.resolve.resolve` raises.

        The memory of a model that is loaded counts as free, because that model goes before the next one comes.
        """
        return self._choice(options)[0]

    def forget(self) -> None:
        """Resolve every choice of model anew, because files came or went."""
        self._known.clear()

    def tokenizer(self, options: LoadOptions) -> Any:
        """Return the tokenizer of a model, None where it is not on the disk. Each is loaded once, which takes seconds.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        from ..checkpoint import load_tokenizer

        part = self.resolve(options).tokenizer
        if isinstance(part, catalog.HubFile):
            return None
        key = getattr(part, "path", part)
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(part)
        return self._tokenizers[key]

    def outlook(self, request: Request, image_size: tuple[int, int] | None = None) -> Outlook:
        """Return size, time and memory of a clip before it is made. Opens no checkpoint that `resolve` has read.

        Args:
            request: what would be submitted. Its image is not opened.
            image_size: width and height of the image.

        Raises:
            UnknownModelError, InputError, BackendError, CheckpointError: the request cannot be met.
        """
        resolved, notes = self._choice(request.load)
        resolved = resolved.decoding(request.clip.decoder)
        preparation.check_without_pictures(request.clip, resolved.spec)
        clip = settings.resolve_clip(request.clip, resolved.spec, image_size)
        resolved.require_memory(clip)
        memory, loaded = resolved.plan(clip.size), self.has(resolved)
        has_colours = self.colours.of(self.model) is not None if loaded else colours.are_known(resolved)
        return Outlook(
            width=clip.width,
            height=clip.height,
            num_frames=clip.num_frames,
            fps=resolved.spec.fps,
            memory=memory,
            time=generation.outlook(resolved, clip, self.model.plan.name if loaded else memory.name),
            loaded=loaded,
            has_preview=memory.offload == "none" or has_colours,
            to_fetch=resolved.to_fetch if resolved.downloads else 0,
            notes=notes,
        )

    def has(self, resolved: ResolvedModel) -> bool:
        """Return whether a model is in memory and can make clips, whatever its LoRAs and its top-k are."""
        model = self.model  # one look, because another thread may load
        return model is not None and not model.ended and self._identity(resolved) == self._loaded

    def set_changeable(self, resolved: ResolvedModel) -> None:
        """Give the loaded model the LoRAs and the top-k of a choice."""
        if _effects(resolved) != _effects(self.model.resolved):
            pipeline.set_loras(self.model.pipeline, resolved.options.loras)
        for transformer in transformers(self.model.pipeline):
            sla.set_topk(transformer, resolved.sla_topk)

    def load(self, resolved: ResolvedModel, clip: ClipSettings, **callbacks: Callable) -> None:
        """Load another model, after the memory of the earlier model is given back.

        Args:
            resolved: the model.
            clip: the first clip.
            callbacks: on_plan and on_progress of `pipeline.load`.
        """
        options, device = resolved.options, resolved.device
        self.model = self._loaded = None
        probe.release_memory()
        free = self._before = _Free(_with_index(device), probe.free_memory(device), probe.free_memory("cpu"))
        resolved = replace(
            resolved,
            memory=options.memory or free.memory,
            host_memory=free.host_memory,
            loras=tuple(replace(one, changed=set()) for one in resolved.loras),  # nothing of this model yet
        )
        size = preparation.prepare(clip, resolved.spec).clip.size
        try:
            loaded = self._load(resolved, clip=size, prompts=[clip.prompt], **callbacks)
        except TurboNbError:
            self.forget()  # because the person may replace the file that cannot be loaded
            raise
        self.model, self._loaded = LoadedModel.of(loaded), self._identity(resolved)
        self._known[_without_changeable(options)] = replace(self.model.resolved, loras=()), ()  # downloaded now

    def _choice(self, options: LoadOptions) -> tuple[ResolvedModel, tuple[str, ...]]:
        """Return the resolved model, and the warnings of resolving it"""
        base = _without_changeable(options)
        if (known := self._known.get(base)) is None:  # one look, because another thread may forget it meanwhile
            known = self._known[base] = self._resolve(base)
        found, notes = known
        topk = found.spec.sla_topk if options.sla_topk is None else options.sla_topk
        found, model = replace(found, sla_topk=topk, options=options), self.model
        if options.loras:  # those that were read before are not read again
            merged = model.resolved.loras if model else ()
            found = replace(found, loras=(*merged, *self._loras)).with_loras(options.loras, quiet=True)
            self._loras = found.loras
        return found, notes

    def _resolve(self, options: LoadOptions) -> tuple[ResolvedModel, tuple[str, ...]]:
        before = self._before
        if before and before.device != _with_index(probe.device_of(options.device)):
            before = None
        with collect_warnings() as notes:
            found = resolve(
                replace(options, memory=options.memory or (before and before.memory)),
                host_memory=before and before.host_memory,
            )
        return found, tuple(notes)

    @staticmethod
    def _identity(resolved: ResolvedModel) -> LoadOptions:
        """Return options that are equal for two choices of the same model"""
        options = _without_changeable(resolved.options)
        named = options.checkpoint is None and str(options.model) in ("auto", *catalog.MODELS, *catalog.UPSTREAM_NAMES)
        return replace(
            options,
            model=resolved.spec.name if named else options.model,
            attention_type=resolved.attention_type,
            quant_linear=resolved.quant_linear,
            device=_with_index(resolved.device),
        )


def _without_changeable(options: LoadOptions) -> LoadOptions:
    """Return options without those that can change while the model stays loaded"""
    return replace(options, sla_topk=None, loras=())


def _effects(model: ResolvedModel) -> list[tuple]:
    """Return what LoRAs do, for comparison: the content of their files, strengths and experts"""
    return [(one.lora.path, one.lora.stamp, one.strength, one.expert) for one in model.loras]


def _with_index(device: str) -> str:
    """Return a device by its index, because "cuda" and "cuda:0" can be the same GPU"""
    index = probe.gpu_index(device)
    return "cpu" if index is None else f"cuda:{index}"
