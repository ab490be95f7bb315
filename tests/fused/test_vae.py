"""A fused VAE decodes and encodes to what diffusers' own makes of it, in chunks of any length, and comes out again."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d, WanEncoder3d

from turbo_nb import backends
from turbo_nb.fused import vae as fused_vae

WAN = {"base_dim": 16, "num_res_blocks": 1}
RESIDUAL = {  # as Wan2.2's and nano's
    "base_dim": 16, "num_res_blocks": 1, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True],
    "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
}  # fmt: skip


def make(config):
    torch.manual_seed(0)
    model = AutoencoderKLWan(**config).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "bias")):  # which are all one, or nearly zero, untrained
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def decode(model, z):
    with torch.inference_mode():
        return model.decode(z, return_dict=False)[0]


def encode(model, clip):
    with torch.inference_mode():
        return model.encode(clip, return_dict=False)[0].parameters


def latents(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [WAN, RESIDUAL], ids=["Wan2.1", "residual"])
@pytest.mark.parametrize("shape", [(1, 16, 1, 3, 5), (2, 16, 2, 4, 3), (1, 16, 6, 2, 2)], ids=str)
def test_chunks_of_any_length_decode_to_diffusers_frames(config, shape):
    model, z = make(config), latents(*shape)
    before, names = decode(model, z), list(model.state_dict())
    assert fused_vae.fuse(model) is None and list(model.state_dict()) == names
    for length in (1, 2, 3, 9):
        with torch.inference_mode():
            parts = list(fused_vae.chunks(model, z, length))
        assert [part.shape[2] for part in parts[1:-1]] == [4 * length] * len(parts[1:-1])
        torch.testing.assert_close(torch.cat(parts, 2), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(decode(model, z), before, rtol=0, atol=1e-5)
    assert model.decode(z).sample.shape == before.shape


@pytest.mark.parametrize("config", [WAN, RESIDUAL], ids=["Wan2.1", "residual"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 32, 48), (2, 3, 5, 48, 32), (1, 3, 23, 32, 32)], ids=str)
def test_chunks_of_any_length_encode_to_diffusers_latents(config, shape, monkeypatch):
    model, clip = make(config), latents(*shape).clamp(-1, 1)
    before = encode(model, clip)
    assert fused_vae.fuse(model) is None
    for length in (1, 2, 9):
        monkeypatch.setattr(fused_vae, "chunk_length", lambda *_, length=length: length)
        torch.testing.assert_close(encode(model, clip), before, rtol=0, atol=1e-5)
    fused_vae.unfuse(model)
    assert "_encode" not in vars(model) and type(model.encoder) is WanEncoder3d
    torch.testing.assert_close(encode(model, clip), before, rtol=0, atol=1e-5)


def test_tiles_and_slices_decode_and_encode_as_before():
    model, z, clip = make(WAN), latents(2, 16, 2, 6, 5), latents(2, 3, 5, 48, 40).clamp(-1, 1)
    model.enable_tiling(32, 32, 24, 24)
    model.enable_slicing()
    before, encoded = decode(model, z), encode(model, clip)
    fused_vae.fuse(model)
    torch.testing.assert_close(decode(model, z), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(encode(model, clip), encoded, rtol=0, atol=1e-5)
    assert len(list(fused_vae.chunks(model, z[:1], 1))) == 1


def test_unfuse_and_a_copy():
    model, z = make(WAN), latents(1, 16, 2, 2, 3)
    fused_vae.fuse(model)
    other = copy.deepcopy(model)
    model.decoder.conv_out.bias.add_(0.5)
    assert (decode(model, z) - decode(other, z)).abs().max() > 0.1  # a copy decodes with its own parameters
    fused_vae.unfuse(other)
    assert type(other.decoder) is WanDecoder3d and "_decode" not in vars(other)
    torch.testing.assert_close(decode(other, z), decode(make(WAN), z), rtol=0, atol=1e-5)


def test_what_is_of_another_make_stays():
    class Other(WanDecoder3d):
        pass

    class Another(WanEncoder3d):
        pass

    model, z, clip = make(WAN), latents(1, 16, 3, 2, 3), latents(1, 3, 9, 16, 16)
    model.decoder.__class__ = Other
    before, encoded = decode(model, z), encode(model, clip)
    assert fused_vae.fuse(model) == "a Other is no decoder of diffusers'" and type(model.decoder) is Other
    torch.testing.assert_close(decode(model, z), before, rtol=0, atol=1e-5)  # in chunks all the same
    model.encoder.__class__ = Another
    assert fused_vae.fuse(model) == "a Other is no decoder of diffusers', a Another is no encoder of diffusers'"
    torch.testing.assert_close(encode(model, clip), encoded, rtol=0, atol=1e-5)


def test_the_kernels_decode_and_encode_the_same(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("tests/kernels runs them on the GPU")
    pytest.importorskip("triton")
    from turbo_nb.ops.conv import triton_conv

    model, z, clip = make(RESIDUAL), latents(1, 16, 3, 2, 2), latents(1, 3, 5, 32, 32).clamp(-1, 1)
    exact, encoded = decode(model, z), encode(model, clip)
    model = torch.nn.Module.to(model, torch.float16)
    plain, plainly = (decode(model, z.half()) - exact).norm(), (encode(model, clip.half()) - encoded).norm()
    fused_vae.fuse(model)
    monkeypatch.setattr(fused_vae, "_kernels", lambda module, x: triton_conv)
    assert 0 < (decode(model, z.half()) - exact).norm() < 1.1 * plain
    assert 0 < (encode(model, clip.half()) - encoded).norm() < 1.1 * plainly


def test_what_the_kernels_do_not_take_is_left_to_diffusers(monkeypatch):
    monkeypatch.setattr(backends, "on_triton", lambda operation, x: x.dtype == torch.bfloat16)
    on_gpu = type("Latents", (), {"is_cuda": True, "dtype": torch.bfloat16})
    assert fused_vae._kernels(make(WAN).decoder, on_gpu).__name__.endswith("triton_conv")
    assert fused_vae._kernels(make(WAN | {"base_dim": 8}).decoder, on_gpu) is None  # 8 channels are too few
    assert fused_vae._kernels(make(WAN).encoder, on_gpu) is not None  # whose pictures have 3, which are filled up
    on_gpu.dtype = torch.float32
    assert fused_vae._kernels(make(WAN).decoder, on_gpu) is None
