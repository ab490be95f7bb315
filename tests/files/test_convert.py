"""Checkpoints into diffusers folders: what is refused before work, and what a LoRA that does not fit says."""

import os

import pytest
import torch
from helpers import write_upstream
from safetensors import SafetensorError
from safetensors.torch import save_file

from turbo_nb.checkpoint import load_transformer
from turbo_nb.errors import CheckpointError, OutputError
from turbo_nb.files import convert as module
from turbo_nb.files.convert import convert

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
