"""The generator's widgets, driven as a person would: values set, buttons clicked, and what the page says read."""

import html
import io
import os
import re
import subprocess
import sys
from datetime import datetime

import ipywidgets as w
import numpy as np
import pytest
from PIL import Image

from turbo_nb.generator import widgets
from turbo_nb.generator.jobs import Request, Studio
from turbo_nb.generator.widgets import Generator
from turbo_nb.video import mp4


@pytest.fixture
def studio(tmp_path, nano, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Studio("clips", load=lambda **_: nano)


@pytest.fixture
def generator(studio):
    """The generator at the smallest clip it can make"""
    made = Generator(studio)
    made.prompt.value = "a large red circle"
    made.resolution.value, made.custom.value = widgets.CUSTOM, "64x64"
    made.frames.value, made.steps.value = 5, 1
    made.random_seed.value, made.seed.value = False, 7
    yield made
    made.close()


def make(generator: Generator) -> None:
    generator.generate.click()
    generator.studio.wait(60)


def page(widget: w.Widget) -> str:
    """All that is on the page: texts, descriptions and shown HTML"""
    parts = []
    for one in widgets._family(widget):
        parts += [str(getattr(one, name, "")) for name in ("description", "value")]
        parts += [out["data"].get("text/html", "") for out in getattr(one, "outputs", ())]
    return "\n".join(parts)


def buttons(generator: Generator, text: str) -> list[w.Button]:
    return [one for one in widgets._family(generator.root) if isinstance(one, w.Button) and one.description == text]


def test_generate_makes_a_clip_and_shows_it_by_a_relative_path(generator):
    assert not generator.generate.disabled and generator.cancel.disabled
    make(generator)
    assert "Done with seed 7" in generator.status.value
    assert re.search(r"denoise \d+\.\d s \(steps (\d+\.\d\d, )*\d+\.\d\d\), decode .*, write ", generator.status.value)
    assert not generator.generate.disabled and generator.cancel.disabled and generator.preview.value == ""
    (shown,) = generator.result.outputs
    path = generator.studio.job.run.path
    assert f'src="clips/{path.name}"' in shown["data"]["text/html"] and len(str(shown)) < 2000
    assert mp4.read_metadata(path)["num_frames"] == 5
    assert len(generator.gallery.children) == 1


def test_the_page_says_what_is_going_on(generator):
    seen = []
    generator.steps.value = 2
    generator.studio.listen(lambda job: seen.append((generator.status.value, generator.preview.value)))
    make(generator)
    running = [status for status, _ in seen if "<progress" in status]
    assert "Denoise, step 1 of 2" in "".join(running) and 'value="1" max="2"' in "".join(running)
    assert all('aria-label="Progress of the clip"' in status and 'role="status"' in status for status in running)
    assert any("data:image/webp" in preview and "alt=" in preview for _, preview in seen)


def test_cancel(generator):
    generator.steps.value = 4
    generator.studio.listen(lambda job: job.done == 1 and job.running and generator.cancel.click())
    make(generator)
    assert "Cancelled; nothing was written" in generator.status.value and generator.gallery.children == ()


def test_errors_are_words_on_the_page(generator):
    generator.frames.value = 6
    assert "it is 4n + 1" in generator.estimate.value and "such as 5" in generator.estimate.value
    generator.frames.value, generator.custom.value = 5, "<b>"
    assert "&lt;b&gt;" in generator.estimate.value and "<b>" not in generator.estimate.value


@pytest.mark.parametrize(
    ("control", "wrong", "right", "words"),
    [
        ("prompt", "  ", "a red circle", 'the prompt is empty; say what to show, such as "a small'),
        ("frames", 6, 9, "num_frames is 6; it is 4n + 1 (1, 5, 9, …), such as 5"),
    ],
)
def test_an_error_is_shown_once_and_goes_with_its_cause(generator, control, wrong, right, words):
    make(generator)
    getattr(generator, control).value = wrong
    generator.generate.click()
    shown = html.unescape(page(generator.root))
    assert shown.count('role="alert"') == shown.count(words) == 1
    assert words in html.unescape(generator.estimate.value) and "Done" not in generator.status.value
    getattr(generator, control).value = right
    assert 'role="alert"' not in page(generator.root)


def test_what_was_typed_is_escaped(generator, tmp_path):
    evil = 'a red circle <img src=x onerror="alert(1)"> & \'"'
    generator.prompt.value = evil
    make(generator)
    os.rename(generator.studio.job.run.path, tmp_path / "clips" / 'a"><script>x</script>.mp4'.replace("/", "%2f"))
    again = Generator(generator.studio)
    shown = page(again.gallery)
    again.close()
    assert "<img" not in shown and "<script" not in shown and "&lt;img" in shown


def test_the_outlook_is_told_before_the_run(tmp_path, monkeypatch, generator):
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path / "cache"))
    generator.steps.value = 2
    assert (
        "5 frames of 64x64" in generator.estimate.value and "not known before the first run" in generator.estimate.value
    )
    assert "memory:" in generator.estimate.value
    make(generator)
    assert re.search(r"about \d+\.\d s, from 1 earlier video here", generator.estimate.value)
    generator.model.value = "TurboWan2.1-T2V-14B-720P"
    assert "81 frames of 1280x720" in generator.estimate.value and "no live preview" not in generator.estimate.value
    assert "Long English prompts" in generator.hint.value
    generator.model.value = "nano"
    generator.prompt.value = "a cat"
    assert "only knows moving shapes" in generator.hint.value


def test_image_to_video_waits_for_a_model_that_can(generator, tmp_path):
    assert generator.upload.disabled and generator.tabs.selected_index == 0
    assert "makes videos from text alone" in generator.image_note.value
    generator.model.value = "TurboWan2.2-I2V-A14B-720P"
    assert not generator.upload.disabled and generator.tabs.selected_index == 1
    assert generator.request.image is None
    file = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(file, "PNG")
    entry = {
        "name": "<b>.png",
        "type": "image/png",
        "size": 1,
        "last_modified": datetime.now(),
        "content": file.getvalue(),
    }
    generator.upload.set_trait("value", (entry,))
    assert generator.request.image.size == (64, 32) and "&lt;b&gt;.png" in generator.image_note.value
    generator.image_path.value = str(tmp_path / "none.png")
    assert generator.request.image is None and "no image" in generator.image_note.value


def test_the_gallery_gives_settings_back(generator):
    generator.topk.value = 0.5
    make(generator)
    generator.prompt.value, generator.frames.value, generator.steps.value = "a small blue square", 9, 4
    generator.resolution.value, generator.topk.value, generator.random_seed.value = widgets.OWN, 0.1, True
    (use,) = buttons(generator, "Use these settings")
    use.click()
    request = generator.request
    assert (request.prompt, request.num_frames, request.num_steps) == ("a large red circle", 5, 1)
    assert (request.seed, request.resolution, request.sla_topk) == (7, "64x64", 0.5)
    (vary,) = buttons(generator, "Vary seed")
    vary.click()
    generator.studio.wait(60)
    seeds = [run.settings["seed"] for run in generator.studio.history.clips()]
    assert len(seeds) == 2 and seeds[0] != 7 and generator.seed.value == seeds[0]


def test_delete_asks_first(generator):
    make(generator)
    (delete,) = buttons(generator, "Delete")
    delete.click()
    assert generator.studio.job.run.path.exists() and delete.description == "Delete for good?"
    delete.click()
    assert not generator.studio.job.run.path.exists() and generator.gallery.children == ()


def test_download_one_or_all(generator):
    make(generator)
    path = generator.studio.job.run.path
    assert f'href="clips/{path.name}" download="{path.name}"' in page(generator.gallery)
    generator.archive.click()
    assert 'href="clips/turbo_nb.zip" download="turbo_nb.zip"' in page(generator.archive_link)


def test_a_clip_of_another_program_does_not_break_the_page(generator, tmp_path):
    mp4.write_mp4(generator.studio.history.folder / "grid.mp4", np.zeros((1, 32, 64, 3), np.uint8), 8, {"seed": [1, 2]})
    generator._show_gallery()
    assert len(generator.gallery.children) == 1 and "grid.mp4" in page(generator.gallery)


def test_the_gallery_is_shown_page_by_page(generator, nano):

    from turbo_nb.generation import Video

    settings = {"prompt": "x", "seed": 1, "width": 32, "height": 32, "num_frames": 5, "num_steps": 1, "model": "nano"}
    video = Video(frames=np.zeros((5, 32, 32, 3), np.uint8), fps=8, timings={"text": 1.0}, settings=settings)
    for _ in range(widgets.PAGE + 1):
        generator.studio.history.save(video)
    generator._show_gallery()
    assert len(generator.gallery.children) == widgets.PAGE and generator.more.layout.display is None
    generator.more.click()
    assert len(generator.gallery.children) == widgets.PAGE + 1 and generator.more.layout.display == "none"


def test_a_clip_shows_what_it_cost(generator, monkeypatch):
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "2.99")
    make(generator)
    cost = f", ${generator.studio.job.run.record.cost:.4f}"
    assert cost in generator.status.value and cost in page(generator.gallery)


def test_continue_from_the_last_frame_where_the_model_can(generator):
    make(generator)
    assert buttons(generator, "Continue from last frame") == []
    generator.model.value = "TurboWan2.2-I2V-A14B-720P"
    (more,) = buttons(generator, "Continue from last frame")
    more.click()
    assert generator.request.image.size == (64, 64) and "the last frame of" in generator.image_note.value


def test_shown_again_it_finds_the_job_and_the_clips(tmp_path, nano, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = widgets.show("clips")
    first.studio._load = lambda **_: nano
    first.studio.submit(Request(prompt="a red circle", num_frames=5, resolution="64x64", num_steps=4))
    second = widgets.show("clips")
    assert second.studio is first.studio and second is not first and first.root.comm is None
    assert "<progress" in second.status.value or "Done" in second.status.value
    second.studio.wait(60)
    assert len(second.gallery.children) == 1 and second.result.outputs
    third = widgets.show("clips")
    assert len(third.gallery.children) == 1 and "Done" in third.status.value
    third.close()


def test_every_control_has_a_name(generator):
    make(generator)
    nameless = [w.Box, w.GridBox, w.HTML, w.Output, w.Tab, w.VBox, w.HBox, w.Layout]
    for one in widgets._family(generator.root):
        if type(one) not in nameless:
            assert one.description, one
            assert type(one) in (
                w.Textarea, w.Text, w.BoundedIntText, w.BoundedFloatText, w.Dropdown, w.Checkbox, w.Button, w.FileUpload
            )  # fmt: skip


def test_nothing_is_left_behind_by_redrawing(generator):
    make(generator)
    generator._show_gallery()
    before = len(w.widgets.widget._instances)
    generator._show_gallery()
    assert len(w.widgets.widget._instances) == before


def test_without_ipywidgets_it_says_what_to_install():
    code = "import sys; sys.modules['ipywidgets'] = None\nimport turbo_nb.ui"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "turbo-nb[notebook]" in result.stderr.splitlines()[-1] and "InputError" in result.stderr.splitlines()[-1]


def test_no_front_end_outside_a_notebook():
    assert not widgets.has_front_end()
