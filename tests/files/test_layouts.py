"""The parts of a model are found in the folders that people have, and never taken from an unrelated place."""

import json
import os
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan
from helpers import upstream_names
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import turbo_nb
from turbo_nb import catalog, cli
from turbo_nb.catalog import Arch, HubFile
from turbo_nb.errors import CheckpointError, InputError
from turbo_nb.files import fingerprint, layouts, resolve
from turbo_nb.settings import LoadOptions

NANO = catalog.NANO.folder
T2V = Arch(dim=256, num_heads=2, num_layers=2, ffn_dim=512)
I2V = Arch(dim=128, num_heads=1, num_layers=2, ffn_dim=256, in_channels=36)
UMT5_NAMES = {
    "encoder.block.": "blocks.", ".layer.0.layer_norm.": ".norm1.", ".layer.1.layer_norm.": ".norm2.",
    ".layer.0.SelfAttention.relative_attention_bias.": ".pos_embedding.embedding.",
    ".layer.0.SelfAttention.": ".attn.", ".layer.1.DenseReluDense.wi_0.": ".ffn.gate.0.",
    ".layer.1.DenseReluDense.wi_1.": ".ffn.fc1.", ".layer.1.DenseReluDense.wo.": ".ffn.fc2.",
    "encoder.final_layer_norm.": "norm.", "shared.": "token_embedding.",
}  # fmt: skip


def wan_config(arch: Arch) -> str:
    """The config.json of Wan-AI, whose keys other classes read differently"""
    return json.dumps({
        "_class_name": "WanModel", "dim": arch.dim, "ffn_dim": arch.ffn_dim, "in_dim": arch.in_channels,
        "num_heads": arch.num_heads, "num_layers": arch.num_layers, "out_dim": 16, "text_len": 512,
    })  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A VAE and a text encoder with upstream's names"""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    torch.save(AutoencoderKLWan(base_dim=16, z_dim=16).state_dict(), folder / "vae.pth")
    state = load_file(NANO / "text_encoder" / "model.safetensors")
    renamed = {}
    for key, tensor in state.items():
        for name, upstream in UMT5_NAMES.items():
            key = key.replace(name, upstream)
        renamed[key] = tensor
    torch.save(renamed, folder / "umt5.pth")
    save_file(state, folder / "umt5.safetensors")
    return folder


def place(source, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)


def transformer(path, arch=T2V):
    path.parent.mkdir(parents=True, exist_ok=True)
    (torch.save if path.suffix == ".pth" else save_file)(
        upstream_names(arch, sla=False, int8=False, text_dim=128), path
    )
    return path


def wan_parts(folder, parts):
    place(parts / "vae.pth", folder / "Wan2.1_VAE.pth")
    place(parts / "umt5.pth", folder / "models_t5_umt5-xxl-enc-bf16.pth")
    place(NANO / "tokenizer", folder / "google" / "umt5-xxl")


def wan_ai(root, parts):
    """Wan-AI/Wan2.1-T2V-1.3B after `hf download --local-dir`"""
    folder = root / "Wan2.1-T2V-1.3B"
    transformer(folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(wan_config(T2V))
    wan_parts(folder, parts)
    return folder


def wan_ai_i2v(root, parts):
    """Wan-AI/Wan2.2-I2V-A14B"""
    folder = root / "Wan2.2-I2V-A14B"
    for name in ("high_noise_model", "low_noise_model"):
        transformer(folder / name / "diffusion_pytorch_model.safetensors", I2V)
        (folder / name / "config.json").write_text(wan_config(I2V))
    wan_parts(folder, parts)
    return folder


def upstream(root, parts):
    """The folder `checkpoints` of TurboDiffusion's README"""
    transformer(root / "checkpoints" / "TurboWan2.1-T2V-1.3B-480P.pth")
    wan_parts(root / "checkpoints", parts)
    return root / "checkpoints"


def upstream_i2v(root, parts):
    for noise in ("high", "low"):
        transformer(root / "checkpoints" / f"TurboWan2.2-I2V-A14B-{noise}-720P.pth", I2V)
    wan_parts(root / "checkpoints", parts)
    return root / "checkpoints"


def comfy(root, parts):
    models = root / "ComfyUI" / "models"
    transformer(models / "diffusion_models" / "wan2.1_t2v_1.3B_bf16.safetensors")
    save_file({"a": torch.ones(1)}, models / "diffusion_models" / "flux1-dev.safetensors")
    (models / "unet").mkdir()
    (models / "unet" / "put_unet_files_here").touch()
    (models / "vae").mkdir()
    save_file(torch.load(parts / "vae.pth"), models / "vae" / "wan_2.1_vae.safetensors")
    save_file({"a": torch.ones(1)}, models / "vae" / "ae.safetensors")
    place(parts / "umt5.safetensors", models / "text_encoders" / "umt5_xxl_fp16.safetensors")
    save_file({"a": torch.ones(1)}, models / "text_encoders" / "clip_l.safetensors")
    place(NANO / "tokenizer", models / "text_encoders" / "umt5-xxl")
    return models / "diffusion_models" / "wan2.1_t2v_1.3B_bf16.safetensors"


def comfy_deep(root, parts):
    """A file one folder further down, as people sort their models"""
    file = comfy(root, parts)
    (file.parent / "wan").mkdir()
    return file.rename(file.parent / "wan" / file.name)


def comfy_root(root, parts):
    comfy(root, parts)
    (root / "ComfyUI/models/diffusion_models/flux1-dev.safetensors").unlink()
    return root / "ComfyUI"


def snapshot(root, parts):
    """A snapshot in the Hub's cache, whose files are links"""
    blobs, folder = root / "models--o--Wan-Diffusers/blobs", root / "models--o--Wan-Diffusers/snapshots" / ("0a" * 20)
    transformer(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    place(parts / "vae.pth", folder / "vae" / "diffusion_pytorch_model.bin")
    place(NANO / "text_encoder", folder / "text_encoder")
    place(NANO / "tokenizer", folder / "tokenizer")
    (folder / "model_index.json").write_text('{"_class_name": "WanDMDPipeline", "transformer": ["evil", "Code"]}')
    blobs.mkdir()
    for number, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    return folder


def repository(root, parts):
    """The folder of that repository, whose branch main is one of two snapshots"""
    current = snapshot(root, parts)
    (current.parent / ("0b" * 20)).mkdir()
    refs = current.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(current.name)
    return current.parents[1]


def snapshots(root, parts):
    """Its only snapshot by the folder above"""
    return snapshot(root, parts).parent


LAYOUTS = [
    wan_ai, wan_ai_i2v, upstream, upstream_i2v, comfy, comfy_deep, comfy_root, snapshot, repository, snapshots
]  # fmt: skip


def resolved(**options):
    with pytest.warns(UserWarning, match="no SLA projections"):
        return resolve.resolve(LoadOptions(device="cpu", **options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("option", ["model", "checkpoint"])
def test_all_parts_of_a_layout_are_found_without_the_network(tmp_path, parts, layout, option):
    path = layout(tmp_path, parts)
    found = resolved(**{option: path})
    assert found.downloads == ()
    assert len(found.transformers) == (2 if "i2v" in layout.__name__ else 1)
    assert all(tmp_path in part.path.parents for part in (*found.transformers, found.vae, found.text_encoder))
    assert tmp_path in found.tokenizer.parents
    assert found.transformers[0].arch == (I2V if "i2v" in layout.__name__ else T2V)


@pytest.mark.parametrize("layout", [wan_ai, wan_ai_i2v])
def test_the_files_of_a_layout_find_the_other_parts(tmp_path, parts, layout):
    folder = layout(tmp_path, parts)
    files = tuple(sorted(folder.rglob("diffusion_pytorch_model.safetensors")))
    given = files if len(files) > 1 else files[0]
    found = resolved(checkpoint=given)
    assert found.downloads == () and [part.path for part in found.transformers] == list(files)
    folders = tuple(file.parent for file in files)
    assert resolved(checkpoint=folders if len(folders) > 1 else folders[0]).downloads == ()


def test_high_noise_comes_first(tmp_path, parts):
    names = [part.path.name for part in resolved(model=wan_ai_i2v(tmp_path / "a", parts)).transformers]
    assert names == ["high_noise_model", "low_noise_model"]
    names = [part.path.stem for part in resolved(model=upstream_i2v(tmp_path / "b", parts)).transformers]
    assert names == ["TurboWan2.2-I2V-A14B-high-720P", "TurboWan2.2-I2V-A14B-low-720P"]


@pytest.mark.parametrize(
    "names",
    [
        ("wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors", "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors"),
        ("Wan2.2-I2V-A14B-HighNoise-Q8_0.gguf", "Wan2.2-I2V-A14B-LowNoise-Q8_0.gguf"),
        ("Wan2_2-I2V-A14B-HIGH_bf16.safetensors", "Wan2_2-I2V-A14B-LOW_bf16.safetensors"),
    ],
)
def test_a_folder_with_one_pair_of_experts_is_that_pair(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in layouts.transformers(tmp_path)] == list(names)
    (tmp_path / "another.safetensors").touch()
    assert layouts.transformers(tmp_path) == (tmp_path,)


@pytest.mark.parametrize("names", [("flow.pth", "fhigh.pth"), ("a-high.pth", "b-low.pth"), ("low.pth", "low2.pth")])
def test_two_files_are_not_taken_for_a_pair_by_chance(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    assert layouts.transformers(tmp_path) == (tmp_path,)


def test_a_folder_of_several_transformers_lists_them(tmp_path, parts):
    file = comfy(tmp_path, parts)
    with pytest.raises(CheckpointError, match=r"several files of weights: flux1-dev\.safetensors, wan2\.1_t2v"):
        resolve.resolve(LoadOptions(device="cpu", model=file.parent))
    with pytest.raises(CheckpointError, match="several files of weights"):
        resolve.resolve(LoadOptions(device="cpu", model=tmp_path / "ComfyUI"))


def test_one_expert_alone_is_an_error_that_names_the_number(tmp_path, parts):
    folder = wan_ai_i2v(tmp_path, parts)
    shutil.rmtree(folder / "low_noise_model")
    with pytest.raises(InputError, match=r"Expected 2 files \(high-noise, low-noise\)"):
        resolve.resolve(LoadOptions(device="cpu", model=folder, attention_type="original"))


@pytest.mark.parametrize("layout", [wan_ai, comfy_root, repository])
def test_a_folder_stands_for_any_of_its_parts(tmp_path, parts, layout):
    folder = layout(tmp_path / "there", parts)
    file = transformer(tmp_path / "elsewhere" / "alone" / "own.safetensors")
    found = resolved(model=file, vae=folder, text_encoder=folder, tokenizer=None if layout is comfy_root else folder)
    assert found.downloads == ()
    assert found.vae.kind == "vae" and found.text_encoder.kind == "text encoder"
    assert found.spec.name == "own"


@pytest.mark.parametrize("given", [".", "google", "google/umt5-xxl", "google/umt5-xxl/tokenizer_config.json"])
def test_any_path_to_a_tokenizer_works(tmp_path, parts, given):
    folder = wan_ai(tmp_path, parts)
    tokenizer = folder / "google" / "umt5-xxl"
    assert resolved(model=folder, tokenizer=folder / given).tokenizer == tokenizer


def test_the_tokenizer_beside_a_given_text_encoder_is_taken(tmp_path, parts):
    folder = wan_ai(tmp_path / "there", parts)
    file = transformer(tmp_path / "elsewhere" / "alone" / "own.safetensors")
    found = resolved(model=file, vae=folder, text_encoder=folder / "models_t5_umt5-xxl-enc-bf16.pth")
    assert found.tokenizer == folder / "google" / "umt5-xxl"


def test_a_part_that_is_not_near_comes_from_the_hub(tmp_path, parts):
    wan_ai(tmp_path / "unrelated", parts)
    file = transformer(tmp_path / "a" / "b" / "c" / "own.safetensors")
    place(parts / "vae.pth", tmp_path / "vae" / "Wan2.1_VAE.pth")  # three folders above
    found = resolved(model=file)
    assert all(isinstance(part, HubFile) for part in (found.vae, found.text_encoder, found.tokenizer))


def test_files_with_other_names_are_not_taken_for_parts(tmp_path, parts):
    file = comfy(tmp_path, parts)
    vae = file.parents[1] / "vae"
    (vae / "wan_2.1_vae.safetensors").rename(vae / "Wan2.2_VAE.safetensors")
    assert isinstance(resolved(model=file).vae, HubFile)


def test_of_several_text_encoders_the_exact_one_is_taken_with_a_warning(tmp_path, parts):
    file = comfy(tmp_path, parts)
    folder = file.parents[1] / "text_encoders"
    for name in ("umt5_xxl_fp8_e4m3fn_scaled.safetensors", "umt5-xxl-encoder-Q8_0.gguf"):
        shutil.copy(folder / "umt5_xxl_fp16.safetensors", folder / name)
    with pytest.warns(
        UserWarning, match=r"umt5_xxl_fp16.*is taken; left out: umt5-xxl-encoder-Q8_0\.gguf, umt5_xxl_fp8"
    ):
        found = resolve.resolve(LoadOptions(device="cpu", model=file, attention_type="original"))
    assert found.text_encoder.path.name == "umt5_xxl_fp16.safetensors"


def test_nanos_shape_does_not_take_the_parts_of_wan(tmp_path, parts):
    """The embedded model has a tokenizer and a VAE of its own."""
    shutil.copy(NANO / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path / "mine.safetensors")
    wan_parts(tmp_path, parts)
    found = resolve.resolve(LoadOptions(device="cpu", model=tmp_path / "mine.safetensors"))
    assert found.vae.path == NANO / "vae" and found.tokenizer == NANO / "tokenizer"


@pytest.mark.parametrize(
    ("layout", "name"),
    [(wan_ai, "Wan2.1-T2V-1.3B"), (wan_ai_i2v, "Wan2.2-I2V-A14B"), (snapshot, "Wan-Diffusers"),
     (repository, "Wan-Diffusers"), (upstream, "TurboWan2.1-T2V-1.3B-480P"), (comfy, "wan2.1_t2v_1.3B_bf16")],
)  # fmt: skip
def test_a_model_is_named_after_its_folder_or_file(tmp_path, parts, layout, name):
    assert resolved(model=layout(tmp_path, parts)).spec.name == name


@pytest.mark.parametrize(("names", "words"), [((), "no snapshot"), (("a", "b"), "several snapshots .a, b.")])
def test_a_repository_of_the_cache_without_one_snapshot_is_named(tmp_path, names, words):
    folder = tmp_path / "models--o--r"
    for name in ("", *names):
        (folder / "snapshots" / name).mkdir(parents=True)
    for given in (folder, folder / "snapshots"):
        with pytest.raises(CheckpointError, match=f"models--o--r' is a folder of the Hub's cache with {words}"):
            resolve.resolve(LoadOptions(device="cpu", model=given))


def test_the_config_of_wan_ai_tells_the_heads_and_nothing_else(tmp_path, parts):
    folder = wan_ai(tmp_path, parts)
    (folder / "config.json").write_text(wan_config(Arch(dim=256, num_heads=4, num_layers=2, ffn_dim=512)))
    assert resolved(model=folder).transformers[0].head_dim == 64


def test_a_clip_of_wan_ais_folder(tmp_path, parts):
    pipe = turbo_nb.load_pipeline(model=wan_ai(tmp_path, parts), device="cpu", attention_type="original")
    video = turbo_nb.generate(pipe, "a street", num_frames=1, num_steps=1, resolution="64x64")
    assert video.frames.shape[-3:] == (64, 64, 3)


@pytest.mark.parametrize("layout", [wan_ai, wan_ai_i2v, comfy_root, snapshot, repository])
def test_info_describes_each_part_of_a_layout(tmp_path, parts, layout):
    result = CliRunner().invoke(cli.app, ["info", str(layout(tmp_path, parts))])
    assert result.exit_code == 0, result.output
    transformers = 2 if "i2v" in layout.__name__ else 1
    assert result.stdout.count("-video transformer") == transformers
    assert result.stdout.count("a vae") == result.stdout.count("a text encoder") == 1
    assert result.stdout.count("a tokenizer") == (layout is not comfy_root)


def test_info_of_a_folder_shows_a_bad_file_in_its_line(tmp_path, parts):
    folder = comfy(tmp_path, parts).parent
    (folder / "cut.safetensors").write_bytes(b"<html>")
    told = layouts.describe(folder).splitlines()
    assert len(told) == 4 and "cut.safetensors' is a web page" in told[1] and "unknown kind" in told[2]


@pytest.mark.parametrize("path", ["x" * 300, "x\0y", "nowhere"])
def test_a_name_that_no_file_can_have_finds_nothing(tmp_path, path):
    for one in (tmp_path / path, tmp_path / path / "a"):
        assert layouts.transformers(one) == (one,)
        assert layouts.part(one, "vae") == one and layouts.near(one, "tokenizer") is None
        with pytest.raises(CheckpointError):
            layouts.describe(one)


def test_the_identity_of_a_folder_is_its_weights_and_config(tmp_path, parts):
    folder = wan_ai(tmp_path, parts)
    before = fingerprint.fingerprint(folder)
    (folder / "README.md").write_text("notes")
    (folder / "Wan2.1_VAE.pth").unlink()
    assert fingerprint.fingerprint(folder) == before
    (folder / "config.json").write_text("{}")
    assert fingerprint.fingerprint(folder) != before


def test_the_identity_of_an_index_is_that_of_all_shards(tmp_path):
    names = [f"m-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file({str(number): torch.ones(3)}, tmp_path / name)
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("01", names, strict=True))}))
    before = fingerprint.fingerprint(index)
    save_file({"1": torch.zeros(3)}, tmp_path / names[1])
    assert fingerprint.fingerprint(index) != before
