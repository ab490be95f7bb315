"""Which model some options mean on this machine: the only owner of "auto".

`decide` chooses the model, its number format and the device. It opens no file and asks no network. `resolve` and
`download` act on its decision.
"""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from .. import backends, catalog
from ..catalog import HubFile, ModelSpec
from ..errors import InputError, warn
from ..machine import probe
from ..runtime import plan
from ..settings import LoadOptions, Weights
from . import hub, reference

OFFLOADS = ("none", "model", "group")  # from fast to slow


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
        gpus, device, memory, host_memory, reason: as in `ResolvedModel`.
    """

    spec: ModelSpec | None
    given: tuple[Path | HubFile, ...]
    quantized: bool | str
    device: str
    memory: float
    host_memory: float
    reason: str
    gpus: int = 1


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
    name, given = asked(options)
    spec = catalog.find(name) if name not in (None, "auto") else None  # an unknown name fails before torch is imported
    device = probe.device_of(options.device)
    gpus = probe.gpus_of(options.gpus, device)
    if gpus > 1 and device == "cuda":
        device = "cuda:0"  # whatever torch's current GPU is, because the other ranks take the following ones
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
        reason=reason, gpus=gpus,
    )  # fmt: skip


def ranks_for(gpus: int, heads: int) -> int:
    """Return the largest number of ranks up to `gpus` that divides the heads. Warns if it is less than `gpus`."""
    count = next(n for n in range(min(gpus, heads), 0, -1) if heads % n == 0)
    if count < gpus:
        warn(
            f"gpus is {gpus}, and {count} of them make the clip, because each GPU computes equally many of the model's "
            f"{heads} heads.",
            stacklevel=4,
        )
    return count


def _auto(
    device: str, memory: float, host_memory: float, quant_linear: bool | str, to_download: bool
) -> tuple[ModelSpec, bool | str, str]:
    """Return the spec, the number format and the reason that "auto" stands for"""
    if device == "cpu":
        return catalog.NANO, quant_linear, "auto: the embedded model runs on a CPU"
    if reason := backends.no_tensor_cores(probe.probe(device)):
        return catalog.NANO, quant_linear, f"auto: only the embedded model is fast enough, because {reason}"
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


def asked(options: LoadOptions) -> tuple[str | None, tuple[Path | HubFile, ...]]:
    """Return a name of the catalogue (or "auto", or None), and the paths and references of transformers."""
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
