"""Film the generator while it makes a clip with nano, as docs/generator.webp.

    python .ci/film.py [FILE]

It opens notebook 04 in a JupyterLab and a headless Chromium, types a prompt, presses Generate and takes pictures
until the finished clip has played. Look at the result before it is committed.
"""

import io
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import lab  # noqa: E402

PROMPT = "a large red circle moving from left to right on a black background"
HEIGHT = 760  # of the filmed part of the page
WIDTH = 900
LONGEST = 250  # ms that a picture stands at most, so that waiting is short
PLAYED = 2.5  # seconds of the finished clip


def film(page, address: str) -> list[tuple[float, bytes]]:
    """Return the pictures with the time of each in seconds."""
    pictures = []

    def take() -> None:
        box = page.locator(".tnb").bounding_box()
        clip = {"x": box["x"] - 8, "y": box["y"] - 8, "width": box["width"] + 16, "height": HEIGHT}
        pictures.append((time.monotonic(), page.screenshot(clip=clip)))

    page.goto(address)
    lab.wait_until_opened(page)
    lab.command(page, "application:toggle-left-area")
    lab.command(page, "notebook:run-all-cells")
    generate = page.get_by_role("button", name=re.compile("^Generate$"))
    generate.wait_for()
    page.locator(".tnb").get_by_text("Ready.").first.wait_for()
    page.locator(".tnb").evaluate("e => { e.style.scrollMarginTop = '12px'; e.scrollIntoView({block: 'start'}) }")
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("")
    take()
    for end in range(4, len(PROMPT) + 4, 4):
        prompt.fill(PROMPT[:end])
        take()
    page.keyboard.press("Tab")
    for _ in range(3):
        take()
    generate.click()
    done = page.locator(".tnb").get_by_text("Done with seed").first
    while not done.is_visible():
        take()
    large = page.locator(".tnb-large video")
    page.wait_for_function("v => v.currentTime > 0", arg=large.element_handle())
    end = time.monotonic() + PLAYED
    while time.monotonic() < end:
        take()
    return pictures


def write(pictures: list[tuple[float, bytes]], path: Path) -> None:
    """Write an animated WebP; equal pictures that follow each other become one."""
    frames, durations = [], []
    times = [moment for moment, _ in pictures] + [pictures[-1][0] + 1.0]
    for (moment, png), following in zip(pictures, times[1:], strict=True):
        shown = min(LONGEST, int((following - moment) * 1000))
        image = Image.open(io.BytesIO(png)).convert("RGB")
        image = image.resize((WIDTH, image.height * WIDTH // image.width), Image.Resampling.LANCZOS)
        if frames and image.tobytes() == frames[-1].tobytes():
            durations[-1] = min(3 * LONGEST, durations[-1] + shown)
        else:
            frames.append(image)
            durations.append(shown)
    durations[-1] = 1500
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=70, method=6)
    print(f"{path}: {len(frames)} pictures, {sum(durations) / 1000:.1f} s, {path.stat().st_size / 1e6:.2f} MB")


def main() -> int:
    """Film the generator. Returns the exit code."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/generator.webp"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "root").mkdir()
        shutil.copy(ROOT / "notebooks/04_generate.ipynb", folder / "root")
        settings = {"TURBO_NB_CONFIG": str(folder / "presets"), "HF_HUB_OFFLINE": "1"}
        with (
            lab.jupyter_lab(folder / "root", folder, "04_generate.ipynb", **settings) as address,
            lab.browser() as chromium,
        ):
            page = chromium.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(lab.WAIT)
            pictures = film(page, address)
            lab.end_kernels(address)
    write(pictures, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
