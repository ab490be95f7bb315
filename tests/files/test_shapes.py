"""What a whole file has: a file that lacks a tensor is refused when it is read, before anything is downloaded."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from helpers import tiny_transformer
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel
from weight_files import named

from turbo_nb import catalog, layerwise
from turbo_nb.errors import CheckpointError
from turbo_nb.files import shapes
from turbo_nb.files.resolve import resolve
from turbo_nb.settings import LoadOptions
from turbo_nb.sla import set_attention_type

ARCH = catalog.Arch(dim=96, num_heads=2, num_layers=2, ffn_dim=80)
TOKENIZER = catalog.NANO.folder / "tokenizer"
WORDS = 400


@pytest.fixture(scope="module")
def transformer():
    return {name: tensor.contiguous() for name, tensor in tiny_transformer(ARCH, text_dim=64).state_dict().items()}


@pytest.fixture(scope="module")
def encoder():
    config = UMT5Config(
        vocab_size=WORDS, d_model=64, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return layerwise.encoder_tensors(UMT5EncoderModel(config).state_dict())


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKLWan(base_dim=8, z_dim=16).state_dict()


@pytest.mark.parametrize("sla", [True, False])
@pytest.mark.parametrize("arch", [ARCH, catalog.NANO.arch, *(one.arch for one in catalog.MODELS.values())])
def test_shapes_of_a_transformer_are_those_of_the_module(arch, sla):
    with torch.device("meta"):
        model = tiny_transformer(arch, text_dim=24)
        set_attention_type(model, "sla" if sla else "original", 0.1)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes.of_transformer(arch, head_dim=arch.dim // arch.num_heads, text_dim=24, sla=sla) == wanted


def test_shapes_of_a_text_encoder_are_those_of_the_module(encoder):
    assert shapes.of_text_encoder(encoder, 2) == {name: tuple(tensor.shape) for name, tensor in encoder.items()}


def resolved(tmp_path, transformer, encoder=None, vae=None):
    """The model of some tensors; a part that is not given is on the Hub"""
    paths = {"model": transformer, "text_encoder": encoder, "vae": vae}
    for name, tensors in paths.items():
        if tensors is not None:
            (tmp_path / name).mkdir()
            paths[name] = tmp_path / name / "weights.safetensors"
            save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, paths[name])
    return resolve(LoadOptions(**paths, tokenizer=TOKENIZER, device="cpu"))


BLOCK = "blocks.1.ffn.2."
FAULTS = {
    "a missing tensor": ({f"{BLOCK}weight": None}, "1 are missing: blocks.1.ffn.net.2.weight"),
    "a missing bias of the head": ({"head.head.bias": None}, "1 are missing: proj_out.bias"),
    "another shape": ({f"{BLOCK}weight": torch.zeros(3, 3)}, r"has shape \(3, 3\). Expected \(96, 80\)"),
    "a bias of one number": ({"head.head.bias": torch.zeros(())}, r"has shape \(\). Expected \(64,\)"),
    "integers in a bias": ({f"{BLOCK}bias": torch.zeros(96, dtype=torch.int8)}, "ffn.net.2.bias.* is int8"),
    "half of SLA's projections": ({"blocks.1.self_attn.attn_op.local_attn.proj_l.bias": None}, "1 are missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_transformer_is_judged_before_its_other_parts_are_downloaded(tmp_path, transformer, fault):
    change, words = FAULTS[fault]
    tensors = {named(name, "upstream"): tensor for name, tensor in transformer.items()} | change
    with pytest.raises(CheckpointError, match=words):
        resolved(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.mark.parametrize(
    "table",
    [torch.zeros(WORDS), torch.zeros(()), torch.zeros(0, 64), torch.zeros(WORDS, 32), torch.zeros(1, WORDS, 64)],
)
def test_text_encoder_is_judged_before_other_parts_are_downloaded(tmp_path, transformer, encoder, table):
    with pytest.raises(CheckpointError, match="text_encoder") as caught:
        resolved(tmp_path, transformer, encoder | {"shared.weight": table})
    assert ". Expected " in str(caught.value)


def test_text_encoder_without_its_table_is_a_typed_error(tmp_path, transformer, encoder):
    tensors = {name: tensor for name, tensor in encoder.items() if name != "shared.weight"}
    with pytest.raises(CheckpointError, match=r"text_encoder.* Expected "):
        resolved(tmp_path, transformer, tensors | {"shared.bias": torch.zeros(3)})


@pytest.mark.parametrize("weight", [None, torch.zeros(3), torch.zeros(())])
def test_vae_without_its_first_layer_is_a_typed_error(tmp_path, transformer, encoder, vae, weight):
    name = "decoder.conv_in.weight"
    tensors = {key: tensor for key, tensor in vae.items() if key != name} | ({} if weight is None else {name: weight})
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.weight in .*vae.* Expected .*Download"):
        resolved(tmp_path, transformer, encoder, tensors)
