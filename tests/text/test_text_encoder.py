"""umT5 in every number format computes what the dequantised weights compute, and 8-bit weights stay in 8 bits."""

import json

import pytest
import torch
from helpers import assert_close
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from turbo_nb import layerwise
from turbo_nb.checkpoint import load_text_encoder
from turbo_nb.errors import CheckpointError
from turbo_nb.files.recognise import read

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CONFIG = {"vocab_size": 200, "d_model": 96, "d_kv": 16, "d_ff": 160, "num_layers": 2, "num_heads": 6}
IDS = torch.tensor([[5, 199, 17, 3, 1, 0, 0]])
TABLE = "shared.weight"
TO_UPSTREAM = {
    "shared.": "token_embedding.", "encoder.final_layer_norm.": "norm.", "encoder.block.": "blocks.",
    ".layer.0.layer_norm.": ".norm1.", ".layer.0.SelfAttention.relative_attention_bias.": ".pos_embedding.embedding.",
    ".layer.0.SelfAttention.": ".attn.", ".layer.1.layer_norm.": ".norm2.",
    ".layer.1.DenseReluDense.wi_0.": ".ffn.gate.0.", ".layer.1.DenseReluDense.wi_1.": ".ffn.fc1.",
    ".layer.1.DenseReluDense.wo.": ".ffn.fc2.",
}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    """A random encoder by transformers' names, float32"""
    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **CONFIG))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    return {name: torch.randn_like(tensor) * 0.3 if "bias" in name else tensor for name, tensor in state.items()}


def linears(state):
    return [name for name in state if layerwise.LINEAR.search(name)]


def fp8(state, *, dtype=E4M3, rows=False, end=None, plain=torch.float16, names=None):
    """A file with fp8 linears, and its dequantised weights. end: of the scale's name; None: no scale."""
    file, whole = {}, {}
    for name, tensor in state.items():
        if name not in (linears(state) if names is None else names):
            file[name] = tensor.to(plain)
            whole[name] = file[name].float()
            continue
        most = tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().amax()
        scale = most / torch.finfo(dtype).max if end else torch.ones(())
        file[name] = (tensor / scale).to(dtype)
        whole[name] = file[name].float() * scale
        if end:
            file[name.removesuffix("weight") + end] = scale
    return file, whole


def int8_rows(state):
    file, whole = dict(state), dict(state)
    for name in linears(state):
        scale = state[name].abs().amax(1, keepdim=True) / 127
        file[name], file[f"{name}_scale"] = (state[name] / scale).round().to(torch.int8), scale
        whole[name] = file[name] * scale
    return file, whole


def scaled(state):
    """As older ComfyUI writes it"""
    file, whole = fp8(state, end="scale_weight")
    inputs = {f"{name.removesuffix('weight')}scale_input": torch.ones(()) for name in linears(state)[::3]}
    return file | inputs | {"scaled_fp8": torch.zeros(2, dtype=E4M3)}, whole


def comfy(state, **options):
    """As ComfyUI writes it from 0.23 on"""
    file, whole = fp8(state, end="weight_scale", **options)
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    return file | {f"{name.removesuffix('weight')}comfy_quant": note.clone() for name in linears(state)}, whole


FORMS = {
    "e4m3": fp8,
    "e5m2": lambda state: fp8(state, dtype=E5M2),
    "e4m3, one scale": scaled,
    "e5m2, one scale": lambda state: fp8(state, dtype=E5M2, end="scale_weight"),
    "e4m3, a scale a row": lambda state: fp8(state, rows=True, end="weight_scale"),
    "ComfyUI": comfy,
    "int8 rows": int8_rows,
    "e4m3, bf16 embedding": lambda state: fp8(state, plain=torch.bfloat16),
    "e4m3 in every tensor": lambda state: fp8(state, names=list(state)),
    "e4m3 embedding with one scale": lambda state: fp8(
        state, end="scale_weight", names=[*linears(state), TABLE]
    ),
    "e4m3 embedding with a scale a row": lambda state: fp8(
        state, rows=True, end="weight_scale", names=[*linears(state), TABLE]
    ),
    "some linears in e4m3": lambda state: fp8(state, names=linears(state)[::2]),
}  # fmt: skip


def upstream(file):
    renamed = {}
    for name, tensor in file.items():
        for ours, theirs in TO_UPSTREAM.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def write(file, path):
    save_file({name: tensor.contiguous() for name, tensor in file.items()}, path)
    return path


def reference(whole, dtype=torch.float32):
    model = UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **CONFIG)).eval()
    model.load_state_dict(whole | {"encoder.embed_tokens.weight": whole[TABLE]})
    return encode(model.to(dtype))


def encode(model):
    with torch.no_grad():
        return model(IDS, (IDS > 0).long()).last_hidden_state


def weight_bytes(model):
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("names", ["transformers", "upstream"])
@pytest.mark.parametrize("form", FORMS)
def test_output_is_that_of_the_dequantised_weights(state, tmp_path, form, names, recwarn):
    file, whole = FORMS[form](state)
    path = write(upstream(file) if names == "upstream" else file, tmp_path / "umt5.safetensors")
    model = load_text_encoder(path)
    assert_close(form, reference(whole), encode(model), 1e-5)
    assert torch.equal(encode(model), encode(model)) and model.dtype is torch.float32
    assert_close(form, reference(whole), encode(load_text_encoder(path, layerwise=False)), 1e-5)
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_8_bit_weights_stay_as_they_are(state, tmp_path, form, dtype):
    contents = read(write(FORMS[form](state)[0], tmp_path / "umt5.safetensors"))
    model = load_text_encoder(contents, dtype=dtype)
    kept = [module for module in model.modules() if isinstance(module, layerwise.StoredLinear)]
    assert len(kept) == (7 if form.startswith("some") else 14)
    assert all(module.stored_dtype.itemsize == 1 for module in kept)
    assert weight_bytes(model) == layerwise.size(contents.tensors, dtype)
    if not form.startswith(("some", "int8")):
        assert weight_bytes(model) < 1.05 * contents.path.stat().st_size


@pytest.mark.parametrize("form", ["e4m3, one scale", "e4m3, a scale a row", "int8 rows"])
def test_bf16_is_as_exact_as_with_dequantised_weights(state, tmp_path, form):
    file, whole = FORMS[form](state)
    model = load_text_encoder(write(file, tmp_path / "umt5.safetensors"), dtype=torch.bfloat16)
    out, exact = encode(model), reference(whole)
    assert out.dtype is model.dtype is torch.bfloat16
    error, plain = ((one.float() - exact).norm() / exact.norm() for one in (out, reference(whole, torch.bfloat16)))
    assert error < 1.2 * plain


@pytest.mark.parametrize("form", ["e4m3, one scale", "e4m3 embedding with a scale a row", "int8 rows"])
def test_another_dtype_or_device_rounds_no_weight(state, tmp_path, form):
    file, whole = FORMS[form](state)
    contents = read(write(file, tmp_path / "umt5.safetensors"))
    model, before = load_text_encoder(contents, dtype=torch.bfloat16), layerwise.size(contents.tensors, torch.bfloat16)
    model.to(torch.float64)
    assert encode(model).dtype is torch.float64
    kept = sum(module.stored.nbytes for module in model.modules() if isinstance(module, layerwise.StoredWeight))
    assert weight_bytes(model) < before + 3 * (before - kept) + 1
    stored = layerwise.stored_weights(contents.tensors, torch.bfloat16)
    exact = {name: one if name in stored else one.bfloat16().double() for name, one in whole.items()}
    assert_close(form, reference(exact, torch.float64), encode(model), 1e-6)
    if torch.cuda.is_available():
        assert_close(form, encode(model), model.cuda()(IDS.cuda(), (IDS > 0).long().cuda())[0].cpu(), 1e-6)


def test_float16_decodes_because_products_without_a_scale_overflow(state, tmp_path):
    file, whole = fp8({name: 1e-3 * t if "Self" in name else t for name, t in state.items()}, end="scale_weight")
    model = load_text_encoder(write(file, tmp_path / "umt5.safetensors"), dtype=torch.float16)
    assert not any(isinstance(module, layerwise.StoredWeight) for module in model.modules())
    assert_close("float16", reference(whole), encode(model).float(), 1e-2)


def test_the_files_own_dtype_is_bf16_for_8_bits(state, tmp_path):
    model = load_text_encoder(write(scaled(state)[0], tmp_path / "umt5.safetensors"), dtype=None)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes[TABLE] is torch.float16 and dtypes[linears(state)[0]] is torch.bfloat16


@pytest.mark.parametrize("number", [0x7F, 0xFF])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("where", ["data", "scale"])
def test_numbers_that_are_not_finite_are_an_error(state, tmp_path, dtype, number, where):
    file, _ = fp8(state, dtype=dtype, end="scale_weight")
    name = linears(state)[3]
    if where == "data":
        file[name].view(torch.uint8)[2, 3] = number
    else:
        file[f"{name.removesuffix('weight')}scale_weight"].fill_(float("nan"))
    with pytest.raises(CheckpointError, match="holds NaN or Inf"):
        load_text_encoder(write(file, tmp_path / "umt5.safetensors"))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_fp8_number_is_judged_as_torch_judges_it(dtype):
    for byte in range(256):
        data = torch.tensor([[byte, 0]], dtype=torch.uint8).view(dtype)
        assert layerwise.is_finite(data) == bool(data.float().isfinite().all()), byte


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [E4M3, E5M2, torch.int8])
def test_a_cast_is_exact(stored, dtype):
    data = torch.arange(256).byte().view(stored)
    data = data[data.float().isfinite()]
    assert torch.equal(layerwise.cast(data, dtype), data.to(dtype))


def test_gguf(state, tmp_path):
    gguf = pytest.importorskip("gguf")
    names = {
        "shared.": "token_embd.", "encoder.final_layer_norm.": "enc.output_norm.", "encoder.block.": "enc.blk.",
        ".layer.0.layer_norm.": ".attn_norm.", ".layer.0.SelfAttention.relative_attention_bias.": ".attn_rel_b.",
        ".layer.0.SelfAttention.": ".attn_", ".layer.1.layer_norm.": ".ffn_norm.",
        ".layer.1.DenseReluDense.wi_0.": ".ffn_gate.", ".layer.1.DenseReluDense.wi_1.": ".ffn_up.",
        ".layer.1.DenseReluDense.wo.": ".ffn_down.",
    }  # fmt: skip
    writer, whole = gguf.GGUFWriter(tmp_path / "umt5.gguf", "t5encoder"), {}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in state.items():
        renamed, data = name, tensor.numpy()
        for ours, theirs in names.items():
            renamed = renamed.replace(ours, theirs)
        if tensor.ndim == 2 and "bias" not in name:
            data = gguf.quants.quantize(data, kind)
            writer.add_tensor(renamed, data, raw_dtype=kind)
            data = gguf.quants.dequantize(data, kind)
        else:
            writer.add_tensor(renamed, data)
        whole[name] = torch.from_numpy(data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_close("GGUF", reference(whole), encode(load_text_encoder(tmp_path / "umt5.gguf")), 1e-5)
