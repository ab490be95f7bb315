"""Checkpoints become diffusers and transformers modules: upstream's files and diffusers folders alike.

`recognise.read` tells from its tensors what a file is, so no option has to match the file. Loading maps the file and
gives its tensors to a model without storage, so nothing is held twice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from . import catalog
from .errors import CheckpointError, InputError, listed, warn
from .files import lora, shapes, vocabulary
from .files.names import PROJ_L
from .files.numbers import Encoded
from .files.part_config import TEXT_ENCODER, TRANSFORMER, VAE, part_config
from .files.recognise import (
    Contents,
    attention_of,
    check_dtypes,
    count_blocks,
    fitting_shapes,
    read,
    require,
    require_tensors,
)
from .layerwise import (
    EMBEDDING,
    Stored,
    StoredEmbedding,
    StoredLinear,
    encoder_tensors,
    is_finite,
    is_large,
    is_zero,
    stored_weights,
)
from .linear import Int8Linear, empty_linears, int8_dequantize, quantize, row_quantize, takes_rows
from .machine import environment
from .machine.mapped import PageReleaser
from .sla import set_attention_type
from .tiny_decoder import TinyDecoder
from .values import local

ROWS = 1024  # of a weight that are quantised at once
KEEP_FP32 = (*WanTransformer3DModel._keep_in_fp32_modules, "proj_l")


def load_transformer(
    path: str | Path | Contents,
    *,
    attention_type: str | None = None,
    sla_topk: float = 0.1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.bfloat16,
    quant_linear: bool | str = "auto",
    attention_backend: str | None = None,
    expected: catalog.ModelSpec | None = None,
    run_device: str | torch.device | None = None,
    loras: Sequence[lora.Applied] = (),
) -> WanTransformer3DModel:
    """Load the transformer in a `.pth` or `.safetensors` file or a diffusers folder, in eval mode.

    Norms, the time embedding, scales and `proj_l` stay float32. Tensors that the model does not have are left out
    with a warning. A matrix of zeros is a warning, too.

    Args:
        path: the file or folder, or what `recognise.read` returned for it.
        attention_type: "sla", "sagesla" or "original" (dense attention). None: "sla", or dense attention with a
            warning for a file without SLA projections. An explicit "sla" then runs without its linear branch.
        sla_topk: share of the key blocks, in (0, 1].
        device: where the model is loaded. Weights are quantised and dequantised there.
        dtype: of the other weights. None: the file's own.
        quant_linear: True for 8-bit linears, False for plain ones, "auto" for the file's own. Warns when it has to
            quantise or dequantise.
        attention_backend: the implementation of SageSLA, as in `sla.SageSparseLinearAttention`.
        expected: the model that the file must be; None: any.
        run_device: where the model will run, if offload moves it there later. None: `device`.
        loras: merged into the weights while they load, on `run_device`. Warns of keys that match no tensor.

    Raises:
        CheckpointError: the file is damaged or something else, or a tensor is missing, does not fit or is not finite.
            Or a LoRA does not fit.
        InputError: an argument cannot be used.
        BackendError: the attention cannot run here.
    """
    if quant_linear is not True and quant_linear is not False and quant_linear != "auto":
        raise InputError(f"quant_linear is {quant_linear!r}. Expected True, False or 'auto' (the file's own linears).")
    contents = path if isinstance(path, Contents) else read(path, "transformer")
    require(contents, "transformer", expected)
    attention_type = attention_type or attention_of(contents)
    dtype = dtype or contents.dtype or torch.bfloat16
    run_device = run_device or device
    gpu = run_device if torch.device(run_device).type == "cuda" else None
    with fitting_shapes(contents.path), init_empty_weights(include_buffers=True):
        model = WanTransformer3DModel.from_config(_transformer_config(contents))
    with init_empty_weights(include_buffers=True):
        set_attention_type(model, attention_type, sla_topk, backend=attention_backend, device=gpu)
    tensors = _matched(_fit_projections(contents, model, attention_type), model.state_dict(), contents)
    for each in loras:
        lora.fit(each.lora, {key: tensor.shape for key, tensor in tensors.items()})
    as_stored = quant_linear in ("auto", contents.quantized)
    count = empty_linears(model, lambda name: _is_int8(tensors[name]) if as_stored else quant_linear, dtype)
    if not as_stored:
        change = "quantised to int8" if quant_linear else f"dequantised to {dtype}"
        warn(f"{str(contents.path)!r} has other linears than asked for; {count} were {change}")
    pages = PageReleaser()
    for key, stored in tensors.items():
        values = _load_tensor(model, key, stored, contents, device, run_device, dtype, loras)
        for name, value in values.items():
            _assign(model, name, value)
        _release(stored, values.values(), pages)
    pages.release()
    rope = model.rope
    model.rope = WanRotaryPosEmbed(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(device)
    return _loaded(model, contents)


def _is_int8(tensor: Tensor | Encoded) -> bool:
    return isinstance(tensor, Encoded) and tensor.is_int8


def _transformer_config(contents: Contents) -> dict[str, Any]:
    """diffusers' configuration of a transformer: from the shapes, with what the folder's own adds"""
    own = _config_of(contents.arch, contents.head_dim, contents.text_dim)
    return part_config(contents.path, TRANSFORMER, own) or own


def _config_of(arch: catalog.Arch, head_dim: int, text_dim: int) -> dict[str, Any]:
    return {
        "attention_head_dim": head_dim,
        "num_attention_heads": arch.num_heads,
        "num_layers": arch.num_layers,
        "ffn_dim": arch.ffn_dim,
        "in_channels": arch.in_channels,
        "out_channels": shapes.OUT_CHANNELS,
        "text_dim": text_dim,
        "patch_size": [1, 2, 2],
        "freq_dim": shapes.TIME_DIM,
        "cross_attn_norm": True,
        "image_dim": None,
        "added_kv_proj_dim": None,
    }


def _fit_projections(contents: Contents, model: nn.Module, attention_type: str) -> dict[str, Tensor | Encoded]:
    """The file's tensors without the projections that dense attention drops, or with zeros for those that SLA lacks"""
    tensors, wanted = contents.tensors, model.state_dict()
    projections = {key for key in tensors.keys() ^ wanted.keys() if PROJ_L in key}
    if projections and attention_type == "original":
        warn(f"{str(contents.path)!r} has SLA projections; dense attention does not use them", stacklevel=2)
        return {key: tensor for key, tensor in tensors.items() if key not in projections}
    if projections and not contents.sla:
        warn(f"{str(contents.path)!r} has no SLA projections: the linear branch is zero", stacklevel=2)
        return tensors | {key: torch.zeros(wanted[key].shape) for key in projections}
    return tensors


def _load_tensor(
    model: WanTransformer3DModel,
    key: str,
    stored: Tensor | Encoded,
    contents: Contents,
    device: str | torch.device,
    run_device: str | torch.device,
    dtype: torch.dtype,
    loras: Sequence[lora.Applied] = (),
) -> dict[str, Tensor]:
    """One tensor on the device, in the number format of the model's linear, by the names of the model's parameters"""
    name, _, leaf = key.rpartition(".")
    in_8_bits = leaf == "weight" and isinstance(model.get_submodule(name), Int8Linear)
    touched = bool(lora.touching(key, loras))
    if in_8_bits and _is_int8(stored) and not touched:
        q, scale = (part.to(device) for part in stored.int8())
        return {f"{name}.int8_weight": q, f"{name}.scale": _finite(key, scale, contents)}
    weight = _finite(key, _decoded(stored, run_device if touched else device), contents)
    if touched:
        weight = lora.apply(key, weight.float(), loras)
    if not in_8_bits:
        return {key: weight.to(torch.float32 if any(part in key for part in KEEP_FP32) else dtype).to(device)}
    # rows are more exact; plain weights get upstream's tiles where upstream's own linears run
    q, scale = _quantized_rows(weight) if isinstance(stored, Encoded) else quantize(weight, run_device)
    return {f"{name}.int8_weight": q.to(device), f"{name}.scale": _finite(key, scale.to(device), contents)}


@torch.inference_mode(False)  # because parameters of inference mode have no version, which caches ask for
@torch.no_grad()
def reload_tensors(
    model: WanTransformer3DModel,
    contents: Contents,
    names: Iterable[str],
    loras: Sequence[lora.Applied],
    *,
    device: str | torch.device,
    run_device: str | torch.device,
) -> None:
    """Read some tensors of a loaded transformer again, with other LoRAs. Those without a LoRA get the file's bits.

    Values are written into the parameters that exist, because offload and fused modules hold on to them.

    Args:
        model: changed in place. It may be fused; its weights are where they are now.
        contents: what it was loaded from.
        names: of the tensors, as in `contents`. Others than the model's are left out.
        loras: merged into these tensors.
        device, run_device: as for `load_transformer`, so that the numbers are rounded in the same way.

    Raises:
        CheckpointError: a tensor is not finite.
    """
    parameters = dict(model.named_parameters())
    for key in names:
        in_8_bits = key.removesuffix("weight") + "int8_weight"
        existing = parameters.get(key, parameters.get(in_8_bits))
        if existing is None:  # a projection that dense attention does not use
            continue
        stored = contents.tensors.get(key)
        if stored is None:  # a projection that the file does not have
            stored = torch.zeros(existing.shape)
        values = _load_tensor(model, key, stored, contents, device, run_device, existing.dtype, loras)
        scale = values.get(key.removesuffix("weight") + "scale")
        if in_8_bits in values and scale.ndim == 2 and takes_rows(run_device):  # as `fuse` has done
            q, scale, _ = row_quantize(int8_dequantize(*(part.to(run_device) for part in (values[in_8_bits], scale))))
            values = dict(zip(values, (q, scale), strict=True))
        for name, value in values.items():
            _overwrite(model, name, parameters[name], value, stored)


def _overwrite(model: nn.Module, key: str, existing: nn.Parameter, value: Tensor, stored: Tensor | Encoded) -> None:
    """Write a value into a parameter, but not into the file's memory, which the parameter may still be"""
    if existing.shape != value.shape:  # the scales of rows in place of those of tiles, or the other way around
        _assign(model, key, value.to(existing.device))
        return
    of_file = (stored.data, stored.scale) if isinstance(stored, Encoded) else (stored,)
    memory = existing.untyped_storage().data_ptr()
    if any(part is not None and part.untyped_storage().data_ptr() == memory for part in of_file):
        existing.data = torch.empty_like(existing)
    existing.copy_(value)  # which tells `TensorCache` that the weights have changed


def _decoded(stored: Tensor | Encoded, device: str | torch.device) -> Tensor:
    return stored.decode(device) if isinstance(stored, Encoded) else stored.to(device)


def _quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight (N, K) with one scale per row, some rows at a time, because there are several temporaries"""
    parts = [row_quantize(rows)[:2] for rows in weight.split(ROWS)]
    q, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return q, scale


def _release(stored: Tensor | Encoded, taken: Iterable[Tensor], pages: PageReleaser) -> None:
    """Release the pages of a tensor in its file, unless the model took these bytes themselves."""
    data = stored.data if isinstance(stored, Encoded) else stored
    memory = data.untyped_storage().data_ptr()
    if data.device.type == "cpu" and all(one.untyped_storage().data_ptr() != memory for one in taken):
        pages.done(data.data_ptr(), data.nbytes)


def load_vae(
    path: str | Path | Contents, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
) -> AutoencoderKLWan:
    """Load the VAE in upstream's `Wan2.1_VAE.pth`, a file with diffusers' names or a diffusers folder.

    Args:
        path: the file or folder, or what `recognise.read` returned for it.
        device: of the weights.
        dtype: of the weights. None: the file's own.

    Raises:
        CheckpointError: as `load_transformer`.
    """
    contents = path if isinstance(path, Contents) else read(path, "vae")
    require(contents, "vae")
    model = _empty_vae(contents)
    _fill(model, contents, device, dtype)
    return _loaded(model, contents)


def require_vae(contents: Contents) -> None:
    """Raise CheckpointError where `load_vae` would, because a tensor is missing or does not fit. Reads no weights."""
    wanted = {key: target.shape for key, target in _empty_vae(contents).state_dict().items()}
    require_tensors(contents, contents.tensors, wanted)


def _empty_vae(contents: Contents) -> AutoencoderKLWan:
    with fitting_shapes(contents.path), init_empty_weights():
        config = part_config(contents.path, VAE, {}) or _vae_config(contents.tensors)
        return AutoencoderKLWan.from_config(config)


def _vae_config(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "base_dim": tensors["encoder.conv_in.weight"].shape[0],
        "z_dim": tensors["decoder.conv_in.weight"].shape[1],
    }


def load_tiny_decoder(
    path: str | Path | Contents, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
) -> TinyDecoder:
    """Load TAEHV's decoder for Wan2.1: `taew2_1.safetensors` or `taew2_1.pth`.

    Args:
        path: the file, or what `recognise.read` returned for it.
        device: of the weights.
        dtype: of the weights. None: the file's own.

    Raises:
        CheckpointError: as `load_transformer`. The tiny decoders of other models mostly have other shapes.
    """
    contents = path if isinstance(path, Contents) else read(path)
    require(contents, "tiny decoder")
    with init_empty_weights():
        model = TinyDecoder()
    _fill(model, contents, device, dtype)
    return model.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def load_text_encoder(
    path: str | Path | Contents,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    layerwise: bool = True,
    in_16_bits: bool = False,
) -> UMT5EncoderModel:
    """Load umT5's encoder: upstream's `models_t5_umt5-xxl-enc-bf16.pth`, ComfyUI's files, GGUF, a transformers folder.

    Args:
        path: the file or folder, or what `recognise.read` returned for it.
        device: of the weights.
        dtype: of the weights. None: the file's own, and bfloat16 for weights in 8 bits or less.
        layerwise: keep linears in fp8 and in int8 with per-row scales as the file stores them (`layerwise`). Not with
            dtype float16 or None.
        in_16_bits: keep the other linears and the embedding in bfloat16, whatever dtype is. Each casts its own weight
            while it works, so a float32 encoder takes no more memory than the file.

    Raises:
        CheckpointError: as `load_transformer`.
    """
    contents = path if isinstance(path, Contents) else read(path, "text encoder")
    require(contents, "text encoder")
    with fitting_shapes(contents.path), init_empty_weights():
        model = UMT5EncoderModel(_umt5_config(contents))
    tensors, wanted = encoder_tensors(contents.tensors), encoder_tensors(model.state_dict())
    tensors = _matched(tensors, wanted, contents)
    stored = stored_weights(tensors, dtype if layerwise else None)
    pages = PageReleaser()
    for key, tensor in tensors.items():
        if key in stored:
            _store(model, key, stored.pop(key), contents, device, dtype)
        else:
            whole = _finite(key, _decoded(tensor, device), contents)
            if in_16_bits and is_large(key):
                whole = whole.to(torch.bfloat16)
                _put(model, key, whole, None, dtype)
            else:
                whole = whole.to(dtype or (torch.bfloat16 if isinstance(tensor, Encoded) else whole.dtype))
                _assign(model, key, whole)
            _release(tensor, [whole], pages)
    pages.release()
    model.encoder.embed_tokens = model.shared
    return _loaded(model, contents)


def _store(
    model: UMT5EncoderModel, key: str, stored: Stored, contents: Contents, device: str | torch.device,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Put a layer that keeps its weight as the file stores it in the place of a model's linear or embedding."""
    data, scale = (None if part is None else _finite(key, part.to(device), contents) for part in stored)
    _put(model, key, data, scale, dtype)


def _put(model: UMT5EncoderModel, key: str, data: Tensor, scale: Tensor | None, dtype: torch.dtype) -> None:
    module = StoredEmbedding(data, scale, dtype) if key == EMBEDDING else StoredLinear(data, scale)
    model.set_submodule(key.removesuffix(".weight"), module)


def _umt5_config(contents: Contents) -> UMT5Config:
    """The configuration of a text encoder: from the shapes, with what the folder's own adds"""
    tensors, path, first = encoder_tensors(contents.tensors), contents.path, "encoder.block.0.layer."
    buckets, heads = tensors[f"{first}0.SelfAttention.relative_attention_bias.weight"].shape
    words, width = tensors[EMBEDDING].shape
    own = {
        "vocab_size": words,
        "d_model": width,
        "d_kv": tensors[f"{first}0.SelfAttention.q.weight"].shape[0] // heads,
        "d_ff": tensors[f"{first}1.DenseReluDense.wo.weight"].shape[1],
        "num_layers": count_blocks(tensors, "encoder.block", path),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
    return UMT5Config(**{"feed_forward_proj": "gated-gelu"} | (part_config(path, TEXT_ENCODER, own) or own))


def load_tokenizer(path: str | Path | Contents):
    """Load a tokenizer.

    Args:
        path: a folder, a Hub repository that is in the cache, a file `spiece.model`, or a text encoder that has its
            tokenizer in its file.

    Raises:
        CheckpointError: the tokenizer is missing or damaged, or brings code of its own. That code never runs.
    """
    path = path if isinstance(path, Contents) else Path(local(path))
    if not isinstance(path, Contents) and environment.is_file(path) and path.suffix != ".model":
        path = read(path, "text encoder")
    if isinstance(path, Contents):
        return vocabulary.from_text_encoder(path)
    if spiece := vocabulary.spiece_file(path):
        return vocabulary.from_spiece(spiece)
    try:
        if made_of := vocabulary.composite(path):
            raise ValueError(f"{made_of} loads other tokenizers")
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # because tokenizers raises many kinds of errors for a file that is not a tokenizer
        raise CheckpointError(
            f"no tokenizer in {str(path)!r}. Expected a folder with tokenizer.json or spiece.model. "
            "Give --tokenizer_path such a folder, for example that of google/umt5-xxl."
        ) from error


def _matched(
    tensors: dict[str, Tensor | Encoded], wanted: dict[str, Tensor], contents: Contents
) -> dict[str, Tensor | Encoded]:
    """The tensors that a module has. Warns of others. Raises CheckpointError where one is missing or does not fit."""
    require_tensors(contents, tensors, {key: target.shape for key, target in wanted.items()})
    if unexpected := tensors.keys() - wanted.keys():
        warn(
            f"{str(contents.path)!r} has {len(unexpected)} tensors that no part of the model takes; left out: "
            f"{listed(unexpected)}",
            stacklevel=2,
        )
    tensors = {key: tensors[key] for key in wanted}
    check_dtypes(replace(contents, tensors=tensors), tensors)
    return tensors


def _finite(key: str, tensor: Tensor, contents: Contents) -> Tensor:
    """The tensor itself. Raises CheckpointError if it holds NaN or Inf."""
    if not is_finite(tensor):
        raise CheckpointError(
            f"{key} in {str(contents.path)!r} holds NaN or Inf. Expected finite numbers. Download the file again."
        )
    return tensor


def _loaded(model: nn.Module, contents: Contents) -> nn.Module:
    """The model in eval mode. Warns of matrices of zeros, which a broken download leaves in a file of full size."""
    found = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.ndim > 1 and name.endswith("weight") and PROJ_L not in name and is_zero(tensor)
    ]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        warn(
            f"all numbers of {found[0]}{more} in {str(contents.path)!r} are zero, as a download that broke off can "
            "leave them; if the clips are noise, download the file again"
        )
    return model.requires_grad_(False).eval()


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
    pages = PageReleaser()
    for key, tensor in _matched(contents.tensors, model.state_dict(), contents).items():
        whole = _finite(key, _decoded(tensor, device), contents)
        whole = whole.to(dtype or whole.dtype)
        _assign(model, key, whole)
        _release(tensor, [whole], pages)
    pages.release()
