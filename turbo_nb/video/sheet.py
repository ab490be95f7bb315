"""Several clips in one picture: side by side, or as a contact sheet."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

GROUND = "#f4f4f1"  # of a contact sheet
LONGEST = 1000  # characters of a caption that are measured


def grid(clips: "list[np.ndarray]") -> "np.ndarray":
    """Put clips (T, H, W, 3) side by side into one, as upstream shows several samples."""
    import numpy as np

    return np.concatenate(clips, axis=2)


def contact_sheet(
    clips: "list[np.ndarray]", captions: list[str] | None = None, *, frames: int = 3, columns: int = 2
) -> "Image":
    """Draw evenly spaced frames of each clip side by side, with its caption below.

    Args:
        clips: each (T, H, W, 3) uint8, all of one size.
        captions: one for each clip. None: no captions.
        frames: how many of each clip.
        columns: clips beside each other.
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
    """Return the text in one line, shortened by bisection until it fits; empty where not even "…" fits"""
    line = " ".join(text.split())
    if len(line) < LONGEST and fits(line):  # a longer line does not fit, and measuring it takes long
        return line
    low, high = -1, min(len(line), LONGEST)  # a cut after `low` characters fits (-1: none does), after `high` not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(line[:middle].rstrip() + "…") else (low, middle)
    return line[:low].rstrip() + "…" if low >= 0 else ""
