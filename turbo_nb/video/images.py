"""The image that a clip begins with: opened from whatever a user gives, and cropped to the clip's size."""

import io
import os
from typing import TYPE_CHECKING

from ..errors import InputError
from ..machine import environment

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


def load_image(image: "str | os.PathLike | io.BytesIO | Image | np.ndarray") -> "Image":
    """Open an image, upright and in RGB.

    Args:
        image: a file or its bytes, a PIL image, or an array (H, W, 3) uint8.

    Raises:
        InputError: it cannot be read as an image.
    """
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    if not isinstance(image, str | os.PathLike | io.BytesIO):
        shape = getattr(image, "shape", ())
        if shape[2:] != (3,) or 0 in shape or str(image.dtype) != "uint8":
            got = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}".strip()
            raise InputError(
                f"image is {got}. Expected a file, a PIL image, or an array (height, width, 3) of uint8. Convert it."
            )
        return Image.fromarray(image)
    name = "an upload" if isinstance(image, io.BytesIO) else repr(str(image))
    allowed = "Expected a png, jpg or webp file."
    if not isinstance(image, io.BytesIO) and not environment.is_file(image):
        raise InputError(f"image is {name}, which is not a file. {allowed} Check the path.")
    try:
        with Image.open(image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # decoders raise errors of many types on bytes that are not an image
        raise InputError(
            f"image is {name}, which cannot be read as an image ({error}). {allowed} Save it as one of these."
        ) from error


def crop(image: "Image", width: int, height: int) -> "tuple[Image, str | None]":
    """Crop an image to the middle that has the aspect of width × height, and resize it.

    Returns:
        The image, and a sentence about what was cut off. None: at most 2 % was cut off.
    """
    from PIL import Image, ImageOps

    scale = max(width / image.width, height / image.height)
    lost_x, lost_y = 1 - width / (image.width * scale), 1 - height / (image.height * scale)
    note = None
    if max(lost_x, lost_y) > 0.02:
        sides = "left and right" if lost_x > lost_y else "top and bottom"
        note = (
            f"the image of {image.width}x{image.height} was cropped to {width}x{height}: {max(lost_x, lost_y):.0%} cut"
            f" at {sides}"
        )
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS), note
