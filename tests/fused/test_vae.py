"""A fused VAE decodes and encodes to what diffusers' own makes of it, in chunks of any length, and comes out again."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanDecoder3d, WanEncoder3d
from helpers import choose_triton, interpret_kernels

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


@pytest.mark.parametrize("sides", [(1, 1), (7, 1), (2, 7)], ids=str)
def test_attention_within_a_picture_has_the_same_bits_in_a_chunk_of_any_length(sides):
    block, x = WanAttentionBlock(384).requires_grad_(False), latents(1, 3, sides[0] + 2, sides[1] + 2, 384)
    parts = [fused_vae._attention(block, picture.clone()) for picture in x.split(1, 1)]
    assert torch.equal(fused_vae._attention(block, x), torch.cat(parts, 1))


def test_tiles_and_slices_decode_and_encode_as_before_where_no_frame_fits(monkeypatch):
    monkeypatch.setattr(fused_vae, "chunk_length", lambda *_: 0)
    model, z, clip = make(WAN), latents(2, 16, 2, 6, 5), latents(2, 3, 5, 48, 40).clamp(-1, 1)
    model.enable_tiling(32, 32, 24, 24)
    model.enable_slicing()
    before, encoded = decode(model, z), encode(model, clip)
    fused_vae.fuse(model)
    torch.testing.assert_close(decode(model, z), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(encode(model, clip), encoded, rtol=0, atol=1e-5)
    assert len(list(fused_vae.chunks(model, z[:1]))) == len(list(fused_vae.chunks(model, z[:1], 0))) == 1


def test_a_vae_with_tiling_works_without_tiles_where_a_frame_fits():
    model, z, clip = make(WAN), latents(1, 16, 2, 6, 5), latents(1, 3, 5, 48, 40).clamp(-1, 1)
    before, encoded = decode(model, z), encode(model, clip)
    fused_vae.fuse(model)
    model.enable_tiling(32, 32, 24, 24)
    torch.testing.assert_close(decode(model, z), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(encode(model, clip), encoded, rtol=0, atol=1e-5)
    assert len(list(fused_vae.chunks(model, z))) == 2


def test_a_vae_with_tiling_encodes_in_tiles_where_memory_runs_out(monkeypatch):
    model, clip = make(WAN), latents(1, 3, 5, 48, 40).clamp(-1, 1)
    full = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))  # noqa: E731
    fused_vae.fuse(model)
    monkeypatch.setattr(fused_vae, "_encode_in_chunks", full)
    with pytest.raises(torch.OutOfMemoryError):
        encode(model, clip)
    model.enable_tiling(32, 32, 24, 24)
    plain = make(WAN)
    plain.enable_tiling(32, 32, 24, 24)
    torch.testing.assert_close(encode(model, clip), encode(plain, clip), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("gigabytes", "frames"), [(8.5, 0), (9, 1), (16, 2), (40, 4)])
def test_a_chunk_has_as_many_latent_frames_as_fit_in_free_memory(gigabytes, frames, monkeypatch):
    told = {"mem_get_info": (gigabytes * 1e9 - 0.5e9, 0), "memory_reserved": 1e9, "memory_allocated": 0.5e9}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    norm = SimpleNamespace(gamma=torch.empty(96, 1, 1, 1))
    vae = SimpleNamespace(config=SimpleNamespace(patch_size=None), decoder=SimpleNamespace(norm_out=norm))
    x = SimpleNamespace(is_cuda=True, device="cuda", element_size=lambda: 2)
    monkeypatch.setattr(fused_vae.backends, "kernel", lambda *_: "a kernel")
    assert fused_vae.chunk_length(vae, x, 1280 * 720) == frames
    monkeypatch.setattr(fused_vae.backends, "kernel", lambda *_: None)
    assert fused_vae.chunk_length(vae, x, 1280 * 720) == 1  # the reference takes more memory


def test_a_copy_of_a_fused_vae_has_its_own_parameters():
    model, z = make(WAN), latents(1, 16, 2, 2, 3)
    fused_vae.fuse(model)
    other = copy.deepcopy(model)
    model.decoder.conv_out.bias.add_(0.5)
    assert (decode(model, z) - decode(other, z)).abs().max() > 0.1
    torch.testing.assert_close(decode(other, z), decode(make(WAN), z), rtol=0, atol=1e-5)


def test_what_is_of_another_make_stays():
    class Other(WanDecoder3d):
        pass

    class Another(WanEncoder3d):
        pass

    model, z, clip = make(WAN), latents(1, 16, 3, 2, 3), latents(1, 3, 9, 16, 16)
    model.decoder.__class__ = Other
    before, encoded = decode(model, z), encode(model, clip)
    assert fused_vae.fuse(model) == "a Other is not diffusers' decoder" and type(model.decoder) is Other
    torch.testing.assert_close(decode(model, z), before, rtol=0, atol=1e-5)  # in chunks all the same
    model.encoder.__class__ = Another
    assert fused_vae.fuse(model) == "a Other is not diffusers' decoder, a Another is not diffusers' encoder"
    torch.testing.assert_close(encode(model, clip), encoded, rtol=0, atol=1e-5)


def test_the_kernels_decode_and_encode_the_same(monkeypatch):
    model, z, clip = make(RESIDUAL), latents(1, 16, 3, 2, 2), latents(1, 3, 5, 32, 32).clamp(-1, 1)
    exact, encoded = decode(model, z), encode(model, clip)
    model = torch.nn.Module.to(model, torch.float16)
    plain, plainly = (decode(model, z.half()) - exact).norm(), (encode(model, clip.half()) - encoded).norm()
    fused_vae.fuse(model)
    choose_triton(monkeypatch)
    interpret_kernels(monkeypatch)
    assert backends.function("rimmed_conv", z).__module__.endswith("conv.reference")  # 2 is not a multiple of 16
    assert backends.function("rms_norm_silu", z).__module__.endswith("triton_conv")
    assert 0 < (decode(model, z.half()) - exact).norm() < 1.1 * plain
    assert 0 < (encode(model, clip.half()) - encoded).norm() < 1.1 * plainly


def test_what_the_kernels_do_not_take_is_left_to_diffusers(monkeypatch):
    choose_triton(monkeypatch)
    on_gpu = SimpleNamespace(
        is_cuda=True, is_floating_point=lambda: True, element_size=lambda: 2, get_device=lambda: 0,
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert fused_vae.takes(make(WAN).decoder, on_gpu)
    assert not fused_vae.takes(make(WAN | {"base_dim": 8}).decoder, on_gpu)  # 8 channels are too few
    assert fused_vae.takes(make(WAN).encoder, on_gpu)  # whose pictures have 3, which are padded to 16
    on_gpu.element_size = lambda: 4
    assert not fused_vae.takes(make(WAN).decoder, on_gpu)
