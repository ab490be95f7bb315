"""The gallery and the player in a real page: clips of a folder that the page cannot reach, compared, dropped, by keys.

Screenshots go to TURBO_NB_SCREENSHOTS, or to the test's own folder.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from lab import browser, command, jupyter_lab, notebook, wait_until_opened

from turbo_nb.generation import Video
from turbo_nb.records import VideoRecord
from turbo_nb.video.gallery import Gallery

SIZE = {"width": 1280, "height": 1900}
CLIPS = {"a white bar that moves to the right": 17, "a white bar that moves down": 25, "a red flash <b>&amp;": 17}


def frames(prompt: str, count: int) -> np.ndarray:
    """A clip in which each frame differs"""
    made = np.full((count, 96, 160, 3), 40, np.uint8)
    for number, frame in enumerate(made):
        at = number * 4
        if "right" in prompt:
            frame[:, at : at + 12] = 255
        elif "down" in prompt:
            frame[at % 90 : at % 90 + 12] = (80, 200, 255)
        else:
            frame[..., 0] = 60 + 8 * number
    return made


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The page of a notebook whose clips are outside the server's folder"""
    folder = tmp_path_factory.mktemp("lab")
    (root := folder / "root").mkdir()
    gallery = Gallery(folder / "elsewhere" / "clips")
    for age, (prompt, count) in enumerate(CLIPS.items()):
        record = VideoRecord(
            model="nano", prompt=prompt, seed=age, num_steps=2, num_frames=count, width=160, height=96, fps=8,
            sigma_max=80.0, attention_type="sla", sla_topk=0.1, quant_linear=False, timings={"denoise": 3.0 - age},
        )  # fmt: skip
        clip = gallery.save(Video(frames=frames(prompt, count), record=record))
        os.utime(clip.path, (1.7e9 - age, 1.7e9 - age))
    small = (
        "from turbo_nb.generator.parts import clips\nclips.PIECE = 1500"  # so that each clip comes in several pieces
    )
    shown = f"from turbo_nb.generator import widgets\nwidgets.show({str(gallery.folder)!r}, model='nano')"
    notebook(root / "page.ipynb", small, shown)
    with (
        jupyter_lab(root, folder, "page.ipynb", TURBO_NB_CONFIG=str(folder / "settings")) as address,
        browser() as chromium,
    ):
        page = chromium.new_page(viewport=SIZE)
        page.set_default_timeout(60_000)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(address)
        wait_until_opened(page)
        command(page, "application:toggle-left-area")
        command(page, "notebook:run-all-cells")
        page.get_by_role("list", name="Finished clips").locator("li").nth(len(CLIPS) - 1).wait_for()
        page.gallery = gallery
        yield page


@pytest.fixture
def page(opened):
    """The page without a selection, as wide and lively as at first, and without errors of scripts"""
    opened.set_viewport_size(SIZE)
    opened.emulate_media(reduced_motion="no-preference")
    if (clear := opened.get_by_role("button", name="Clear selection")).is_visible():
        clear.click()
    yield opened
    assert opened.errors == []


def playing(page, selector: str) -> None:
    """Wait until a video has advanced"""
    page.wait_for_function(
        "s => { const v = document.querySelector(s); return v && v.readyState >= 2 && v.currentTime > 0.2 }",
        arg=selector,
    )


def large(page, prompt: str) -> None:
    """Show a clip large, and wait until it plays"""
    page.get_by_role("button", name=f"Show large: {prompt}").click()
    page.locator(".tnb-result .tnb-words", has_text=prompt).wait_for()
    playing(page, ".tnb-result video")


def delete_first(page, prompt: str) -> None:
    """Delete a clip that is one too many"""
    page.get_by_role("checkbox", name=f"Select: {prompt}").first.check()
    page.get_by_role("button", name="Delete", exact=True).first.click()
    page.get_by_role("button", name="Delete for good?").click()
    page.locator(".tnb-count", has_text="3 clips").wait_for()


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return Path(os.environ.get("TURBO_NB_SCREENSHOTS") or tmp_path_factory.mktemp("shots"))


def test_posters_show_and_play_from_a_folder_that_the_page_cannot_reach(page):
    page.wait_for_function(
        "n => [...document.querySelectorAll('.tnb-poster img')].filter(i => i.naturalWidth > 100).length == n",
        arg=len(CLIPS),
    )
    first = page.locator(".tnb-poster").first
    first.hover()
    playing(page, ".tnb-poster video")
    page.get_by_role("searchbox").hover()
    page.locator(".tnb-poster video").wait_for(state="detached")
    first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    playing(page, ".tnb-poster video")  # as it does for the keyboard
    page.keyboard.press("Enter")
    playing(page, ".tnb-result video")
    video = page.locator(".tnb-result video")
    assert video.evaluate("v => v.muted && v.loop && v.controls && !v.paused && v.src.startsWith('blob:')")
    assert page.locator(".tnb-clips b").count() == 0  # a prompt is text
    page.get_by_role("searchbox").hover()


def test_clips_are_compared_in_step(page, shots):
    page.get_by_text("Tick two clips to compare them.").wait_for()
    for prompt in list(CLIPS)[:2]:
        page.get_by_role("checkbox", name=f"Select: {prompt}").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    box = page.get_by_role("region", name="Compare two clips")
    box.wait_for()
    times = "[...document.querySelectorAll('.tnb-compare video')].map(v => v.currentTime)"
    for _ in range(3):
        page.wait_for_function(f"([before]) => {times}[0] != before", arg=page.evaluate(f"() => {times}"))
        page.wait_for_function(
            f"() => {{ const [a, b] = {times}; return b > 0.1 && b < 2 && Math.abs(a - b) < 0.08 }}", polling="raf"
        )
    box.get_by_role("button", name="Pause").click()
    position = box.get_by_role("slider", name="Position in both clips")
    position.fill("1.25")
    page.wait_for_function(f"() => {times}.every(time => Math.abs(time - 1.25) < 0.01)")
    position.fill("3")  # the shorter clip stays at its end
    page.wait_for_function(f"() => {{ const [a, b] = {times}; return a > 2 && a < 2.2 && Math.abs(b - 3) < 0.01 }}")
    assert (
        box.locator(".tnb-facts").all_inner_texts()
        == [  # what differs where the prompts are the same
            page.locator(".tnb-clip", has_text=prompt).locator(".tnb-facts").inner_text() for prompt in list(CLIPS)[:2]
        ]
    )
    box.screenshot(path=shots / "compare.png")
    box.get_by_role("button", name="Play").click()
    page.wait_for_function(f"() => {times}[1] < 1 && {times}[1] > 0.1")  # it begins again after its end
    page.keyboard.press("Escape")
    box.wait_for(state="detached")


def test_find_star_delete_and_zip(page, tmp_path):
    listed = page.locator(".tnb-clip")
    page.get_by_role("searchbox").fill("WHITE bar")
    page.locator(".tnb-count", has_text="2 clips").wait_for()
    page.get_by_role("searchbox").fill("")
    page.locator(".tnb-count", has_text="3 clips").wait_for()
    card = page.locator(".tnb-clip").first
    height = card.bounding_box()["height"]
    card.get_by_text("More", exact=True).click()
    card.get_by_role("button", name="Vary seed").wait_for()
    assert card.bounding_box()["height"] == height  # the menu does not move the page
    page.locator(".tnb-count").click()
    card.get_by_role("button", name="Vary seed").wait_for(state="hidden")
    page.get_by_role("combobox", name="Order of the clips").select_option("prompt")
    page.wait_for_function("document.querySelector('.tnb-clip .tnb-prompt').textContent.includes('red flash')")
    page.get_by_role("combobox", name="Order of the clips").select_option("newest")
    star = page.get_by_role("button", name="Star: a white bar that moves down")
    star.click()
    page.wait_for_function("s => s.getAttribute('aria-pressed') == 'true'", arg=star.element_handle())
    only = page.get_by_role("button", name="Only clips with a star")
    only.click()
    page.locator(".tnb-count", has_text="1 clip").wait_for()
    assert listed.count() == 1
    only.click()
    page.locator(".tnb-count", has_text="3 clips").wait_for()

    page.get_by_role("checkbox", name="Select: a red flash").check()
    page.get_by_role("button", name="Zip", exact=True).click()
    with page.expect_download() as download:
        page.get_by_role("button", name=re.compile("Download turbo_nb.zip .[0-9]+ kB")).click()
    download.value.save_as(tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == (page.gallery.folder / "turbo_nb.zip").read_bytes()

    copy = page.gallery.folder / "copy.mp4"
    copy.write_bytes(next(page.gallery.folder.glob("*flash*.mp4")).read_bytes())
    os.utime(copy, (1e9, 1e9))
    page.get_by_role("combobox", name="Order of the clips").select_option("oldest")
    page.get_by_role("button", name="Clear selection").click()
    page.locator(".tnb-count", has_text="4 clips").wait_for()
    delete_first(page, "a red flash")
    assert not copy.exists() and page.get_by_role("button", name="Clear selection").is_hidden()
    page.get_by_role("combobox", name="Order of the clips").select_option("newest")


def test_settings_come_back_from_a_clip_and_from_a_dropped_file(page):
    prompt = page.get_by_label("Prompt", exact=True)
    page.set_viewport_size({"width": 1280, "height": 700})
    use = page.get_by_role("button", name=re.compile("^Use these settings: .*down"))
    use.scroll_into_view_if_needed()
    assert prompt.evaluate("one => one.getBoundingClientRect().bottom < 0")  # the form is out of view
    use.click()
    page.wait_for_function("p => p.value == 'a white bar that moves down'", arg=prompt.element_handle())
    note = page.locator(".tnb-columns .tnb-note", has_text="The form has the settings of")
    note.wait_for()
    page.wait_for_function("n => n.getBoundingClientRect().top > 0", arg=note.element_handle())  # the page has scrolled
    (clip,) = page.gallery.folder.glob("*right*.mp4")
    page.evaluate(
        """([bytes, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: "video/mp4"}));
            const target = document.querySelector(".tnb-part");
            for (const kind of ["dragover", "drop"])
                target.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        [list(clip.read_bytes()), "mine.mp4"],
    )
    page.locator(".tnb-drop .tnb-note", has_text="mine.mp4").wait_for()
    assert prompt.input_value() == "a white bar that moves to the right"
    page.get_by_label("Restore the settings of a clip").set_input_files(next(page.gallery.folder.glob("*flash*.mp4")))
    page.wait_for_function("p => p.value.includes('red flash')", arg=prompt.element_handle())
    page.get_by_label("Restore the settings of a clip").set_input_files(
        [{"name": "no.mp4", "mimeType": "video/mp4", "buffer": b"no"}]
    )
    page.locator(".tnb-drop").get_by_text("no.mp4 says nothing of how it was made").wait_for()
    page.locator(".tnb-columns").get_by_text("no.mp4 says nothing of how it was made").wait_for()


@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_both_themes_and_widths(page, shots, theme, width):
    page.set_viewport_size({"width": width, "height": 1900})
    command(page, "apputils:change-theme", theme=theme)
    page.wait_for_function("t => document.body.dataset.jpThemeName == t", arg=theme)
    large(page, "a white bar that moves down")
    page.get_by_role("checkbox", name="Select: a red flash").check()
    wide = page.evaluate(
        "() => [...document.querySelectorAll('.tnb-part')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    )
    assert wide == 0
    for part in (".tnb-gallery", ".tnb-result", ".tnb-drop"):
        tree = page.locator(part).aria_snapshot()
        assert not re.findall(r"- (?:button|textbox|combobox|checkbox|searchbox|slider)\b(?! \")[^\n]*", tree), tree
    page.locator(".tnb").screenshot(path=shots / f"page-{theme.split()[1].lower()}-{width}.png")
    page.locator(".tnb-gallery").screenshot(path=shots / f"gallery-{theme.split()[1].lower()}-{width}.png")


def test_calm_pages_play_only_when_asked(page):
    page.emulate_media(reduced_motion="reduce")
    page.locator(".tnb-poster").nth(1).hover()
    page.get_by_role("button", name="Show large: a white bar that moves to the right").click()
    page.locator(".tnb-result .tnb-words", has_text="right").wait_for()
    page.wait_for_function(
        "() => { const v = document.querySelector('.tnb-result video'); return v.readyState >= 2 && v.paused }"
    )
    assert page.locator(".tnb-poster video").count() == 0


def test_keys_start_and_cancel_and_a_playing_clip_plays_on(page):
    large(page, "a white bar that moves to the right")
    page.evaluate("() => { window.kept = document.querySelector('.tnb-result video'); window.turns = 0 }")
    title = page.title()
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("a large green square")
    prompt.press("Control+Enter")
    page.wait_for_function("() => /^\\d+ %|^\\d+%/.test(document.title)")
    listed = page.locator(".tnb-clip")
    page.locator(".tnb-clip", has_text="a large green square").wait_for()
    page.wait_for_function("t => document.title == t", arg=title)
    assert listed.count() == len(CLIPS) + 1
    playing(page, ".tnb-result video")
    assert page.evaluate("() => window.kept === document.querySelector('.tnb-result video') && window.kept.isConnected")
    page.get_by_label("Frames").fill("121")
    page.keyboard.press("Tab")
    page.get_by_text("121 frames of").wait_for()
    prompt.press("Control+Enter")
    page.wait_for_function("() => /^\\d+%/.test(document.title)")
    prompt.press("Escape")
    page.get_by_text("Cancelled; nothing was written").wait_for()
    page.wait_for_function("t => document.title == t", arg=title)
    assert listed.count() == len(CLIPS) + 1
    delete_first(page, "a large green square")
