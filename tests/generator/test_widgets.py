"""The generator's widgets, driven as a person would: values set, buttons clicked, and what the page says read."""

import builtins
import html
import io
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import comm
import ipywidgets as w
import numpy as np
import pytest
import torch
from helpers import golden, upstream_names, write_upstream
from PIL import Image

import turbo_nb
from turbo_nb import backends, catalog, presets, records, settings, values
from turbo_nb.batch.queue import QueueFile, QueueRecord
from turbo_nb.errors import DownloadError, InputError, OutputError
from turbo_nb.files import hub, hub_cache, lora, recognise
from turbo_nb.files.resolve import ResolvedModel
from turbo_nb.generator import controls, form, gallery, models, run, widgets
from turbo_nb.generator.choices import Choices
from turbo_nb.generator.controls import OWN
from turbo_nb.generator.form import CUSTOM
from turbo_nb.generator.jobs import JobRunner
from turbo_nb.generator.page import family
from turbo_nb.generator.parts import Part
from turbo_nb.generator.request import Job, Request
from turbo_nb.generator.widgets import Generator
from turbo_nb.machine import environment
from turbo_nb.settings import ClipSettings, LoadOptions
from turbo_nb.video import images, mp4
from turbo_nb.video.gallery import Gallery


@pytest.fixture
def runner(tmp_path, nano, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return JobRunner("clips", load=lambda *_, **__: nano)


@pytest.fixture
def generator(runner):
    """The generator at the smallest clip it can make"""
    made = Generator(runner)
    fill(made, prompt="a large red circle", resolution=CUSTOM, custom="64x64", num_frames=5, num_steps=1)
    fill(made, random_seed=False, seed=7)
    yield made
    made.runner.clear()
    made.runner.cancel()
    made.runner.wait(60)
    made.close()


def fill(generator: Generator, **values) -> None:
    """Set controls, by the option's name or the form's own"""
    form = generator.form
    for name, value in values.items():
        if name in form.fields:
            form.fields[name].widget.value = str(value) if name == "seed" else value
        elif name == "prompt":
            form.prompt.text.value = value
        else:
            getattr(form, name).value = value


def make(generator: Generator) -> None:
    generator.run.generate.click()
    generator.runner.wait(60)


def page(widget: w.Widget) -> str:
    """All that is on the page: texts, descriptions and shown HTML"""
    parts = []
    for one in family(widget):
        parts += [str(getattr(one, name, "")) for name in ("description", "value")]
        parts += [out["data"].get("text/html", "") for out in getattr(one, "outputs", ())]
    return "\n".join(parts)


def buttons(generator: Generator, text: str) -> list[w.Button]:
    return [one for one in family(generator.root) if isinstance(one, w.Button) and one.description == text]


def act(generator: Generator, action: str, kind: str = "act") -> None:
    """Press a button of the latest clip"""
    view = generator.clips.view
    name = view.items[0]["name"]
    view._handle_custom_msg({"kind": kind, "action": action, "name": name, "names": [name]}, [])


def offered(generator: Generator) -> list[str]:
    return [label for _, label in generator.clips.view.actions]


def problem(generator: Generator) -> str:
    """What the gallery warns of"""
    message = generator.clips.view.message
    return message.get("text", "") if message.get("alert") else ""


def test_generate_makes_a_clip_and_plays_it_large(generator):
    assert not generator.run.generate.disabled and generator.run.cancel.disabled
    generator.run.say("The form has the settings of a clip.")
    make(generator)
    assert generator.run.note.value == "" and generator.run.note.layout.display == "none"
    assert "Done with seed 7" in generator.run.status.value
    times = r"denoise (less than )?\d+\.\d s \(steps (\d+\.\d\d, )*\d+\.\d\d\), decode .*, write "
    assert re.search(times, generator.run.status.value)
    assert not generator.run.generate.disabled and generator.run.cancel.disabled and generator.run.preview.value == ""
    path, shown = generator.runner.job.clip.path, generator.result.player.clip
    assert shown["name"] == path.name and "64x64, 5 frames, 1 steps, seed 7" in shown["facts"]
    assert mp4.read_metadata(path)["num_frames"] == 5
    assert [item["name"] for item in generator.clips.view.items] == [path.name]


def test_the_page_shows_what_is_going_on(generator):
    seen = []
    fill(generator, num_steps=2)
    generator.runner.listen(lambda job: seen.append((generator.run.status.value, generator.run.preview.value)))
    make(generator)
    running = [status for status, _ in seen if "progressbar" in status]
    assert "Denoise, step 2 of 2" in "".join(running) and "Decode, 5 of 5 frames" in "".join(running)
    assert all('aria-label="Progress of the clip"' in status and 'role="status"' in status for status in running)
    shares = [float(re.search(r"width:([\d.]+)%", status)[1]) for status in running]
    assert shares == sorted(shares) and len(set(shares)) > 4
    assert any("data:image/webp" in preview and "alt=" in preview for _, preview in seen)


def test_the_bar_moves_every_second(generator, monkeypatch):
    monkeypatch.setattr(widgets, "TICK", 0.02)
    go, generate = threading.Event(), generator.runner._generate
    generator.runner._generate = lambda *args, **more: go.wait(30) and generate(*args, **more)
    generator.run.generate.click()
    seen = set()
    deadline = time.monotonic() + 30
    while len(seen) < 4 and time.monotonic() < deadline:
        seen.add(generator.run.status.value)
    go.set()
    generator.runner.wait(60)
    assert len(seen) >= 4 and "Done" in generator.run.status.value


def test_cancel(generator):
    fill(generator, num_steps=4)
    generator.runner.listen(lambda job: job.done == 1 and job.running and generator.run.cancel.click())
    make(generator)
    assert "Cancelled; nothing was written" in generator.run.status.value and generator.clips.view.items == []


def test_errors_are_words_on_the_page(generator):
    fill(generator, custom="<b>")
    assert "&lt;b&gt;" in generator.run.outlook.value and "<b>" not in generator.run.outlook.value


WRONG = [  # control, a wrong value, a right value, and what the page says of the wrong one
    ("prompt", "  ", "a red circle", "The prompt is empty"),
    ("num_frames", 6, 9, "Frames is 6. Expected 4n + 1 (1, 5, 9, …). Take 5."),
    ("seed", "12 34", 12, "Seed is '12 34'. Expected a whole number"),
    ("seed", -1, 12, "Seed is -1. Expected a whole number"),
    ("sigma_max", 1.0, 80.0, "First noise level is 1.0. Expected a number above"),
    ("custom", "100000x100000", "64x64", "Size is '100000x100000'. Expected sides"),
    ("custom", "a x b", "64 × 64", "Size is 'a x b'. Expected 480p, 720p, WIDTHxHEIGHT"),
]


def test_an_error_is_shown_once_in_the_page_s_words_and_goes_with_its_cause(generator):
    make(generator)
    for control, wrong, right, words in WRONG:
        fill(generator, **{control: wrong})
        shown = html.unescape(page(generator.root))
        assert shown.count('role="alert"') == shown.count(words) == 1 and generator.run.generate.disabled, shown
        assert words in html.unescape(generator.run.outlook.value)
        generator.run.start()
        assert generator.runner.jobs == [] and len(generator.runner.gallery.clips()) == 1
        fill(generator, **{control: right})
        assert 'role="alert"' not in page(generator.root) and not generator.run.generate.disabled, control


@pytest.mark.parametrize(
    ("place", "name", "action"),
    [
        (JobRunner, "submit_all", lambda page: page.run.generate.click()),
        (Choices, "outlook", lambda page: fill(page, num_frames=9)),
        (Choices, "resolve", lambda page: fill(page, model="TurboWan2.1-T2V-14B-720P")),
        (JobRunner, "download", lambda page: page.models.download.click()),
        (models.fits, "every_fit", lambda page: page.models.compare.toggle.set_trait("value", True)),
        (presets, "save", lambda page: page.presets.save.click()),
        (presets, "delete", lambda page: page.presets.delete.click()),
        (JobRunner, "take_over", lambda page: page.queue.resume.click()),
        (images, "load_image", lambda page: page.form.image.path.set_trait("value", "a.png")),
        (gallery, "restore", lambda page: page.clips._act("use", SimpleNamespace(record=None, path=Path("a.mp4")))),
        (presets, "built_in", lambda page: page.presets.choice.set_trait("value", "fast")),
        (lora, "available", lambda page: page.form.loras.refresh_list.click()),
        (JobRunner, "cancel", lambda page: queued(page) and page.queue.clear.click()),
        (JobRunner, "_end", lambda page: queued(page) and page.run.cancel.click()),
        (JobRunner, "_end", lambda page: queued(page) and page.keys._handle_custom_msg({"kind": "cancel"}, [])),
        (Gallery, "find", lambda page: page.clips.view.set_trait("words", "red")),
        (run, "_status", lambda page: page.runner._notify(queued(page))),
        (Choices, "tokenizer", lambda page: wait_for_hint(page)),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_an_error_that_nobody_expects_is_on_the_page(generator, monkeypatch, place, name, action):
    """ipywidgets only logs what a callback raises."""

    def fail(*_, **__):
        raise RuntimeError("the disk <hums>")

    monkeypatch.setattr(place, name, fail)
    action(generator)
    monkeypatch.undo()
    shown = html.unescape(page(generator.root)) + problem(generator)
    assert "unexpected RuntimeError: the disk <hums>" in shown
    fill(generator, model="nano", prompt="a small red circle")
    assert not generator.run.generate.disabled and "hums" not in generator.run.outlook.value


def test_the_error_of_generate_stays_until_the_form_changes(generator, monkeypatch):
    def fail(*_, **__):
        raise OutputError("the disk is full")

    monkeypatch.setattr(JobRunner, "submit_all", fail)
    generator.run.generate.click()
    generator.form.prompt._read_tokenizer(generator.form.spec, LoadOptions(model="nano"))
    job = Job(request=generator.form.request, state="finished")
    generator._on_change(job)
    assert "the disk is full" in generator.run.outlook.value and not generator.run.generate.disabled
    fill(generator, prompt="a small red circle")
    assert "the disk is full" not in generator.run.outlook.value


def test_a_clip_that_cannot_be_started_is_refused_before_generate(generator, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fill(generator, noise_device="cuda")
    assert "torch sees no GPU" in generator.run.outlook.value and generator.run.generate.disabled
    fill(generator, noise_device="cpu")
    assert not generator.run.generate.disabled


@pytest.mark.parametrize("text", ["128x64", "128 x 64", "128×64", " 128 X 64 "])
def test_a_size_in_any_spelling(generator, text):
    fill(generator, custom=text)
    assert "5 frames of 128x64" in generator.run.outlook.value and not generator.run.generate.disabled


def test_a_size_that_is_not_typed_yet_is_a_hint_and_no_error(generator):
    fill(generator, custom=" ")
    assert "such as 128 x 128" in generator.run.outlook.value and 'role="alert"' not in generator.run.outlook.value
    assert generator.run.generate.disabled
    fill(generator, custom="128 x 64")
    assert "5 frames of 128x64" in generator.run.outlook.value and not generator.run.generate.disabled


def test_a_clip_that_takes_weeks_is_refused(generator, monkeypatch):
    monkeypatch.setattr(environment, "memory", lambda: environment.Memory(available=None, total=None))
    make(generator)
    fill(generator, custom="16384x16384", num_frames=4093, num_steps=4)
    assert "days. Take a smaller size" in generator.run.outlook.value and generator.run.generate.disabled


def test_no_message_has_the_name_of_a_flag():
    for text in (
        "num_frames is 6. Expected 4n + 1.", "image is None. Expected a picture (--image_path), because nano",
        "attention_type 'sagesla' cannot run here. Use --attention_type sla", "adaptive_resolution keeps its aspect",
        "boundary is 0.9. Leave it out.",
    ):  # fmt: skip
        assert not re.search(r"--|[a-z]_[a-z]|^[a-z]", controls.in_page_words(text)), controls.in_page_words(text)


def test_what_was_typed_is_escaped(generator, tmp_path):
    evil = 'a red circle <img src=x onerror="alert(1)"> & \'"'
    fill(generator, prompt=evil)
    make(generator)
    os.rename(generator.runner.job.clip.path, tmp_path / "clips" / 'a"><script>x</script>.mp4'.replace("/", "%2f"))
    again = Generator(generator.runner)
    shown, (item,) = page(again.root), again.clips.view.items
    again.close()
    assert item["words"] == evil and item["name"].startswith('a"><script>')  # its script puts them in as text
    assert "<img src=x" not in shown.replace(evil, "") and "<script" not in shown


def test_the_outlook_is_shown_before_the_run(tmp_path, monkeypatch, generator):
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path / "cache"))
    fill(generator, num_steps=2)
    estimate = generator.run.outlook
    assert "5 frames of 64x64" in estimate.value
    assert "time: not known before the first run of this model on this machine</p>" in estimate.value
    assert "memory:" in estimate.value
    make(generator)
    assert re.search(r"(about |less than )\d+\.\d s, from 1 earlier video here", estimate.value)
    fill(generator, model="TurboWan2.1-T2V-14B-720P")
    assert "81 frames of 1280x720" in estimate.value and "no live preview" not in estimate.value
    assert "Long English prompts" in generator.form.prompt.hint.value
    fill(generator, model="nano")
    fill(generator, prompt="a cat")
    assert "only knows moving shapes" in generator.form.prompt.hint.value


@pytest.mark.parametrize("kind", images.FORMATS)
def test_the_upload_offers_every_kind_of_image_that_opens(generator, kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    Image.init()
    offered = generator.form.image.upload.accept.split(",")
    suffixes = [suffix for suffix, one in Image.registered_extensions().items() if one == kind]
    known = Image.MIME[kind].startswith("image/") and kind != "HEIF"  # browsers do not know HEIF
    assert "image/*" in offered if known else {".heic", ".heif"} <= {*suffixes} & {*offered}


def test_an_image_has_a_place_where_the_model_takes_one(generator, tmp_path, monkeypatch):
    image, needed = generator.form.image, "This model begins with an image"
    assert image.box.layout.display == "none"
    monkeypatch.setattr(ResolvedModel, "downloads", ())
    fill(generator, model="TurboWan2.2-I2V-A14B-720P")
    assert image.box.layout.display is None and generator.form.request.clip.image is None
    assert needed in generator.run.outlook.value and generator.run.generate.disabled
    file = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(file, "PNG")
    entry = {
        "name": "<b>.png",
        "type": "image/png",
        "size": 1,
        "last_modified": datetime.now(),
        "content": file.getvalue(),
    }
    image.upload.set_trait("value", (entry,))
    assert generator.form.request.clip.image.size == (64, 32) and "&lt;b&gt;.png" in image.note.value
    assert needed not in generator.run.outlook.value
    fill(generator, model="nano")
    assert generator.form.request.clip.image is None and generator.form.image.size is None
    image.path.value = str(tmp_path / "none.png")
    assert image.picture is None and "Expected a png" in image.note.value


def test_the_gallery_gives_settings_back(generator):
    fill(generator, sla_topk=0.5)
    make(generator)
    fill(generator, prompt="a small blue square", num_frames=9, num_steps=4)
    fill(generator, resolution=OWN, sla_topk=0.1, random_seed=True)
    act(generator, "use")
    request = generator.form.request
    assert (request.clip.prompt, request.clip.num_frames, request.clip.num_steps) == ("a large red circle", 5, 1)
    assert (request.clip.seed, request.clip.resolution, request.load.sla_topk) == (7, "64x64", 0.5)
    act(generator, "vary")
    generator.runner.wait(60)
    seeds = [run.settings["seed"] for run in generator.runner.gallery.clips()]
    assert len(seeds) == 2 and seeds[0] != 7 and int(generator.form.fields["seed"].widget.value) == seeds[0]


def test_every_setting_of_a_clip_comes_back(generator):
    wanted = {
        "prompt": "a small green square", "num_frames": 9, "num_steps": 2, "seed": 5, "attention_type": "sla",
        "sla_topk": 0.3, "quant_linear": False, "ode": True, "sigma_max": 120.0, "noise_device": "cpu",
    }  # fmt: skip
    fill(generator, **wanted)
    make(generator)
    fill(
        generator, prompt="x", num_frames=5, num_steps=1, seed=1, attention_type="original", sla_topk=0.1,
        quant_linear="auto", ode=False, sigma_max=80.0, noise_device="cuda", random_seed=True, resolution=OWN,
    )  # fmt: skip
    act(generator, "use")
    request = generator.form.request
    assert {name: vars(request.clip).get(name, vars(request.load).get(name)) for name in wanted} == wanted
    assert request.clip.resolution == "64x64" and not request.random_seed and problem(generator) == ""


def put_clip(generator: Generator, **metadata) -> None:
    """Put a clip with this metadata into the gallery"""
    path = generator.runner.gallery.folder / "other.mp4"
    mp4.write_mp4(path, np.zeros((5, 32, 64, 3), np.uint8), 8, metadata)
    generator.clips.show()


WHOLE = {
    "model": "nano", "prompt": "a red circle", "seed": 3, "num_steps": 2, "num_frames": 5, "width": 32, "height": 32,
    "sigma_max": 90.0, "ode": True, "noise_device": "cuda", "attention_type": "sla", "sla_topk": 0.2,
    "quant_linear": True,
}  # fmt: skip


def test_dense_attention_has_no_topk_to_restore(generator):
    put_clip(generator, **WHOLE | {"attention_type": "original", "sla_topk": None})
    act(generator, "use")
    assert problem(generator) == "" and generator.form.request.load.attention_type == "original"


def test_the_attention_is_at_first_the_models_own(generator):
    assert generator.form.fields["attention_type"].widget.label == "the model's own"
    assert generator.form.request.load.attention_type is None


def test_a_grid_gives_the_size_of_a_clip_and_the_first_seed_and_names_the_others(generator):
    put_clip(generator, **WHOLE | {"seed": [11, 12]})
    assert "seed 11 12" in generator.clips.view.items[0]["facts"]
    act(generator, "use")
    request = generator.form.request
    assert (request.clip.seed, request.clip.resolution, request.clip.noise_device) == (11, "32x32", "cuda")
    assert request.load.quant_linear is True
    assert "11 is the first of a grid of 11, 12" in problem(generator)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model": "mine"}, "Model: 'mine' is not in this list"),
        ({"num_steps": 50}, "Steps: 50 is not on the page"),
        ({"attention_type": "flash"}, "Attention: flash is not on the page"),
        ({"attention_type": "sagesla"}, "Attention: sagesla is not on the page"),
        ({"seed": []}, "Seed: the file does not give it"),
        ({"width": None}, "Size: the file does not give it"),
        ({"attention_type": None}, "Attention: the file does not give it"),
        ({"sla_topk": None}, "SLA top-k: the file does not give it"),
        ({"sigma_max": "loud"}, "First noise level: the file does not give it"),
    ],
)
def test_what_cannot_be_restored_is_on_the_page(generator, more, words):
    put_clip(generator, **WHOLE | more)
    act(generator, "use")
    message = problem(generator)
    assert message.startswith(f"Not restored:\n{words}") and message.count("\n") == 1
    assert generator.form.request.clip.ode
    act(generator, "vary")
    message = problem(generator)
    if "seed" in more:
        generator.runner.wait(60)
    else:
        assert "Not started" in message and words in message and generator.runner.job is None


@pytest.mark.parametrize(("name", "value"), [("seed", 2**53 + 1), ("seed", 1125899906842624123), ("sla_topk", 0.005)])
def test_a_number_survives_the_page_exactly(generator, name, value):
    put_clip(generator, **WHOLE | {name: value})
    act(generator, "use")
    request = generator.form.request
    assert vars(request.clip).get(name, vars(request.load).get(name)) == value and problem(generator) == ""


@pytest.mark.parametrize(
    "metadata", [{"prompt": 5}, {"a": 1}, {"seed": None, "width": [], "timings": "long", "steps": {}, "machine": 7}]
)
def test_foreign_metadata_raise_nothing(generator, metadata):
    put_clip(generator, **metadata)
    for action in ("use", "vary"):
        act(generator, action)
    assert "Model: the file does not give it" in problem(generator) and generator.runner.job is None


@pytest.mark.parametrize(
    "metadata",
    [
        {"model": "x" * 9000},
        {"attention_type": "x" * 9000},
        {"loras": [{"name": "x" * 300, "hash": "0", "strength": 1.0}] * 60},
        {"loras": [{"name": "x", "hash": "0", "strength": 1.0, "expert": "x" * 9000}]},
    ],
)
def test_a_reason_for_foreign_metadata_is_short(generator, metadata):
    put_clip(generator, **WHOLE | metadata)
    act(generator, "use")
    assert len(problem(generator)) < 2000


def test_the_image_comes_back_from_its_path_and_else_is_asked_for(generator, tmp_path):
    Image.new("RGB", (64, 32), "red").save(tmp_path / "red.png")
    whole = WHOLE | {"model": "TurboWan2.2-I2V-A14B-720P", "boundary": 0.8, "image": str(tmp_path / "red.png")}
    put_clip(generator, **whole)
    act(generator, "use")
    clip = generator.form.request.clip
    assert (clip.image, clip.boundary, clip.adaptive_resolution) == (str(tmp_path / "red.png"), 0.8, False)
    assert generator.form.image.size == (64, 32) and problem(generator) == ""
    (tmp_path / "red.png").unlink()
    act(generator, "use")
    assert "Image: choose it again" in problem(generator) and generator.form.request.clip.image is None


def test_every_option_of_a_clip_has_a_control_and_an_explanation(generator):
    fields = generator.form.fields
    assert set(settings.options(ClipSettings)) - set(fields) == {
        "prompt", *settings.PICTURES, "adaptive_resolution", "resolution", "aspect_ratio", "extend_clip"
    }  # fmt: skip
    for cls, names in ((ClipSettings, None), (LoadOptions, ("attention_type", "sla_topk", "quant_linear"))):
        for name in names or (name for name in settings.options(cls) if name in fields):
            assert fields[name].widget.tooltip == settings.options(cls)[name].help
            words = controls.HELP.get(name, settings.options(cls)[name].help)
            assert words in html.unescape(fields[name].box.children[1].value)
    assert fields["num_frames"].widget.max == settings.MAX_FRAMES
    assert [value for _, value in fields["noise_device"].widget.options] == ["cpu", "cuda"]
    toggle, content = generator.form.advanced.children
    assert content.layout.display == "none"
    toggle.value = True
    assert content.layout.display is None
    assert fields["boundary"].widget.disabled and generator.form.request.clip.boundary is None
    for name, why in controls.UNUSED.items():
        fill(generator, attention_type="original", model="nano")
        assert fields[name].widget.disabled and why in fields[name].box.children[1].value
        fill(generator, attention_type="sla", model="TurboWan2.2-I2V-A14B-720P")
        assert not fields[name].widget.disabled and why not in fields[name].box.children[1].value


def test_the_tiny_decoder_is_offered_where_it_fits_and_counts_among_the_downloads(generator):
    decoder = generator.form.fields["decoder"]
    assert decoder.widget.disabled  # nano
    fill(generator, model="TurboWan2.1-T2V-1.3B-480P")
    assert not decoder.widget.disabled
    card = generator.models
    before = card._runner.choices.resolve(card._options).downloads
    decoder.widget.value = "tiny"
    assert generator.form.outline.clip.decoder == card._decoder == "tiny"
    asked = []
    card._runner.download = lambda options, name: asked.append((options.model, name))
    card._on_download()
    assert asked == [("TurboWan2.1-T2V-1.3B-480P", "tiny")]
    wanted = card._runner.choices.resolve(card._options).decoding("tiny").downloads
    assert wanted == (*before, catalog.TINY_DECODER)
    fill(generator, model="nano")
    assert decoder.widget.disabled and generator.form.outline.clip.decoder == "full"


def test_a_late_update_of_another_thread_does_not_hide_an_error(generator, monkeypatch):
    """The thread that reads a tokenizer updates the page with the model that was chosen when it began"""
    choices, begun = generator.runner.choices, threading.Event()
    outlook = choices.outlook

    def slow(*arguments):
        monkeypatch.setattr(choices, "outlook", outlook)
        made = outlook(*arguments)
        begun.set()
        time.sleep(0.3)
        return made

    monkeypatch.setattr(choices, "outlook", slow)
    thread = threading.Thread(target=generator.run.update)
    thread.start()
    begun.wait(30)
    fill(generator, num_frames=6)
    thread.join()
    assert "Frames is 6" in generator.run.outlook.value and generator.run.generate.disabled


def test_a_late_hint_of_another_thread_does_not_hide_that_of_the_present_prompt(generator, monkeypatch):
    prompt, begun = generator.form.prompt, threading.Event()
    advice = prompt._advice

    def slow():
        monkeypatch.setattr(prompt, "_advice", advice)
        made = advice()
        begun.set()
        time.sleep(0.3)
        return made

    fill(generator, prompt="a large red circle")
    monkeypatch.setattr(prompt, "_advice", slow)
    thread = threading.Thread(target=prompt.show)
    thread.start()
    begun.wait(30)
    fill(generator, prompt="a cat")
    thread.join()
    assert "only knows moving shapes" in prompt.hint.value


def test_sagesla_is_offered_where_it_runs(generator):
    field = generator.form.fields["attention_type"]
    offered = [value for _, value in field.widget.options]
    can = backends.choose("sagesla").chosen is not None
    assert ("sagesla" in offered) == can and ("SageSLA cannot run here" in field.box.children[1].value) == (not can)


@pytest.mark.parametrize("model", ["nope", "gone/mine.pth"])
def test_a_model_that_cannot_be_read_is_the_error_on_the_page(tmp_path, monkeypatch, model):
    words = f"unknown model {model!r}"
    monkeypatch.chdir(tmp_path)
    made = widgets.show("clips", model=model)
    assert made.run.generate.disabled
    assert words in html.unescape(made.run.outlook.value)
    own = ("num_frames", "sigma_max", "boundary", "resolution")
    assert [getattr(made.form.outline.clip, name) for name in own] == [None] * 4
    assert made.form.outline.load.sla_topk is None
    fill(made, sigma_max=100.0)
    assert made.form.outline.clip.sigma_max == 100.0
    fill(made, model="nano")
    assert made.form.fields["sigma_max"].widget.value == made.form.spec.sigma_max
    fill(made, model=model)
    assert words in html.unescape(made.run.outlook.value) and made.form.outline.clip.sigma_max is None
    made.close()


def test_an_empty_optional_text_stands_for_none(runner, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class WithText(ClipSettings):
        negative_prompt: str | None = settings._option(None, values.Text("text"), "What not to show.", "clip", row=True)

    monkeypatch.setattr(form, "ClipSettings", WithText)
    monkeypatch.setattr(form, "MORE", (*form.MORE, "negative_prompt"))
    made = Generator(runner)
    fill(made, prompt="a large red circle")
    assert isinstance(made.form.fields["negative_prompt"].widget, w.Text) and 'role="alert"' not in page(made.root)
    for text, value in (("a cat", "a cat"), ("", None)):
        fill(made, negative_prompt=text)
        assert made.form.request.clip.negative_prompt == value
    put_clip(made, **WHOLE)
    fill(made, negative_prompt="a cat")
    act(made, "use")
    assert "negative_prompt" not in problem(made)  # the clip was made without one
    assert made.form.request.clip.negative_prompt is None and made.form.request.clip.seed == WHOLE["seed"]
    made.close()


def test_typing_opens_no_file_and_a_choice_reads_a_checkpoint_once(runner, tmp_path, monkeypatch):
    path, reads, opened = write_upstream(tmp_path / "mine.pth"), [], []
    read = recognise.read
    monkeypatch.setattr(recognise, "read", lambda path: reads.append(path) or read(path))
    monkeypatch.setattr(run, "KEEP_AFTER", 60)
    made = Generator(runner, path)
    assert made.form.spec.name == "mine" and reads == [path]
    for module, name in ((io, "open"), (builtins, "open"), (os, "open")):
        monkeypatch.setattr(module, name, lambda *args, **_: opened.append(args) or pytest.fail(f"opens {args}"))
    for text in ("a", "a c", "a cat"):
        fill(made, prompt=text)
    monkeypatch.undo()
    assert (opened, reads) == ([], [path])
    made.close()


def test_delete_and_zip(generator):
    make(generator)
    path, view = generator.runner.job.clip.path, generator.clips.view
    act(generator, "", kind="zip")
    view._pool.submit(int).result()  # after the zip, because one thread does both
    assert view.archive["name"] == "turbo_nb.zip" and (path.parent / "turbo_nb.zip").stat().st_size > 1000
    act(generator, "", kind="delete")
    assert not path.exists() and view.items == [] and view.gone == [path.name]


def test_a_clip_that_cannot_be_deleted_is_a_warning(generator, monkeypatch):
    make(generator)

    def fail(clip):
        raise OutputError("cannot delete it")

    monkeypatch.setattr(generator.runner.gallery, "delete", fail)
    act(generator, "", kind="delete")
    assert problem(generator) == "cannot delete it" and len(generator.clips.view.items) == 1


def test_a_clip_that_is_opened_plays_large(generator):
    make(generator)
    generator.result.player.show(None)
    act(generator, "open")
    assert generator.result.player.clip["name"] == generator.runner.job.clip.path.name
    act(generator, "nothing")  # as another version of the page may ask


def test_a_clip_of_another_program_does_not_break_the_page(generator, tmp_path):
    mp4.write_mp4(generator.runner.gallery.folder / "grid.mp4", np.zeros((1, 32, 64, 3), np.uint8), 8, {"seed": [1, 2]})
    generator.clips.show()
    assert [item["name"] for item in generator.clips.view.items] == ["grid.mp4"]


def test_a_dropped_clip_gives_its_settings(generator):
    make(generator)
    fill(generator, prompt="x", num_steps=4)
    record = generator.runner.job.clip.record
    assert generator.clips._on_drop("a.mp4", record) == ("The form has the settings of a.mp4.", False)
    assert generator.form.request.clip.prompt == record.prompt
    words, alert = generator.clips._on_drop("a.mp4", replace(record, num_steps=50))
    assert alert and words == "Not restored:\nSteps: 50 is not on the page"


def test_ctrl_enter_starts_only_what_the_button_would_start(generator):
    generator.keys._handle_custom_msg({"kind": "generate", "prompt": "  "}, [])
    assert generator.runner.job is None and generator.run.generate.disabled
    titles = []
    generator.keys.observe(lambda change: titles.append(change["new"]), "title")
    generator.keys._handle_custom_msg({"kind": "generate", "prompt": "a small blue square"}, [])
    generator.runner.wait(60)
    assert generator.runner.job.clip.record.prompt == "a small blue square"
    assert titles[-1] == "" and all(title.endswith("%") for title in titles[:-1]) and len(titles) > 1
    assert not generator.keys.running


def test_a_clip_shows_what_it_cost(generator, monkeypatch):
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "2.99")
    make(generator)
    cost = f", ${generator.runner.job.clip.record.cost:.4f}"
    assert cost in generator.run.status.value and cost in generator.clips.view.items[0]["facts"]


def test_continue_from_the_last_frame_where_the_model_can(generator):
    make(generator)
    for action in ("extend", "continue"):  # offered, because a person has to learn how
        act(generator, action)
        assert "begins with a picture. Choose TurboWan2.2-I2V-A14B-720P under Model" in problem(generator)
        assert problem(generator) in generator.run.note.value and generator.runner.jobs == []
    fill(generator, model="TurboWan2.2-I2V-A14B-720P")
    assert problem(generator) == generator.run.note.value == ""  # it named the other model
    assert {"Extend", "Continue from last frame"} <= set(offered(generator))
    act(generator, "continue")
    assert generator.form.request.clip.image.size == (64, 64) and "the last frame of" in generator.form.image.note.value


def test_a_last_frame_has_a_place_where_the_model_takes_one(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(ResolvedModel, "downloads", ())
    last = generator.form.last_image
    assert last.box.layout.display == "none" and generator.form.request.clip.last_image is None
    fill(generator, model="TurboWan2.2-I2V-A14B-720P")
    assert last.box.layout.display is None and last.remove.layout.display == "none"
    assert last.box.children[1].layout.display == "none"  # folded, because Generate has to be on the first screen
    Image.new("RGB", (64, 32), "red").save(tmp_path / "red.png")
    last.path.value = str(tmp_path / "red.png")
    assert "The clip ends with" in last.note.value and last.remove.layout.display is None
    for picture in (generator.form.image, last):
        picture.take(str(tmp_path / "red.png"), "red.png")
    clip, state = generator.form.request.clip, generator.form.state
    assert clip.last_image == state["last_image"] == str(tmp_path / "red.png")
    again = Generator(generator.runner, state=state)
    assert again.form.request.clip.last_image == clip.last_image and again.form.last_image.box.toggle.value
    again.close()
    fill(generator, model="nano")
    assert generator.form.request.clip.last_image is None and last.size is None
    fill(generator, model="TurboWan2.2-I2V-A14B-720P")
    last.remove.click()
    assert generator.form.request.clip.last_image is None and last.path.value == "" and last.upload.value == ()
    last.path.value = str(tmp_path / "none.png")
    assert "Last frame is" in last.note.value and "_" not in last.note.value.replace(str(tmp_path), "")
    generator.form.image.remove.click()
    assert "This model begins with an image" in generator.run.outlook.value


def test_the_last_frame_comes_back_from_its_path_or_is_none(generator, tmp_path):
    Image.new("RGB", (64, 32), "red").save(tmp_path / "red.png")
    red = str(tmp_path / "red.png")
    whole = WHOLE | {"model": "TurboWan2.2-I2V-A14B-720P", "boundary": 0.8, "image": red}
    put_clip(generator, **whole, last_image=red)
    act(generator, "use")
    assert generator.form.request.clip.last_image == red and problem(generator) == ""
    put_clip(generator, **whole)
    act(generator, "use")
    assert generator.form.request.clip.last_image is None and problem(generator) == ""
    put_clip(generator, **whole, last_image=records.IN_MEMORY)
    act(generator, "use")
    assert "Last frame: choose it again" in problem(generator)
    assert "Last frame: choose it again" in generator.run.note.value  # beside Generate, too


@pytest.fixture(scope="module")
def tiny_i2v(tmp_path_factory):
    """The checkpoints of a tiny image-to-video model, and its pipeline"""
    arch, folder = catalog.Arch(dim=128, num_heads=2, num_layers=1, ffn_dim=128, in_channels=36), catalog.NANO.folder
    place = tmp_path_factory.mktemp("i2v")
    for name, seed in (("high", 1), ("low", 2)):
        torch.manual_seed(seed)
        state = upstream_names(arch, sla=True, int8=False, text_dim=128)
        torch.save({key: tensor.bfloat16() for key, tensor in state.items()}, place / f"{name}.pth")
    torch.save(golden("vae_state"), place / "Wan2.1_VAE.pth")
    model = place / "high.pth", place / "low.pth"
    return model, turbo_nb.load_pipeline(
        model, text_encoder=folder / "text_encoder", tokenizer=folder / "tokenizer", device="cpu"
    )


def test_a_clip_of_the_gallery_is_extended(generator, tiny_i2v, tmp_path, monkeypatch):
    model, pipeline = tiny_i2v
    make(generator)
    first = generator.runner.job.clip
    assert generator.clips.times.layout.display == "none"
    assert generator.form.fields["extend"].widget.disabled  # a text model cannot
    generator.close()
    monkeypatch.setattr(ResolvedModel, "downloads", ())
    runner = JobRunner("clips", load=lambda *_, **__: pipeline)
    generator = Generator(runner, model)
    fill(generator, prompt="anything else", num_frames=5, num_steps=1, random_seed=False, seed=3)
    assert "Extend" in offered(generator) and generator.clips.times.layout.display is None
    extend = generator.form.fields["extend"]
    assert (extend.widget.value, extend.value, extend.widget.disabled) == (0, None, False)
    extend.widget.value = 1
    assert extend.value == 1 and not extend.put(None) and extend.value is None
    generator.clips.times.value, seen = 2, []
    runner.listen(lambda job: job.stage == "decode" and seen.append((job.done, job.progress.total)))
    act(generator, "extend")
    assert problem(generator) == "" and first.path.name in generator.clips.view.message["text"]
    runner.wait(60)
    job, clip = runner.job, runner.job.clip
    assert clip, job.error
    asked = job.request.clip
    assert (asked.extend_clip, asked.prompt, clip.record.seed) == (first.path, "a large red circle", 3)
    assert mp4.count_frames(clip.path) == 5 + 2 * 4  # each part shares a frame
    assert generator.run.note.value == ""  # it named the job, which is done
    assert seen[-1] == (13, 13) and all(done <= 13 == total for done, total in seen)
    own, longer = (mp4.read_frames(path, 64, 64).astype(int) for path in (first.path, clip.path))
    assert np.abs(longer[:5] - own).mean() < 2 and clip.record.parts[0]["model"] == "nano"
    assert "was not trained to extend" in generator.run.status.value
    assert "5 frames extended 2×" in generator.clips.view.items[0]["facts"]
    generator.clips.times.value = 1
    act(generator, "extend")  # of the longer one, which is the latest
    runner.wait(60)
    assert mp4.count_frames(runner.job.clip.path) == 13 + 4 and len(runner.job.clip.record.parts) == 2
    assert "was not trained to extend" not in generator.run.status.value  # the page shows the note once
    fill(generator, resolution=CUSTOM, custom="32x32")
    generator.form.fields["num_frames"].widget.value = 1
    act(generator, "extend")
    assert "Frames is 1. Expected 5 or more" in problem(generator)
    generator.form.fields["num_frames"].widget.value = 5
    act(generator, "use")
    assert f"Image: press Extend at the clip {clip.path.name}" in problem(generator)
    assert generator.form.request.clip.extend is None
    generator.close()


def test_shown_again_it_finds_the_job_and_the_clips(tmp_path, nano, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = widgets.show("clips")
    first.runner._load = lambda *_, **__: nano
    first.runner.submit(Request.of("a red circle", num_frames=5, resolution="64x64", num_steps=4))
    second = widgets.show("clips")
    assert second.runner is first.runner and second is not first and first.root.comm is None
    assert "progressbar" in second.run.status.value or "Done" in second.run.status.value
    second.runner.wait(60)
    assert len(second.clips.view.items) == 1 and second.result.player.clip
    third = widgets.show("clips")
    assert len(third.clips.view.items) == 1 and "Done" in third.run.status.value
    third.close()


def test_every_control_has_a_name(generator):
    make(generator)
    nameless = [w.Box, w.GridBox, w.HTML, w.Output, w.Tab, w.VBox, w.HBox, w.Layout]
    for one in family(generator.root):
        if type(one) not in nameless and not isinstance(one, Part):  # tests with a browser look at a Part's names
            assert one.description, one
            assert type(one) in (
                w.Textarea, w.Text, w.BoundedIntText, w.FloatText, w.Dropdown, w.Checkbox, w.Button, w.FileUpload,
                w.ToggleButton, w.FloatSlider, w.BoundedFloatText,
            )  # fmt: skip


def test_nothing_is_left_behind_by_redrawing(generator):
    make(generator)
    generator.clips.show()
    before = len(w.widgets.widget._instances)
    generator.clips.show()
    assert len(w.widgets.widget._instances) == before


def test_without_ipywidgets_it_says_what_to_install():
    code = "import sys; sys.modules['ipywidgets'] = None\nimport turbo_nb.generator.widgets"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "turbo-nb[notebook]" in result.stderr.splitlines()[-1] and "InputError" in result.stderr.splitlines()[-1]


def test_no_front_end_outside_a_notebook():
    assert not widgets.has_front_end()


@pytest.mark.parametrize(("colab", "calls"), [(True, 1), (False, 0)])
def test_colab_is_asked_for_its_custom_widgets_where_the_page_is_shown(generator, monkeypatch, colab, calls):
    """A stand-in for Colab's module: without its widget manager the players of the page stay empty."""
    asked = []
    output = SimpleNamespace(enable_custom_widget_manager=lambda: asked.append("enabled"))
    monkeypatch.setitem(sys.modules, "google.colab.output", output)
    for name in ("RUNPOD_POD_ID", "RUNPOD_ENDPOINT_ID", "RUNPOD_WEBHOOK_GET_JOB", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    if colab:
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-external_20260819")
    generator._ipython_display_()
    assert len(asked) == calls
    monkeypatch.delitem(sys.modules, "google.colab.output")
    generator._ipython_display_()  # a kernel without the module, such as a local runtime


@pytest.mark.parametrize(("metadata", "person"), [({"colab": {"cell_id": "a1"}}, True), ({}, False)])
def test_a_cell_that_colab_sends_has_a_person_before_it(monkeypatch, metadata, person):
    kernel = SimpleNamespace(get_parent=lambda channel: {"metadata": metadata})
    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=kernel))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert widgets.has_front_end() is person


def test_the_settings_come_back_when_the_cell_runs_again_and_after_a_restart(tmp_path, nano, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = widgets.show("clips")
    seed = 2**60 + 1
    fill(
        first, prompt="a blue square", custom="64 x 64", resolution=CUSTOM, random_seed=False, seed=seed, sla_topk=0.005
    )
    second = widgets.show("clips")
    second.run.keep()
    widgets._shown.clear()  # as in another kernel
    third = widgets.show("clips")
    for made in (second, third):
        request = made.form.request
        assert (request.clip.prompt, request.clip.resolution, request.clip.seed) == ("a blue square", "64 x 64", seed)
        assert request.load.sla_topk == 0.005 and not request.random_seed
    for broken in ({"num_frames": 6}, {"custom": "5x5"}, {"custom": " "}, {"sla_topk": 2.0}):  # cannot be used
        fill(third, custom="64x64", num_frames=9, num_steps=2, sla_topk=0.005, prompt="a green square")
        fill(third, **broken)
        third.run.keep()
        kept = presets.latest()
        assert (kept["prompt"], kept["num_steps"], kept["seed"]) == ("a green square", 2, seed)
        again = Generator(third.runner, state=kept)
        assert again.run.note.value == "" and not again.run.generate.disabled
        again.close()
    fourth = widgets.show("clips")
    assert fourth.form.request.clip.prompt == "a green square"
    fourth.close()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"prompt": "x", "model": "gone.pth"}, "Model: 'gone.pth' is not in this list"),
        ({"model": [["a"], 5]}, "Model: (['a'], 5) is not in this list"),
        ({"num_steps": 99}, "Steps: 99 is not on the page"),
        ({"num_frames": 6}, "Frames: 6 is not on the page"),
        ({"loras": ["gone"]}, "LoRAs: gone is not in"),
        ({"image": "gone.png"}, "Image: 'gone.png' cannot be opened: choose it again"),
        ({"last_image": 5}, "Last frame: 5 cannot be opened"),
        ({"resolution": "5x5"}, "Size is '5x5'. Expected sides"),
        ({"aspect_ratio": "9:16"}, "Size: Aspect is '9:16'. Expected None without"),
        ({"seed": "x", "ode": 3, "loras": 5}, "Seed: x is not|ODE: 3 is not|LoRAs is 5. Expected"),
        ({"seed": 2**70}, "Seed: 1180591620717411303424 is not on the page"),
        ({"attention_type": "sagesla"}, "Attention: sagesla is not on the page"),
        ({"prompt": ["a", "b"]}, "Prompt is ['a', 'b']. Expected text"),
        ({"prompt": "\ud800"}, "Prompt is '\\ud800'"),  # no page could be sent it
        (
            {"random_seed": "no", "adaptive_resolution": 5},
            "New seed each time: no is|Keep the image's aspect: 5 is",
        ),
        ({"boundary": 0.9}, "Expert boundary: This model has only one expert."),
        ({"extend": 3}, "Extend: This model cannot"),
        ({"decoder": "tiny"}, "Decoder: This model has only its own."),
        ({"gpus": 4, "device": "cuda", "vae": "gone"}, "GPUs: it has no control|Device: it has no control|VAE: it has"),
        ({"extend_clip": "gone.mp4"}, "Clip to extend: it has no control on this page"),
        ({"num_steps": 2, "dit_path": "x"}, "Dit path: this version has no such option"),
        ({f"a{n}": n for n in range(30)}, "and 10 more"),
    ],
    ids=str,
)
def test_the_page_says_which_settings_of_another_machine_it_leaves_out(runner, state, words):
    made = Generator(runner, state=state)
    assert made.form.spec.name == "nano" and made.run.outlook.value and not made.run.generate.disabled
    shown = html.unescape(made.run.note.value)
    assert all(one in shown for one in words.split("|")) and made.run.note.layout.display is None
    assert shown.count("\n") == (len(words.split("|")) if len(state) < 30 else 21)
    made.run.generate.click()
    made.runner.clear()
    made.runner.cancel()
    made.runner.wait(60)
    assert made.runner.job.state in ("cancelled", "finished")
    made.close()


def test_the_page_says_why_the_settings_of_the_latest_session_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for state in ({"num_steps": 2, "gpus": 1}, {"num_steps": 2, "model": "auto", "aspect_ratio": None}):
        presets.remember(state)
        made = widgets.show("clips")
        assert made.run.note.value == "" and made.form.fields["num_steps"].value == 2
        widgets._shown.clear()
        made.close()
    (environment.config() / presets.LATEST).write_text("{")
    made = widgets.show("clips")
    assert "latest session are left out:" in made.run.note.value and "latest.json" in made.run.note.value
    assert not made.run.generate.disabled
    made.close()


LEFT_OUT = {"model": "gone.pth", "num_steps": 99, "loras": ["gone"], "gpus": 4, "image": "gone.png", "colour": 1}


@pytest.fixture
def kept(tmp_path, monkeypatch, nano):
    """The file of the latest session, with settings that this machine cannot use"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "KEEP_AFTER", 0.01)
    monkeypatch.setattr(Choices, "load", lambda self, *_, **__: None)
    path = environment.config() / presets.LATEST
    presets.remember(LEFT_OUT | {"prompt": "a blue square", "resolution": "64x64", "num_frames": 5})
    yield path
    for made in widgets._shown.values():
        made.close()
    widgets._shown.clear()


def test_the_page_writes_no_settings_before_a_change(kept):
    before = kept.read_bytes(), kept.stat().st_mtime_ns
    made = widgets.show("clips")
    made.run.update()
    made.run.update(keep_error=True)  # as at the end of a job or a download
    time.sleep(0.3)
    made.run.keep()
    second = widgets.show("clips")
    second.close()
    assert (kept.read_bytes(), kept.stat().st_mtime_ns) == before
    kept.unlink()
    widgets.show("clips", model="nano").run.keep()
    assert not kept.exists()


def test_a_change_is_written_beside_what_this_machine_cannot_use(kept):
    made = widgets.show("clips")
    fill(made, prompt="a red circle")
    wait_for(lambda: presets.latest()["prompt"] == "a red circle")
    expected = LEFT_OUT | {"prompt": "a red circle", "resolution": "64x64", "num_frames": 5}
    assert presets.latest() == expected
    for name, broken in {  # a fault elsewhere on the page changes nothing else
        "num_frames": {"num_frames": 6}, "resolution": {"resolution": CUSTOM, "custom": " "},
    }.items():  # fmt: skip
        fill(made, **broken)
        made.run.keep()
        del expected[name]
        assert presets.latest() == expected
    fill(made, custom="32x32", num_frames=9, num_steps=2, model="TurboWan2.1-T2V-1.3B-480P")
    fill(made, num_steps=3)
    made.run.keep()
    kept = presets.latest()
    assert (kept["num_steps"], kept["model"]) == (3, "TurboWan2.1-T2V-1.3B-480P")  # chosen anew
    assert {name: kept[name] for name in ("loras", "gpus", "image", "colour")} == {
        name: LEFT_OUT[name] for name in ("loras", "gpus", "image", "colour")
    }


def test_two_notebooks_keep_each_other_s_settings(kept, tmp_path):
    first, second = widgets.show("clips"), widgets.show("others")
    fill(first, prompt="a red circle", num_steps=2)
    fill(second, num_frames=9)
    for made in (first, second):
        made.run.keep()
    fill(first, num_frames=13)
    first.run.keep()
    fill(second, seed=5, random_seed=False)
    second.run.keep()
    found = {"prompt": "a red circle", "num_steps": 2, "num_frames": 13, "seed": 5, "random_seed": False}
    assert presets.latest() == LEFT_OUT | {"resolution": "64x64"} | found


def test_a_size_is_kept_whole(kept):
    first, second = widgets.show("clips"), widgets.show("others")
    fill(first, resolution="480p", aspect="9:16")
    first.run.keep()
    fill(second, custom="32x32")
    second.run.keep()
    assert presets.latest()["resolution"] == "32x32" and "aspect_ratio" not in presets.latest()


def test_a_change_just_before_the_page_goes_is_written(kept, monkeypatch):
    monkeypatch.setattr(run, "KEEP_AFTER", 60)
    made = widgets.show("clips")
    fill(made, prompt="a red circle")
    made.close()
    assert presets.latest()["prompt"] == "a red circle"


def test_what_could_not_be_written_is_written_with_the_next_change(kept, monkeypatch):
    def fail(*_):
        raise OutputError("the disk is full")

    made, remember = widgets.show("clips"), presets.remember
    monkeypatch.setattr(presets, "remember", fail)
    fill(made, num_steps=2)
    made.run.keep()
    monkeypatch.setattr(presets, "remember", remember)
    fill(made, prompt="a red circle")
    made.run.keep()
    assert (presets.latest()["prompt"], presets.latest()["num_steps"]) == ("a red circle", 2)


def test_the_aspect_of_an_image_that_is_not_kept_comes_back(kept):
    made = widgets.show("clips")
    assert made.form.image.adaptive.value
    made.form.image.adaptive.value = False
    made.run.keep()
    again = Generator(made.runner, state=presets.latest())
    assert not again.form.image.adaptive.value
    again.close()


def test_presets_are_used_saved_and_deleted(generator):
    bar, steps = generator.presets, generator.form.fields["num_steps"].widget
    bar.choice.value = "fast"
    assert steps.value == 2 and "half the time" in bar.note.value
    bar.choice.value = "best"
    assert steps.value == 4 and generator.form.request.load.sla_topk == 0.225
    bar.name.value = "mine"
    bar.save.click()
    assert bar.choice.value == "mine" and presets.own()["mine"] == {
        "resolution": "64x64",
        "num_frames": 5,
        "sla_topk": 0.225,
    }
    bar.choice.value = "normal"
    fill(generator, prompt="a green square", num_frames=9, resolution=OWN)
    assert generator.form.request.load.sla_topk is None
    bar.choice.value = "mine"
    request = generator.form.request
    assert (request.clip.num_frames, request.clip.resolution, request.load.sla_topk) == (5, "64x64", 0.225)
    assert request.clip.prompt == "a green square"
    bar.name.value = "a/b"
    bar.save.click()
    assert "Expected up to" in bar.note.value
    bar.choice.value = "mine"
    bar.delete.click()
    assert presets.own() == {} and bar.choice.value == ""
    bar.choice.value = "fast"
    fill(generator, prompt="a blue square")
    assert bar.choice.value == "fast"
    fill(generator, num_steps=3)
    assert bar.choice.value == "" and steps.value == 3  # so that "fast" can be chosen again


@pytest.mark.parametrize(
    "values",
    [{"resolution": 64}, {"resolution": {}}, {"resolution": "64 by 64"}, {"resolution": "480p", "aspect_ratio": "7:5"}],
    ids=str,
)
def test_a_size_that_somebody_wrote_into_a_preset_is_named(generator, values):
    reason = generator.form.put(values)["resolution"]
    assert re.match(r"(resolution|aspect_ratio) is .*\. Expected ", reason) and generator.form.resolution.value == OWN
    assert generator.form.put({"resolution": [64, 48]}) == {} and generator.form.custom.value == "64x48"


def test_a_preset_says_what_it_cannot_set_in_the_page_s_words(generator):
    presets.save("mine", {"num_steps": 50, "sla_topk": 0.3, "quant_linear": "no"})
    generator.presets.list()
    generator.presets.choice.value = "mine"
    shown = "Not set:\nWeights: no is not on the page\nSteps: 50 is not on the page"
    assert shown in generator.presets.note.value and generator.form.request.load.sla_topk == 0.3


def test_an_example_can_be_chosen_again(generator):
    prompt = generator.form.prompt
    example = prompt.examples.options[1][1]
    for _ in range(2):
        fill(generator, prompt="else")
        prompt.examples.value = example
        assert prompt.text.value == example


def test_the_length_of_the_prompt_and_what_is_cut(generator):
    wait_for(lambda: "of 512 tokens" in generator.form.prompt.hint.value)
    fill(generator, prompt="a red circle " * 60 + "<b>")
    hint = generator.form.prompt.hint.value
    assert "The model reads 512" in hint and 'class="tnb-cut"' in hint and "&lt;b&gt;" in hint
    assert "Why is there no negative prompt?" in hint


def queued(generator: Generator) -> Job:
    """Put a job into the queue that nobody begins"""
    job = generator.runner.job = Job(request=generator.form.request)
    generator.runner.jobs.append(job)
    return job


def wait_for_hint(generator: Generator) -> None:
    generator.form.prompt.read_tokenizer()
    wait_for(lambda: "hums" in generator.form.prompt.hint.value)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def waiting(generator):
    """The generator with a runner whose first clip waits"""
    go, generate = threading.Event(), generator.runner._generate
    generator.runner._generate = lambda *args, **more: go.wait(30) and generate(*args, **more)
    generator.go = go
    yield generator
    go.set()


def test_generate_adds_to_the_queue(waiting):
    fill(waiting, prompt="a red circle\na blue square", random_seed=False)
    assert waiting.form.prompt.lines.layout.display is None
    waiting.form.prompt.lines.value = True
    waiting.run.seeds.value = 2
    assert waiting.run.generate.description == "Generate 4" and not waiting.run.generate.disabled
    waiting.run.generate.click()
    assert len(waiting.queue.rows.children) == 4
    last = '<span>a blue square</span><span class="tnb-dim">seed 8</span>'
    assert last in page(waiting.queue.rows.children[3])
    assert not waiting.run.generate.disabled  # more can be added
    wait_for(lambda: "<span>▶</span><span>a red circle</span>" in page(waiting.queue.rows.children[0]))
    buttons(waiting, "Cancel")[-1].click()
    assert len(waiting.queue.rows.children) == 3
    waiting.queue.clear.click()
    assert len(waiting.queue.rows.children) == 1
    waiting.go.set()
    waiting.runner.wait(60)
    assert waiting.queue.card.layout.display == "none" and len(waiting.runner.gallery.clips()) == 1


def test_a_long_queue_is_counted(waiting):
    waiting.run.seeds.value = 20
    waiting.run.generate.click()
    assert len(waiting.queue.rows.children) == 8 and "and 12 more" in waiting.queue.note.value
    waiting.queue.clear.click()


def test_a_failed_job_stays_with_its_reason(generator):
    generator.runner._generate = lambda *_, **__: (_ for _ in ()).throw(InputError("num_steps is <9>."))
    make(generator)
    assert "Steps is &lt;9&gt;." in page(generator.queue.rows) and generator.queue.card.layout.display is None
    (dismiss,) = buttons(generator, "Dismiss")
    dismiss.click()
    assert generator.queue.rows.children == () and generator.queue.card.layout.display == "none"


def test_the_queue_of_the_last_session_goes_on(runner, nano):
    rows = QueueFile(runner.gallery.folder)
    for name in "ab":
        clip = {"prompt": "a red circle", "num_frames": 5, "num_steps": 1, "resolution": "64x64"}
        rows.add(QueueRecord(id=name, status="waiting", clip=clip, load={"model": "nano"}))
    rows.close()
    made = Generator(runner)
    assert made.queue.resume.description == "Continue 2 jobs of the last session"
    made.queue.resume.click()
    assert made.queue.resume.layout.display == "none"
    runner.wait(60)
    assert len(runner.gallery.clips()) == 2
    made.close()


def test_a_model_is_downloaded_by_its_button_alone(generator, monkeypatch):
    card, go, begun = generator.models, threading.Event(), threading.Event()

    def fetch(model, on_progress):
        for done in range(0, 10**9, 10**8):
            on_progress(hub.Progress(file=None, stage="fetch", file_done=done, done=done, total=10**9))
            begun.set()
        go.wait(30)
        raise DownloadError("num_steps is lost")

    assert card.download.layout.display == "none" and "comes with turbo_nb" in card.facts.value
    monkeypatch.setattr(ResolvedModel, "fetch", fetch)
    monkeypatch.setattr(hub_cache, "free_bytes", lambda: 10**12)
    fill(generator, model="TurboWan2.1-T2V-1.3B-480P")
    facts = html.unescape(card.facts.value)
    assert "832×480 from text" in facts and "to download, 1.0 TB free" in facts and "licence Apache-2.0" in facts
    assert "needs a GPU" in facts and card.download.description == "Download 14.4 GB"
    assert generator.run.generate.disabled and "Press Download first (14.4 GB)" in generator.run.outlook.value
    card.download.click()
    begun.wait(30)
    card.show_download()
    assert "900.0 MB of 1.0 GB" in card.progress.value and 'aria-valuenow="90"' in card.progress.value
    assert card.download.disabled and card.cancel.layout.display is None
    go.set()
    generator.runner.downloading.wait(30)
    assert "Steps is lost" in card.progress.value and card.cancel.layout.display == "none"
    monkeypatch.setattr(hub_cache, "free_bytes", lambda: 10**9)
    card.show()
    generator.run.update()
    assert card.download.disabled and "too little" in card.facts.value
    assert "its 14.4 GB do not fit" in generator.run.outlook.value and "Press" not in generator.run.outlook.value


def test_rows_of_buttons_wrap_where_the_page_is_narrow(generator):
    rows = [one for one in family(generator.root) if isinstance(one, w.HBox)]
    rows = [row for row in rows if sum(isinstance(child, w.Button) for child in row.children) > 1]
    assert len(rows) > 2 and {row.layout.flex_flow for row in rows} == {"row wrap"}  # else "Cancel" is cut off


def test_models_are_compared(generator):
    assert generator.models.table.value == ""
    generator.models.compare.toggle.value = True
    rows = re.findall(r'scope="row">([^<]*)', generator.models.table.value)
    assert rows[0] == "nano" and "TurboWan2.2-I2V-A14B-720P (8-bit)" in rows and len(rows) == 9


def test_every_widget_answers_on_the_subshell_of_its_page(generator):
    make(generator)
    manager = comm.get_comm_manager()
    for one in family(generator.root):
        if type(one) in (w.Button, w.Text, w.Dropdown, w.Checkbox, w.Textarea):
            registered = manager.get_comm(one.comm.comm_id)
            assert registered.target_name == "jupyter.widget" and not hasattr(registered, "_reply_subshell_for")
    seen = []
    generator.run.generate.on_msg(lambda widget, content, buffers: seen.append(content))
    data = {"method": "custom", "content": {"event": "none"}}
    manager.get_comm(generator.run.generate.comm.comm_id).handle_msg({"content": {"data": data}, "buffers": []})
    assert seen == [{"event": "none"}]
