"""Checkpoints into diffusers folders: what is refused before work, and what a LoRA that does not fit says."""

import os
import shutil
from unittest.mock import Mock

import pytest
import torch
from helpers import write_upstream
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from turbo_nb import catalog
from turbo_nb.checkpoint import load_transformer
from turbo_nb.errors import CheckpointError, InputError, OutputError
from turbo_nb.files import convert as module
from turbo_nb.files.convert import convert

NANO = catalog.NANO.folder / "transformer" / "diffusion_pytorch_model.safetensors"
Q = "diffusion_model.blocks.{}.self_attn.q.lora_{}.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_upstream(tmp_path_factory.mktemp("source") / "model.pth")


def save_lora(path, blocks=(0, 1), up=1.0, key=Q):
    state = {}
    for block in blocks:
        state[key.format(block, "A")] = torch.ones(4, 256)
        state[key.format(block, "B")] = torch.full((256, 4), up)
    save_file(state, path)
    return str(path)


@pytest.mark.parametrize("taken", ["out", "out/transformer"])
def test_file_in_the_place_of_the_folder_is_refused_before_work(source, tmp_path, monkeypatch, taken):
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("mine")
    monkeypatch.setattr(module, "_load", lambda contents: pytest.fail("loaded"))
    with pytest.raises(OutputError, match=rf"{taken}' is a file. Expected a folder"):
        convert(source, tmp_path / "out")
    assert (tmp_path / taken).read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "words"), [("n" * 300, "too long"), ("\0", "null"), ("closed", "ermission"), ("closed/new", "ermission")]
)
def test_folder_that_cannot_be_written_is_refused_before_work(source, tmp_path, monkeypatch, name, words):
    (tmp_path / "closed").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path) and access(path, mode))
    monkeypatch.setattr(module, "_load", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(OutputError, match=f"cannot be written .*{words}"):
        convert(source, f"{tmp_path}/{name}")


@pytest.mark.parametrize("error", [SafetensorError("No space left on device (os error 28)"), OSError(28, "No space")])
def test_full_disk_raises_output_error(source, tmp_path, monkeypatch, error):
    def full(*arguments, **settings):
        raise error

    monkeypatch.setattr("diffusers.models.modeling_utils.safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match=r"cannot be written .*No space.* Free some space"):
        convert(source, tmp_path / "out")


def test_shards_that_are_converted_in_their_folder_stay_until_the_new_file_is_written(tmp_path, monkeypatch):
    place, ref = tmp_path / "transformer", load_file(NANO)
    place.mkdir()
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file({key: ref[key] for key in sorted(ref)[number::2]}, place / name)
    (place / "config.json").symlink_to(shutil.copy(NANO.parent / "config.json", tmp_path / "mine.json"))
    before, mine = {path.name: path.read_bytes() for path in place.iterdir()}, (tmp_path / "mine.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(
            "diffusers.models.modeling_utils.safetensors.torch.save_file", Mock(side_effect=OSError(28, ""))
        )
        with pytest.raises(OutputError):
            convert(place, tmp_path)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    convert(place, tmp_path)
    assert sorted(path.name for path in place.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    made = load_file(place / "diffusion_pytorch_model.safetensors")
    assert made.keys() == ref.keys() and all(torch.equal(made[key], ref[key]) for key in ref)
    assert (tmp_path / "mine.json").read_bytes() == mine


def test_low_noise_is_for_a_transformer(tmp_path):
    with pytest.raises(InputError, match=r"low_noise is True, and .* is a vae"):
        convert(NANO.parents[1] / "vae", tmp_path, low_noise=True)


def test_folder_that_stays_empty_raises_output_error(source, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.WanTransformer3DModel.save_pretrained", lambda self, place: None)
    with pytest.raises(OutputError, match="nothing was written"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [{"up": 0.0}, {"key": "elsewhere.{}.q.lora_{}.weight"}, {"blocks": (7, 8)}],
    ids=["zeros", "foreign names", "foreign blocks"],
)
def test_lora_that_changes_nothing_raises_checkpoint_error(source, tmp_path, settings):
    lora = save_lora(tmp_path / "lora.safetensors", **settings)
    with pytest.raises(CheckpointError, match=r"is zero in all 2 tensors|match no tensor of this model"):
        convert(source, tmp_path / "out", loras=[lora])
    assert not (tmp_path / "out").exists()


def test_keys_of_a_lora_that_match_nothing_are_counted_and_named(source, tmp_path):
    lora = save_lora(tmp_path / "lora.safetensors", blocks=(0, 7))
    with pytest.warns(UserWarning, match=r"2 of the 4 keys of .*lora.*: diffusion_model.blocks.7.self_attn.q.lora_A"):
        told = convert(source, tmp_path / "out", loras=[lora])
    assert "with 1 LoRA merged: 1 tensors changed" in told
    ours, theirs = (load_transformer(path).state_dict() for path in (tmp_path / "out" / "transformer", source))
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == ["blocks.0.attn1.to_q.weight"]


def test_half_a_lora_raises_checkpoint_error(source, tmp_path):
    save_file(
        {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(4, 256)}, tmp_path / "lora.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"lora_down.weight in .* is without lora_up"):
        convert(source, tmp_path / "out", loras=[str(tmp_path / "lora.safetensors")])
