"""A GPU without bfloat16 (T4): float16 throughout, gathered key blocks, and umT5 in float32 from 16-bit weights."""

from functools import partial

import pytest
import torch
from diffusers import AutoencoderKLWan
from helpers import assert_close, golden, set_machine, write_upstream
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from turbo_nb import backends, generation, layerwise, linear, pipeline
from turbo_nb.checkpoint import load_text_encoder, load_transformer, load_vae
from turbo_nb.errors import TurboNbError
from turbo_nb.fused import vae as fused_vae
from turbo_nb.machine.probe import Library, Machine
from turbo_nb.ops.attention import gathered
from turbo_nb.ops.attention import reference as attention_reference
from turbo_nb.ops.compare import psnr
from turbo_nb.ops.linear8 import dequantized
from turbo_nb.sla import attention_type

ROUNDING = 6e-4  # of float16
GOLDEN = 6e-3  # of a whole model; its outputs were recorded in bfloat16, whose rounding they carry
GOLDEN_INT8 = 1e-2  # upstream's activations are in 8 bits, and these are not


@pytest.fixture
def t4(monkeypatch):
    """A machine whose every device, the CPU too, is a T4"""
    here = Machine(gpu="Tesla T4", gpu_count=1, arch=(7, 5), libraries={"triton": Library(version="3.6.0")})
    monkeypatch.setattr(Machine, "on", lambda self, device: self)
    set_machine(monkeypatch, here)
    monkeypatch.setattr(backends, "_half_on_gpu", lambda tensors: all(x.element_size() == 2 for x in tensors))


def random(*shape, seed=0, dtype=torch.float16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_a_gpu_computes_in_what_it_has(monkeypatch, arch, expected):
    set_machine(monkeypatch, Machine(gpu="a card", gpu_count=1, arch=arch))
    assert backends.number_format("cuda:0") is backends.number_format() is expected
    assert backends.number_format("cpu") is torch.float32


@pytest.mark.parametrize("length", [63, 300, 512, 1000])
@pytest.mark.parametrize("topk", [0.1, 1.0])
def test_gathered_blocks_give_the_attention_of_the_reference(monkeypatch, length, topk):
    monkeypatch.setitem(gathered.GATHERED, "cpu", 1 << 18)  # several parts
    q, k, v = (random(2, length, 3, 64, seed=seed) for seed in range(3))
    weight, bias = random(64, 64, seed=3, dtype=torch.float32), random(64, seed=4, dtype=torch.float32)
    rest = weight, bias, topk, 128, 64
    kept = attention_reference.block_map(q, k, topk, 128, 64)
    monkeypatch.setattr(attention_reference, "block_map", lambda *_: kept)  # a tie may fall either way
    exact = attention_reference.sparse_linear_attention(q.float(), k.float(), v.float(), *rest)
    out = gathered.sparse_linear_attention(q, k, v, *rest)
    assert out.dtype is torch.float16 and out.is_contiguous()
    assert_close("gathered", exact, out.float(), ROUNDING)


def test_sums_over_the_sequence_do_not_overflow():
    q, k, v = (random(1, 4096, 1, 64, seed=seed) for seed in range(3))
    q[..., 0] = k[..., 0] = 30  # the whole φ falls on one channel, so that its sums are those of v
    v += 40
    weight, bias = torch.eye(64), torch.zeros(64)
    out = gathered.sparse_linear_attention(q, k, v, weight, bias, 0.1, 128, 64)
    assert out.isfinite().all() and abs(out.float().mean() - 80) < 1  # both parts are means of v


def test_an_8_bit_linear_is_as_exact_as_its_weight(t4):
    x, bias = random(2, 100, 320), random(264, seed=1)
    quantized = linear.int8_quantize(random(264, 320, seed=2, dtype=torch.float32))
    exact = x.float() @ linear.int8_dequantize(*quantized).T + bias.float()
    out = linear.int8_linear(x, *quantized, bias)
    assert out.dtype is torch.float16
    assert_close("linear", exact, out.float(), ROUNDING)
    assert not linear.takes_rows("cuda")  # files keep their tiles


@pytest.mark.parametrize(("file", "state"), [("bf16", "dit_state"), ("int8", "dit_state_int8")])
@pytest.mark.parametrize("attention", ["sla", "original"])
@pytest.mark.filterwarnings("ignore")  # dense attention leaves proj_l out
def test_one_forward_equals_upstream(t4, monkeypatch, tmp_path, file, state, attention):
    io = golden("dit_io")
    path = write_upstream(tmp_path / "dit.pth", state=state)
    model = load_transformer(path, attention_type=attention, sla_topk=0.4, dtype=torch.float16)
    assert attention_type(model) == attention and model.dtype is torch.float16
    used = []
    for module, name in ((gathered, "sparse_attention"), (dequantized, "int8_dequantize")):
        monkeypatch.setattr(module, name, partial(noted, used, getattr(module, name)))
    with torch.no_grad():
        out = model(io["x"].half(), io["t"], io["ctx"].half(), return_dict=False)[0]
    assert out.dtype is torch.float16
    assert_close(
        f"{file} {attention}", io[f"out.{attention}.{file}"], out.float(), GOLDEN_INT8 if file == "int8" else GOLDEN
    )
    assert ("sparse_attention" in used, "int8_dequantize" in used) == (attention == "sla", file == "int8")


def noted(used, function, *arguments):
    used.append(function.__name__)
    return function(*arguments)


def test_the_vae_equals_upstream(t4, monkeypatch, tmp_path):
    torch.save(golden("vae_state"), tmp_path / "vae.pth")
    io = golden("vae_io")
    vae = load_vae(tmp_path / "vae.pth", dtype=torch.float16)
    assert fused_vae.fuse(vae) is None
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.inference_mode():
        frames = torch.cat(list(fused_vae.chunks(vae, (io["z"] * std + mean).half(), 1)), 2)
        z = (vae.encode(io["video"].half()).latent_dist.mode().float() - mean) / std
    assert frames.dtype is torch.float16
    assert_close("decode", io["dec"].clamp(-1, 1), frames.float(), GOLDEN)
    assert_close("encode", io["z"], z, GOLDEN)


def test_a_frame_that_exceeds_float16_is_an_error_and_not_a_white_picture():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=16, num_res_blocks=1).half().requires_grad_(False).eval()
    fused_vae.fuse(vae)
    vae.decoder.conv_out.bias.fill_(torch.inf)
    with torch.inference_mode(), pytest.raises(TurboNbError, match=r"65504.*--decoder tiny"):
        list(fused_vae.chunks(vae, random(1, 16, 1, 2, 2)))


IDS = torch.tensor([[5, 17, 3, 1, 0, 0], [9, 1, 0, 0, 0, 0]])


def test_umt5_in_float32_takes_the_memory_of_its_16_bit_file(tmp_path):
    torch.manual_seed(0)
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
        )
    ).eval()
    state = {
        name: tensor.bfloat16().contiguous()
        for name, tensor in model.state_dict().items()
        if "embed_tokens" not in name
    }
    save_file(state, tmp_path / "umt5.safetensors")
    found = load_text_encoder(tmp_path / "umt5.safetensors", dtype=torch.float32, in_16_bits=True)
    plain = load_text_encoder(tmp_path / "umt5.safetensors", dtype=torch.float32)
    out, expected = (one(IDS, (IDS > 0).long())[0] for one in (found, plain))
    assert found.dtype is out.dtype is torch.float32
    assert_close("umT5", expected, out, 1e-6)
    small = sum(x.numel() for name, x in state.items() if not layerwise.is_large(name))
    total = sum(x.numel() for x in state.values())
    assert sum(parameter.nbytes for parameter in found.parameters()) == 2 * total + 2 * small


def test_nano_makes_the_same_clip_in_float16(nano, monkeypatch):
    expected = generation.generate(nano, "a large red circle", seed=3, num_frames=5).frames
    monkeypatch.setattr(backends, "number_format", lambda device=None: torch.float16)
    pipe = pipeline.load_pipeline("nano", device="cpu", text_cache=False)
    assert pipe.transformer.dtype is pipe.vae.dtype is torch.float16
    frames = generation.generate(pipe, "a large red circle", seed=3, num_frames=5).frames
    assert psnr(frames, expected) > 45
    with pipe.turbo_nb.prompt_encoder.loaded():
        assert pipe.text_encoder.dtype is torch.float32  # umT5 exceeds float16
