"""The list of LoRAs in the generator: rows, clips of different strengths with one load, restoring, and errors."""

import dataclasses
import html
import os
import shutil
from pathlib import Path

import ipywidgets as w
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from turbo_nb import pipeline, settings
from turbo_nb.errors import TurboNbError
from turbo_nb.files import hub, lora
from turbo_nb.generator import choices
from turbo_nb.generator.form import CUSTOM
from turbo_nb.generator.jobs import JobRunner
from turbo_nb.generator.page import family
from turbo_nb.generator.widgets import Generator
from turbo_nb.records import LoRARecord, VideoRecord
from turbo_nb.settings import LoadOptions
from turbo_nb.values import LoRAFile
from turbo_nb.video import mp4

FILE = Path(__file__).parents[1] / "files" / "nano_lora.safetensors"
I2V = "TurboWan2.2-I2V-A14B-720P"
COLOURS = {"black": (0, 0, 0), "navy": (20, 30, 95), "blue": (40, 90, 235)}
SMALL = {
    "prompt": "a large yellow triangle growing on a black background", "num_frames": 5, "num_steps": 2,
    "resolution": "64x64", "seed": 8,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of LoRAs, with nano's in it"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(lora.FOLDER, raising=False)
    place = tmp_path / "loras"
    place.mkdir()
    shutil.copy(FILE, place / "blue.safetensors")
    return place


@pytest.fixture
def loads():
    """One entry for each load of a model: its attention"""
    return []


@pytest.fixture
def runner(folder, loads):
    def load(resolved, **more):
        loads.append(resolved.attention_type)
        return pipeline.load(resolved, **more)

    return JobRunner("clips", load=load)


@pytest.fixture
def generator(runner):
    """The generator at the smallest clip with a background"""
    made = Generator(runner)
    fill(made, prompt=SMALL["prompt"], resolution=CUSTOM, custom="64x64", num_frames=5, num_steps=2)
    fill(made, random_seed=False, seed=8)
    yield made
    made.close()


def fill(generator, **values):
    for name, value in values.items():
        field = generator.form.fields.get(name)
        control = (
            field.widget if field else generator.form.prompt.text if name == "prompt" else getattr(generator.form, name)
        )
        control.value = str(value) if name == "seed" else value


def add(generator, strength=1.0):
    generator.form.loras.add_row.click()
    row = generator.form.loras.rows[-1]
    row.strength.value = strength
    return row


def make(generator):
    generator.run.generate.click()
    generator.runner.wait(120)
    return generator.runner.job


def background(clip):
    """The usual colour along the upper and the lower edge of a clip"""
    frames = mp4.read_frames(clip.path, 64, 64)
    return np.median(np.concatenate([frames[:, :6].reshape(-1, 3), frames[:, -6:].reshape(-1, 3)]), 0)


def shows(clip, colour):
    return np.linalg.norm(background(clip) - COLOURS[colour]) < 40


def alerts(generator):
    shown = [str(getattr(one, "value", "")) for one in family(generator.root)]
    return [html.unescape(text) for text in shown if 'role="alert"' in text]


def warning(generator):
    """What the gallery warns of"""
    message = generator.clips.view.message
    return message.get("text", "") if message.get("alert") else ""


def broken(path, change):
    save_file({key: change(key, tensor) for key, tensor in load_file(FILE).items()}, path)


def test_strengths_change_the_clip_and_the_model_is_loaded_once(generator, loads):
    assert shows(make(generator).clip, "black")
    row = add(generator, 0.5)
    half = make(generator).clip
    row.slider.value = 1.0
    whole = make(generator).clip
    assert (row.strength.value, loads) == (1.0, ["sla"]) and shows(half, "navy") and shows(whole, "blue")
    assert [[(one.name, one.strength) for one in clip.record.loras] for clip in (half, whole)] == [
        [("blue.safetensors", 0.5)], [("blue.safetensors", 1.0)]
    ]  # fmt: skip
    row.remove.click()
    assert generator.form.request.load.loras == ()
    plain = make(generator).clip
    assert loads == ["sla"] and shows(plain, "black") and plain.record.loras == []


def test_same_loras_touch_no_weight_and_another_model_takes_them_along(runner, loads, monkeypatch):
    merges, set_loras = [], pipeline.set_loras
    monkeypatch.setattr(pipeline, "set_loras", lambda *args: merges.append(args[1]) or set_loras(*args))
    asked = [(FILE, 0.5)]
    clips = [runner.make(**SMALL | {"seed": seed}, loras=asked) for seed in (8, 9)]
    assert (loads, merges) == (["sla"], []) and shows(clips[0], "navy")  # merged while the model was loaded
    assert runner.make(**SMALL, loras=asked, attention_type="original").record.loras == clips[0].record.loras
    assert loads == ["sla", "original"] and merges == []
    assert shows(runner.make(**SMALL, attention_type="original"), "black") and merges == [()]  # loaded with it


def test_strengths_of_two_loras_add_up(generator, folder, loads):
    shutil.copy(FILE, folder / "more.safetensors")
    generator.form.loras.refresh_list.click()
    first, second = add(generator, 0.5), add(generator, 0.5)
    assert [Path(row.file.value).name for row in (first, second)] == ["blue.safetensors", "more.safetensors"]
    assert shows(make(generator).clip, "blue")
    second.strength.value = 0.0
    assert shows(make(generator).clip, "navy")
    first.remove.click()
    assert shows(make(generator).clip, "black") and loads == ["sla"]
    assert second.file.description == "LoRA 1"


def test_file_that_was_replaced_is_merged_anew(generator, folder, loads):
    add(generator)
    assert shows(make(generator).clip, "blue")
    broken(folder / "new", lambda key, tensor: tensor / 2 if "lora_up" in key else tensor)
    os.replace(folder / "new", folder / "blue.safetensors")
    assert shows(make(generator).clip, "navy") and loads == ["sla"]


def test_moving_a_slider_reads_no_lora_again(generator, monkeypatch):
    row, read = add(generator), []
    monkeypatch.setattr(lora, "read", lambda path: read.append(path) or pytest.fail(f"reads {path}"))
    for strength in (0.1, 0.2, -2.0):
        row.slider.value = strength
        assert generator.form.request.load.loras[0].strength == strength
    assert read == [] and alerts(generator) == []


def test_slider_and_number_show_one_strength(generator):
    row = add(generator, 0.33)
    assert row.slider.value == 0.33
    row.slider.value = 0.95 + 2e-16
    assert row.strength.value == generator.form.loras.value[0].strength == 0.95
    row.strength.value = 5
    assert row.slider.value == generator.form.loras.value[0].strength == 2.0


def test_choice_of_model_and_estimate_know_no_lora(generator, tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path / "cache"))
    resolved, resolve = [], choices.resolve
    monkeypatch.setattr(
        choices, "resolve", lambda options, **more: resolved.append(options) or resolve(options, **more)
    )
    monkeypatch.setattr(hub, "fetch", lambda *_, **__: pytest.fail("downloads"))
    make(generator)
    before = generator.run.outlook.value
    row = add(generator, 0.3)
    assert generator.run.outlook.value == before and "from 1 earlier video" in before
    fill(generator, model=I2V)
    assert "blue.safetensors' is made for a tensor of shape" in alerts(generator)[0]
    assert [one.loras for one in resolved] == [()] * len(resolved)
    row.remove.click()
    (words,) = alerts(generator)
    assert "not on the disk" in words and "81 frames of 1280x720" in generator.run.outlook.value


def test_error_of_a_lora_is_on_the_page_and_the_earlier_loras_stay(generator, folder, loads):
    broken(folder / "nan.safetensors", lambda key, tensor: tensor * float("nan"))
    broken(folder / "wide.safetensors", lambda key, tensor: tensor.repeat(2, 1) if "lora_up" in key else tensor)
    broken(folder / "zero.safetensors", lambda key, tensor: torch.zeros_like(tensor) if "lora_up" in key else tensor)
    generator.form.loras.refresh_list.click()
    first = add(generator)
    assert shows(make(generator).clip, "blue")
    row, job = add(generator), generator.runner.job
    for name, words in (("nan", "holds NaN"), ("wide", "made for a tensor of shape"), ("zero", "is zero in all")):
        row.file.value = str(folder / f"{name}.safetensors")
        assert [words in text for text in alerts(generator)] == [True]
        generator.run.generate.click()
        assert generator.runner.job is job and [words in text for text in alerts(generator)] == [True]
    row.remove.click()
    assert alerts(generator) == []
    assert [one.strength for one in generator.runner.choices.model.resolved.loras] == [1.0]
    first.strength.value = 0.5
    assert shows(make(generator).clip, "navy") and loads == ["sla"]


def test_merge_that_overflows_fails_the_job_and_the_earlier_loras_stay(runner, loads, folder):
    broken(folder / "huge.safetensors", lambda key, tensor: tensor.float() * 1e25)
    runner.make(**SMALL, loras=[(FILE, 1.0)])
    with pytest.raises(TurboNbError, match="is NaN or Inf with"):
        runner.make(**SMALL, loras=[(folder / "huge.safetensors", 1.0)])
    assert [one.strength for one in runner.choices.model.resolved.loras] == [1.0]
    assert shows(runner.make(**SMALL, loras=[(FILE, 1.0)]), "blue") and loads == ["sla"]


def test_each_load_finds_out_anew_what_a_lora_changes(folder):
    changed = []

    def load(resolved, **more):
        changed.append([len(one.changed) for one in resolved.loras])
        return pipeline.load(resolved, **more)

    runner = JobRunner("clips", load=load)
    for attention in ("sla", "original"):
        runner.make(**SMALL, loras=[FILE], attention_type=attention)
        assert runner.choices.model.resolved.loras[0].changed
    assert changed == [[0], [0]]


@pytest.mark.parametrize("loaded", [False, True], ids=["loading", "loaded"])
def test_keys_that_match_nothing_are_a_note_of_the_job(generator, folder, loaded):
    tensors = load_file(FILE) | {"diffusion_model.blocks.99.ffn.0.lora_down.weight": torch.ones(2, 2),
                                 "diffusion_model.blocks.99.ffn.0.lora_up.weight": torch.ones(2, 2)}  # fmt: skip
    save_file(tensors, folder / "blue.safetensors")
    if loaded:
        make(generator)
    add(generator)
    assert [f"2 of the {len(tensors)} keys" in note for note in make(generator).notes] == [True]


def test_use_these_settings_restores_loras(generator, folder):
    shutil.copy(FILE, folder / "more.safetensors")
    generator.form.loras.refresh_list.click()
    add(generator, 0.35)
    add(generator, -0.2)
    clip = make(generator).clip
    wanted = generator.form.request.load.loras
    generator.form.loras.rows[0].remove.click()
    generator.form.loras.rows[0].strength.value = 2
    generator.clips._use(clip)
    assert generator.form.request.load.loras == wanted and warning(generator) == ""
    plain = dataclasses.replace(clip, record=dataclasses.replace(clip.record, loras=[]))
    generator.clips._use(plain)
    assert generator.form.loras.rows == []


def test_missing_file_of_a_clip_is_named(generator, folder):
    add(generator, 0.5)
    clip = make(generator).clip
    os.rename(folder / "blue.safetensors", folder / "azure.safetensors")
    generator.clips._use(clip)
    words = warning(generator)
    assert f"Not restored:\nLoRAs: blue.safetensors is not in {str(folder)!r}" in words
    assert generator.form.loras.rows == [] and len(generator.form.loras.listing.files) == 1
    job = generator.runner.job
    generator.clips._vary(clip)
    assert generator.runner.job is job  # because it would be another clip
    broken(folder / "blue.safetensors", lambda key, tensor: tensor * 2)
    generator.clips._use(clip)
    assert "blue.safetensors in" in warning(generator) and "another content" in warning(generator)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"strength": 3.5}, "the strength 3.5 of blue.safetensors is not on the page"),
        ({"strength": float("nan")}, "the strength nan of"),
        ({"expert": "<b>"}, "the expert <b> of blue.safetensors"),
        ({"name": "../../etc/passwd"}, "../../etc/passwd is not in"),
    ],
)
def test_foreign_metadata_name_what_is_not_restored(generator, more, words):
    record = LoRARecord(**{"name": "blue.safetensors", "hash": "0", "strength": 1.0} | more)
    assert words in generator.form.loras.restore([record])["loras"] and generator.form.loras.rows == []
    assert VideoRecord(loras=[record])


def test_two_experts_are_chosen_by_row(generator, folder):
    row = add(generator)
    assert row.expert.disabled and row.expert.layout.display == "none"
    fill(generator, model=I2V)
    row.expert.value = "low"
    later = add(generator)
    assert not later.expert.disabled and later.expert.layout.display is None
    file = str(folder / "blue.safetensors")
    assert generator.form.loras.value == (LoRAFile(file=file, expert="low"), LoRAFile(file=file))
    fill(generator, model="nano")
    assert generator.form.loras.value == (LoRAFile(file=file), LoRAFile(file=file)) and alerts(generator) == []


def test_without_a_lora_the_section_is_one_line(generator, folder):
    (folder / "blue.safetensors").unlink()
    loras = generator.form.loras
    loras.refresh_list.click()
    assert f"Put their files into '{folder}', or set TURBO_NB_LORAS" in html.unescape(loras.note.value)
    assert loras.add_row.layout.display == "none" and loras.rows == [] and len(loras.box.children[0].children) == 0
    loras.add_row.click()
    assert loras.rows == []
    shutil.copy(FILE, folder / "a<b>.safetensors")
    (folder / "page.safetensors").write_text("<html>")
    loras.refresh_list.click()
    assert loras.add_row.layout.display is None and "Left out: page.safetensors is a web page." in loras.note.value


def test_folder_that_cannot_be_read_is_words_beside_the_list(runner, tmp_path, monkeypatch):
    monkeypatch.setenv(lora.FOLDER, str(FILE))
    made = Generator(runner)
    assert "cannot be read (Not a directory)" in made.form.loras.note.value
    made.close()


def test_refresh_keeps_the_row_of_a_file_that_is_gone(generator, folder):
    row = add(generator, 0.5)
    (folder / "blue.safetensors").unlink()
    shutil.copy(FILE, folder / "a.safetensors")
    generator.form.loras.refresh_list.click()
    assert row.file.label == "blue.safetensors (missing)" and row.strength.value == 0.5
    assert "no LoRA" in alerts(generator)[0] and "blue.safetensors" in alerts(generator)[0]
    row.file.value = str(folder / "a.safetensors")
    assert alerts(generator) == []


def test_rows_have_names_and_tooltips_and_leave_nothing_behind(generator):
    generator.form.loras.add_row.click()
    before = len(w.widgets.widget._instances)
    row = add(generator)
    controls = [row.file, row.expert, row.slider, row.strength]
    assert [one.description for one in controls] == ["LoRA 2", "Experts 2", "Strength 2", "Strength 2 as a number"]
    assert {one.tooltip for one in controls} == {settings.options(LoadOptions)["loras"].help}
    assert (row.remove.description, row.remove.tooltip) == ("Remove", "Remove: LoRA 2")
    assert (row.slider.min, row.slider.max, row.slider.step) == (-2.0, 2.0, 0.05)
    row.remove.click()
    assert len(w.widgets.widget._instances) == before
