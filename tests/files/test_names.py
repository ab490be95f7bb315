"""Wrappers, copies and naming conventions: what a file's tensors are called makes no difference."""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from helpers import golden, upstream_names
from safetensors.torch import load_file, save_file
from weight_files import CONVENTIONS, named, plain_fp8

from turbo_nb import catalog
from turbo_nb.checkpoint import load_text_encoder, load_transformer, load_vae
from turbo_nb.errors import CheckpointError, collect_warnings
from turbo_nb.files import names
from turbo_nb.files.recognise import read, recognise, require, require_experts

UPSTREAM = golden("dit_state")
BLOCK = re.compile(r"^(blocks\.\d+\.)")


def recognised(state):
    return recognise(state, "model.pth")


def same(contents):
    wanted = recognised(UPSTREAM).tensors
    return contents.tensors.keys() == wanted.keys() and all(
        torch.equal(tensor, wanted[name]) for name, tensor in contents.tensors.items()
    )


@pytest.mark.parametrize(
    "prefix",
    ["net.", "net_ema.", "model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.",
     "_orig_mod.", "module._orig_mod.", "generator.", "model.net.", "pipe.dit.", "wan.", "state_dict.model.",
     "ema.module.", "a.b.c."],
)  # fmt: skip
def test_any_prefix_makes_no_difference(prefix):
    assert same(recognised({prefix + name: tensor for name, tensor in UPSTREAM.items()}))


@pytest.mark.parametrize(
    "piece", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module", "module._orig_mod"]
)
def test_wrappers_inside_a_name_make_no_difference(piece):
    assert same(recognised({BLOCK.sub(rf"\1{piece}.", name): tensor for name, tensor in UPSTREAM.items()}))


ZEROS = {name: torch.zeros_like(tensor) for name, tensor in UPSTREAM.items()}


@pytest.mark.parametrize(
    ("taken", "other"),
    [("net_ema.", "net."), ("ema.", "model."), ("generator.model.", "critic.model."), ("generator_ema.", "generator."),
     ("generator_ema.", "critic_ema."), ("net.", "teacher."), ("", "critic."), ("model_ema.", ""),
     ("module_ema.", "fake_score.")],
)  # fmt: skip
def test_the_averaged_or_best_known_copy_is_taken_and_reported(taken, other):
    state = {taken + name: tensor for name, tensor in UPSTREAM.items()} | {
        other + name: tensor for name, tensor in ZEROS.items()
    }
    for order in (state, dict(reversed(state.items()))):
        contents = recognised(order)
        assert same(contents) and f"of several copies {contents.copy!r}" in str(contents)
        assert contents.copy == (taken.rstrip(".") or "the names without a prefix")


def test_copies_of_equal_rank_are_an_error():
    state = {prefix + name: tensor for prefix in ("a.", "b.") for name, tensor in UPSTREAM.items()}
    with pytest.raises(CheckpointError, match=r"several models: 'a.', 'b.'. Expected one"):
        recognised(state)


def test_a_tensor_under_two_names_is_an_error():
    state = UPSTREAM | {"blocks.0.attn1.to_q.weight": torch.zeros(256, 256)}
    with pytest.raises(CheckpointError, match=r"blocks.0.attn1.to_q.weight under two names"):
        recognised(state)


@pytest.mark.parametrize("model", ["t2v", "vace"])
def test_upstream_names_become_those_of_diffusers_converter(model):
    arch = catalog.Arch(dim=256, num_heads=2, num_layers=3, ffn_dim=512)
    state = upstream_names(arch, sla=False, int8=False, device="meta")
    state |= {f"blocks.{block}.norm2.{end}": torch.zeros(256) for block in range(3) for end in ("weight", "bias")}
    if model == "vace":
        state |= {
            "img_emb.proj.1.weight": 0,
            "blocks.0.cross_attn.k_img.bias": 0,
            "blocks.1.cross_attn.norm_k_img.weight": 0,
        }
    convention = next(one for one in names.CONVENTIONS if one.fits(state))
    wanted = convert_wan_transformer_to_diffusers({name: name for name in state})
    assert convention.name == "upstream" and {convention.rename(name): name for name in state} == wanted


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "base_model.model.", "pipe.dit."])
def test_module_name_finds_a_module_in_any_convention(convention, prefix):
    modules = {name.removesuffix(".weight") for name in recognised(UPSTREAM).tensors if name.endswith(".weight")}
    for module in modules:
        name = prefix + named(f"{module}.weight", convention).removesuffix(".weight")
        assert names.module_name(name, modules.__contains__) == module
    assert names.module_name("diffusion_model.vace_blocks.0.self_attn.q", modules.__contains__) is None


# --- Other members of the family ---


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"vace_blocks.0.self_attn.q.weight": torch.zeros(256, 256)}, "VACE"),
        ({"img_emb.proj.1.weight": torch.zeros(4, 4)}, "Wan2.1's image-to-video"),
        ({"blocks.0.cross_attn.k_img.weight": torch.zeros(256, 256)}, "Wan2.1's image-to-video"),
        ({"motion_encoder.enc.fc.0.weight": torch.zeros(4, 4)}, "Wan-Animate"),
        ({"patch_embedding.weight": torch.zeros(256, 192)}, "TI2V-5B"),
    ],
)
def test_other_wan_models_are_named_and_not_run(more, words):
    contents = recognised(UPSTREAM | more)
    assert words in str(contents)
    with pytest.raises(CheckpointError, match=f"{words}.*Expected a model that turbo_nb runs"):
        require(contents, "transformer")


def test_tiny_decoder_is_named():
    state = {f"{part}.{n}.weight": torch.zeros(4, 4, 3, 3) for part in ("encoder", "decoder") for n in range(3)}
    with pytest.raises(CheckpointError, match=r"is a tiny decoder, .*TAEHV's names.*Expected a vae"):
        require(recognised(state), "vae")


# --- The size of attention heads ---


def without_sla(state):
    return {name: tensor for name, tensor in state.items() if "proj_l" not in name}


def test_head_size_of_a_dense_file_is_that_of_the_known_model():
    state = upstream_names(catalog.NANO.arch, sla=False, int8=False, text_dim=128)
    assert recognised(state).arch == catalog.NANO.arch


def test_head_size_of_a_dense_file_is_that_of_its_config():
    assert recognise(without_sla(UPSTREAM), "m", config={"num_heads": 4}).head_dim == 64
    assert recognise(without_sla(UPSTREAM), "m", config={"num_attention_heads": 2}).head_dim == 128
    assert recognise(without_sla(UPSTREAM), "m", config={"num_heads": "all"}).head_dim == 128


def test_files_with_wrappers_load_from_disk(tmp_path):
    save_file({f"net_ema.{name}": tensor.clone() for name, tensor in UPSTREAM.items()}, tmp_path / "a.safetensors")
    assert same(read(tmp_path / "a.safetensors"))


# --- Experts ---


@pytest.fixture
def expert(tmp_path):
    """Write one expert under a name, and read it"""

    def write(name, channels=36, seed=0):
        torch.manual_seed(seed)
        arch = catalog.Arch(dim=128, num_heads=1, num_layers=1, ffn_dim=64, in_channels=channels)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(upstream_names(arch, sla=True, int8=False, text_dim=32), path)
        return read(path)

    return write


@pytest.mark.parametrize(
    ("first", "second"),
    [("high.safetensors", "low.safetensors"),
     ("high_noise_model/model.safetensors", "low_noise_model/model.safetensors"),
     ("TurboWan2.2-I2V-A14B-high-720P.safetensors", "TurboWan2.2-I2V-A14B-low-720P.safetensors"),
     ("wan2.2_i2v_high_noise_14B_fp8.safetensors", "wan2.2_i2v_low_noise_14B_fp8.safetensors"),
     ("Wan2.2-I2V-HighNoise-Q8.safetensors", "Wan2.2-I2V-LowNoise-Q8.safetensors")],
)  # fmt: skip
def test_swapped_experts_are_told_apart_by_their_names(expert, first, second):
    high, low = expert(first, seed=1), expert(second, seed=2)
    require_experts([high, low])
    with pytest.raises(CheckpointError, match=r"\(low noise\).*\(high noise\). Expected the high-noise expert first"):
        require_experts([low, high])
    with pytest.raises(CheckpointError, match="Swap or replace"):
        require_experts([high, high])


def test_one_expert_twice_is_found_by_its_bytes(expert):
    with pytest.raises(CheckpointError, match="which are the same weights"):
        require_experts([expert("a.safetensors"), expert("b.safetensors")])
    require_experts([expert("a.safetensors"), expert("b.safetensors", seed=1)])


def test_text_to_video_experts_are_named_alone_and_in_pairs(expert):
    high, low = expert("t2v_high.safetensors", 16, 1), expert("t2v_low.safetensors", 16, 2)
    for given in ([high, low], [high], [low]):
        with pytest.raises(CheckpointError, match=r"Wan2.2-T2V-A14B. Expected a model that turbo_nb runs"):
            require_experts(given)
    require_experts([expert("a_high_quality_model.safetensors", 16)])


# --- Several models in one file ---

PREFIXES = {
    "ComfyUI": ("model.diffusion_model.", "vae.", "text_encoders.umt5xxl.transformer."),
    "older ComfyUI": ("model.diffusion_model.", "first_stage_model.", "cond_stage_model."),
    "nested": ("pipe.transformer.", "pipe.vae.", "pipe.text_encoder."),
}


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("form", PREFIXES)
def test_each_model_of_a_whole_checkpoint_is_loaded_from_it(tmp_path, form, fp8):
    transformer, encoder = (load_file(next((catalog.NANO.folder / part).glob("*.safetensors")))
                            for part in ("transformer", "text_encoder"))  # fmt: skip
    parts = {"transformer": transformer, "vae": AutoencoderKLWan(base_dim=8).state_dict(), "text_encoder": encoder}
    if fp8:  # the transformer without scales, the text encoder with them
        parts["transformer"] = plain_fp8(parts["transformer"])
        matrix = "encoder.block.0.layer.0.SelfAttention.q"
        encoder |= {"scaled_fp8": torch.empty(0).to(torch.float8_e4m3fn), f"{matrix}.scale_weight": torch.tensor(1.0),
                    f"{matrix}.weight": encoder[f"{matrix}.weight"].to(torch.float8_e4m3fn)}  # fmt: skip
    whole = {prefix + name: tensor.clone() for prefix, part in zip(PREFIXES[form], parts.values(), strict=True)
             for name, tensor in part.items()}  # fmt: skip
    whole["text_encoders.spiece_model"] = torch.ones(9, dtype=torch.uint8)
    path = tmp_path / "whole.safetensors"
    save_file(whole, path)
    assert "beside a vae and a text encoder" in str(read(path)) and read(path).kind == "transformer"
    for kind, load, part in zip(LOADS, LOADS.values(), parts, strict=True):
        save_file(parts[part], tmp_path / "part.safetensors")
        with collect_warnings() as warned:
            expected, found = load(tmp_path / "part.safetensors").state_dict(), load(path).state_dict()
        assert not [one for one in warned if "no part of the model takes" in one and "spiece" not in one], kind
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert "spiece_model" in read(path, "text encoder").tensors


LOADS = {"transformer": load_transformer, "vae": load_vae, "text encoder": load_text_encoder}
