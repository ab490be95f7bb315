"""Images in, mp4 with metadata out (imageio-ffmpeg), several clips in one picture, and previews of latents."""

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


def load_image(image: "str | os.PathLike | io.BytesIO | Image | np.ndarray") -> "Image":
    """An RGB image from a file or its bytes, a PIL image or an array (H, W, 3) uint8, upright.

    Raises InputError if it is none.
    """
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    if not isinstance(image, str | os.PathLike | io.BytesIO):
        shape = getattr(image, "shape", ())
        if shape[2:] != (3,) or 0 in shape or str(image.dtype) != "uint8":
            got = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}".strip()
            raise InputError(f"image is {got}; give a file, a PIL image, or an array (height, width, 3) of uint8")
        return Image.fromarray(image)
    name = "the upload" if isinstance(image, io.BytesIO) else repr(str(image))
    if not isinstance(image, io.BytesIO) and not Path(image).is_file():
        raise InputError(f"no image {name}; give the path of a png, jpg or webp file")
    try:
        with Image.open(image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # whatever a decoder raises on bytes that are no image
        raise InputError(f"{name} is no image that can be read ({error}); give a png, jpg or webp file") from error


def crop(image: "Image", width: int, height: int) -> "tuple[Image, str | None]":
    """The image's middle at width × height, and what was cut off in words (None: nothing worth saying)."""
    from PIL import Image, ImageOps

    scale = max(width / image.width, height / image.height)
    lost_x, lost_y = 1 - width / (image.width * scale), 1 - height / (image.height * scale)
    note = None
    if max(lost_x, lost_y) > 0.02:
        sides = "left and right" if lost_x > lost_y else "top and bottom"
        note = (
            f"the image of {image.width}x{image.height} was cropped to {width}x{height}: {max(lost_x, lost_y):.0%} cut"
        )
        note += f" at {sides}"
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS), note
