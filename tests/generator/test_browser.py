"""Notebook 04 in a real JupyterLab and a headless Chromium: what only a page can show.

Skipped, with the reason, where Chromium or JupyterLab is missing; TURBO_NB_BROWSER=required makes that a failure.
Screenshots go to TURBO_NB_SCREENSHOTS, or to the test's own folder.
"""

import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from turbo_nb.generator.jobs import JobRunner

ROOT = Path(__file__).parents[2]
WAIT = 120_000  # ms


def missing(reason: str) -> None:
    if os.environ.get("TURBO_NB_BROWSER") == "required":
        pytest.fail(f"{reason}, and TURBO_NB_BROWSER=required")
    pytest.skip(reason)


EARLIER = (
    "a large red circle moving from left to right on a black background",
    "a large green square growing on a white background",
)


@pytest.fixture
def lab(tmp_path, nano):
    """A JupyterLab with a token over a folder with 04 and earlier clips: its address."""
    if importlib.util.find_spec("jupyterlab") is None:
        missing("JupyterLab is not installed")
    root, token = tmp_path / "root", secrets.token_hex(16)
    root.mkdir()
    shutil.copy(ROOT / "notebooks" / "04_generate.ipynb", root)
    (root / "loras").mkdir()
    shutil.copy(ROOT / "tests/files/nano_lora.safetensors", root / "loras")
    runner = JobRunner(root / "outputs", load=lambda *_, **__: nano)
    for prompt in EARLIER:
        runner.make(prompt, num_frames=9, seed=0)
    news = tmp_path / "CONFIG/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')  # else the page asks
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    folders = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "RUNTIME")}
    server = subprocess.Popen(
        [
            sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
            f"--port={address.rsplit(':', 1)[1]}", f"--ServerApp.root_dir={root}", "--expose-app-in-browser",
        ],
        env=os.environ | folders | {"JUPYTER_TOKEN": token, "PYTHONPATH": path},
        stdout=(tmp_path / "lab.log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "lab.log").read_text()
                time.sleep(0.5)
        yield f"{address}/lab/tree/04_generate.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page():
    try:
        from playwright import sync_api
    except ImportError:
        missing("playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        missing("no chromium on the PATH (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1750})
        page.set_default_timeout(WAIT)
        yield page
        browser.close()


def test_a_person_at_the_generator(page, lab, tmp_path):
    from playwright.sync_api import expect

    shots = Path(os.environ.get("TURBO_NB_SCREENSHOTS") or tmp_path)
    generate = page.get_by_role("button", name="Generate", exact=True)
    cancel = page.get_by_role("button", name="Cancel", exact=True)
    clips = page.get_by_role("button", name="Use these settings")

    def command(name: str) -> None:
        page.evaluate(f"() => {{ window.jupyterapp.commands.execute({name!r}) }}")

    def opened() -> None:
        page.wait_for_function("window.jupyterapp && window.jupyterapp.restored.then(() => true)")
        page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
        page.evaluate(
            """async () => {
                const panel = window.jupyterapp.shell.currentWidget;
                await panel.context.ready;
                await panel.sessionContext.ready;
                await panel.sessionContext.session.kernel.info;
                window.jupyterapp.shell.activateById(panel.id);
            }"""
        )

    def shoot(name: str) -> None:
        page.locator(".tnb").screenshot(path=shots / f"04-{name}.png")

    def play(count: int) -> None:
        """All videos can be played; they are, slowly from their middle, and the browser takes its controls away"""
        videos = "[...document.querySelectorAll('.tnb video')]"
        page.wait_for_function(f"n => {videos}.filter(v => v.readyState >= 2).length == n", arg=count)
        middle = "v.currentTime = v.duration / 2, v.playbackRate = 1 / 16, v.play()"
        page.evaluate(f"() => Promise.all({videos}.map(v => ({middle})))")
        page.wait_for_function(f"() => {videos}.every(v => v.currentTime > v.duration / 2 && v.readyState >= 2)")
        page.wait_for_timeout(3500)

    def says(text: str) -> None:
        page.locator(".tnb").get_by_text(text).first.wait_for()

    page.goto(lab)
    opened()
    command("application:toggle-left-area")
    command("notebook:run-all-cells")
    generate.wait_for()
    says("Ready.")
    shoot("idle")

    # every control has a name, and the keyboard alone makes a clip
    page.get_by_label("Prompt").fill("a small cyan triangle growing on a navy background")
    page.get_by_role("tab", name="Text to video").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    says("it makes videos from text alone")
    named = page.locator(".tnb").aria_snapshot()
    roles = "button|textbox|combobox|spinbutton|checkbox|tab|link"
    assert not re.findall(rf"- (?:{roles})\b(?! \")[^\n]*", named), named
    page.get_by_role("tab", name="Text to video").click()
    page.get_by_role("button", name="More settings").press("Enter")
    page.get_by_label("Noise device").wait_for()
    page.get_by_role("checkbox", name="ODE").wait_for()
    assert not re.findall(rf"- (?:{roles})\b(?! \")[^\n]*", page.locator(".tnb").aria_snapshot())
    shoot("more")
    page.get_by_role("button", name="Fewer settings").click()
    page.get_by_label("Noise device").wait_for(state="hidden")
    page.get_by_role("button", name="Add LoRA").press("Enter")
    strength = page.get_by_role("spinbutton", name="Strength 1 as a number")
    strength.fill("0.33")
    strength.press("Tab")
    assert not re.findall(rf"- (?:{roles})\b(?! \")[^\n]*", page.locator(".tnb").aria_snapshot())
    shoot("lora")
    assert strength.input_value() == "0.33"
    slider = page.get_by_role("slider")  # which the kernel moves after the number
    page.wait_for_function("s => s.getAttribute('aria-valuenow') < 0.5", arg=slider.element_handle())
    slider.press("ArrowRight")
    page.wait_for_function("n => n.value == '0.4'", arg=strength.element_handle())
    page.get_by_role("button", name="Remove").press("Enter")
    strength.wait_for(state="detached")
    generate.focus()
    page.keyboard.press("Enter")
    page.get_by_role("img", name="Preview of the clip being made").wait_for()
    page.get_by_role("progressbar", name="Progress of the clip").wait_for()
    shoot("running")
    says("Done with seed")
    clips.first.wait_for()
    play(len(EARLIER) + 2)
    shoot("finished")

    # another is cancelled
    page.get_by_label("Frames").fill("121")
    page.keyboard.press("Tab")
    says("121 frames of")
    generate.click()
    cancel.click()
    says("Cancelled; nothing was written")
    assert clips.count() == len(EARLIER) + 1

    # an error in words
    page.get_by_label("Frames").fill("6")
    page.keyboard.press("Tab")
    says("num_frames is 6")
    generate.click()
    page.locator(".tnb").get_by_text("Cancelled; nothing was written").wait_for(state="detached")
    alert = page.locator(".tnb [role=alert]")
    expect(alert).to_have_count(1)
    assert alert.inner_text() == "num_frames is 6. Expected 4n + 1 (1, 5, 9, …). Take 5."
    shoot("error")

    # a reloaded page finds the running clip, and then both
    page.get_by_label("Frames").fill("49")
    page.keyboard.press("Tab")
    says("49 frames of")
    command("docmanager:save")
    generate.click()
    says("Load")
    page.reload()
    opened()
    says("Done with seed")
    page.wait_for_function("n => document.querySelectorAll('.tnb .tnb-prompt').length == n", arg=len(EARLIER) + 2)
    assert clips.count() == len(EARLIER) + 2
