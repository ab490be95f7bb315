"""Every path in Python may begin with `~`, as on the command line, and none may be an address of another place."""

import shutil
from pathlib import Path

import pytest
import typer.testing

import turbo_nb
from turbo_nb import batch, catalog, checkpoint, cli
from turbo_nb.batch import manifest, prompts
from turbo_nb.batch.notebook import run_notebook
from turbo_nb.errors import InputError
from turbo_nb.files import convert, layouts, lora, recognise
from turbo_nb.generator import standalone, widgets
from turbo_nb.generator.jobs import JobRunner
from turbo_nb.machine import environment
from turbo_nb.settings import LoadOptions, RunOptions, options
from turbo_nb.study.rope import judge
from turbo_nb.values import PathLike
from turbo_nb.video import mp4
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


def command(text):
    result = typer.testing.CliRunner().invoke(cli.app, text.split(), env={"COLUMNS": "300"})
    raise InputError(result.output) if result.exit_code == 2 else result.exception


ADDRESS = "s3://bucket/x"
PLACES = {
    "a saved pipeline": lambda nano: nano.save_pretrained(ADDRESS),
    "a converted checkpoint": lambda nano: convert.convert(catalog.NANO.folder / "vae", ADDRESS),
    "a checkpoint to convert": lambda nano: convert.convert(ADDRESS, "out"),
    "a mp4": lambda nano: mp4.Encoder(f"{ADDRESS}.mp4", 16),
    "a mp4 to read": lambda nano: mp4.read_metadata(Path(f"{ADDRESS}.mp4")),
    "a mp4 to play": lambda nano: turbo_nb.play(f"{ADDRESS}.mp4"),
    "a batch": lambda nano: batch.run(["x"], nano, ADDRESS),
    "prompts": lambda nano: batch.run(f"{ADDRESS}.txt", nano, "out"),
    "a manifest": lambda nano: manifest.read_manifest(ADDRESS),
    "a gallery": lambda nano: Gallery(ADDRESS),
    "a checkpoint": lambda nano: recognise.read(f"{ADDRESS}.safetensors"),
    "a LoRA": lambda nano: turbo_nb.set_loras(nano, ADDRESS),
    "a report": lambda nano: judge("cpu", (), (), ()).save(ADDRESS),
    "a notebook": lambda nano: run_notebook("x.ipynb", ADDRESS),
    "turbo-nb t2v": lambda nano: command(f"t2v --prompt x --save_path {ADDRESS}.mp4"),
    "turbo-nb batch": lambda nano: command(f"batch p.txt --output_dir {ADDRESS}"),
    "turbo-nb info": lambda nano: command(f"info {ADDRESS}"),
    "turbo-nb convert": lambda nano: command(f"convert x {ADDRESS}"),
    "turbo-nb notebooks": lambda nano: command(f"notebooks {ADDRESS}"),
    "turbo-nb ui": lambda nano: command(f"ui {ADDRESS}"),
}


@pytest.mark.parametrize("use", PLACES.values(), ids=PLACES)
def test_an_address_is_an_error_before_any_work_and_makes_no_folder(home, nano, use):
    with pytest.raises(InputError, match=r"is .*s3:/+bucket/x.*Expected a path on this machine.* mount"):
        use(nano)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("variable", environment.FOLDERS)
def test_a_variable_that_names_a_folder_takes_no_address(home, monkeypatch, variable):
    monkeypatch.setenv(variable, "~/kept")
    environment.check_folders()
    assert environment.folder_of(variable) == home / "kept"
    monkeypatch.setenv(variable, ADDRESS)
    uses = [lambda: turbo_nb.load_pipeline("nano", device="cpu"), widgets.show, standalone.serve]
    uses += [lambda line=line: command(line) for line in ("t2v --prompt x", "batch p.txt", "download nano", "verify")]
    for use in uses:
        with pytest.raises(InputError, match=rf"{variable} is 's3://bucket/x'\. Expected a path on this machine"):
            use()
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "find"),
    [
        ("TURBO_NB_HOME", environment.cache), ("TURBO_NB_HOME", environment.config),
        ("TURBO_NB_CACHE", environment.text_cache), ("TURBO_NB_CONFIG", environment.config),
        ("TRITON_CACHE_DIR", environment.kernel_cache), ("TURBO_NB_LORAS", lora.folder),
    ],
)  # fmt: skip
def test_a_folder_of_a_variable_is_below_the_home_or_an_error(home, monkeypatch, variable, find):
    for one in environment.FOLDERS:
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setenv(variable, "~/kept")
    assert find().is_relative_to(home / "kept")
    monkeypatch.setenv(variable, f" {ADDRESS}")
    with pytest.raises(InputError, match=f"^{variable} is "):
        find()


@pytest.mark.parametrize("address", ["s3://b/x.mp4", "gs://b/x.mp4", "GS:/b/x.mp4", " s3://b", "file:///x.mp4"])
def test_no_option_that_is_a_path_takes_an_address(address):
    for cls in (LoadOptions, RunOptions):
        for name in (name for name, one in options(cls).items() if isinstance(one.check, PathLike) or name == "loras"):
            with pytest.raises(InputError, match=rf"^{name} is .*Expected a path on this machine"):
                cls(**{name: address})
            if cls is RunOptions:
                with pytest.raises(InputError, match=rf"^{name} is "):
                    cls(**{name: "https://example.com/x.mp4"})
    with pytest.raises(InputError, match=r"^checkpoint is "):
        LoadOptions(checkpoint=("a", address))


def test_an_address_of_the_hub_and_names_with_a_colon_remain():
    assert LoadOptions(model="https://huggingface.co/o/r", loras="high=https://huggingface.co/o/r:0.5")
    for name in ("a:b/x.mp4", "C:/x.mp4", "12:30.mp4", "/s3:/x.mp4"):
        assert RunOptions(save_path=name).save_path == name
