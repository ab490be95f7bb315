"""The tiny decoder against outputs of the public code (madebyollin/taehv), recorded on random weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbo_nb.checkpoint import load_tiny_decoder
from turbo_nb.errors import CheckpointError
from turbo_nb.tiny_decoder import TinyDecoder

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
