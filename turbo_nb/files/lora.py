"""Checkpoints become diffusers and transformers modules: upstream's files and diffusers folders alike.

What a file is comes from its tensors (`weights.read`), so no flag has to be right. Loading maps the file and gives its
tensors to a model without storage: nothing is held twice.
"""

import math
from pathlib import Path

from diffusers import WanPipeline, WanTransformer3DModel

from ..errors import CheckpointError, first_line
from ..scheduler import RCMScheduler


def _merge_lora(transformer: WanTransformer3DModel, lora: str) -> None:
    """Add a LoRA's weights to the transformer's own"""
    path, scale = lora, "1"
    if not Path(lora).is_file() and ":" in lora:
        path, _, scale = lora.rpartition(":")
    if not Path(path).is_file() or not _is_number(scale):
        raise CheckpointError(f"no LoRA {lora!r}; give FILE or FILE:SCALE, such as style.safetensors:0.8")
    pipeline = WanPipeline(None, None, None, RCMScheduler(), transformer)
    try:
        pipeline.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name, adapter_name="merged")
        pipeline.fuse_lora(components=["transformer"], lora_scale=float(scale))
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path!r} cannot be merged as a LoRA of this model: {first_line(error)}") from error
    pipeline.unload_lora_weights()


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
