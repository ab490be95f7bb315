"""Configure the parts of nano, and write them to the folder that they ship in (diffusers layout)."""

import json

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from turbo_nb import checkpoint
from turbo_nb.checkup import selftest

from .world import ASSET

LATENT_CHANNELS = 16
TEXT_DIM = 128

VAE = {
    "base_dim": 24,
    "decoder_base_dim": 32,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}
TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 256,
    "ffn_dim": 960,
    "num_layers": 7,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
TEXT_ENCODER = {
    "vocab_size": 384,
    "d_model": TEXT_DIM,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
}


def new_text_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**TEXT_ENCODER))


def new_vae(latents_mean: list[float] | None = None, latents_std: list[float] | None = None) -> AutoencoderKLWan:
    mean, std = latents_mean or [0.0] * LATENT_CHANNELS, latents_std or [1.0] * LATENT_CHANNELS
    return AutoencoderKLWan(**VAE, latents_mean=mean, latents_std=std)


def new_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(**TRANSFORMER)


def save(part: torch.nn.Module, name: str) -> None:
    """Write one part (bf16 weights) and the small files of diffusers' layout into the shipped folder."""
    part.to("cpu", torch.bfloat16).save_pretrained(ASSET / name, safe_serialization=True)
    config = json.loads((ASSET / name / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # names a folder of the machine that trained it
    ByT5Tokenizer().save_pretrained(ASSET / "tokenizer")
    scheduler = {"_class_name": "RCMScheduler", "sigma_max": 80.0, "ode": False}
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["turbo_nb.scheduler", "RCMScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (ASSET / "scheduler").mkdir(exist_ok=True)
    files = {f"{name}/config.json": config, "scheduler/scheduler_config.json": scheduler, "model_index.json": index}
    for path, content in files.items():
        (ASSET / path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_sums()


def load_text_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel.from_pretrained(ASSET / "text_encoder", dtype=torch.float32)


def load_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(ASSET / "vae", torch_dtype=torch.float32)


def load_transformer(attention_type: str = "original", topk: float = 0.15) -> WanTransformer3DModel:
    return checkpoint.load_transformer(
        ASSET / "transformer", attention_type=attention_type, sla_topk=topk, dtype=torch.float32
    )


def write_sums() -> None:
    """Write the hashes of the shipped files, which `turbo-nb verify` compares."""
    (ASSET / selftest.SUMS).write_text(selftest.sums(ASSET), encoding="utf-8")
