"""Checkpoints become diffusers and transformers modules: upstream's files and diffusers folders alike.

What a file is comes from its tensors (`weights.read`), so no flag has to be right. Loading maps the file and gives its
tensors to a model without storage: nothing is held twice.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from . import catalog
from .errors import CheckpointError, InputError, first_line
from .files.names import PROJ_L
from .files.recognise import Contents, listed, read, require
from .linear import Int8Linear, dequantize, empty_linears, held, quantize
from .sla import set_attention_type

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
KEEP_FP32 = (*WanTransformer3DModel._keep_in_fp32_modules, "proj_l")


def load_transformer(
    path: str | Path | Contents,
    *,
    attention_type: str = "sla",
    sla_topk: float = 0.1,
    quant_linear: bool | str = "auto",
    attention_backend: str | None = None,
    expected: catalog.ModelSpec | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.bfloat16,
) -> WanTransformer3DModel:
    """The transformer in a `.pth` or `.safetensors` file or a diffusers folder, in eval mode.

    Norms, the embedding of time, scales and `proj_l` stay float32, the rest goes to `dtype` (None: the file's own).
    quant_linear: "auto" as the file has it, True for 8-bit linears, False for plain ones; what has to be quantised or
    dequantised for that is said. A file without `proj_l` run as "sla" has no linear branch, one with it run as
    "original" does without, and unexpected tensors are left out, each with a warning. `expected`: the model asked for.

    Raises CheckpointError if the file is damaged, is something else, lacks a tensor or has one that doesn't fit or is
    not finite; InputError or BackendError for an attention_type that cannot be had.
    """
    if quant_linear is not True and quant_linear is not False and quant_linear != "auto":
        raise InputError(f"quant_linear is {quant_linear!r}; it is auto (as the file has it), True or False")
    contents = path if isinstance(path, Contents) else read(path)
    require(contents, "transformer", expected)
    quantized = contents.quantized if quant_linear == "auto" else quant_linear
    dtype = dtype or contents.dtype
    with init_empty_weights(include_buffers=True):
        model = WanTransformer3DModel.from_config(_config(contents))
        set_attention_type(model, "sla", sla_topk)
        empty_linears(model, contents.quantized, dtype)
        for key, tensor in contents.tensors.items():
            name, _, leaf = key.rpartition(".")
            if leaf == "scale" and tensor.ndim == 1:  # saved with scales of rows
                model.get_submodule(name).scale = held(torch.empty(tensor.shape))
        set_attention_type(model, attention_type, sla_topk, backend=attention_backend)

    tensors = _matched(_fitting_attention(contents, model, attention_type), model.state_dict(), contents)
    if quantized != contents.quantized:
        count = empty_linears(model, quantized, dtype)
        change = "quantised to int8" if quantized else f"dequantised to {dtype}"
        warnings.warn(f"{str(contents.path)!r} has other linears than asked for; {count} were {change}", stacklevel=2)
    for key in list(tensors):
        if key not in tensors:  # the scale of a weight that was dequantised
            continue
        tensor = _finite(key, tensors.pop(key).to(device), contents)
        name, _, leaf = key.rpartition(".")
        if leaf == "weight" and isinstance(module := model.get_submodule(name), Int8Linear):
            module.int8_weight, module.scale = map(held, quantize(tensor))
        elif leaf == "int8_weight" and not quantized:
            scale = _finite(f"{name}.scale", tensors.pop(f"{name}.scale").to(device), contents)
            _assign(model, f"{name}.weight", dequantize(tensor, scale).to(dtype))
        else:
            if tensor.is_floating_point():
                keep = any(part in key for part in KEEP_FP32) or leaf == "scale"
                tensor = tensor.to(torch.float32 if keep else dtype)
            _assign(model, key, tensor)
    rope = model.rope
    model.rope = WanRotaryPosEmbed(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(device)
    return model.requires_grad_(False).eval()


def _fitting_attention(contents: Contents, model: nn.Module, attention_type: str) -> dict[str, Tensor]:
    """The file's tensors less the projections that dense attention does without, or with zeros for those it lacks."""
    tensors, wanted = contents.tensors, model.state_dict()
    projections = {key for key in tensors.keys() ^ wanted.keys() if PROJ_L in key}
    if projections and attention_type == "original":
        warnings.warn(f"{str(contents.path)!r} has SLA's projections; dense attention does without them", stacklevel=3)
        return {key: tensor for key, tensor in tensors.items() if key not in projections}
    if projections and not contents.sla:
        warnings.warn(f"{str(contents.path)!r} has no SLA projections: the linear branch is zero", stacklevel=3)
        return tensors | {key: torch.zeros(wanted[key].shape) for key in projections}
    return tensors


def _folder_config(folder: Path) -> dict:
    """config.json of a folder. Raises CheckpointError if there is none, or it cannot be read."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no config.json that can be read in {str(folder)!r} ({first_line(error)}); a diffusers folder has one"
        ) from error


def _config(contents: Contents) -> dict:
    """diffusers' config of a transformer: the folder's own, else from the shapes"""
    if contents.path.is_dir():
        return _folder_config(contents.path)
    arch = contents.arch
    return {
        "attention_head_dim": contents.head_dim,
        "num_attention_heads": arch.num_heads,
        "num_layers": arch.num_layers,
        "ffn_dim": arch.ffn_dim,
        "in_channels": arch.in_channels,
        "out_channels": 16,
        "text_dim": contents.text_dim,
    }


def _matched(tensors: dict[str, Tensor], wanted: dict[str, Tensor], contents: Contents) -> dict[str, Tensor]:
    """The tensors that a module wants; unexpected ones are left out with a warning. Raises CheckpointError."""
    path, missing, unexpected = str(contents.path), wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing:
        raise CheckpointError(
            f"{path!r} looks like {contents}, but {len(missing)} of {len(wanted)} tensors are missing: "
            f"{listed(missing)}"
        )
    if unexpected:
        warnings.warn(
            f"{path!r} has {len(unexpected)} tensors that no part of the model takes; left out: {listed(unexpected)}",
            stacklevel=3,
        )
    for key, target in wanted.items():
        if tensors[key].shape != target.shape:
            raise CheckpointError(
                f"{key} in {path!r} has shape {tuple(tensors[key].shape)}; in {contents} it is {tuple(target.shape)}"
            )
    return {key: tensors[key] for key in wanted}


def _finite(key: str, tensor: Tensor, contents: Contents) -> Tensor:
    """The tensor itself. Raises CheckpointError if it holds NaN or Inf, or floats of a kind that no model has."""
    if tensor.is_floating_point() and tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{key} in {str(contents.path)!r} is {tensor.dtype}, which no released model is; take the bf16 or int8 file"
        )
    if tensor.is_floating_point() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise CheckpointError(f"{key} in {str(contents.path)!r} holds NaN or Inf; the file is damaged, fetch it again")
    return tensor


def _assign(model: nn.Module, key: str, tensor: Tensor) -> None:
    """Give a module's parameter or buffer this storage."""
    owner, _, leaf = key.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _fill(model: nn.Module, contents: Contents, device: str | torch.device, dtype: torch.dtype | None) -> None:
    """Give a model without storage the tensors of a file."""
    for key, tensor in _matched(contents.tensors, model.state_dict(), contents).items():
        _assign(model, key, _finite(key, tensor.to(device), contents).to(dtype or tensor.dtype))


def load_vae(
    path: str | Path | Contents, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
) -> AutoencoderKLWan:
    """The VAE in upstream's `Wan2.1_VAE.pth`, a file of diffusers' names or a diffusers folder; dtype None: its own.

    Raises CheckpointError as `load_transformer` does.
    """
    contents = path if isinstance(path, Contents) else read(path)
    require(contents, "vae")
    if contents.path.is_dir():
        config = _folder_config(contents.path)
    else:
        config = {
            "base_dim": contents.tensors["encoder.conv_in.weight"].shape[0],
            "z_dim": contents.tensors["decoder.conv_in.weight"].shape[1],
        }
    with init_empty_weights():
        model = AutoencoderKLWan.from_config(config)
    _fill(model, contents, device, dtype)
    return model.requires_grad_(False).eval()


def load_text_encoder(
    path: str | Path | Contents, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
) -> UMT5EncoderModel:
    """The encoder in upstream's `models_t5_umt5-xxl-enc-bf16.pth` or a transformers folder; dtype None: the file's own.

    Raises CheckpointError as `load_transformer` does.
    """
    contents = path if isinstance(path, Contents) else read(path)
    require(contents, "text encoder")
    config = UMT5Config(**_folder_config(contents.path)) if contents.path.is_dir() else _umt5_config(contents)
    with init_empty_weights():
        model = UMT5EncoderModel(config)
    tensors = contents.tensors
    embeddings = tensors.get("shared.weight", tensors.get("encoder.embed_tokens.weight"))
    tensors = tensors | {"shared.weight": embeddings, "encoder.embed_tokens.weight": embeddings}
    _fill(model, replace(contents, tensors=tensors), device, dtype)
    model.encoder.embed_tokens.weight = model.shared.weight
    return model.requires_grad_(False).eval()


def _umt5_config(contents: Contents) -> UMT5Config:
    """The configuration of a text encoder, from its shapes"""
    tensors, first = contents.tensors, "encoder.block.0.layer."
    buckets, heads = tensors[f"{first}0.SelfAttention.relative_attention_bias.weight"].shape
    vocabulary, width = tensors["shared.weight"].shape
    return UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=tensors[f"{first}0.SelfAttention.q.weight"].shape[0] // heads,
        d_ff=tensors[f"{first}1.DenseReluDense.wo.weight"].shape[1],
        num_layers=1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("encoder.block.")),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )


def load_tokenizer(path: str | Path):
    """Load the tokenizer in folder `path`, or of a Hub repository that is in the cache.

    Raises CheckpointError if the folder holds no tokenizer, or one that brings code of its own: that code never runs.
    """
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises many kinds of errors for a file that is not a tokenizer
        raise CheckpointError(
            f"no tokenizer in {str(path)!r}; give --tokenizer_path a folder with tokenizer.json or spiece.model, such "
            "as that of google/umt5-xxl"
        ) from error
