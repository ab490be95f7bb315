"""Weight files: read safely, and told apart by their tensors alone.

`read(path)` never runs code from a file: pickles load with `weights_only`, and what is no honest file of tensors is
refused before anything is allocated. The tensors are mapped from the file, not copied.
"""

from torch import Tensor

PREFIXES = ("net.", "model.diffusion_model.", "module.")
PROJ_L = ".attn1.processor.sla.proj_l."  # where a transformer with SLA has them


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in tensors):
            rest = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
            if len(rest) == len(tensors):
                return _without_prefix(rest)
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


def _umt5_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Wan's raw umT5 names → transformers'"""
    renamed = {}
    for key, tensor in tensors.items():
        for raw, name in UMT5_NAMES.items():
            key = key.replace(raw, name)
        renamed["encoder.final_layer_norm.weight" if key == "norm.weight" else key] = tensor
    return renamed
