"""Every naming convention with every number format: what loads, what it computes, and what is refused."""

import warnings
from pathlib import Path

import pytest
import torch
from helpers import tiny_transformer
from safetensors.torch import load_file, save_file
from weight_files import (
    ARCH,
    CONVENTIONS,
    FORMATS,
    TEXT_DIM,
    gguf_file,
    linears,
    named,
    note,
    plain_fp8,
    row_int8,
    scaled_fp8,
)

from turbo_nb.checkpoint import load_transformer
from turbo_nb.errors import CheckpointError
from turbo_nb.files import numbers
from turbo_nb.files.gguf_file import GGUFTensor
from turbo_nb.files.recognise import read, recognise
from turbo_nb.linear import Int8Linear, is_quantized
from turbo_nb.ops.compare import relative_error


@pytest.fixture(scope="module")
def state():
    """A random model by diffusers' names, whose weights are exact in bf16"""
    torch.manual_seed(0)
    model = tiny_transformer(ARCH, text_dim=TEXT_DIM)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return {name: tensor.bfloat16().float().contiguous() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    return torch.randn(1, 16, 3, 16, 16), torch.tensor([700.0]), torch.randn(1, 20, TEXT_DIM)


def write(path, state):
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)
    return path


def load(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_transformer(path, sla_topk=0.5, **{"dtype": torch.float32} | options)


def run(model, inputs):
    with torch.no_grad():
        return model(*inputs, return_dict=False)[0]


def in_convention(state, convention):
    return {named(name, convention): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("number_format", FORMATS)
def test_any_names_with_any_numbers_give_the_decoded_weights(tmp_path, state, convention, number_format):
    contents = read(write(tmp_path / "model.safetensors", FORMATS[number_format](in_convention(state, convention))))
    assert contents.names == convention and contents.sla and contents.arch == ARCH
    weights = load(contents, quant_linear=False).state_dict()
    steps = {"bf16": 1e-6, "fp16": 1e-3, "fp32": 0}.get(number_format, 0.07)  # e5m2 has two bits after the point
    for name, wanted in state.items():
        assert relative_error(weights[name], wanted) <= steps, name


@pytest.mark.parametrize("number_format", FORMATS)
def test_forward_equals_the_one_of_the_decoded_weights(tmp_path, state, inputs, number_format):
    path = write(tmp_path / "model.safetensors", FORMATS[number_format](state))
    decoded = {name: one.decode() if isinstance(one, numbers.Encoded) else one.float()
               for name, one in read(path).tensors.items()}  # fmt: skip
    plain = load(write(tmp_path / "decoded.safetensors", decoded))
    assert relative_error(run(load(path, quant_linear=False), inputs), run(plain, inputs)) <= 1e-6


@pytest.mark.parametrize("number_format", [name for name in FORMATS if "int8" in name])
def test_int8_numbers_keep_their_bytes(tmp_path, state, number_format):
    stored = FORMATS[number_format](state)
    model = load(write(tmp_path / "model.safetensors", stored))
    for name in linears(state):
        linear = model.get_submodule(name[:-1])
        data = next(t for end in ("int8_weight", "weight._data", "weight") if (t := stored.get(name + end)) is not None)
        assert isinstance(linear, Int8Linear) and torch.equal(linear.int8_weight, data)


def test_the_same_numbers_in_other_names_give_the_same_bits(tmp_path, state, inputs):
    outputs = [
        run(
            load(write(tmp_path / "model.safetensors", FORMATS[number_format](in_convention(state, convention)))),
            inputs,
        )
        for convention in CONVENTIONS
        for number_format in ("TurboDiffusion int8", "SGLang int8")
    ]
    assert all(torch.equal(outputs[0], other) for other in outputs)


@pytest.mark.parametrize("number_format", ["fp8 e4m3", "ComfyUI fp8, scale_weight", "LightX2V fp8"])
def test_fp8_is_quantised_to_rows_on_request(tmp_path, state, inputs, number_format):
    path = write(tmp_path / "model.safetensors", FORMATS[number_format](state))
    model = load(path, quant_linear=True)
    assert is_quantized(model) and model.blocks[0].ffn.net[2].scale.shape == (256,)
    assert relative_error(run(model, inputs), run(load(path), inputs)) < 0.02


def test_numbers_and_names_are_reported(tmp_path, state):
    stored = FORMATS["SGLang int8"](in_convention(state, "SGLang"))
    words = str(read(write(tmp_path / "model.safetensors", stored)))
    assert "SLA, int8 linears" in words and "SGLang names, int8 tiles" in words


def test_int8_outside_the_blocks_is_decoded(tmp_path, state, inputs):
    name = "condition_embedder.text_embedder.linear_1"
    q = (state[f"{name}.weight"] / 0.002).round().clamp(-127, 127).to(torch.int8)
    model = load(
        write(tmp_path / "a.safetensors", state | {f"{name}.weight": q, f"{name}.weight_scale": torch.tensor(0.002)})
    )
    assert torch.equal(model.get_submodule(name).weight, q * 0.002) and not is_quantized(model)


@pytest.mark.parametrize(
    "number_format", ["TurboDiffusion int8", "LightX2V int8", "ComfyUI fp8, scale_weight", "fp8 e4m3"]
)
def test_patch_embedding_of_upstreams_shape_may_be_in_8_bits(tmp_path, state, number_format):
    name = "patch_embedding.weight"
    matrix = state[name].flatten(1)
    as_linear = FORMATS[number_format]({f"blocks.0.{name}": matrix})  # because only linears of blocks are quantised
    stored = {key.removeprefix("blocks.0."): tensor for key, tensor in as_linear.items()}
    stored |= {key: tensor for key, tensor in state.items() if key != name}
    contents = read(write(tmp_path / "model.safetensors", stored))
    assert relative_error(load(contents).patch_embedding.weight, state[name]) < 0.04
    on_no_device = {key: tensor.to("meta") for key, tensor in stored.items()}
    assert recognise(on_no_device, tmp_path).arch == contents.arch


def test_plain_linears_of_a_quantised_file_stay_plain(tmp_path, state):
    kept = "blocks.1.attn2.to_k.weight"
    stored = {name: one for name, one in row_int8(state).items() if not name.startswith("blocks.1.attn2.to_k.weight")}
    model = load(write(tmp_path / "model.safetensors", stored | {kept: state[kept]}))
    assert torch.equal(model.blocks[1].attn2.to_k.weight, state[kept]) and is_quantized(model)


# --- GGUF ---

GGUF_TYPES = ["F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K", "IQ4_NL"]


@pytest.mark.parametrize("type_name", GGUF_TYPES)
def test_gguf_gives_the_decoded_weights(tmp_path, state, inputs, type_name):
    gguf = pytest.importorskip("gguf")
    path, upstream = tmp_path / "model.gguf", in_convention(state, "upstream")
    quantised = gguf_file(path, upstream, type_name)
    contents = read(path)
    plain = {name: torch.from_numpy(array) for name, array in quantised.items()}
    decoded = load(write(tmp_path / "decoded.safetensors", upstream | plain))
    assert contents.names == "upstream" and type_name in (contents.numbers if "Q" in type_name else type_name)
    assert relative_error(run(load(contents), inputs), run(decoded, inputs)) <= 1e-6
    assert gguf.GGMLQuantizationType[type_name]


def test_gguf_is_quantised_to_rows_on_request(tmp_path, state, inputs):
    gguf_file(tmp_path / "model.gguf", in_convention(state, "upstream"), "Q8_0")
    model = load(tmp_path / "model.gguf", quant_linear=True)
    assert is_quantized(model) and model.blocks[0].ffn.net[2].scale.ndim == 1
    assert relative_error(run(model, inputs), run(load(tmp_path / "model.gguf"), inputs)) < 0.02


@pytest.mark.parametrize("type_name", ["Q8_1", "Q8_K"])
def test_a_gguf_format_without_a_decoder_is_named_when_the_file_is_read(tmp_path, type_name):
    gguf = pytest.importorskip("gguf")
    block, width = gguf.GGML_QUANT_SIZES[kind := gguf.GGMLQuantizationType[type_name]]
    one = GGUFTensor(data=torch.zeros(width, dtype=torch.uint8), quant_type=kind, type_name=type_name, shape=(1, block))
    with pytest.raises(CheckpointError, match=rf"blocks\.0\.ffn\.0\.weight in 'x\.gguf' has the .* GGUF {type_name}"):
        numbers.encode({"blocks.0.ffn.0.weight": one}, "x.gguf")


# --- Refused ---


def nvfp4(state):
    parts = {
        "weight": torch.zeros(320, 128, dtype=torch.uint8),
        "weight_scale": torch.ones(320, 16).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.ones(()),
        "comfy_quant": note({"format": "nvfp4"}),
    }
    return one_linear(state, **parts)


def one_linear(state, **parts):
    name = "blocks.0.ffn.net.0.proj"
    rest = {key: tensor for key, tensor in state.items() if key != f"{name}.weight"}
    return rest | {f"{name}.{end.replace('__', '._')}": tensor for end, tensor in parts.items()}


E4M3 = torch.ones(320, 256).to(torch.float8_e4m3fn)
INT8 = torch.ones(320, 256, dtype=torch.int8)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"weight": E4M3, "weight_scale": torch.ones(320, 8, dtype=torch.uint8)}, "MXFP8"),
        ({"weight": E4M3, "weight_scale": torch.ones(320, 8)}, "MXFP8 .*of 32"),
        ({"weight": E4M3, "weight_scale": torch.ones(()), "comfy_quant": note({"format": "mxfp8"})}, "MXFP8"),
        ({"weight": INT8, "weight_scale": torch.ones(()),
          "comfy_quant": note({"format": "int8_tensorwise", "convrot": True})}, "rotated"),
        ({"weight": INT8, "weight_scale": torch.ones(()), "comfy_quant": note({"format": "svdq"})}, "'svdq'"),
        ({"weight": INT8, "weight_scale": torch.ones(()), "comfy_quant": note({"format": ["svdq"]})}, r"\['svdq'\]"),
        ({"weight": INT8, "weight_scale": torch.ones(()), "comfy_quant": torch.ones(9, dtype=torch.uint8)}, "JSON"),
        ({"weight": torch.zeros(40960, 1, dtype=torch.uint8), "weight.absmax": torch.ones(9)}, "bitsandbytes"),
        ({"weight": torch.zeros(320, 128, dtype=torch.uint8)}, "uint8"),
        ({"weight": INT8.to(torch.int32), "weight_scale": torch.ones(())}, "int32"),
        ({"weight": INT8}, "int8 without a scale"),
        ({"weight__data": torch.zeros(320, 128, dtype=torch.uint8), "weight__scale": torch.ones(320, 1),
          "weight__shift": torch.ones(320, 1)}, "quanto's 4-bit"),
        ({"weight": E4M3, "weight_scale": torch.ones(7)}, r"shape \(7,\).*Expected \(\), \(320,\), \(320, 1\)"),
        ({"weight": INT8, "weight_scale_inv": torch.ones(3, 3)}, r"shape \(3, 3\)"),
    ],
)  # fmt: skip
def test_a_format_that_cannot_be_loaded_is_named_when_the_file_is_read(tmp_path, state, parts, words):
    with pytest.raises(CheckpointError, match=f"(?s)blocks.0.ffn.net.0.proj.*{words}"):
        read(write(tmp_path / "model.safetensors", one_linear(state, **parts)))


def test_nvfp4_error_names_alternatives(tmp_path, state):
    with pytest.raises(CheckpointError, match=r"NVFP4.*Take the model's bf16, fp8 or int8 file"):
        read(write(tmp_path / "model.safetensors", nvfp4(state)))


def test_header_metadata_that_names_a_format_is_read(tmp_path, state):
    layers = '{"format_version": "1.0", "layers": {"blocks.0.ffn.0": {"format": "mxfp8"}}}'
    save_file(plain_fp8(state), tmp_path / "model.safetensors", {"_quantization_metadata": layers})
    with pytest.raises(CheckpointError, match="MXFP8"):
        read(tmp_path / "model.safetensors")
    save_file(plain_fp8(state), tmp_path / "model.safetensors", {"_quantization_metadata": "[" * 9})
    with pytest.raises(CheckpointError, match="Expected JSON"):
        read(tmp_path / "model.safetensors")


def test_a_missing_scale_is_an_error_and_not_a_scale_of_one(tmp_path, state):
    stored = {name: one for name, one in scaled_fp8(state).items() if name != "blocks.1.attn1.to_v.scale_weight"}
    with pytest.raises(CheckpointError, match=r"blocks.1.attn1.to_v.weight .*without a scale"):
        read(write(tmp_path / "model.safetensors", stored))


@pytest.mark.parametrize("number_format", ["LightX2V int8", "ComfyUI fp8, scale_weight", "SGLang int8"])
def test_a_scale_that_is_not_finite_is_an_error(tmp_path, state, number_format):
    stored = FORMATS[number_format](state)
    name = next(
        name for name in stored if "scale" in name.rpartition(".")[2] and "table" not in name and stored[name].numel()
    )
    stored[name] = stored[name] * float("nan")
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        load(write(tmp_path / "model.safetensors", stored))


def test_saved_int8_model_is_read_again(tmp_path, state, inputs):
    model = load(write(tmp_path / "model.safetensors", row_int8(state)))
    model.save_pretrained(tmp_path / "folder")
    assert "int8_weight" in "".join(load_file(next((tmp_path / "folder").glob("*.safetensors"))))
    assert torch.equal(run(load(tmp_path / "folder"), inputs), run(model, inputs))


# --- The table of the docs ---

# The beginning of a row → the formats of the tests above that it stands for
DOCS = {
    "bf16, fp16, fp32": ["bf16", "fp16", "fp32"],
    "TurboDiffusion int8": ["TurboDiffusion int8"],
    "SGLang int8": ["SGLang int8"],
    "LightX2V int8": ["LightX2V int8"],
    "LightX2V fp8": ["LightX2V fp8"],
    "quanto int8": ["quanto int8"],
    "ComfyUI int8": ["ComfyUI int8"],
    "ComfyUI fp8, `scale_weight`": ["ComfyUI fp8, scale_weight", "ComfyUI fp8 e5m2, scale_weight"],
    "ComfyUI fp8, `comfy_quant`": ["ComfyUI fp8, comfy_quant"],
    "fp8 without scales": ["fp8 e4m3", "fp8 e5m2"],
}


def test_the_table_of_the_docs_has_what_these_tests_load_and_refuse():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    table = [line for line in text.split("names × numbers")[1].split("\n- ")[0].splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert all(any(convention in cell for cell in head[2:]) for convention in CONVENTIONS)
    loads = {name for name, *_ in rows if "error" not in _ and not name.startswith("GGUF")}
    assert all(any(name.startswith(start) for start in DOCS) for name in loads) and len(loads) == len(DOCS)
    assert sorted(name for row in DOCS.values() for name in row) == sorted(FORMATS)
    assert [cells[2:] for cells in rows if "NVFP4" in cells[0]] == [["error"] * len(CONVENTIONS)]
