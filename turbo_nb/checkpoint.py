"""A model folder in diffusers layout becomes diffusers and transformers modules."""

import json
import warnings
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from .errors import CheckpointError
from .sla import set_attention_type

KEEP_FP32 = (*WanTransformer3DModel._keep_in_fp32_modules, "proj_l")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        raise CheckpointError(f"no diffusion_pytorch_model*.safetensors in {str(folder)!r}; is it a diffusers folder?")
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def load_transformer(
    path: str | Path,
    *,
    attention_type: str = "sla",
    sla_topk: float = 0.1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> WanTransformer3DModel:
    """The transformer in folder `path`, in eval mode; norms, embeddings of time and `proj_l` stay fp32.

    A file without `proj_l` run as "sla" gets a zero linear branch, with a warning. Raises CheckpointError if any other
    key is missing or left over, InputError or BackendError for an attention_type that cannot be had.
    """
    path = Path(path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    with init_empty_weights():
        model = WanTransformer3DModel.from_config(config)
        set_attention_type(model, "sla", sla_topk)
    state = _read_weights(path)
    for key, parameter in model.state_dict().items():
        if "proj_l" in key and key not in state:
            if attention_type == "sla" and key.endswith("blocks.0.attn1.processor.sla.proj_l.weight"):
                warnings.warn(f"{str(path)!r} has no SLA weights: the linear branch is zero", stacklevel=2)
            state[key] = torch.zeros(parameter.shape)
    missing, unexpected = model.state_dict().keys() - state.keys(), state.keys() - model.state_dict().keys()
    if missing or unexpected:
        raise CheckpointError(
            f"the weights in {str(path)!r} do not fit its config.json: {len(missing)} keys missing "
            f"({', '.join(sorted(missing)[:3])}), {len(unexpected)} unexpected ({', '.join(sorted(unexpected)[:3])})"
        )
    for key, tensor in state.items():
        state[key] = tensor.to(torch.float32 if any(part in key for part in KEEP_FP32) else dtype)
    model.load_state_dict(state, assign=True)
    rope = model.rope
    model.rope = WanRotaryPosEmbed(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    set_attention_type(model, attention_type, sla_topk)
    return model.to(device).eval()


def load_vae(path: str | Path, *, device: str | torch.device = "cpu", dtype=torch.float32) -> AutoencoderKLWan:
    """The VAE in folder `path`."""
    return AutoencoderKLWan.from_pretrained(path, torch_dtype=dtype, local_files_only=True).to(device).eval()


def load_text_encoder(path: str | Path, *, device: str | torch.device = "cpu", dtype=torch.float32) -> UMT5EncoderModel:
    """The text encoder in folder `path`."""
    return UMT5EncoderModel.from_pretrained(path, dtype=dtype, local_files_only=True).to(device).eval()


def load_tokenizer(path: str | Path):
    """The tokenizer in folder `path`."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True)
