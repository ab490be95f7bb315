"""Images from anywhere: their colours arrive, or an error names what is wrong."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from turbo_nb.errors import InputError, collect_warnings
from turbo_nb.settings import PICTURES
from turbo_nb.video import images

GREY = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
COLOUR = np.stack([GREY, 255 - GREY, GREY.T], -1)
RED = (200, 30, 10)


def loaded(image, *words: str) -> np.ndarray:
    """Pixels of `load_image`, which warns with these words, or not at all"""
    with collect_warnings() as warned:
        picture = images.load_image(image)
    assert picture.mode == "RGB" and len(warned) == bool(words) and all(word in warned[0] for word in words), warned
    return np.asarray(picture).astype(int)


def stored(picture: Image.Image, kind: str, **options) -> io.BytesIO:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return io.BytesIO(data.getvalue())


WIDE = {  # values of each kind, and the words of its warning
    "uint16": (GREY.astype(np.uint16) * 257, ()),
    "big endian": ((GREY.astype(np.uint16) * 257).astype(">u2"), ()),
    "dark uint16": (np.minimum(GREY.astype(np.uint16) * 257, 255), ()),
    "int32 of 8 bits": (GREY.astype(np.int32), ("0 to 255",)),
    "int32 of 16 bits": (GREY.astype(np.int32) * 257, ("0 to 65535",)),
    "int32": (GREY.astype(np.int32) * (2**31 // 256), ("0 to 2147483647",)),
    "float of 1": (GREY.astype(np.float32) / 255, ("0 to 1",)),
    "float of 255": (GREY.astype(np.float32), ("0 to 255",)),
    "float of 65535": (GREY.astype(np.float32) * 257, ("0 to 65535",)),
    "float from -1": (GREY.astype(np.float32) / 127.5 - 1, ("-1 to 1",)),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_values_are_scaled_by_their_range(name):
    values, words = WIDE[name]
    wanted = np.stack([np.minimum(GREY, 1) if name.startswith("dark") else GREY] * 3, -1)
    sources = [values]
    if values.dtype.byteorder != ">":
        sources += [Image.fromarray(values), stored(Image.fromarray(values), "TIFF")]
    if values.dtype == np.uint16:
        sources += [stored(Image.fromarray(values.astype(np.uint16)), "PNG")]
    for source in sources:
        assert np.abs(loaded(source, *words) - wanted).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_a_channel_keep_their_colours(tmp_path, kind):
    if kind == "TIFF":  # Pillow writes none, so this one is made by hand
        tags = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 140)]
        tags += [(277, 3, 1, 3), (278, 4, 1, 8), (279, 4, 1, 384)]
        table = b"".join(struct.pack("<HHII", *tag) for tag in tags)
        data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + struct.pack("<I", 0)
        data = data.ljust(134, b"\0") + struct.pack("<3H", 16, 16, 16)
        data += (COLOUR.astype("<u2") * 257).tobytes()
    else:
        import zlib

        def chunk(name: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

        rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in COLOUR)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
        data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.abs(loaded(io.BytesIO(data)) - COLOUR).max() <= 1


ALPHA = np.zeros((4, 4, 4), np.uint8)  # blue that alpha hides, half of a red, and a whole red
ALPHA[0], ALPHA[1], ALPHA[2:] = (0, 0, 255, 0), (*RED, 128), (*RED, 255)
SHOWN = np.broadcast_to(np.array([(255, 255, 255), (227, 142, 132), RED, RED])[:, None], (4, 4, 3))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "PIL", "RGBa", "array", "uint16 array", "float array"])
def test_what_is_transparent_becomes_white_and_is_reported(kind):
    picture = Image.fromarray(ALPHA)
    source = {
        "PIL": picture, "RGBa": picture.convert("RGBa"), "array": ALPHA,
        "uint16 array": ALPHA.astype(np.uint16) * 257, "float array": ALPHA / 255,
    }.get(kind)  # fmt: skip
    if source is None:
        source = stored(picture, kind, **({"lossless": True} if kind == "WEBP" else {}))
    words = ("0 to 1",) if kind == "float array" else ("white",)
    with collect_warnings() as warned:
        pixels = np.asarray(images.load_image(source)).astype(int)
    assert np.abs(pixels - SHOWN).max() <= 1 and all(any(word in one for one in warned) for word in [*words, "white"])


@pytest.mark.parametrize("mode", ["P", "LA", "La", "PA", "L", "RGB", "1", "I;16"])
def test_every_kind_of_transparency_shows_the_white_ground(mode):
    grey = np.array([[0, 255], [100, 200]], np.uint8)
    picture = Image.fromarray(grey)
    if mode in ("LA", "La", "PA"):
        alpha = Image.fromarray(np.array([[0, 255], [255, 255]], np.uint8))
        source = Image.merge("LA", [picture, alpha]).convert("LA" if mode == "PA" else mode)
        if mode == "PA":
            source = picture.convert("P")
            source.putalpha(alpha)
        assert source.mode == mode
    elif mode == "I;16":
        source = stored(Image.fromarray(grey.astype(np.uint16) * 257), "PNG", transparency=0)
    else:
        picture = picture.convert("RGB").quantize(4) if mode == "P" else picture.convert(mode)
        index = picture.getpixel((0, 0))
        source = stored(picture, "PNG", transparency=index if mode != "1" else 0)
    pixels = loaded(source, "white")
    assert (pixels[0, 0] == 255).all() and (mode == "1" or np.abs(pixels[1, 0] - 100).max() <= 2)


def png(depth: int, kind: int, pixel: bytes, key: bytes) -> io.BytesIO:
    """One pixel of a PNG's colour type and depth, which a tRNS chunk makes transparent"""
    parts = {b"IHDR": struct.pack(">IIBBBBB", 1, 1, depth, kind, 0, 0, 0), b"tRNS": key}
    parts |= {b"IDAT": zlib.compress(b"\0" + pixel), b"IEND": b""}
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts.items())
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize(
    ("depth", "kind", "pixel", "key"),
    [
        (1, 0, b"\x80", b"\0\1"),
        (2, 0, b"\x40", b"\0\1"),
        (4, 0, b"\x40", b"\0\4"),
        (8, 0, b"\x40", b"\0\x40"),
        (16, 0, b"\x12\x34", b"\x12\x34"),
        (8, 2, b"\x12\x56\x9a", b"\0\x12\0\x56\0\x9a"),
        (16, 2, b"\x12\x34\x56\x78\x9a\xbc", b"\x12\x34\x56\x78\x9a\xbc"),
    ],
)
def test_a_transparent_value_of_any_depth_is_found(depth, kind, pixel, key):
    assert (loaded(png(depth, kind, pixel, key), "white") == 255).all()


@pytest.mark.parametrize(("most", "value", "shown"), [(1023, 1023, 255), (65535, 257, 1), (65535, 32896, 128)])
def test_a_pgm_of_16_bits_is_scaled_by_its_maximum(most, value, shown):
    assert loaded(io.BytesIO(f"P5 1 1 {most}\n".encode() + struct.pack(">H", value)))[0, 0].tolist() == [shown] * 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_further_frames_of_an_image_are_reported(kind):
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), "blue")
    data = stored(first, kind, save_all=True, append_images=[second])
    assert np.abs(loaded(data, "2 frames") - RED).max() <= 3


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises(InputError, match="Expected at least 1x1"):
        images.load_image(Image.new("RGB", size))


def test_an_alpha_that_hides_nothing_is_not_reported():
    solid = ALPHA.copy()
    solid[..., 3] = 255
    assert (loaded(solid) == solid[..., :3]).all()


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (COLOUR, COLOUR),
        (GREY, np.stack([GREY] * 3, -1)),
        (GREY[..., None], np.stack([GREY] * 3, -1)),
        (GREY > 100, np.stack([(GREY > 100) * 255] * 3, -1)),
        (COLOUR[::-1, ::2], COLOUR[::-1, ::2]),
    ],
    ids=["colour", "grey", "one channel", "bool", "strided"],
)
def test_arrays_of_other_shapes(array, wanted):
    assert (loaded(array) == wanted).all()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \(3, 8, 8\).*transpose"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"\(2, 8, 8, 3\)"),
        (np.zeros((8, 8, 5), np.uint8), r"\(8, 8, 5\)"),
        (np.zeros(8, np.uint8), r"\(8,\)"),
        (np.full((8, 8), np.nan), "not finite"),
        (np.full((8, 8, 3), np.inf, np.float32), "not finite"),
        (np.zeros((8, 8, 3), complex), "complex128"),
        (np.full((8, 8), "a"), "<U1"),
        (np.full((8, 8), None), "object"),
        (7, "7"),
        (["a.png"], "list"),
        (b"\x89PNG", "bytes"),
        ("", "''"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", PICTURES)
def test_what_is_not_an_image_is_an_input_error(image, words, name):
    with pytest.raises(InputError, match=f"^{name} is .*{words}"):
        images.load_image(image, name)


def test_the_error_of_a_tensor_is_one_line_with_its_conversion():
    with pytest.raises(InputError, match=r"^image is tensor\(\[.* of type Tensor.* Call its numpy\(\)\.$"):
        images.load_image(torch.zeros(3, 4, 4))


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1"])
def test_bytes_that_are_not_an_image_are_named_once(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    for source in (io.BytesIO(data), tmp_path / "a.png"):
        with pytest.raises(InputError, match=r"\(its format is unknown\)") as caught:
            images.load_image(source)
        with pytest.raises(InputError, match=r"^last_image is "):
            images.load_image(source, "last_image")
        assert "BytesIO" not in str(caught.value) and str(caught.value).count(str(tmp_path)) <= 1


def test_an_image_that_the_disk_does_not_give_is_an_input_error(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)

    def open_nothing(self, *_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(path), "open", open_nothing)
    with pytest.raises(InputError, match=r"a\.png'.*Input/output error.*Expected a png"):
        images.load_image(path)


def test_a_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    assert (loaded("~/a.png") == COLOUR).all()


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("https://example.org/a.png", "address.*Download"),
        ("s3://bucket/a.png", "address.*Download"),
        ("data:image/png;base64,iVBORw0KGgo=", "address"),
        ("file://{}", "Take '{}'"),
        ("'{}'", "Take '{}'"),
        ('"{}"', "Take '{}'"),
        ("“{}”", "Take '{}'"),
        (" {}\n", "Take '{}'"),
        ("{}/missing.png", "not a file"),
        ("{}\0", "not a file"),
        ("x" * 5000, "not a file"),
    ],
)
@pytest.mark.parametrize("name", PICTURES)
def test_a_path_in_another_form_is_named(tmp_path, form, words, name):
    path = tmp_path / "a b.png"
    Image.fromarray(COLOUR).save(path)
    with pytest.raises(InputError, match=f"^{name} is .*{words.format(path)}") as caught:
        images.load_image(form.format(path.as_uri()[7:] if "file:" in form else path), name)
    assert len(str(caught.value)) < 500


def heic() -> io.BytesIO:
    heif = pytest.importorskip("pillow_heif")
    data = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 64), RED)).save(data)
    return io.BytesIO(data.getvalue())


def test_heic_is_read_by_pillow_heif():
    assert np.abs(loaded(heic()) - RED).max() < 8


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1"])
def test_without_pillow_heif_the_error_names_heic_and_the_package(tmp_path, monkeypatch, brand):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(64))
    for source in (path, io.BytesIO(path.read_bytes())):
        with pytest.raises(InputError, match=r"HEIC.*pip install pillow-heif"):
            images.load_image(source)


def test_a_huge_picture_is_refused_before_it_is_decoded(monkeypatch):
    data = bytearray(stored(Image.new("L", (1, 1)), "PNG").getvalue())
    for width, height in ((10_000, 10_000), (100_000, 100_000), (2**31 - 1, 1)):
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", __import__("zlib").crc32(data[12:29]))
        for name in PICTURES:
            with pytest.raises(InputError, match=rf"^{name} is .*(of {width}x{height}|pixels).*64 million"):
                images.load_image(io.BytesIO(data), name)
    with pytest.raises(InputError, match="64 million"):
        images.load_image(np.broadcast_to(np.uint8(0), (10_000, 10_000)))


def test_formats_that_run_other_programs_are_not_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(InputError, match="cannot be read as an image"):
        images.load_image(path)


def test_an_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=exif)
    assert (loaded(tmp_path / "a.png") == np.rot90(COLOUR, -1)).all()
    wide = stored(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG", exif=exif)
    assert (loaded(wide)[..., 0] == np.rot90(GREY, -1)).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0not a TIFF header", b"Exif\0\0II*\0"])
def test_exif_data_that_cannot_be_read_are_ignored(kind, exif):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (loaded(stored(Image.fromarray(COLOUR), kind, exif=exif, **options)) == COLOUR).all()


def tiff(bits: int, photometric: int, pixels: bytes) -> io.BytesIO:
    """A grey TIFF of 8x8, little endian, of a kind that Pillow does not write"""
    tags = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, photometric)]
    tags += [(273, 4, 1, 122), (277, 3, 1, 1), (278, 4, 1, 8), (279, 4, 1, len(pixels))]
    table = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return io.BytesIO(b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + struct.pack("<I", 0) + pixels)


def test_the_tags_of_a_wide_tiff_are_applied():
    white_is_zero = tiff(16, 0, (65535 - GREY.astype("<u2") * 257).astype("<u2").tobytes())
    assert (loaded(white_is_zero)[..., 0] == GREY).all()
    unsigned = tiff(32, 1, (GREY.astype("<u4") * 0x01010101).tobytes())
    assert np.abs(loaded(unsigned, "4.29497e+09")[..., 0] - GREY).max() <= 1
    digits = "".join(f"{value:02x}{value >> 4:x}" for value in GREY.ravel().tolist())  # 12 bits each
    assert np.abs(loaded(tiff(12, 1, bytes.fromhex(digits)))[..., 0] - GREY).max() <= 1


def swapped_profile() -> bytes:
    """A profile in which the red channel is green and the green one red"""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"tmp_"), (b"gXYZ", b"rXYZ"), (b"tmp_", b"gXYZ")):
        profile = profile.replace(old, new, 1)
    return profile.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "PIL"])
def test_a_colour_profile_is_applied(mode):
    picture = Image.new("RGB", (8, 8), RED)
    picture = picture.quantize(4) if mode == "P" else picture.convert("RGBA" if mode == "RGBA" else "RGB")
    source = stored(picture, "PNG", icc_profile=swapped_profile())
    pixels = loaded(Image.open(source) if mode == "PIL" else source)
    assert np.abs(pixels - (RED[1], RED[0], RED[2])).max() <= 2


@pytest.mark.parametrize("profile", [b"damaged", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
def test_a_profile_of_srgb_or_without_sense_changes_nothing(profile):
    assert (loaded(stored(Image.fromarray(COLOUR), "PNG", icc_profile=profile)) == COLOUR).all()


def test_a_transparent_value_is_found_before_a_profile_moves_it():
    source = stored(Image.new("RGB", (8, 8), RED), "PNG", transparency=RED, icc_profile=swapped_profile())
    assert (loaded(source, "white") == 255).all()


def test_warnings_name_the_option():
    film = stored(Image.fromarray(GREY), "GIF", save_all=True, append_images=[Image.fromarray(GREY.T)])
    for source in (GREY.astype(np.float32), ALPHA, stored(Image.fromarray(GREY.astype(np.int32)), "TIFF"), film):
        for name in PICTURES:
            with collect_warnings() as warned:
                images.load_image(source, name)
            assert [words.startswith(f"{name} is ") for words in warned] == [True], warned
    assert images.crop(Image.new("RGB", (9, 90)), 64, 48, "last_image")[1].startswith("the last image of 9x90 was")


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (20000, 10), (7, 5)])
def test_a_picture_of_any_aspect_is_cropped_to_the_clip(size):
    picture, note = images.crop(Image.new("RGB", size, RED), 64, 48)
    assert picture.size == (64, 48) and picture.getpixel((32, 24)) == RED and note
