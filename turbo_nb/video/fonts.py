"""Captions in any script: fonts of the system or of this package, and marks for what no font has."""

import io
import lzma
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

SIZE, LINE = 12, 18  # of the font and of a caption's line, in pixels
LONGEST = 1000  # characters of a caption that are measured
MARKS = 4  # accents of one letter that are drawn, because shaping thousands takes seconds
MISSING = "□"  # stands for a character that no font has, and for an emoji
BUNDLED = Path(__file__).parents[1] / "assets" / "fonts"
# Noto's names by script, because Noto has a font of its own for most scripts
SCRIPTS = (
    "", "CJK", "CJKsc", "CJKjp", "SC", "JP", "KR", "TC", "Arabic", "Hebrew", "Armenian", "Georgian",
    "Devanagari", "Bengali", "Gurmukhi", "Gujarati",
    "Oriya", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala", "Thai", "Lao", "Myanmar", "Khmer", "Ethiopic",
    "Tibetan", "Mongolian", "Math", "Symbols", "Symbols2",
)  # fmt: skip
EMOJI = re.compile(
    "[\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]"
    "(?:[\ufe0e\ufe0f\u20e3\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]|\u200d.)*"  # what belongs to the emoji
)
ENDS = ("-Regular.ttf", "-Regular.otf", "-Regular.ttc", "-VF.ttf", "-VF.ttc", "[wght].ttf", "[wdth,wght].ttf")
JOINERS = "\u200c\u200d"  # which Arabic and the scripts of India need


def draw(text: str, width: int, ground: str, colour: str) -> "Image":
    """Draw a caption in one line, shortened with "…" to fit.

    Args:
        text: any. Line ends become blanks, and what no font has becomes "□".
        width: of the picture, in pixels.
        ground, colour: of the picture and of the text.

    Returns:
        A picture of `width` × `LINE` pixels.
    """
    from PIL import Image, ImageDraw

    line = fitted(one_line(text), lambda part: sum(font.getlength(run) for font, run in runs(part)) <= width)
    picture, left = Image.new("RGB", (width, LINE), ground), 0.0
    pen = ImageDraw.Draw(picture)
    for font, run in runs(line):
        pen.text((left, SIZE + 1), run, fill=colour, font=font, anchor="ls")
        left += font.getlength(run)
    return picture


def one_line(text: str) -> str:
    """Return the beginning of a text in one line, without what cannot be drawn."""
    line = unicodedata.normalize("NFC", " ".join(text[: 8 * LONGEST].split()))
    line = EMOJI.sub(MISSING, line)
    kept, marks = [], 0
    for one in line:
        category = unicodedata.category(one)
        marks = marks + 1 if unicodedata.combining(one) or one in JOINERS else 0
        if marks > MARKS or (category in ("Cc", "Cf", "Me") and one not in JOINERS) or "\ufe00" <= one <= "\ufe0f":
            continue
        kept.append(MISSING if category == "Cs" else one)  # half of a surrogate pair is not a character
    line = "".join(kept)
    return line[: LONGEST + 1]


def fitted(line: str, fits: Callable[[str], bool]) -> str:
    """Return the line, shortened by bisection until it fits; empty where not even "…" fits."""
    if len(line) <= LONGEST and fits(line):  # measuring a longer line takes long
        return line
    low, high = -1, min(len(line), LONGEST)  # a cut after `low` characters fits (-1: none does), after `high` not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(line[:middle].rstrip() + "…") else (low, middle)
    return line[:low].rstrip() + "…" if low >= 0 else ""


def runs(line: str) -> "Iterator[tuple[FreeTypeFont, str]]":
    """Yield parts of a line that one font has, in order. A character that no font has is "□"."""
    placed, font = [], font_of(MISSING)
    for one in line:
        is_mark = one in JOINERS or unicodedata.combining(one)
        if not (is_mark or one == " ") or (one == " " and not has(font, one)):  # others stay in the font before them
            font = font_of(one)
        elif not has(font, one):  # an accent without its own glyph is left out
            continue
        placed.append((font, one) if font else (font := font_of(MISSING), MISSING))
    for used, group in groupby(placed, lambda pair: pair[0]):
        yield used, "".join(one for _, one in group)


@lru_cache(65536)
def font_of(character: str) -> "FreeTypeFont | None":
    """Return the first font that has a character."""
    return next((font for path in paths() if (font := _load(path)) and has(font, character)), None)


def has(font: "FreeTypeFont", character: str) -> bool:
    """Return whether a font has a character, whose picture is then not that of a missing one."""
    return _picture(font, character) != _missing(font)


@cache
def _missing(font: "FreeTypeFont") -> tuple:
    return _picture(font, "\uffff")  # never a character


def _picture(font: "FreeTypeFont", character: str) -> tuple:
    mask = _plain(font).getmask(character)
    return mask.size, bytes(mask)


@cache
def _plain(font: "FreeTypeFont") -> "FreeTypeFont":
    """Return the font without shaping, which draws a dotted circle under an accent of its own"""
    from PIL import ImageFont

    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


@cache
def paths() -> tuple[Path, ...]:
    """Return the fonts of captions: Noto's of the system, then this package's."""
    wanted = {f"NotoSans{script}{end}": place for place, script in enumerate(SCRIPTS) for end in ENDS}
    found: dict[str, Path] = {}
    for folder in folders():
        for parent, _, names in os.walk(folder):
            for name in wanted.keys() & set(names):
                found.setdefault(name, Path(parent, name))
    return (*(found[name] for name in sorted(found, key=wanted.get)), BUNDLED / "west.ttf.xz", BUNDLED / "east.ttf.xz")


def folders() -> list[str]:
    """Return the folders where systems keep fonts."""
    if sys.platform == "darwin":
        return ["/Library/Fonts", "/System/Library/Fonts", os.path.expanduser("~/Library/Fonts")]
    if sys.platform == "win32":
        return [os.path.join(os.environ.get("WINDIR", r"C:\Windows"), "Fonts")]
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return ["/usr/share/fonts", "/usr/local/share/fonts", os.path.join(data, "fonts")]


@cache
def _load(path: Path) -> "FreeTypeFont | None":
    """Open a font; None for a file that is not one"""
    from PIL import ImageFont

    try:
        source = io.BytesIO(lzma.decompress(path.read_bytes())) if path.suffix == ".xz" else path
        return ImageFont.truetype(source, SIZE)
    except (OSError, lzma.LZMAError):
        return None
