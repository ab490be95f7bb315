"""Every path in Python may begin with `~`, as on the command line."""

import shutil
from pathlib import Path

import pytest

from turbo_nb import batch, catalog, checkpoint
from turbo_nb.batch import manifest, prompts
from turbo_nb.files import convert, layouts, lora, recognise
from turbo_nb.generator.jobs import JobRunner
from turbo_nb.video.gallery import Gallery

LORA = Path(__file__).with_name("files") / "nano_lora.safetensors"
PROMPT = "a small green square growing on a gray background"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with a model, a LoRA and prompts, and another folder as the current one"""
    place = tmp_path / "home"
    shutil.copytree(catalog.NANO.folder, place / "nano")
    shutil.copy(LORA, place / "style.safetensors")
    (place / "prompts.txt").write_text(f"{PROMPT}\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(place))
    return place


READERS = {
    "a checkpoint": lambda: recognise.read("~/nano/vae"),
    "a path object": lambda: recognise.read(Path("~/nano/vae")),
    "a transformer": lambda: checkpoint.load_transformer("~/nano/transformer"),
    "a VAE": lambda: checkpoint.load_vae("~/nano/vae"),
    "a text encoder": lambda: checkpoint.load_text_encoder("~/nano/text_encoder"),
    "a tokenizer": lambda: checkpoint.load_tokenizer("~/nano/tokenizer"),
    "a LoRA": lambda: lora.describe("~/style.safetensors"),
    "a folder": lambda: layouts.describe("~/nano"),
    "prompts": lambda: prompts.read_prompts("~/prompts.txt"),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_is_read_may_be_below_the_home(home, read):
    assert read()


def test_what_is_written_is_below_the_home(home, nano):
    convert.convert("~/nano/vae", "~/converted")
    nano.save_pretrained("~/saved")
    batch.run("~/prompts.txt", nano, "~/batch", num_frames=1, num_steps=1)
    assert {"converted", "saved", "batch"} <= {path.name for path in home.iterdir()}
    assert len(manifest.read_manifest("~/batch")) == 1
    assert Gallery("~/clips").folder == JobRunner.of("~/clips").gallery.folder == home / "clips"
    assert JobRunner.of("~/clips") is JobRunner.of(home / "clips")
    assert list(Path.cwd().iterdir()) == []
