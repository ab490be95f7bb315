"""Checkpoints become parts of a diffusers folder, in their own dtypes."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from ..checkpoint import load_text_encoder, load_transformer, load_vae
from ..errors import CheckpointError, OutputError, first_line
from . import lora
from .recognise import Contents, read, require

FOLDERS = {"transformer": "transformer", "vae": "vae", "text encoder": "text_encoder"}


def convert(source: str | Path, folder: str | Path, *, loras: Sequence[str] = (), low_noise: bool = False) -> str:
    """Write a checkpoint as a part of a diffusers folder.

    Args:
        source: a transformer, a VAE or a text encoder, in any layout that `recognise.read` knows.
        folder: the diffusers folder; it is made.
        loras: FILE or FILE:SCALE of LoRAs that are merged into the transformer first.
        low_noise: whether the transformer is the second of two experts.

    Returns:
        A line that names the folder written and its contents.

    Raises:
        CheckpointError: the source or a LoRA cannot be used, or a LoRA is to be merged into int8 linears.
        OutputError: the folder cannot be written.
    """
    merged, contents, folder = [lora.parse(each) for each in loras], read(source), Path(folder)
    if contents.kind not in FOLDERS:
        raise CheckpointError(f"{str(source)!r} is {contents}. Expected a transformer, a VAE or a text encoder.")
    require(contents, contents.kind)
    if merged and (contents.kind != "transformer" or contents.quantized):
        raise CheckpointError(
            f"{str(source)!r} is {contents}. Expected a transformer with plain linears to merge a LoRA into. "
            "Take the bf16 file."
        )
    place = folder / ("transformer_2" if low_noise else FOLDERS[contents.kind])
    for path in (place, *place.parents):
        if path.exists() and not path.is_dir():
            raise OutputError(f"{str(path)!r} is a file. Expected a folder. Remove the file or choose another folder.")
    module = _load(contents)
    for each in merged:
        lora.merge(module, each)
    try:
        module.save_pretrained(place)
        if not any(place.glob("*.safetensors")):
            raise OSError("nothing was written")
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{str(place)!r} cannot be written ({first_line(error)}). Expected a folder with room for "
            f"{sum(t.numel() * t.element_size() for t in contents.tensors.values()) / 1e9:.1f} GB. "
            "Free some space or choose another folder."
        ) from error
    note = f", with {len(loras)} LoRA{'s' if len(loras) > 1 else ''} merged" if loras else ""
    return f"{place}: {contents}{note}"


def _load(contents: Contents):
    """The module that a file holds, in the file's own dtypes"""
    if contents.kind == "transformer":
        return load_transformer(contents, attention_type="sla" if contents.sla else "original", dtype=None)
    return (load_vae if contents.kind == "vae" else load_text_encoder)(contents, dtype=None)
