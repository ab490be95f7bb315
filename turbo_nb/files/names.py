"""Tensor names: the prefixes of training frameworks, and Wan's raw umT5 names."""

from torch import Tensor

PREFIXES = ("net.", "model.diffusion_model.", "module.")
PROJ_L = ".attn1.processor.sla.proj_l."  # the path of SLA's projections within a block


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of training frameworks from every name. Names that would collide stay as they are."""
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in tensors):
            rest = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
            if len(rest) == len(tensors):
                return without_prefix(rest)
    return tensors


UMT5_NAMES = {
    "token_embedding.": "shared.",
    "blocks.": "encoder.block.",
    ".norm1.": ".layer.0.layer_norm.",
    ".attn.": ".layer.0.SelfAttention.",
    ".pos_embedding.embedding.": ".layer.0.SelfAttention.relative_attention_bias.",
    ".norm2.": ".layer.1.layer_norm.",
    ".ffn.gate.0.": ".layer.1.DenseReluDense.wi_0.",
    ".ffn.fc1.": ".layer.1.DenseReluDense.wi_1.",
    ".ffn.fc2.": ".layer.1.DenseReluDense.wo.",
}


def to_transformers_umt5(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename Wan's raw umT5 tensors as transformers names them."""
    renamed = {}
    for key, tensor in tensors.items():
        for raw, name in UMT5_NAMES.items():
            key = key.replace(raw, name)
        renamed["encoder.final_layer_norm.weight" if key == "norm.weight" else key] = tensor
    return renamed
