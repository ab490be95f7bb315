"""Checkpoints become diffusers and transformers modules: upstream's files and diffusers folders alike.

What a file is comes from its tensors (`weights.read`), so no flag has to be right. Loading maps the file and gives its
tensors to a model without storage: nothing is held twice.
"""

from collections.abc import Sequence
from pathlib import Path

from ..checkpoint import load_text_encoder, load_transformer, load_vae
from ..errors import CheckpointError, OutputError
from .lora import _merge_lora
from .recognise import read


def convert(source: str | Path, folder: str | Path, *, loras: Sequence[str] = (), low_noise: bool = False) -> str:
    """Write a checkpoint as a part of a diffusers folder, in its own dtypes; what was written where, in words.

    loras: "FILE" or "FILE:SCALE", merged into the transformer first. low_noise: it is the second of two experts.
    Raises CheckpointError, also for LoRAs and int8 linears, and OutputError if the folder cannot be written.
    """
    contents, folder = read(source), Path(folder)
    if loras and (contents.kind != "transformer" or contents.quantized):
        raise CheckpointError(f"{str(source)!r} is {contents}; a LoRA is merged into a transformer with plain linears")
    if contents.kind == "transformer":
        kind = "sla" if contents.sla else "original"
        module = load_transformer(contents, attention_type=kind, dtype=None)
        for lora in loras:
            _merge_lora(module, lora)
        place = folder / ("transformer_2" if low_noise else "transformer")
    elif contents.kind == "vae":
        module, place = load_vae(contents, dtype=None), folder / "vae"
    elif contents.kind != "text encoder":
        raise CheckpointError(f"{str(source)!r} is {contents}; a transformer, a VAE or a text encoder can be converted")
    else:
        module, place = load_text_encoder(contents, dtype=None), folder / "text_encoder"
    try:
        module.save_pretrained(place)
    except OSError as error:
        raise OutputError(f"cannot write {str(place)!r}: {error}; free some space or choose another folder") from error
    merged = f", with {len(loras)} LoRA{'s' if len(loras) > 1 else ''} merged" if loras else ""
    return f"{place}: {contents}{merged}"
