"""Checkpoints become parts of a diffusers folder, in their own dtypes.

diffusers is imported after all checks, because that takes seconds.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from ..errors import CheckpointError, InputError, OutputError, first_line, space_or
from ..machine import atomic, environment
from ..settings import LoadOptions, options
from ..values import local
from . import lora
from .filenames import INDEX, as_one_file
from .recognise import Contents, read, require
from .weight_set import weight_sets

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

FOLDERS = {"transformer": "transformer", "vae": "vae", "text encoder": "text_encoder"}


def convert(source: str | Path, folder: str | Path, *, loras: Sequence[str] = (), low_noise: bool = False) -> str:
    """Write a checkpoint as a part of a diffusers folder.

    Args:
        source: a transformer, a VAE or a text encoder, in any layout that `recognise.read` knows.
        folder: the diffusers folder; it is made.
        loras: merged into the transformer, each as in `LoadOptions.loras`.
        low_noise: whether the transformer is the second of two experts.

    Returns:
        A line that names the folder written and its contents.

    Raises:
        CheckpointError: the source or a LoRA cannot be used, or a LoRA changes nothing.
        InputError: a strength cannot be used.
        OutputError: the folder cannot be written.
    """
    asked = options(LoadOptions)["loras"].check("lora", loras)
    if zero := [each.file for each in asked if not each.strength]:
        raise InputError(f"strength of {zero[0]!r} in lora is 0. Expected another number, because 0 changes nothing.")
    merged, contents, folder = lora.choose(asked, 1), read(source), Path(local(folder, "folder"))
    if contents.kind not in FOLDERS:
        raise CheckpointError(
            f"{str(source)!r} is {contents}. Expected a transformer, a VAE or a text encoder. Give the path of one. "
            "--lora merges a LoRA into a transformer."
        )
    require(contents, contents.kind)
    if merged and contents.kind != "transformer":
        raise CheckpointError(f"{str(source)!r} is {contents}. Expected a transformer to merge a LoRA into.")
    if low_noise and contents.kind != "transformer":
        raise InputError(
            f"low_noise is True, and {str(source)!r} is {contents}. Expected a transformer with it. Leave it out."
        )
    place = folder / ("transformer_2" if low_noise else FOLDERS[contents.kind])
    for path in (place, *place.parents):
        if os.path.lexists(path) and not environment.is_dir(path):
            what = "a link that leads to no folder" if os.path.islink(path) else "a file"
            raise OutputError(f"{str(path)!r} is {what}. Expected a folder. Remove it or choose another folder.")
    try:
        environment.require_writable(place)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{str(place)!r} cannot be written ({first_line(error)}). Expected a folder that you can write to. "
            "Choose another folder."
        ) from error
    module = _load(contents, merged)
    changed = lora.require_changed(merged)
    try:
        _save(module, place)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{str(place)!r} cannot be written ({first_line(error)}). Expected a folder with room for "
            f"{sum(t.numel() * t.element_size() for t in contents.tensors.values()) / 1e9:.1f} GB. "
            f"{space_or('choose another folder', error)}"
        ) from error
    note = f", with {len(merged)} LoRA{'s' if len(merged) > 1 else ''} merged: {changed} tensors changed"
    return f"{place}: {contents}{note if merged else ''}"


def _save(module: "ModelMixin | PreTrainedModel", place: Path) -> None:
    """Write a module into a folder, which keeps its files until all new ones are written.

    Because they may be the shards that the module was read from, which diffusers deletes first, or links.
    """
    atomic.sweep(place)
    with atomic.temporary_folder(place) as temporary:
        module.save_pretrained(temporary)
        new = os.listdir(temporary)
        if not any(name.endswith(".safetensors") for name in new):
            raise OSError("nothing was written")
        if folders := [name for name in new if environment.is_dir(place / name)]:
            raise IsADirectoryError(f"{folders[0]} in it is a folder")
        sets = weight_sets(place)
        old = {name for one in {as_one_file(name.removesuffix(INDEX)) for name in new} for name in sets.get(one, ())}
        for name in new:
            os.replace(temporary / name, place / name)
        for name in old.difference(new):
            (place / name).unlink()


def _load(contents: Contents, loras: Sequence[lora.Applied]) -> "ModelMixin | PreTrainedModel":
    """The module that a file holds, in the file's own dtypes"""
    from ..checkpoint import load_text_encoder, load_transformer, load_vae

    if contents.kind == "transformer":
        return load_transformer(contents, attention_type="sla" if contents.sla else "original", dtype=None, loras=loras)
    return (load_vae if contents.kind == "vae" else load_text_encoder)(contents, dtype=None)
