"""Several clips in one picture: side by side, or as a contact sheet."""

from typing import TYPE_CHECKING

from ..errors import InputError
from . import fonts

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

GROUND = "#f4f4f1"  # of a contact sheet
NARROWEST = 240  # pixels that a clip with a caption takes, because a tall clip's frames leave no place for words


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
        captions: one for each clip, in any script. None: no captions.
        frames: how many of each clip.
        columns: clips beside each other.

    Raises:
        InputError: no clips, clips of several sizes, or another number of captions.
    """
    import numpy as np
    from PIL import Image

    if not clips or len({clip.shape[1:] for clip in clips}) > 1 or len(captions or clips) != len(clips):
        sizes = sorted({f"{clip.shape[2]}x{clip.shape[1]}" for clip in clips})
        raise InputError(
            f"clips is {len(clips)} clips ({', '.join(sizes)}) with {len(captions or ())} captions. Expected at least "
            "one clip, all of one size, and a caption for each. Scale the clips first."
        )
    gap, line = 8, fonts.LINE if captions else 0
    _, height, width, _ = clips[0].shape
    strip = max(frames * width + (frames - 1) * 2, NARROWEST if captions else 0)
    rows = -(-len(clips) // columns)
    sheet = Image.new("RGB", (columns * (strip + gap) + gap, rows * (height + line + gap) + gap), GROUND)
    for number, clip in enumerate(clips):
        left, top = gap + number % columns * (strip + gap), gap + number // columns * (height + line + gap)
        for place, index in enumerate(np.linspace(0, len(clip) - 1, frames).round().astype(int)):
            sheet.paste(Image.fromarray(clip[index]), (left + place * (width + 2), top))
        if captions:
            sheet.paste(fonts.draw(captions[number], strip, GROUND, "#333333"), (left, top + height))
    return sheet
