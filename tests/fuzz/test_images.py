"""Images of every format that Pillow writes, damaged or odd: an RGB picture or a short error."""

import io
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from fuzz.harness import PATHS, TEXTS, bent, fuzz, require_documented
from helpers import command_line
from PIL import Image

from turbo_nb.settings import adaptive_size
from turbo_nb.video.images import crop, load_image

MODES = (
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "La",
    "I;16",
    "I;16B",
)
SIZES = ((1, 1), (1, 3000), (3000, 1), (2, 700), (33, 17), (64, 64), (300, 200))
DTYPES = (
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "object",
    "U3",
)
VALUES = (0, 1, -1, 0.5, 255, 256, 65535, 1e30, float("nan"), float("inf"), -5)


def png(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """Return a small file that claims to be a picture of this size"""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def picture(chance) -> Image.Image:
    mode, size = chance.choice(MODES), chance.choice(SIZES)
    return (
        Image.frombytes("RGB", size, chance.randbytes(3 * size[0] * size[1]))
        .convert("RGB" if mode in ("HSV", "LAB") else "L")
        .convert(mode)
        if mode in ("L", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "1", "P", "LA", "HSV")
        else Image.new(mode, size)
    )


def written(chance) -> bytes:
    """Return a picture as a file of any format"""
    formats = [one for one in Image.SAVE if one not in ("PDF", "PALM", "XBM", "MSP")]
    if chance.random() < 0.1:
        side = chance.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 8000, 8001, 30_000])
        return png(
            side, chance.choice([1, 8000, 8001, side]), chance.choice([1, 8, 16, 3]), chance.choice([0, 2, 3, 4, 6, 1])
        )
    while True:
        made, file, kind = picture(chance), io.BytesIO(), chance.choice(formats)
        exif = Image.Exif()
        exif[274] = chance.choice([0, 1, 2, 3, 5, 6, 8, 9, 65535])
        more = {"exif": exif.tobytes()} if chance.random() < 0.5 else {}
        more |= {"transparency": chance.choice([0, 3, 255, b"\0\1", (1, 2, 3)])} if chance.random() < 0.2 else {}
        more |= {"save_all": True, "append_images": [made, made]} if chance.random() < 0.1 else {}
        more = {} if kind == "AVIF" else more  # because Pillow 13 ends the process while it writes some of these
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made.save(file, kind, **more)
            return file.getvalue()
        except Exception:  # the format does not have the mode
            continue


def require_picture(image) -> None:
    assert image.mode == "RGB" and min(image.size) > 0
    width, height = adaptive_size(832 * 480, *image.size)
    if max(width, height) <= 1024:
        cropped, _ = crop(image, width, height)
        assert cropped.size == (width, height)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_picture_is_a_picture_or_an_error(folder):
    Image.init()

    def attempt(chance):
        data = written(chance)
        data = bent(data, chance, chance.choice([None, 64, 400])) if chance.random() < 0.7 else data
        path = folder / f"x{chance.choice(['.png', '.jpg', '.webp', '', '.PNG', '.heic', '.gif', '.txt'])}"
        path.write_bytes(data)
        require_picture(load_image(chance.choice([path, str(path), io.BytesIO(data)])))

    fuzz("images", 150, attempt)


@pytest.mark.filterwarnings("ignore")
def test_an_odd_array_or_object_is_a_picture_or_an_error():
    def attempt(chance):
        shape = chance.choice(
            [
                (),
                (0,),
                (3,),
                (4, 4),
                (0, 4),
                (4, 4, 3),
                (4, 4, 1),
                (3, 4, 4),
                (4, 4, 5),
                (1, 4, 4, 3),
                (4, 4, 0),
                (4, 4, 2),
            ]
        )
        made = np.full(shape, 0, chance.choice(DTYPES))
        try:
            made.flat[: chance.choice([0, 1, 3])] = chance.choice(VALUES)
        except (OverflowError, ValueError, TypeError):
            made = made.astype("float32")
        made = chance.choice(
            [
                made,
                made[::-1] if made.ndim else made,
                made.T,
                made.astype(">f4", copy=False) if made.dtype.kind == "f" else made,
            ]
        )
        whole = [made] * 5 + [
            picture(chance),
            None,
            5,
            b"x",
            ["a"],
            {},
            io.BytesIO(b""),
            io.BytesIO(b"x"),
            chance.choice(TEXTS),
            True,
            float("nan"),
            object,
        ]
        require_picture(load_image(chance.choice(whole)))

    fuzz("arrays", 150, attempt)


@pytest.mark.usefixtures("cheap")
def test_names_of_pictures(folder):
    def attempt(chance):
        name = (
            chance.choice(PATHS)
            if chance.random() < 0.7
            else chance.choice(TEXTS) + chance.choice([".png", "", ".jpg"])
        )
        wrapped = chance.choice(["{}", "'{}'", '"{}"', " {} ", "file://{}", "file:{}", "‘{}’", "./{}"]).format(name)
        if chance.random() < 0.1:
            require_documented(command_line("i2v", "--prompt", "x", "--image_path", wrapped, cwd=folder))
        else:
            require_picture(load_image(chance.choice([wrapped, Path(name)])))

    fuzz("names of images", 100, attempt)
