"""The tiny decoder against outputs of the public code (madebyollin/taehv), recorded on random weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from helpers import upstream_names
from safetensors.torch import load_file, save_file

import turbo_nb
from turbo_nb import batch, catalog, preparation
from turbo_nb.catalog import NANO, Arch
from turbo_nb.checkpoint import load_tiny_decoder
from turbo_nb.errors import CheckpointError, DownloadError, InputError
from turbo_nb.files.resolve import resolve
from turbo_nb.generator.colours import Colours
from turbo_nb.pipeline import LoadedModel
from turbo_nb.settings import ClipSettings, LoadOptions
from turbo_nb.tiny_decoder import TinyDecoder
from turbo_nb.video import preview

GOLDEN = Path(__file__).parent / "golden" / "tiny_decoder.safetensors"


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights that the golden frames were recorded with"""
    generator = torch.Generator().manual_seed(seed)
    state = TinyDecoder().state_dict()
    for name in sorted(state):
        shape = state[name].shape
        scale = 0.7 * (2 / shape[1:].numel()) ** 0.5 if len(shape) == 4 else 0.1
        state[name] = torch.randn(shape, generator=generator) * scale
    state["decoder.22.weight"] *= 4  # so that the frames use the range from black to white
    state["decoder.22.bias"] += 0.5
    return state


@pytest.fixture(scope="module")
def decoder():
    made = TinyDecoder().eval()
    made.load_state_dict(random_weights())
    return made


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_frames_are_those_of_the_public_code(decoder, length):
    golden = load_file(GOLDEN)
    frames = torch.cat(list(decoder.chunks(golden["latents"], length)), 2)
    wanted = golden["frames"].mul(2).sub(1)
    assert 0.2 < wanted.std() < 0.6 and frames.shape == (1, 3, 9, 24, 40)
    assert (frames - wanted.clamp(-1, 1)).abs().max() < 5e-5


def test_a_frame_depends_on_earlier_latents_and_not_on_later_ones(decoder):
    latents = load_file(GOLDEN)["latents"]
    before = torch.cat(list(decoder.chunks(latents)), 2)
    latents[:, :, 1] += 1
    changed = (torch.cat(list(decoder.chunks(latents)), 2) != before).flatten(3).any(-1)[0].any(0)
    assert not changed[0] and changed[1:].all()


@pytest.fixture
def write(tmp_path):
    """Write a file as it is published, with an encoder beside the decoder"""

    def write(name: str = "taew2_1.safetensors", **more: torch.Tensor) -> Path:
        state = random_weights() | {"encoder.0.weight": torch.zeros(64, 3, 3, 3), "encoder.1.weight": torch.zeros(4)}
        state |= more
        path = tmp_path / name
        torch.save(state, path) if path.suffix == ".pth" else save_file(state, path)
        return path

    return write


@pytest.mark.parametrize("name", ["taew2_1.safetensors", "taew2_1.pth"])
def test_it_is_loaded_from_the_published_files(write, name, decoder):
    loaded = load_tiny_decoder(write(name))
    golden = load_file(GOLDEN)
    frames = torch.cat(list(loaded.chunks(golden["latents"])), 2)
    assert torch.allclose(frames, torch.cat(list(decoder.chunks(golden["latents"])), 2), atol=5e-5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"decoder.1.weight": torch.zeros(256, 48, 3, 3)}, r"decoder\.1\.weight"),  # that of Wan2.2's 5B model
        ({"decoder.22.bias": torch.full((3,), float("nan"))}, "NaN"),
    ],
)
def test_another_or_damaged_file_is_refused(write, more, words):
    with pytest.raises(CheckpointError, match=words):
        load_tiny_decoder(write(**more))


# ---- as the decoder of a clip


@pytest.fixture
def wan(tmp_path, write):
    """Options of a tiny model with Wan2.1's latents, and of the tiny decoder's file"""
    torch.manual_seed(0)
    arch = Arch(dim=128, num_heads=2, num_layers=1, ffn_dim=128)
    weights = upstream_names(arch, sla=True, int8=False, text_dim=128)
    torch.save(weights, tmp_path / "model.pth")
    torch.save(AutoencoderKLWan(base_dim=8).state_dict(), tmp_path / "Wan2.1_VAE.pth")
    return {
        "model": str(tmp_path / "model.pth"), "vae": tmp_path / "Wan2.1_VAE.pth", "device": "cpu",
        "text_encoder": NANO.folder / "text_encoder", "tokenizer": NANO.folder / "tokenizer", "tiny_decoder": write(),
    }  # fmt: skip


CLIP = {"num_frames": 5, "num_steps": 1, "resolution": "32x32"}


def test_a_clip_is_decoded_by_it(wan, tmp_path, decoder):
    pipeline, seen = turbo_nb.load_pipeline(**wan), []
    clip = turbo_nb.generate(pipeline, "a red circle", **CLIP, decoder="tiny", on_step=lambda *step: seen.append(step))
    frames = torch.cat(list(decoder.chunks(seen[-1][2])), 2)[0].permute(1, 2, 3, 0)
    assert np.abs(clip.frames - frames.add(1).mul(127.5).numpy()).max() <= 0.51
    assert turbo_nb.read_metadata(clip.save(tmp_path / "clip.mp4"))["more"] == {"decoder": "tiny"}
    plain = turbo_nb.generate(pipeline, "a red circle", **CLIP)
    assert "more" not in plain.settings and (plain.frames != clip.frames).any()


def test_the_generator_shows_it_while_a_clip_is_made(wan, tmp_path, monkeypatch):
    pipeline = turbo_nb.load_pipeline(**wan, text_cache=False)
    model, colours = pipeline.turbo_nb, Colours()
    latents = torch.randn(1, 16, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    assert colours.frames(model, latents).shape == (3, 8, 10, 3)  # on a CPU the rough colours
    monkeypatch.setattr(preview, "DECODED_PIXELS", 64 * 80 // 4)
    monkeypatch.setattr(LoadedModel, "device", "cpu:0")  # as if it were a GPU
    shown = colours.frames(model, latents)
    whole = torch.cat(list(model.tiny_decoder().chunks(latents)), 2)[0].add(1).mul(127.5)
    assert shown.shape == (3, 32, 40, 3)
    for number, frame in enumerate((0, 4, 8)):
        small = torch.nn.functional.avg_pool2d(whole[:, frame], 2).round().permute(1, 2, 0)
        assert np.abs(shown[number] - small.numpy()).max() <= 1
    monkeypatch.setattr(model, "plan", replace(model.plan, offload="group"))
    assert colours.frames(model, latents).shape == (3, 8, 10, 3)


def test_a_model_with_its_own_latents_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"decoder is 'tiny'\. Expected full for nano"):
        preparation.preflight(
            ClipSettings(prompt="a red circle", decoder="tiny"), LoadOptions(model="nano"), [tmp_path / "clip.mp4"]
        )
    with pytest.raises(InputError, match="prompt 1: decoder is 'tiny'"):
        batch.run(["a red circle"], "nano", tmp_path, decoder="tiny")


def test_the_file_counts_among_the_downloads_only_where_it_is_wanted(wan):
    resolved = resolve(LoadOptions(**wan | {"tiny_decoder": None}))
    assert resolved.downloads == resolved.decoding("full").downloads == ()
    wanted = resolved.decoding("tiny")
    assert wanted.downloads == (catalog.TINY_DECODER,) and 2e7 < wanted.to_fetch < 3e7
    with pytest.raises(DownloadError, match=r"taew2_1\.safetensors"):  # because the tests have no network
        wanted.fetch()


def test_a_vae_of_another_kind_is_no_tiny_decoder(wan):
    with pytest.raises(CheckpointError, match=r"is a vae.*Expected a tiny decoder"):
        resolve(LoadOptions(**wan | {"tiny_decoder": wan["vae"]}))
