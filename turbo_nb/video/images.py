"""The pictures that a clip begins and ends with: opened from whatever a user gives, and cropped to the clip's size.

`what` is the beginning of a message about a picture, such as "image is 'cat.png'".
"""

import hashlib
import io
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import url2pathname

from ..errors import InputError, first_line, warn
from ..machine import environment
from ..values import ADDRESS as OTHER_PLACE
from ..values import shown, with_home

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

KEPT_BYTES = 512_000_000  # of decoded images, about 14 photos of 12 megapixels
MOST_PIXELS = 64_000_000  # a png of this size takes 5 s on a busy core of a CPU, and with alpha 1 GB
# Pillow's names. Others are left out, because EPS and WMF run programs, and old formats' readers are little tested.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "TGA", "ICO")
FILMS = ("PNG", "WEBP", "AVIF", "GIF", "TIFF")  # formats in which further frames are whole pictures
ACCEPT = "image/*,.heic,.heif"  # for a browser, which may not know HEIC as an image
ALLOWED = "Expected a png, jpg or webp file."
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands of ISO/IEC 23008-12
QUOTES = "'\"`“”‘’«»"
ADDRESS = re.compile(rf"\s*data:|{OTHER_PLACE.pattern}", re.IGNORECASE)


def load_image(image: "str | os.PathLike | io.BytesIO | Image | np.ndarray", name: str = "image") -> "Image":
    """Open an image, upright and in 8-bit RGB.

    Values of uint16 are scaled from 0…65535. Wider integers and floats are scaled from the first range that has them
    all: 0…1 and -1…1 (floats only), 0…255, 0…65535, 0…2³¹-1, else their own. A warning names the range. Transparent
    parts are put on white, with a warning. A colour profile is applied.

    Args:
        image: a file or its bytes, a PIL image, or an array (H, W) or (H, W, C) of bool, integers or floats. C is 1
            (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).
        name: of the option that it is the value of, for messages.

    Raises:
        InputError: it cannot be read as an image, or has more than 64 million pixels.
    """
    import numpy as np
    from PIL import Image

    if isinstance(image, np.ndarray):
        what = f"{name} is {image.dtype} {image.shape}"
        return _on_white(_from_array(image, what), what)
    if isinstance(image, Image.Image):
        return _opened(image, f"{name} is a PIL image of mode {image.mode}")
    if isinstance(image, io.BytesIO):
        return _read(image, f"{name} is an upload")
    if not isinstance(image, str | os.PathLike):
        fix = "Call its numpy()." if hasattr(image, "numpy") else "Convert it."  # a tensor
        raise InputError(
            f"{name} is {shown(image)} of type {type(image).__name__}. Expected a file, a PIL image, or a numpy array "
            f"(height, width, 3). {fix}"
        )
    what = f"{name} is {shown(str(image), 300)}"
    return _read(_file(image, what), what)


class Pictures:
    """Images of files, each decoded once while the images in use fit into KEPT_BYTES."""

    def __init__(self):
        self._kept: dict[str, Image] = {}

    def open(self, image: Any, name: str = "image", *, evict: bool = True) -> "Image":
        """Open an image as `load_image` does.

        Args:
            image, name: as of `load_image`. Only files are kept.
            evict: forget those that were used longest ago to make room. False: keep this one only where room is left.

        Raises:
            InputError: it cannot be read as an image.
        """
        if not isinstance(image, str | os.PathLike):
            return load_image(image, name)
        key = os.fspath(image)
        picture = self._kept.pop(key, None) or load_image(image, name)
        room = KEPT_BYTES - 3 * picture.width * picture.height
        while evict and self._kept and self._size() > room:
            del self._kept[next(iter(self._kept))]
        if self._size() <= room:
            self._kept[key] = picture
        return picture

    def _size(self) -> int:
        return sum(3 * one.width * one.height for one in self._kept.values())


def digest(image: "Image") -> str:
    """Return the hash of an image's pixels."""
    return hashlib.sha256(image.tobytes()).hexdigest()


def is_address(image: Any) -> bool:
    """Return whether an image is given as the text of an address, such as https://… or file:///…"""
    return isinstance(image, str) and bool(ADDRESS.match(image))


def _file(image: str | os.PathLike, what: str) -> Path:
    """Return the path of a file. Raises InputError with a hint where it is one in another form"""
    path = Path(with_home(image))
    if str(image) and environment.is_file(path):
        return path
    text = str(image)
    bare = text.strip().strip(QUOTES).strip()
    if bare.lower().startswith("file:"):
        bare = url2pathname(re.sub(r"(?i)^file:(//(localhost)?(?=/))?", "", bare))
    bare = with_home(bare)
    if bare != text and environment.is_file(bare):
        raise InputError(f"{what}. Expected the path alone. Take {bare!r}.")
    if ADDRESS.match(text) and not text.strip().lower().startswith("file:"):
        raise InputError(f"{what}, which is an address. Expected a file on this machine. Download it first.")
    raise InputError(f"{what}, which is not a file. {ALLOWED} Check the path.")


def _read(source: "Path | io.BytesIO", what: str) -> "Image":
    """Open a file"""
    from PIL import Image

    is_heic = False
    try:
        is_heic = _is_heic(source)
        if is_heic:
            with suppress(ImportError):
                import pillow_heif

                pillow_heif.register_heif_opener()
        Image.init()  # fills Image.ID
        with Image.open(source, formats=[one for one in FORMATS if one in Image.ID]) as opened:
            return _opened(opened, what)
    except InputError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, about three times ours
        raise _too_large(what, "which has too many pixels") from error
    except Exception as error:  # decoders raise errors of many types on bytes that are not an image
        if is_heic and "HEIF" not in Image.ID:
            raise InputError(
                f"{what}, a HEIC picture, and pillow-heif is not installed. {ALLOWED} Run: pip install "
                "pillow-heif, or save the picture as jpg."
            ) from error
        raise _unreadable(what, error) from error


def _unreadable(what: str, error: Exception) -> InputError:
    from PIL import UnidentifiedImageError

    # Pillow's own words would be the path once more, or the address of a BytesIO
    reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else first_line(error)
    return InputError(f"{what}, which cannot be read as an image ({reason}). {ALLOWED} Save it as one of these.")


def _is_heic(source: "Path | io.BytesIO") -> bool:
    head = source.getvalue()[:12] if isinstance(source, io.BytesIO) else None
    if head is None:
        with source.open("rb") as file:
            head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in HEIC


def _too_large(what: str, how: str) -> InputError:
    return InputError(
        f"{what}, {how}. Expected at most {MOST_PIXELS // 10**6} million pixels. Make it smaller: a clip "
        "shows less than 1 million."
    )


def _opened(picture: "Image", what: str) -> "Image":
    """Return a picture upright and in RGB, after a look at its size, because decoding is what takes long"""
    from PIL import ImageOps

    if picture.width * picture.height > MOST_PIXELS:
        raise _too_large(what, f"a picture of {picture.width}x{picture.height}")
    if 0 in picture.size:
        raise InputError(f"{what} of {picture.width}x{picture.height}. Expected at least 1x1. Give another.")
    try:
        _unpack_transparency(picture)
        if picture.format in FILMS and getattr(picture, "n_frames", 1) > 1:
            warn(f"{what} with {picture.n_frames} frames. The first one is taken.")
        picture.load()
        upright = picture
        with suppress(Exception):  # viewers ignore EXIF data that cannot be read, whose errors are of many types
            upright = ImageOps.exif_transpose(picture)
        return _on_white(_eight_bits(_in_srgb(upright), picture, what), what)
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(what, error) from error


def _unpack_transparency(picture: "Image") -> None:
    """Scale a PNG's transparent value as Pillow scales its pixels, which it does not do itself"""
    key, tile = picture.info.get("transparency"), getattr(picture, "tile", None)
    layout = tile[0][3] if picture.format == "PNG" and tile else None  # before the pixels are read
    if isinstance(key, int) and layout in ("L;2", "L;4"):
        picture.info["transparency"] = key * (85 if layout == "L;2" else 17)
    elif isinstance(key, tuple) and layout == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in key)


def _eight_bits(picture: "Image", source: "Image", what: str) -> "Image":
    """Return a picture as L, LA, RGB or RGBA. `source` is the picture as it was opened.

    Pillow's own conversion clips the values of wider modes at 255.
    """
    import numpy as np
    from PIL import Image

    mode, key = picture.mode, picture.info.get("transparency")
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = np.asarray(picture)
        if source.format == "TIFF":
            values = _tiff_values(values, source.tag_v2)
        if mode == "I" and source.format in ("PNG", "PPM"):  # 16 bits: PNG before Pillow 11, PPM in every version
            values = values.astype(np.uint16)
        picture = Image.fromarray(_scaled(values, what))
        if isinstance(key, int):  # the value that is transparent
            picture.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
        return picture
    if mode == "La":  # premultiplied
        return picture.convert("LA")
    return picture.convert(_colours(picture))


def _colours(picture: "Image") -> str:
    """Return the mode that holds the colours of a picture, and what is transparent"""
    has_alpha = picture.info.get("transparency") is not None or picture.mode in ("LA", "PA", "RGBA", "RGBa")
    return "RGBA" if has_alpha else "RGB"


def _tiff_values(values: "np.ndarray", tags: Any) -> "np.ndarray":
    """Return whole numbers as the tags of a TIFF mean them, which Pillow does not apply to more than 8 bits"""
    import numpy as np
    from PIL import TiffImagePlugin as names

    bits, kind = (tags.get(name, (1,))[0] for name in (names.BITSPERSAMPLE, names.SAMPLEFORMAT))
    if kind != 1:  # not unsigned
        return values
    if bits == 12:
        values = values << 4 | values >> 8
    elif bits == 32:
        values = values.view(np.uint32)
    return np.invert(values) if tags.get(names.PHOTOMETRIC_INTERPRETATION) == 0 else values  # 0 is white


def _in_srgb(picture: "Image") -> "Image":
    """Return a picture with the colours that its profile gives it: of wide gamut, as phones write it, or of CMYK"""
    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("P", "PA", "RGB", "RGBA", "CMYK"):
        return picture
    with suppress(Exception):  # viewers ignore a profile that cannot be read; ImportError: Pillow without littlecms
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" not in ImageCms.getProfileDescription(own):
            colours = picture if picture.mode == "CMYK" else picture.convert(_colours(picture))
            target = "RGB" if picture.mode == "CMYK" else colours.mode
            return ImageCms.profileToProfile(colours, own, ImageCms.createProfile("sRGB"), outputMode=target)
    return picture


def _from_array(array: "np.ndarray", what: str) -> "Image":
    """Return an array as L, LA, RGB or RGBA"""
    from PIL import Image

    channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
    if channels not in (1, 2, 3, 4) or 0 in array.shape or array.dtype.kind not in "buif":
        fix = "Call its transpose(1, 2, 0)." if array.ndim == 3 and array.shape[0] in (1, 3, 4) else "Convert it."
        raise InputError(f"{what}. Expected a number array (height, width) or (height, width, 1 to 4). {fix}")
    height, width = array.shape[:2]
    if height * width > MOST_PIXELS:
        raise _too_large(what, f"a picture of {width}x{height}")
    values = _scaled(array, what).reshape(height, width, channels)
    return Image.fromarray(values[..., 0] if channels == 1 else values)


def _scaled(values: "np.ndarray", what: str) -> "np.ndarray":
    """Return values as uint8, scaled as `load_image` documents"""
    import numpy as np

    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    is_float = values.dtype.kind == "f"
    least, most = values.min(), values.max()
    if is_float and not (np.isfinite(least) and np.isfinite(most)):
        raise InputError(f"{what} with values that are not finite. Expected numbers. Replace them.")
    least, most = float(least), float(most)
    slack = 0.05 if is_float else 0  # filters overshoot a range a little
    ranges = [(0, 1), (-1, 1)] if is_float else []
    for low, high in [*ranges, (0, 255), (0, 65535), (0, 2**31 - 1), (least, most)]:
        if low - slack * high <= least and most <= high * (1 + slack):
            break
    warn(f"{what} with values from {least:g} to {most:g}. They were scaled as a range of {low} to {high}.")
    scaled = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 256):  # in parts, because float64 takes 8 bytes a value
        part = (values[start : start + 256].astype(np.float64) - low) * (255 / ((high - low) or 1))
        scaled[start : start + 256] = part.round().clip(0, 255)
    return scaled


def _on_white(picture: "Image", what: str) -> "Image":
    """Return a picture in RGB, with what is transparent on white"""
    from PIL import Image

    if picture.mode in ("LA", "RGBA") and picture.getchannel("A").getextrema()[0] < 255:
        warn(f"{what} with transparent parts, which were put on white. Give a picture without transparency to choose.")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


def crop(image: "Image", width: int, height: int, name: str = "image") -> "tuple[Image, str | None]":
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
            f"the {name.replace('_', ' ')} of {image.width}x{image.height} was cropped to {width}x{height}: "
            f"{max(lost_x, lost_y):.0%} cut at {sides}"
        )
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS), note
