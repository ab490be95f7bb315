"""Where the parts of a model come from: a name of the catalogue, a checkpoint, two of them, or a diffusers folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import catalog, download, weights
from .errors import InputError
from .weights import Contents

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
    contents = tuple(weights.read(path) for path in paths)
    weights.require(contents[0], "transformer", spec)
    spec = spec or _spec_of(contents[0], paths[0])
    for one in contents[1:]:
        weights.require(one, "transformer", spec)
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
        return next((path for path in own if path.exists()), None) or download.part(file, on_progress=on_progress)

    found_vae = weights.read(part(vae, "vae", catalog.VAE))
    found_encoder = weights.read(part(text_encoder, "text_encoder", catalog.TEXT_ENCODER))
    weights.require(found_vae, "vae")
    weights.require(found_encoder, "text encoder")
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
    contents = weights.read(paths[0])
    weights.require(contents, "transformer")
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
        if files := download.cached(spec, quantised=choice):
            return files.transformers
    return download.fetch(spec, quantised=choices[0], on_progress=on_progress).transformers


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
