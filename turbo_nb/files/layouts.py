"""Where the parts of a model lie in the folders that people have.

diffusers' folders and snapshots of the Hub (`transformer/`, `vae/`, …), Wan-AI's own (the transformer, Wan2.1_VAE.pth,
models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl in one folder; high_noise_model/ and low_noise_model/ beside them),
and ComfyUI's (`models/diffusion_models`, `vae`, `text_encoders`). Names only find a file. Its tensors tell what it is.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, listed, warn
from ..machine import environment
from ..values import local
from . import recognise, vocabulary
from .filenames import EXPERTS, TOKENIZER_FOLDERS, USUAL
from .weight_set import weight_sets

COMFY = ("models/diffusion_models", "diffusion_models", "models/unet", "unet")
SHARED = {"transformer", "transformer_2", "high_noise_model", "low_noise_model", "diffusion_models", "unet", "model"}
PARENTS = 2  # folders above the transformer that are searched
REDUCED = re.compile(r"fp8|int8|int4|nf4|nvfp4|mxfp|[-_.]i?q\d", re.IGNORECASE)  # in names of files of 8 bits or less


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a part lies within a folder.

    Args:
        folders: of the part, diffusers' first.
        file: a pattern of the names that its file has, in these folders or beside the transformer.
    """

    folders: tuple[str, ...]
    file: re.Pattern


PLACES = {
    "vae": Place(folders=("vae",), file=re.compile(r"wan[-_ ]?2[._]1[-_ ]?vae.*", re.IGNORECASE)),
    "text_encoder": Place(
        folders=("text_encoder", "text_encoders", "clip"), file=re.compile(r"(models_t5_)?umt5[-_]xxl.*", re.IGNORECASE)
    ),
    "tiny_decoder": Place(folders=("vae_approx",), file=re.compile(r"taew2[._]1.*", re.IGNORECASE)),
}
TOKENIZERS = (*TOKENIZER_FOLDERS, "umt5-xxl")


def transformers(path: Path) -> tuple[Path, ...]:
    """Return the transformers that a path means: one, or (high-noise, low-noise).

    Args:
        path: a file, or a folder in any of the layouts.
    """
    for names in EXPERTS:
        if found := tuple(path / name for name in names if environment.is_dir(path / name)):
            return found
    folder = next((path / name for name in COMFY if weight_sets(path / name)), path)
    return _alone(folder) or (folder,)


def _alone(folder: Path) -> tuple[Path, ...]:
    """The only file of a folder, or its only pair of experts, beside files that have the names of other parts"""
    sets = weight_sets(folder)
    others = [place.file for place in PLACES.values()]
    names = sorted((name for name in sets if not any(one.fullmatch(name) for one in others)), key=str.lower)
    if sets.keys() & set(USUAL) or not 0 < len(names) < 3:
        return ()
    if len(names) == 2 and re.sub("(?<![a-z])low", "high", names[1].lower()) != names[0].lower():
        return ()
    return tuple(_member(folder, name) for name in names)


def part(path: Path, name: str) -> Path:
    """Return the part that a path means.

    Args:
        path: its file or folder, a file of a tokenizer, or a folder in any of the layouts.
        name: "vae", "text_encoder", "tokenizer" or "tiny_decoder".
    """
    if name == "tokenizer" and path.suffix == ".json" and environment.is_file(path) and is_tokenizer(path.parent):
        return path.parent
    if name == "tokenizer" and is_tokenizer(path):
        return path
    return within(path, name) or within(path / "models", name) or path


def near(path: Path, name: str, *, own_layout: bool = False) -> Path | None:
    """Return the part that lies with a transformer, in its folder or up to two folders above; None without one.

    Args:
        path: of the transformer.
        name: "vae", "text_encoder" or "tokenizer".
        own_layout: look only for diffusers' folders, because the model does not take Wan's own parts.
    """
    path = Path(os.path.abspath(path))
    folder = path if environment.is_dir(path) else path.parent
    places = (folder, *folder.parents[:PARENTS])
    return next((found for place in places if (found := within(place, name, own_layout=own_layout))), None)


def within(folder: Path, name: str, *, own_layout: bool = False) -> Path | None:
    """Return a part in a folder; None without one. Arguments as for `near`."""
    if name == "tokenizer":
        names = TOKENIZERS[:1] if own_layout else TOKENIZERS
        return next((folder / one for one in names if is_tokenizer(folder / one)), None)
    inner, file = folder / name, PLACES[name].file
    if environment.is_file(inner / "config.json") or weight_sets(inner).keys() & set(USUAL):
        return inner
    places = () if own_layout else (*PLACES[name].folders, ".")
    return next((found for place in places if (found := _named(folder / place, file))), None)


def is_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return any(environment.is_file(folder / name) for name in vocabulary.FILES)


def name_of(path: Path) -> str:
    """Return the name of a model by its path, without the names that all models of a layout share."""
    path = Path(os.path.abspath(path))
    name = path.name if environment.is_dir(path) else path.stem
    if name in SHARED or name.startswith(("diffusion_pytorch_model", "model-0")):
        path = path.parent
        name = path.name
    if path.parent.name == "snapshots":  # in the Hub's cache, where a commit is the folder's name
        return path.parent.parent.name.rpartition("--")[2]
    return name


def describe(path: str | Path) -> str:
    """Describe a weight file, a folder of shards, or each part of a folder, one a line.

    Raises:
        CheckpointError: as `recognise.read`. A part among others has its error in its line.
    """
    path = Path(local(path))
    if is_tokenizer(path):
        return _description(path)
    parts = dict(_parts(path))
    own = [one for one in parts.values() if one.parent == path and not environment.is_dir(one)]
    if len(parts) == len(own) <= 1:
        return str(recognise.read(path))
    width = max(map(len, parts))
    lines = [f"{name:{width}} {_description(one)}" for name, one in parts.items()]
    return "\n".join([f"{str(path)!r} holds:", *lines])


def _parts(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and paths of all parts in a folder"""
    places = [*EXPERTS[0], *EXPERTS[1], "diffusion_models", "unet", *PLACES["vae"].folders,
              *PLACES["text_encoder"].folders, "loras"]  # fmt: skip
    for place in ("", *places, *(f"models/{one}" for one in places)):
        sets = weight_sets(folder / place)
        usual = next((one for one in USUAL if one in sets), None)
        for name in sets:
            if name == usual and place:
                yield place, folder / place
            elif usual is None or not place:
                yield os.path.join(place, name), _member(folder / place, name)
    for place in TOKENIZERS:
        if is_tokenizer(folder / place):
            yield place, folder / place


def _description(path: Path) -> str:
    if is_tokenizer(path):
        return f"a tokenizer ({', '.join(name for name in vocabulary.FILES if environment.is_file(path / name))})"
    try:
        return str(recognise.read(path))
    except CheckpointError as error:
        return str(error)


def _named(folder: Path, pattern: re.Pattern) -> Path | None:
    """The weights in a folder whose name fits; of several the most exact ones, with a warning"""
    names = [name for name in weight_sets(folder) if pattern.fullmatch(name)]
    if not names:
        return None
    first, *others = sorted(names, key=lambda name: (bool(REDUCED.search(name)), name))
    if others:
        warn(f"{str(folder / first)!r} is taken; left out: {listed(others)}, which lie beside it", stacklevel=3)
    return _member(folder, first)


def _member(folder: Path, name: str) -> Path:
    """The path of a set of weights: its file, its index or one of its shards"""
    members = weight_sets(folder)[name]
    return folder / (name if name in members else members[-1])
