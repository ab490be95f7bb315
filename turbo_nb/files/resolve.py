"""Where the parts of a model come from: a name of the catalogue, a checkpoint, two of them, or a diffusers folder."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import catalog
from ..errors import InputError
from ..machine import probe
from ..runtime import plan
from . import hub, recognise
from .recognise import Contents

Checkpoint = str | Path | tuple[str | Path, str | Path]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a pipeline is made of: what its files hold (transformers: one, or high-noise and low-noise)."""

    spec: catalog.ModelSpec
    transformers: tuple[Contents, ...]
    vae: Contents
    text_encoder: Contents
    tokenizer: Path


def resolve(
    model: Checkpoint,
    *,
    checkpoint: Checkpoint | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    quantised: bool | None = None,
    on_progress: Callable | None = None,
) -> Sources:
    """Find the parts of `model`, fetching what is on the Hub and not in the cache.

    model: a name; a path; or (high-noise, low-noise) paths. checkpoint: the file or files to take for a named model,
    whose shape they must have ("auto": any). vae, text_encoder, tokenizer: paths that take the place of the model's
    own. quantised: whether to take the released files with int8 linears; None takes those in the cache, the plain ones
    first.

    Raises UnknownModelError, InputError, CheckpointError or DownloadError.
    """
    name, paths = _name_or_paths(model)
    if checkpoint is not None:
        name, paths = None if model == "auto" else model, _pair(checkpoint)
    spec = catalog.find(str(name)) if name is not None else None
    if not paths and spec.folder:
        paths = (spec.folder / "transformer",)
    if not paths:
        paths = _released(spec, quantised, on_progress)
    contents = tuple(recognise.read(path) for path in paths)
    recognise.require(contents[0], "transformer", spec)
    spec = spec or _spec_of(contents[0], paths[0])
    for one in contents[1:]:
        recognise.require(one, "transformer", spec)
    experts = 2 if spec.task == "i2v" else 1
    if len(contents) != experts:
        raise InputError(
            f"{spec.name} takes {experts} checkpoint{'s (high-noise, low-noise)' if experts > 1 else ''}, and got "
            f"{len(contents)}: {', '.join(str(path) for path in paths)}"
        )
    near = paths[0].parent  # a diffusers folder, or where upstream's README puts its files

    def part(given: str | Path | None, folder: str, file: catalog.HubFile) -> Path:
        if given is not None:
            return Path(given)
        own = [near / folder]
        if spec.folder:
            own.append(spec.folder / folder)
        elif file.path != "/":
            own.append(near / file.path)
        return next((path for path in own if path.exists()), None) or hub.part(file, on_progress=on_progress)

    found_vae = recognise.read(part(vae, "vae", catalog.VAE))
    found_encoder = recognise.read(part(text_encoder, "text_encoder", catalog.TEXT_ENCODER))
    recognise.require(found_vae, "vae")
    recognise.require(found_encoder, "text encoder")
    return Sources(
        spec=spec,
        transformers=contents,
        vae=found_vae,
        text_encoder=found_encoder,
        tokenizer=part(tokenizer, "tokenizer", catalog.TOKENIZER),
    )


def spec_of(model: Checkpoint) -> catalog.ModelSpec:
    """The spec of a checkpoint, two of them, or a folder, from its tensors. Raises CheckpointError or InputError."""
    _, paths = _name_or_paths(model)
    if not paths:
        return catalog.find(str(model))
    contents = recognise.read(paths[0])
    recognise.require(contents, "transformer")
    return _spec_of(contents, paths[0])


def _pair(checkpoint: Checkpoint) -> tuple[Path, ...]:
    return tuple(map(Path, checkpoint)) if isinstance(checkpoint, tuple | list) else (Path(checkpoint),)


def _name_or_paths(model: Checkpoint) -> tuple[str | None, tuple[Path, ...]]:
    """A catalogue name, or the paths of transformers"""
    if isinstance(model, tuple | list):
        return None, _pair(model)
    path = Path(model)
    if str(model) in (*catalog.MODELS, *catalog.UPSTREAM_NAMES, "auto"):
        return str(model), ()  # whatever lies here under that name
    if path.is_dir():
        folders = [path / name for name in ("transformer", "transformer_2") if (path / name).is_dir()]
        return None, tuple(folders or [path])
    if path.suffix in (".pth", ".pt", ".safetensors") or path.is_file():
        return None, (path,)
    return str(model), ()


def _released(spec: catalog.ModelSpec, quantised: bool | None, on_progress: Callable | None) -> tuple[Path, ...]:
    """The transformers of a released model"""
    choices = (False, True) if quantised is None else (quantised,)
    for choice in choices:
        if files := hub.cached(spec, quantised=choice):
            return files.transformers
    return hub.fetch(spec, quantised=choices[0], on_progress=on_progress).transformers


def _spec_of(contents: Contents, path: Path) -> catalog.ModelSpec:
    """The spec of the first model with this shape; for another shape, Wan's defaults for its task"""
    if known := catalog.of_arch(contents.arch):
        return known
    if contents.arch.task is None:
        raise InputError(
            f"{str(path)!r} is {contents}; models of 16 channels (text-to-video) and 36 (image-to-video) run here"
        )
    name = path.parent.name if path.name == "transformer" else path.stem
    return catalog.unnamed(name, contents.arch, contents.arch.task)


def fitting(
    memory: float, quant_linear: bool | str = "auto", host: float | None = None
) -> list[tuple[catalog.ModelSpec, bool]]:
    """The released models that work in `memory` bytes of a GPU and `host` of main memory (None: as much as it takes)
    without moving block by block, the best first.

    Each comes with whether it is its files with int8 linears (quant_linear: only those, or only the plain ones). Larger
    models go first; of one model the files that stay on the GPU, and of these the plain ones.
    """
    found = []
    for spec in reversed(catalog.MODELS.values()):  # the catalogue goes from small to large
        kinds = (False, True) if quant_linear == "auto" else (quant_linear,)
        given = {"budget": memory, "host_budget": host, "fused": plan.fused_on()}
        plans = [(plan.for_model(spec, quantised=kind, **given), kind) for kind in kinds if spec.files]
        plans = [one for one in plans if one[0].fits and one[0].offload != "group"]
        found += [(spec, kind) for _, kind in sorted(plans, key=lambda one: one[0].offload == "model")]
    return found


def choose(
    *, device: str = "auto", memory: float | None = None, quant_linear: bool | str = "auto"
) -> tuple[str, bool | str]:
    """The model that "auto" stands for, and `quant_linear` for loading it.

    On a GPU it is the best text-to-video model that was downloaded and fits `memory` bytes (None: what is free); else,
    and on a CPU, nano. Warns, in one line, of a better one that could be downloaded. Raises InputError for a device
    that is not here.
    """
    fits = _text_to_video(device, memory, quant_linear)
    here = next((one for one in fits if hub.cached(one[0], quantised=one[1])), (catalog.NANO, quant_linear))
    if fits and here[0] is not fits[0][0]:
        best, quantised = fits[0]
        warnings.warn(
            f"model auto takes {here[0].name}; this GPU could run {best.name}, which is not downloaded: "
            f"turbo-nb download {best.name}{' --quant' if quantised else ''}",
            stacklevel=1,  # told once a process, whoever asks
        )
    return here[0].name, here[1]


def download_model(model: str = "auto", *, quantised: bool | None = None) -> hub.Files | None:
    """Fetch a model with its plan and progress shown, and say where its files lie; None for one of the package.

    "auto" is the best text-to-video model that fits this machine. quantised: the files with int8 linears or the plain
    ones; None takes what suits this GPU, the plain ones if neither does. Raises what `hub.plan` and `fetch` raise.
    """
    quant_linear = "auto" if quantised is None else quantised
    if model == "auto":
        spec, quantised = next(iter(_text_to_video("auto", None, quant_linear)), (catalog.NANO, False))
    else:
        spec = catalog.find(model)
        if quantised is None:
            quantised = next((is_int8 for one, is_int8 in _fitting_here("auto", None, "auto") if one is spec), False)
    planned = hub.plan(spec, quantised=quantised)
    print(planned, flush=True)
    if not planned.files:
        return None
    with hub.progress_bars() as show:
        return hub.fetch(spec, quantised=quantised, planned=planned, on_progress=show)


def _fitting_here(device: str, memory: float | None, quant_linear: bool | str) -> list[tuple[catalog.ModelSpec, bool]]:
    device = probe.device_of(device)
    return (
        [] if device == "cpu" else fitting(memory or probe.free_memory(device), quant_linear, probe.free_memory("cpu"))
    )


def _text_to_video(device: str, memory: float | None, quant_linear: bool | str) -> list[tuple[catalog.ModelSpec, bool]]:
    return [one for one in _fitting_here(device, memory, quant_linear) if one[0].task == "t2v"]
