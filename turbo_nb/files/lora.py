"""LoRAs: merged into the weights of a transformer."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import CheckpointError, first_line, listed, warn
from ..scheduler import RCMScheduler


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A LoRA's file, and the factor that its weights are multiplied by."""

    path: Path
    scale: float = 1.0


def parse(lora: str) -> LoRA:
    """Parse FILE or FILE:SCALE. Raises CheckpointError for a missing file or a scale that is not a finite number."""
    path, scale = lora, "1"
    if not Path(lora).is_file() and ":" in lora:
        path, _, scale = lora.rpartition(":")
    if not Path(path).is_file() or not _is_number(scale):
        raise CheckpointError(f"no LoRA {lora!r}. Expected FILE or FILE:SCALE, such as style.safetensors:0.8.")
    return LoRA(path=Path(path), scale=float(scale))


@torch.no_grad()
def merge(transformer: WanTransformer3DModel, lora: LoRA) -> None:
    """Add a LoRA's weights to the transformer's own. Warns of keys that match no part of the transformer.

    Raises:
        CheckpointError: the file is not a LoRA of this model, or changes no tensor.
    """
    name = repr(str(lora.path))
    pipeline = WanPipeline(None, None, None, RCMScheduler(), transformer)
    try:
        state = pipeline.lora_state_dict(str(lora.path.parent), weight_name=lora.path.name)
        pipeline.load_lora_weights(state, adapter_name="merged")
        changed = sum(_merge_layer(layer, lora.scale) for layer in _layers(transformer).values())
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name} cannot be merged as a LoRA of this model ({first_line(error)}). Expected a LoRA of Wan. "
            "Take one that was trained for this model."
        ) from error
    keys = {key.removeprefix("transformer.") for key in state}
    foreign = {key for key in keys if key.partition(".lora_")[0] not in _layers(transformer)}
    pipeline.unload_lora_weights()
    if not changed:
        raise CheckpointError(
            f"{name} at scale {lora.scale:g} changed 0 tensors; {len(foreign)} of its {len(keys)} keys match no part "
            f"of the model ({listed(foreign or keys)}). Expected a LoRA of this model. Take another file."
        )
    if foreign:
        warn(
            f"{len(foreign)} of the {len(keys)} keys of {name} match no part of the model; left out: {listed(foreign)}"
        )


def _layers(transformer: WanTransformer3DModel) -> dict[str, BaseTunerLayer]:
    """The layers that a LoRA was loaded for, by name"""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}


def _merge_layer(layer: BaseTunerLayer, scale: float) -> bool:
    """Merge the LoRA of one layer, and return whether that changed the layer's weight."""
    before = layer.get_base_layer().weight.clone()
    layer.scale_layer(scale)
    layer.merge(adapter_names=["merged"])
    return not torch.equal(layer.get_base_layer().weight, before)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
