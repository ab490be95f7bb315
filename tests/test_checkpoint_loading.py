"""Upstream's checkpoints: what they are, that they compute what upstream computes, and what bad ones say."""

import json
import math
import pickle
import random
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from io import StringIO

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers import assert_close, golden, tiny_transformer, upstream_names, write_upstream
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel
from weight_files import FORMATS, gguf_file

from turbo_nb import catalog, checkpoint
from turbo_nb.checkpoint import load_text_encoder, load_tokenizer, load_transformer, load_vae
from turbo_nb.errors import CheckpointError, InputError, TurboNbWarning, collect_warnings
from turbo_nb.files import part_config
from turbo_nb.files.layouts import describe
from turbo_nb.files.recognise import read, recognise
from turbo_nb.linear import is_quantized, to_per_row_scales
from turbo_nb.scheduler import RCMScheduler
from turbo_nb.sla import attention_type


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Upstream's golden state dicts as the files that users have."""
    folder = tmp_path_factory.mktemp("checkpoints_of_upstream")
    i2v = {key.removeprefix("sd."): value for key, value in golden("i2v").items() if key.startswith("sd.")}
    states = {"bf16": golden("dit_state"), "int8": golden("dit_state_int8"), "i2v": i2v, "vae": golden("vae_state")}
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pth")
    return folder


@pytest.fixture(scope="module")
def io():
    return golden("dit_io")


def run(model, x, t, text):
    with torch.no_grad():
        return model(x, t.float().flatten(), text, return_dict=False)[0]


# --- The numbers of upstream ---


@pytest.mark.parametrize(
    ("file", "attention", "bound"),
    [
        ("bf16", "original", 1e-2), ("bf16", "sla", 1e-2), ("bf16", "sagesla", 5e-2),
        ("int8", "original", 2e-2), ("int8", "sla", 2e-2), ("int8", "sagesla", 5e-2),
    ],
)  # fmt: skip
def test_one_forward_equals_upstream(files, io, file, attention, bound):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dense attention leaves proj_l out
        model = load_transformer(
            files / f"{file}.pth", attention_type=attention, sla_topk=0.4, attention_backend="reference"
        )
    if attention == "sagesla":
        for block in model.blocks:  # as upstream has them on sm_90
            block.attn1.processor.sla.block_q, block.attn1.processor.sla.block_k = 64, 128
    assert attention_type(model) == attention and is_quantized(model) == (file == "int8")
    assert_close(f"{file} {attention}", io[f"out.{attention}.{file}"], run(model, io["x"], io["t"], io["ctx"]), bound)


def test_one_forward_of_image_to_video_equals_upstream(files):
    i2v = golden("i2v")
    model = load_transformer(files / "i2v.pth", sla_topk=0.4)
    assert_close("i2v", i2v["out.sla.bf16"], run(model, torch.cat([i2v["x"], i2v["y"]], 1), i2v["t"], i2v["ctx"]), 1e-2)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("kind", ["sde", "ode"])
def test_whole_sampling_run_equals_upstream(files, io, kind, steps, monkeypatch):
    model = load_transformer(files / "bf16.pth", sla_topk=0.4)
    scheduler = RCMScheduler(80.0, ode=kind == "ode")
    noises = iter(io[f"noise.{index}"].double() for index in range(5))
    monkeypatch.setattr(scheduler, "_noise", lambda shape, device: next(noises))
    scheduler.set_timesteps(steps)
    x = scheduler.start_latents(io["x"].shape)
    for t in scheduler.timesteps:
        x = scheduler.step(run(model, x.bfloat16(), t, io["ctx"]), t, x, return_dict=False)[0]
    assert_close(kind, io[f"sample.{kind}.{steps}"], x.float(), 3e-2)


def test_vae_equals_upstream(files):
    vae, io = load_vae(files / "vae.pth"), golden("vae_io")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        z = (vae.encode(io["video"]).latent_dist.mode() - mean) / std
        frames = vae.decode(io["z"] * std + mean).sample
    assert_close("encode", io["z"], z, 1e-3)
    assert_close("decode", io["dec"].clamp(-1, 1), frames, 3e-3)


RAW_UMT5 = {
    "norm1": "0.layer_norm", "norm2": "1.layer_norm", "attn.q": "0.SelfAttention.q", "attn.k": "0.SelfAttention.k",
    "attn.v": "0.SelfAttention.v", "attn.o": "0.SelfAttention.o", "ffn.gate.0": "1.DenseReluDense.wi_0",
    "ffn.fc1": "1.DenseReluDense.wi_1", "ffn.fc2": "1.DenseReluDense.wo",
    "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
}  # fmt: skip


def test_text_encoder_equals_transformers(tmp_path):
    config = UMT5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = UMT5EncoderModel(config).eval()
    state = model.state_dict()
    raw = {"token_embedding.weight": state["shared.weight"], "norm.weight": state["encoder.final_layer_norm.weight"]}
    for index in range(2):
        for theirs, ours in RAW_UMT5.items():
            raw[f"blocks.{index}.{theirs}.weight"] = state[f"encoder.block.{index}.layer.{ours}.weight"]
    assert len(raw) == len(state) - 1  # transformers ties the embedding, and has it twice
    torch.save(raw, tmp_path / "umt5.pth")
    model.save_pretrained(tmp_path / "folder")
    ids = torch.randint(0, 99, (1, 7))
    for path in (tmp_path / "umt5.pth", tmp_path / "folder"):
        with torch.no_grad():
            assert torch.equal(load_text_encoder(path)(ids)[0], model(ids)[0])


# --- What a file is ---


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("bf16", "a Wan text-to-video transformer with dim 256, 2 layers, ffn 512, SLA, bfloat16 linears"),
        ("int8", "SLA, int8 linears"),
        ("i2v", "a Wan image-to-video transformer with dim 256"),
        ("vae", "a vae"),
    ],
)
def test_file_is_described_by_its_tensors(files, file, words):
    assert words in str(read(files / f"{file}.pth"))


@pytest.mark.parametrize("prefix", ["", "net.", "model.diffusion_model.", "module.", "module.net."])
@pytest.mark.parametrize("kind", ["pth", "nested.pth", "safetensors"])
def test_prefixes_and_wrappings_make_no_difference(files, io, tmp_path, prefix, kind):
    state = {prefix + key: tensor for key, tensor in golden("dit_state").items()}
    path = tmp_path / f"model.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "step": 7} if kind == "nested.pth" else state, path)
    ours, theirs = load_transformer(path).state_dict(), load_transformer(files / "bf16.pth").state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("kind", ["plain", "SLA", "SLA + int8"])
@pytest.mark.parametrize("model", ["1.3B", "14B", "A14B"])
def test_full_size_names_and_shapes_fit_without_rest(model, kind):
    arch = {"1.3B": catalog.ARCH_1_3B, "14B": catalog.ARCH_14B, "A14B": catalog.ARCH_A14B}[model]
    state = upstream_names(arch, sla=kind != "plain", int8=kind.endswith("int8"), device="meta")
    contents = recognise(state, None)
    assert (contents.arch, contents.head_dim, contents.text_dim) == (arch, 128, 4096)
    assert contents.sla == (kind != "plain") and contents.quantized == kind.endswith("int8")
    with torch.device("meta"):
        wanted = tiny_transformer(arch, text_dim=4096, sla=contents.sla).state_dict()
    assert {key: t.shape for key, t in contents.tensors.items()} == {key: t.shape for key, t in wanted.items()}


# --- Tolerant, and never silently wrong ---


def test_unexpected_tensors_are_counted_and_named(tmp_path):
    path = write_upstream(tmp_path / "x.pth", {f"extra.{i}": torch.zeros(1) for i in range(5)})
    with pytest.warns(UserWarning, match=r"5 tensors that no part .*extra.0, extra.1, extra.2 and 2 more"):
        load_transformer(path)


def test_missing_tensors_are_an_error_that_says_what_the_file_is(tmp_path):
    path = write_upstream(tmp_path / "x.pth", drop=["blocks.1.ffn.2.bias"])
    with pytest.raises(CheckpointError, match=r"looks like a Wan.*1 are missing: blocks.1.ffn.net.2.bias"):
        load_transformer(path)


def test_a_shape_that_does_not_fit_names_the_tensor(tmp_path):
    path = write_upstream(tmp_path / "x.pth", {"blocks.1.self_attn.q.bias": torch.zeros(7)})
    with pytest.raises(CheckpointError, match=r"blocks.1.attn1.to_q.bias .* \(7,\). Expected \(256,\)"):
        load_transformer(path)


def test_dense_attention_warns_of_unused_sla_projections(files):
    with pytest.warns(UserWarning, match="SLA projections; dense attention does not use them"):
        load_transformer(files / "bf16.pth", attention_type="original")


@pytest.fixture
def without_projections(tmp_path):
    state = {key: tensor for key, tensor in golden("dit_state").items() if "proj_l" not in key}
    torch.save(state, tmp_path / "plain.pth")
    return tmp_path / "plain.pth"


def test_file_without_projections_runs_dense_by_default(without_projections, files):
    with pytest.warns(UserWarning, match="no SLA projections, so dense attention is used"):
        model = load_transformer(without_projections)
    assert attention_type(model) == "original" and attention_type(load_transformer(files / "bf16.pth")) == "sla"


def test_explicit_sla_without_projections_has_a_zero_branch(without_projections):
    with pytest.warns(UserWarning, match="no SLA projections: the linear branch is zero"):
        model = load_transformer(without_projections, attention_type="sla")
    assert attention_type(model) == "sla"
    assert not any(p.any() for name, p in model.named_parameters() if "proj_l" in name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_are_quantised_on_the_device_of_the_model(files, monkeypatch):
    devices, quantize = set(), checkpoint.quantize
    monkeypatch.setattr(
        checkpoint, "quantize", lambda weight, device: devices.add(weight.device.type) or quantize(weight, device)
    )
    with pytest.warns(UserWarning, match="quantised"):
        model = load_transformer(files / "bf16.pth", quant_linear=True, device="cuda")
    assert devices == {"cuda"} and {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}


def test_some_projections_missing_is_an_error(tmp_path):
    path = write_upstream(tmp_path / "x.pth", drop=["blocks.1.self_attn.attn_op.local_attn.proj_l.bias"])
    with pytest.raises(CheckpointError, match=r"missing: blocks.1.attn1.processor.sla.proj_l.bias"):
        load_transformer(path)


def test_quantising_on_load_warns_and_is_close_to_the_quantised_file(files, io):
    with pytest.warns(UserWarning, match="20 were quantised to int8"):
        model = load_transformer(files / "bf16.pth", sla_topk=0.4, quant_linear=True)
    ref = load_transformer(files / "int8.pth").state_dict()
    ours = model.state_dict()
    same = [(ours[key] == ref[key]).float().mean() for key in ref if key.endswith("int8_weight")]
    assert len(same) == 20 and min(same) >= 0.9999
    assert_close("int8", io["out.sla.int8"], run(model, io["x"], io["t"], io["ctx"]), 2e-2)


def test_scales_of_rows_are_saved_and_loaded(files, io, tmp_path):
    model = load_transformer(files / "int8.pth", sla_topk=0.4)
    to_per_row_scales(model)
    model.save_pretrained(tmp_path / "rows")
    again = load_transformer(tmp_path / "rows", sla_topk=0.4)
    assert again.blocks[0].attn1.to_q.scale.ndim == 1
    outs = (run(m, io["x"], io["t"], io["ctx"]) for m in (model, again))
    assert_close("saved and loaded", *outs, 3e-3)
    with pytest.warns(UserWarning, match="20 were dequantised"):
        plain = load_transformer(tmp_path / "rows", quant_linear=False)
    weight = load_transformer(files / "bf16.pth").blocks[0].attn1.to_q.weight
    assert_close("weight", weight, plain.blocks[0].attn1.to_q.weight, 1.5e-2)


def test_dequantising_on_load_warns_and_is_close_to_the_plain_file(files):
    with pytest.warns(UserWarning, match="20 were dequantised"):
        model = load_transformer(files / "int8.pth", quant_linear=False)
    ref = load_transformer(files / "bf16.pth")
    assert not is_quantized(model)
    assert_close("weight", ref.blocks[0].attn1.to_q.weight, model.blocks[0].attn1.to_q.weight, 1e-2)


def test_the_right_dtypes_survive(files):
    model = load_transformer(files / "int8.pth")
    dtypes = {name.rpartition(".")[2]: t.dtype for name, t in model.state_dict().items() if "to_q" in name}
    assert dtypes == {"int8_weight": torch.int8, "scale": torch.float32, "bias": torch.bfloat16}
    block = model.blocks[0]
    assert block.scale_shift_table.dtype == block.attn1.processor.sla.proj_l.weight.dtype == torch.float32
    assert model.rope.freqs_cos.device.type == "cpu"


@pytest.mark.parametrize("quant_linear", ["yes", None, 2])
def test_quant_linear_is_checked(files, quant_linear):
    with pytest.raises(InputError, match="auto"):
        load_transformer(files / "bf16.pth", quant_linear=quant_linear)


# --- Bad files: a typed error, soon, and nothing is run ---


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def truncated(path):
    write_upstream(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path):
    torch.save({"patch_embedding.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)


def compressed(path):
    write_upstream(path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def bent(key, value):
    def make(path):
        state = golden("dit_state")
        state[key] = state[key].clone()
        state[key].view(-1)[3] = value
        torch.save(state, path)

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (truncated, "damaged or cut short"),
        (lambda path: torch.save({"a": Marker(path.parent / "ran")}, path), "could run code: refused"),
        (lambda path: path.write_bytes(pickle.dumps({"a": Marker(path.parent / "ran")})), "neither a torch file"),
        (bomb, "claims more bytes than the file holds"),
        (compressed, "compressed entries"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("\n<!DOCTYPE html><html>404</html>"), "is a web page"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (lambda path: torch.save({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 4)}, path), "is a LoRA"),
        (lambda path: torch.save(golden("vae_state"), path), "is a vae.*Expected a transformer"),
        (lambda path: torch.save({"epoch": 3}, path), "holds dict"),
        (lambda path: torch.save([torch.zeros(1)], path), "holds list"),
        (lambda path: torch.save({"a.b": torch.zeros(1)}, path), "tensors of an unknown kind"),
        (
            lambda path: write_upstream(path, state="dit_state_int8", drop=["blocks.0.ffn.0.scale"]),
            r"blocks.0.ffn.net.0.proj.int8_weight .*is int8 without a scale",
        ),
        (bent("blocks.1.ffn.0.weight", float("nan")), "blocks.1.ffn.net.0.proj.weight .*holds NaN or Inf"),
        (
            lambda path: write_upstream(path, {"patch_embedding.weight": torch.zeros(256, 63)}),
            "but the shapes do not fit",
        ),
        (
            lambda path: write_upstream(path, {"text_embedding.0.weight": torch.zeros(5)}),
            "but the shapes do not fit",
        ),
        (
            lambda path: write_upstream(path, {"blocks.0.self_attn.q.bias": torch.ones(256, dtype=torch.int64)}),
            "blocks.0.attn1.to_q.bias .*is int64. Expected bfloat16",
        ),
        (
            lambda path: write_upstream(
                path,
                {"blocks.0.ffn.0.weight": torch.ones(512, 256).char(), "blocks.0.ffn.0.weight_scale": torch.ones(3)},
            ),
            r"ffn.net.0.proj.weight_scale .*has shape \(3,\). Expected \(\), \(512,\)",
        ),
        (
            lambda path: write_upstream(
                path, {"blocks.0.ffn.0.int8_weight": torch.ones(512, 256)}, state="dit_state_int8"
            ),
            "blocks.0.ffn.net.0.proj.int8_weight .*number format float32",
        ),
        (
            lambda path: write_upstream(path, {"blocks.999999.norm3.bias": torch.ones(256)}),
            r"tensors of blocks.999999, but of 3 blocks in all",
        ),
        (
            lambda path: write_upstream(path, drop=["text_embedding.0.weight"]),
            "parts are missing",
        ),
        (lambda path: torch.save({7: torch.zeros(1)}, path), "has the key 7 for a tensor"),
        (bent("head.head.bias", float("inf")), "proj_out.bias .*holds NaN or Inf"),
        (lambda path: path.mkdir(), "no weights in"),
        (lambda path: None, "no file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_file_raises_checkpoint_error_and_runs_no_code(tmp_path, make, words):
    path = tmp_path / "model.pth"
    make(path)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_transformer(path)
    assert str(caught.value).count("ownload the file again") <= 1
    assert not (tmp_path / "ran").exists()


def test_a_damaged_safetensors_file_is_a_typed_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(golden("dit_state"), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_transformer(path)


@pytest.mark.parametrize("number_format", ["bf16", "TurboDiffusion int8", "LightX2V int8", "fp8 e5m2"])
def test_one_warning_names_the_matrices_of_zeros(tmp_path, number_format):
    state = load_file(catalog.NANO.folder / "transformer" / "diffusion_pytorch_model.safetensors")
    state = {key: tensor.contiguous().clone() for key, tensor in FORMATS[number_format](state).items()}
    for key in [key for key in state if re.match(r"blocks\.[23]\.ffn\.net\.2\.(?!.*scale)", key)]:
        state[key].zero_()
    save_file(state, tmp_path / "model.safetensors")
    with collect_warnings() as told:
        load_transformer(tmp_path / "model.safetensors")
    (told,) = (line for line in told if "zero" in line)
    assert re.search(
        r"blocks\.2\.ffn\.net\.2\..*weight and 1 more .*model\.safetensors.* download the file again", told
    )


@pytest.mark.parametrize(
    ("part", "load", "key"),
    [
        ("vae", load_vae, "decoder.conv_in.weight"),
        ("text_encoder", load_text_encoder, "encoder.block.1.layer.0.SelfAttention.q.weight"),
    ],
)
def test_zeros_in_another_part_are_a_warning(tmp_path, part, load, key):
    shutil.copytree(catalog.NANO.folder / part, tmp_path / part)
    (path,) = (tmp_path / part).glob("*.safetensors")
    state = load_file(path)
    save_file(state | {key: torch.zeros_like(state[key])}, path)
    with pytest.warns(TurboNbWarning, match=f"all numbers of {key} in"):
        load(tmp_path / part)


def test_bent_bytes_are_typed_errors_or_do_not_matter(tmp_path):
    whole = write_upstream(tmp_path / "whole.pth").read_bytes()
    bent, rng, told = tmp_path / "bent.pth", random.Random(0), 0
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(5):
            data[rng.randrange(12_000)] = rng.randrange(256)  # the pickle comes first
        bent.write_bytes(data)
        try:
            read(bent)
        except CheckpointError:
            told += 1
    assert told > 20


def test_other_model_than_expected_names_both(files):
    with pytest.raises(CheckpointError, match=r"dim 256.*Expected TurboWan2.1-T2V-14B-480P, which has dim 5120"):
        load_transformer(files / "bf16.pth", expected=catalog.find("Wan2.1-14B"))


def test_transformer_is_refused_as_vae_or_text_encoder(files):
    for load, kind in ((load_vae, "vae"), (load_text_encoder, "text encoder")):
        with pytest.raises(CheckpointError, match=f"transformer.*Expected a {kind}"):
            load(files / "bf16.pth")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda state: state.pop("encoder.block.1.layer.1.DenseReluDense.wi_0.weight"), "missing: .*wi_0"),
        (lambda state: state["shared.weight"].view(-1)[7].fill_(torch.nan), "holds NaN or Inf"),
        (lambda state: state.update({"encoder.final_layer_norm.weight": torch.zeros(3)}), "has shape"),
    ],
    ids=["missing", "NaN", "shape"],
)
def test_a_text_encoders_folder_is_checked_as_files_are(tmp_path, fault, words):
    folder = shutil.copytree(catalog.NANO.folder / "text_encoder", tmp_path / "text_encoder")
    state = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    fault(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_text_encoder(folder)


def test_the_model_is_diffusers_own(files):
    assert type(load_transformer(files / "bf16.pth")) is WanTransformer3DModel


@pytest.mark.parametrize(
    ("load", "state"),
    [
        (load_vae, lambda: golden("vae_state") | {"conv1.bias": torch.zeros(8)}),
        (load_vae, lambda: golden("vae_state") | {"decoder.conv1.weight": torch.zeros(())}),
        (load_vae, lambda: golden("vae_state") | {"encoder.conv1.weight": torch.zeros(0, 3, 3, 3, 3)}),
        (load_vae, lambda: golden("vae_state") | {"conv1.bias": torch.zeros(32, dtype=torch.uint8)}),
        (load_text_encoder, lambda: {"shared.weight": torch.zeros(9, 8)}),
        (load_text_encoder, lambda: {"encoder.embed_tokens.weight": torch.zeros(9, 8)}),
        (load_text_encoder, lambda: umt5_state() | {"shared.weight": torch.zeros(9)}),
        (load_text_encoder, lambda: umt5_state() | {"encoder.block.999999.layer.0.layer_norm.weight": torch.ones(8)}),
        (load_text_encoder, lambda: umt5_state() | {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(())}),
        (load_text_encoder, lambda: umt5_state() | {f"{BUCKETS}.weight": torch.ones(4, 0)}),
        (load_text_encoder, lambda: umt5_state() | {"shared.weight": torch.ones(9, 8, dtype=torch.int32)}),
    ],
)
def test_foreign_shapes_of_vae_and_text_encoder_raise_checkpoint_error(tmp_path, load, state):
    torch.save(state(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.pth") as caught:
        load(tmp_path / "model.pth")
    assert str(caught.value).count("Download the file again") <= 1


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.popitem(),
        lambda state: state.update({name: state[name][:1].clone() for name in list(state)[-1:]}),
        lambda state: [state.pop(name) for name in list(state) if ".resnets.1." in name],
    ],
    ids=["a tensor less", "another shape", "fewer blocks"],
)
def test_a_vae_of_another_model_is_not_called_a_bad_download(tmp_path, change):
    state = load_file(catalog.NANO.folder / "vae" / "diffusion_pytorch_model.safetensors")
    change(state)
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(
        CheckpointError, match=r"Give Wan2\.1's vae, or for another one its folder with config\.json"
    ) as caught:
        load_vae(tmp_path / "vae.safetensors")
    assert "ownload" not in str(caught.value)


BUCKETS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"


def umt5_state():
    config = UMT5Config(
        vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    state = UMT5EncoderModel(config).state_dict()
    return {key: tensor for key, tensor in state.items() if key != "encoder.embed_tokens.weight"}


LOADERS = {"transformer": load_transformer, "text_encoder": load_text_encoder}
WRITERS = {"transformer": {"_class_name": "WanTransformer3DModel"}, "text_encoder": {"model_type": "umt5"}}


@pytest.mark.parametrize("config", ["[]", "{", "own"])
@pytest.mark.parametrize("part", LOADERS)
def test_config_that_does_not_belong_to_the_weights_raises_checkpoint_error(tmp_path, part, config):
    folder = shutil.copytree(catalog.NANO.folder / part, tmp_path / part)
    own = json.dumps(WRITERS[part] | {"num_layers": 999999})
    (folder / "config.json").write_text(own if config == "own" else config)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LOADERS[part](folder)


@pytest.mark.parametrize("config", [None, {}, {"num_layers": 999999}, {"_class_name": "WanModel", "num_layers": 40}])
@pytest.mark.parametrize("part", LOADERS)
def test_shapes_decide_where_another_class_wrote_the_config(tmp_path, part, config):
    folder = shutil.copytree(catalog.NANO.folder / part, tmp_path / part)
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    ref, found = (LOADERS[part](one).state_dict() for one in (catalog.NANO.folder / part, folder))
    assert found.keys() == ref.keys() and all(torch.equal(found[key], ref[key]) for key in ref)


WRONG_SETTINGS = {
    "transformer": [
        ("num_attention_heads", 8), ("patch_size", [1, 4, 1]), ("cross_attn_norm", False), ("image_dim", 1280),
        ("eps", "x"), ("eps", 1e30), ("rope_max_seq_len", 8), ("rope_max_seq_len", 10**12),
    ],
    "vae": [
        ("latents_mean", [math.nan] * 16), ("latents_mean", [1]), ("latents_std", [0.0] * 16), ("latents_std", None),
        ("patch_size", "x"), ("scale_factor_spatial", 16), ("scale_factor_temporal", 1), ("num_res_blocks", 10**9),
        ("dim_mult", []), ("temperal_downsample", [True]), ("is_residual", "x"), ("z_dim", True),
    ],
    "text_encoder": [
        ("d_ff", None), ("relative_attention_max_distance", 8), ("layer_norm_epsilon", 1e30),
        ("feed_forward_proj", "gated-silu"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "key", "value"), [(part, *one) for part, ones in WRONG_SETTINGS.items() for one in ones]
)
def test_setting_that_the_weights_or_their_part_cannot_have_is_named(tmp_path, part, key, value):
    folder = tmp_path / part
    folder.mkdir()
    for file in (catalog.NANO.folder / part).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"^{key} in '.*config\.json' is .*\. Expected "):
        (LOADERS | {"vae": load_vae})[part](folder)


def test_defaults_of_diffusers_are_read_only_for_settings_that_the_config_lacks(tmp_path, monkeypatch):
    config = json.loads((catalog.NANO.folder / "vae/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "patch_size"}))
    with pytest.raises(CheckpointError, match=r"^in_channels in .* is 12\. Expected 3 channels for each pixel"):
        part_config.part_config(tmp_path, part_config.VAE, {})
    monkeypatch.delattr(part_config, "_vae_defaults")  # importing diffusers takes seconds
    assert part_config.part_config(catalog.NANO.folder / "vae", part_config.VAE, {})["patch_size"] == 2


def test_setting_that_a_library_would_act_on_is_left_out(tmp_path):
    folder = shutil.copytree(catalog.NANO.folder / "text_encoder", tmp_path / "text_encoder")
    config = json.loads((folder / "config.json").read_text())
    more = {"_attn_implementation": "someone/kernels", "return_dict": False, "num_labels": 10**9, "dtype": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config | more))
    model, ref = load_text_encoder(folder), load_text_encoder(catalog.NANO.folder / "text_encoder")
    ids = torch.tensor([[5, 7, 1]])
    assert torch.equal(model(ids).last_hidden_state, ref(ids).last_hidden_state)


def test_unreadable_paths_raise_checkpoint_error():
    for name in ("x" * 300, "x\0y"):
        with pytest.raises(CheckpointError, match="no file"):
            read(name)


def test_diffusers_folder_is_described_part_by_part(tmp_path):
    told = describe(catalog.NANO.folder).splitlines()
    assert [line.split()[0] for line in told[1:]] == ["transformer", "vae", "text_encoder", "tokenizer"]
    assert "a Wan text-to-video transformer of nano's shape" in told[1] and "a vae" in told[2]
    assert describe(catalog.NANO.folder / "vae") == str(read(catalog.NANO.folder / "vae"))
    with pytest.raises(CheckpointError, match="in its folders text_encoder, transformer, vae"):
        read(catalog.NANO.folder)
    with pytest.raises(CheckpointError, match="no weights in"):
        describe(tmp_path)


RAG = {"model_type": "rag", "question_encoder": {"model_type": "vit"}, "generator": {"model_type": "vit"}}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config.json": {"tokenizer_class": "RagTokenizer"}, "config.json": RAG},
        {"tokenizer_config.json": {}, "config.json": RAG},
    ],
    ids=["own class", "composite class", "composite model"],
)
def test_code_in_a_tokenizer_folder_never_runs(tmp_path, monkeypatch, files):
    ran = tmp_path / "ran"
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "own.py").write_text(
        f"from transformers import PreTrainedTokenizerFast\nopen({str(ran)!r}, 'w').close()\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    inner = folder / "question_encoder_tokenizer"
    inner.mkdir()
    for name, values in ({"tokenizer_config.json": config} | files).items():
        (folder / name).write_text(json.dumps(values))
    (inner / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.stdin", StringIO("y\n" * 9))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(folder)
    assert not ran.exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("number_format", ["ComfyUI fp8, scale_weight", "GGUF"])
def test_a_file_is_quantised_one_tensor_at_a_time(tmp_path, forked, number_format, suffix):
    """Peak main memory is at most 1.15 times the file plus one tensor in float32."""
    arch = catalog.Arch(dim=1024, num_heads=8, num_layers=8, ffn_dim=4096)
    state, path = upstream_names(arch, sla=True, int8=False, text_dim=256), tmp_path / "model"
    if number_format == "GGUF":
        pytest.importorskip("gguf")
        if suffix == "pth":
            pytest.skip("GGUF is a format of its own")
        gguf_file(path, state, "Q8_0")
    elif suffix == "pth":
        torch.save(FORMATS[number_format](state), path)
    else:
        save_file(FORMATS[number_format](state), path)
    code = (  # not ru_maxrss, because a process begins with that of its parent
        "import sys, warnings, torch; from turbo_nb.checkpoint import load_transformer as load\n"
        "status = lambda: dict(line.split(':') for line in open('/proc/self/status'))\n"
        "warnings.simplefilter('ignore'); peak = lambda: int(status()['VmHWM'].split()[0]) << 10\n"
        "load(sys.argv[2], quant_linear=True); before = peak()\n"
        "load(sys.argv[1], quant_linear=True); print(peak() - before)"
    )
    tiny, small = catalog.Arch(dim=128, num_heads=1, num_layers=1, ffn_dim=64), tmp_path / "small.safetensors"
    save_file(FORMATS["fp8 e4m3"](upstream_names(tiny, sla=True, int8=False)), small)  # to import what loading needs
    run = subprocess.run(forked.command("-c", code, path, small), capture_output=True, text=True, check=True)
    size = path.stat().st_size
    assert 0.5 * size < int(run.stdout) <= 1.15 * size + 4 * arch.dim * arch.ffn_dim
