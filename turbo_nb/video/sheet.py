"""Images in, mp4 with metadata out (imageio-ffmpeg), several clips in one picture, and previews of latents."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
GROUND = "#f4f4f1"  # of a contact sheet


def grid(clips: "list[np.ndarray]") -> "np.ndarray":
    """Clips (T, H, W, 3) side by side as one, as upstream shows several samples."""
    import numpy as np

    return np.concatenate(clips, axis=2)


def contact_sheet(
    clips: "list[np.ndarray]", captions: list[str] | None = None, *, frames: int = 3, columns: int = 2
) -> "Image":
    """One picture of several clips: `frames` evenly spaced frames of each side by side, its caption below.

    clips: each (T, H, W, 3) uint8, all of one size.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    gap, line = 8, 18 if captions else 0
    _, height, width, _ = clips[0].shape
    strip = frames * width + (frames - 1) * 2
    rows = -(-len(clips) // columns)
    sheet = Image.new("RGB", (columns * (strip + gap) + gap, rows * (height + line + gap) + gap), GROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, clip in enumerate(clips):
        left, top = gap + number % columns * (strip + gap), gap + number // columns * (height + line + gap)
        for place, index in enumerate(np.linspace(0, len(clip) - 1, frames).round().astype(int)):
            sheet.paste(Image.fromarray(clip[index]), (left + place * (width + 2), top))
        if captions:
            text = _fitted(captions[number], lambda text: pen.textlength(text, font) <= strip)
            pen.text((left, top + height + 1), text, fill="#333333", font=font)
    return sheet


def _fitted(text: str, fits: Callable[[str], bool]) -> str:
    """The text in one line, shortened by bisection until it fits; empty where not even "…" fits"""
    line = " ".join(text.split())
    if len(line) < 1000 and fits(line):  # a longer line does not fit, and measuring it takes long
        return line
    low, high = (
        -1,
        min(len(line), 1000),
    )  # a cut after `low` characters fits (-1: nothing does), after `high` it does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(line[:middle].rstrip() + "…") else (low, middle)
    return line[:low].rstrip() + "…" if low >= 0 else ""
