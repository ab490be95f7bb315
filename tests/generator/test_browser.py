"""Notebook 04 in a real JupyterLab and a headless Chromium: what only a page can show.

All tests use one page and one kernel, because opening them takes longer than most tests. Each test sets what it needs
and leaves no job, so it also runs alone. The restart of the kernel comes last.

Skipped, with the reason, where Chromium or JupyterLab is missing; TURBO_NB_BROWSER=required makes that a failure.
Screenshots go to TURBO_NB_SCREENSHOTS, or to the test's own folder.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
from lab import ROOT, WAIT, browser, end_kernels, jupyter_lab
from loopback_chat import SECRET, Chat

from turbo_nb.generator.jobs import JobRunner
from turbo_nb.text.rewrite import KEY, URL

RELOADS = int(os.environ.get("TURBO_NB_RELOADS", "2"))  # a reload, then a new tab
VIEWPORT = {"width": 1280, "height": 1750}


EARLIER = (
    "a large red circle moving from left to right on a black background",
    "a large green square growing on a white background",
)


@pytest.fixture(scope="module")
def chat():
    """A language model's endpoint"""
    server = Chat("a large green square growing on a white background")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, chat):
    """A JupyterLab that knows `chat`: the folder that it shows, and its address"""
    folder = tmp_path_factory.mktemp("lab")
    (root := folder / "root").mkdir()
    variables = {URL: chat.url, KEY: SECRET, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    variables |= {"TURBO_NB_CONFIG": str(folder / "presets")}
    with jupyter_lab(root, folder, "{folder}/04_generate.ipynb", **variables) as address:
        yield root, address


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, nano):
    """A folder with the earlier clips"""
    folder = tmp_path_factory.mktemp("earlier")
    runner = JobRunner(folder, load=lambda *_, **__: nano)
    for prompt in EARLIER:
        runner.make(prompt, num_frames=9, seed=0)
    return folder


@pytest.fixture(scope="module")
def lab(server, earlier):
    """A folder with 04 and earlier clips: its address in the JupyterLab."""
    root, address = server
    (own := root / "notebook").mkdir()
    shutil.copy(ROOT / "notebooks" / "04_generate.ipynb", own)
    (own / "loras").mkdir()
    shutil.copy(ROOT / "tests/files/nano_lora.safetensors", own / "loras")
    shutil.copytree(earlier, own / "outputs")
    yield address.format(folder=own.name)
    end_kernels(address)


@pytest.fixture(scope="module")
def chromium():
    with browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def page(chromium):
    page = chromium.new_page(viewport=VIEWPORT)
    page.set_default_timeout(WAIT)
    yield page
    page.close()


@pytest.fixture
def shots(tmp_path):
    return Path(os.environ.get("TURBO_NB_SCREENSHOTS") or tmp_path)


ROLES = "button|textbox|combobox|spinbutton|checkbox|tab|link|progressbar"


class Notebook:
    """Notebook 04 on a page, as a person sees it."""

    def __init__(self, page, address: str):
        self.page, self.tnb = page, page.locator(".tnb")
        self.generate = page.get_by_role("button", name=re.compile("^Generate( [0-9]+)?$"))
        self.cancel = page.get_by_role("button", name="Cancel", exact=True).first
        self.clips = page.get_by_role("button", name="Use these settings")
        page.goto(address)
        self.opened()
        self.command("application:toggle-left-area")
        self.command("notebook:run-all-cells")
        self.generate.wait_for()
        self.says("Ready.")

    def command(self, name: str, **arguments) -> None:
        script = "([name, arguments]) => { window.jupyterapp.commands.execute(name, arguments) }"
        self.page.evaluate(script, [name, arguments])

    def opened(self) -> None:
        """Wait until the notebook is connected to its kernel"""
        self.page.wait_for_function("window.jupyterapp && window.jupyterapp.restored.then(() => true)")
        self.page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
        self.page.evaluate(
            """async () => {
                const panel = window.jupyterapp.shell.currentWidget;
                await panel.context.ready;
                await panel.sessionContext.ready;
                await panel.sessionContext.session.kernel.info;
                window.jupyterapp.shell.activateById(panel.id);
            }"""
        )

    def reload(self) -> None:
        self.page.reload()
        self.opened()
        self.generate.wait_for()

    def says(self, text: str) -> None:
        self.tnb.get_by_text(text).first.wait_for()

    def fill(self, label: str, text: str) -> None:
        self.tnb.get_by_label(label, exact=True).fill(text)
        self.page.keyboard.press("Tab")

    def nameless(self) -> list[str]:
        """Controls without an accessible name"""
        return re.findall(rf"- (?:{ROLES})\b(?! \")[^\n]*", self.tnb.aria_snapshot())

    def wait_for_clips(self, count: int) -> None:
        self.page.wait_for_function("n => document.querySelectorAll('.tnb .tnb-prompt').length == n", arg=count)


@pytest.fixture(scope="module")
def notebook(page, lab):
    return Notebook(page, lab)


def test_a_person_at_the_generator(page, notebook, shots):
    tnb, generate = notebook.tnb, notebook.generate
    tnb.screenshot(path=shots / "04-idle.png")
    assert page.get_by_text("The generator's kernel has ended").is_hidden()

    # every control has a name, and the keyboard alone makes a clip
    page.get_by_label("Prompt", exact=True).fill("a small cyan triangle growing on a navy background")
    assert notebook.nameless() == []
    page.get_by_role("button", name="Advanced settings").press("Enter")
    page.get_by_label("Noise device").wait_for()
    page.get_by_role("checkbox", name="ODE").wait_for()
    notebook.says("Share of the key blocks that SLA attends to")
    page.get_by_role("button", name="LoRAs ▸").press("Enter")
    page.get_by_role("button", name="Add LoRA").press("Enter")
    strength = page.get_by_role("spinbutton", name="Strength 1 as a number")
    strength.fill("0.33")
    strength.press("Tab")
    assert notebook.nameless() == []
    tnb.screenshot(path=shots / "04-more.png")
    assert strength.input_value() == "0.33"
    assert strength.evaluate("one => one.closest('.widget-hbox').clientHeight") < 50  # its label takes no line
    slider = page.get_by_role("slider")  # which the kernel moves after the number
    page.wait_for_function("s => s.getAttribute('aria-valuenow') < 0.5", arg=slider.element_handle())
    slider.press("ArrowRight")
    page.wait_for_function("n => n.value == '0.4'", arg=strength.element_handle())
    page.get_by_role("button", name="Remove").press("Enter")
    strength.wait_for(state="detached")
    page.get_by_role("button", name="Advanced settings").press("Enter")
    generate.focus()
    page.keyboard.press("Enter")
    page.get_by_role("progressbar", name="Progress of the clip").wait_for()
    page.get_by_role("img", name="Preview of the clip being made").wait_for()
    assert notebook.nameless() == []
    tnb.screenshot(path=shots / "04-running.png")
    notebook.says("Done with seed")
    notebook.wait_for_clips(len(EARLIER) + 1)
    large = page.locator(".tnb-large video")
    page.wait_for_function("v => !v.paused && v.loop && v.currentTime > 0", arg=large.element_handle())
    page.wait_for_timeout(3500)  # until the browser takes its controls away
    tnb.screenshot(path=shots / "04-finished.png")

    # another is cancelled
    notebook.fill("Frames", "121")
    notebook.says("121 frames of")
    generate.click()
    notebook.says("a small cyan triangle growing on a navy background")
    notebook.cancel.click()
    notebook.says("Cancelled; nothing was written")
    assert notebook.clips.count() == len(EARLIER) + 1

    # an error in words
    notebook.fill("Frames", "6")
    notebook.says("Frames is 6")
    alert = page.locator(".tnb [role=alert]")
    assert alert.inner_text() == "Frames is 6. Expected 4n + 1 (1, 5, 9, …). Take 5." and generate.is_disabled()
    tnb.screenshot(path=shots / "04-error.png")


# labels and buttons whose text is cut off
CUT = """() => [...document.querySelectorAll('.tnb .widget-label, .tnb button')]
    .filter(one => one.checkVisibility() && one.scrollWidth > one.clientWidth).map(one => one.textContent)"""

# whether the longest entry of a list fits the list
FITS = """(list) => {
    const [pen, style] = [document.createElement("canvas").getContext("2d"), getComputedStyle(list)];
    pen.font = style.font;
    const room = list.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    return pen.measureText("1280x720 (default)").width <= room;
}"""


def test_the_layout_and_rewriting(page, notebook, chat, shots, server):
    tnb = notebook.tnb
    notebook.fill("Frames", "25")
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("ein grünes Quadrat")
    page.get_by_role("button", name="Rewrite", exact=True).click()
    notebook.says("Rewritten.")
    assert prompt.input_value() == chat.answer
    page.get_by_role("button", name="Undo", exact=True).click()
    page.get_by_role("button", name="Redo", exact=True).wait_for()
    assert prompt.input_value() == "ein grünes Quadrat" and notebook.nameless() == []
    notebook.command("docmanager:save")
    page.wait_for_timeout(1000)
    saved = [path.read_bytes() for path in server[0].parent.rglob("*") if path.is_file()]
    assert len(chat.requests) == 1 and not any(SECRET.encode() in data for data in [page.content().encode(), *saved])

    page.get_by_role("button", name="Advanced settings").click()
    page.get_by_label("Size", exact=True).select_option("other…")
    page.get_by_label("Pixels", exact=True).wait_for()
    style = "one => getComputedStyle(one).gridTemplateColumns.split(' ').length"
    for theme in ("Light", "Dark"):
        notebook.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        for width, columns in ((1280, 2), (800, 1)):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(1500)
            tnb.evaluate("one => one.scrollIntoView()")
            page.wait_for_timeout(500)
            page.screenshot(path=shots / f"04-{width}-{theme.lower()}.png")
            cut = page.evaluate(CUT)
            assert page.locator(".tnb-columns").evaluate(style) == columns
            box = notebook.generate.bounding_box()
            assert box["y"] > 0 and box["y"] + box["height"] < 900
            assert tnb.evaluate("one => one.scrollWidth <= one.clientWidth + 1")
            large, model = tnb.locator(".tnb-large"), page.get_by_label("Model", exact=True)
            assert box["y"] - 900 < large.bounding_box()["y"] < model.bounding_box()["y"]  # the settings come last
            assert not cut, cut
            dark = page.locator(".tnb h3").first.evaluate("one => getComputedStyle(one).color")
            light = sum(map(int, re.findall(r"\d+", dark)[:3])) > 3 * 128
            assert light == (theme == "Dark")
            page.set_viewport_size({"width": width, "height": 2300})
            page.wait_for_timeout(300)
            tnb.screenshot(path=shots / f"04-{width}-{theme.lower()}-all.png")
    page.set_viewport_size({"width": 1405, "height": 900})  # two columns of settings would be narrow
    page.wait_for_timeout(500)
    assert page.get_by_label("Size", exact=True).evaluate(FITS)
    page.set_viewport_size(VIEWPORT)
    page.get_by_label("Size", exact=True).select_option(index=0)
    page.get_by_label("Pixels", exact=True).wait_for(state="hidden")
    page.get_by_role("button", name="Advanced settings").click()


def test_the_page_outlives_reloads_while_a_clip_runs(page, notebook):
    """A reload takes the page's subshell away, and a close its tab; the widgets answer the next page all the same"""
    notebook.command("docmanager:save")
    notebook.fill("Clips", "1")
    notebook.fill("Frames", "241")
    notebook.says("241 frames of")
    jobs = notebook.tnb.locator(".tnb-job")
    for count in range(RELOADS):
        notebook.generate.click()
        notebook.says("so far")
        if count % 2:
            address = page.url
            page.goto("about:blank")
            page.goto(address)
            notebook.opened()
        else:
            notebook.reload()
        notebook.says("so far")  # it is still at work
        page.wait_for_timeout(1500)  # so that it has published for this page
        notebook.generate.click()
        page.wait_for_function("() => document.querySelectorAll('.tnb .tnb-job').length == 2")
        page.get_by_role("button", name="Clear the queue").click()
        page.wait_for_function("() => document.querySelectorAll('.tnb .tnb-job').length == 1")
        notebook.cancel.click()
        notebook.says("Cancelled; nothing was written")
        assert jobs.count() == 0


def test_the_queue_on_the_page(page, notebook, shots):
    clips = notebook.clips.count()
    notebook.fill("Frames", "49")
    notebook.fill("Clips", "3")
    page.get_by_role("button", name="Generate 3").click()
    notebook.says("▶")
    tnb = notebook.tnb
    assert tnb.locator(".tnb-job").count() == 3 and notebook.nameless() == []
    tnb.screenshot(path=shots / "04-queue.png")
    tnb.locator(".tnb-job").nth(1).get_by_role("button").click()
    page.wait_for_function("() => document.querySelectorAll('.tnb .tnb-job').length == 2")
    page.get_by_role("button", name="Clear the queue").click()
    page.wait_for_function("() => document.querySelectorAll('.tnb .tnb-job').length <= 1")
    notebook.wait_for_clips(clips + 1)


def test_after_a_restart_of_the_kernel_the_page_goes_on(page, notebook, shots):
    clips = notebook.clips.count()
    notebook.fill("Prompt", "a small orange square shrinking on a gray background")
    notebook.fill("Frames", "121")
    notebook.fill("Clips", "8")  # because a slow page may give the kernel time to finish one or two of them
    page.get_by_role("button", name="Generate 8").click()
    notebook.says("so far")
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    advice = page.get_by_text("The generator's kernel has ended")
    advice.wait_for()
    page.screenshot(path=shots / "04-restarted.png")
    notebook.opened()
    notebook.command("notebook:run-all-cells")
    page.get_by_role("button", name=re.compile("Continue [2-8] jobs of the last session")).click()
    notebook.says("so far")
    assert advice.is_hidden()
    prompt = page.get_by_label("Prompt", exact=True)
    assert prompt.input_value() == "a small orange square shrinking on a gray background"
    page.get_by_role("button", name="Clear the queue").click()
    page.wait_for_function("n => document.querySelectorAll('.tnb .tnb-prompt').length > n", arg=clips)
