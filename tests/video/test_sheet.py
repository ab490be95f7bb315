"""Contact sheets: any caption, in any script, under clips of any shape."""

import lzma
import time
import unicodedata

import numpy as np
import pytest

from turbo_nb.errors import InputError
from turbo_nb.video import fonts, sheet


@pytest.fixture(params=["bundled", "system"])
def captions(request, monkeypatch, tmp_path):
    """Fonts of this package alone, or those of the system too"""
    if request.param == "bundled":
        monkeypatch.setattr(fonts, "folders", list)
    clear()
    yield
    monkeypatch.undo()
    clear()


def clear() -> None:
    for one in (fonts.paths, fonts.font_of, fonts._load, fonts._missing, fonts._plain):
        one.cache_clear()


def clip(width: int = 96, height: int = 64) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    frames = [np.stack([x * 2, y * 3, np.full_like(x, 10 * t)], -1) for t in range(9)]
    return np.stack(frames).astype(np.uint8)


def drawn(text: str) -> str:
    """The characters that a caption has, with □ for those that no font has"""
    return "".join(run for _, run in fonts.runs(fonts.one_line(text)))


SCRIPTS = {
    "Latin": "Ein großer Kreis, ñandú, Việt Nam ằ",
    "Greek": "μεγάλος κόκκινος κύκλος",
    "Cyrillic": "Большой красный круг, Ґґ Ўў",
    "Chinese": "红色的大圆从左到右移动",
    "traditional": "紅色的大圓從左到右移動",
    "Japanese": "大きな赤い円が左から右へ、カタカナ",
    "Korean": "큰 빨간 원이 왼쪽에서 오른쪽으로",
    "Arabic": "دائرة حمراء كبيرة",
    "Hebrew": "עיגול אדום גדול",
    "Georgian": "დიდი წითელი წრე",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_caption_has_every_letter_of_its_script(captions, script):
    text = unicodedata.normalize("NFC", SCRIPTS[script])
    assert fonts.MISSING not in text and drawn(text) == text
    for font, run in fonts.runs(text):
        boxes = [font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))]
        assert all([font.getmask(one).getbbox(), bytes(font.getmask(one))] != boxes for one in run if one != " ")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("two\nlines\r\nand\ta tab\u2028end\u3000", "two lines and a tab end"),
        ("family 👨‍👩‍👧 here", "family □ here"),
        ("👍🏽 ❤️ 1️⃣ x", "□ □ 1 x"),
        ("half \ud83d of it", "half □ of it"),
        ("a\x1b\x07\u202eb\u200bc\0", "abc"),
        ("\U00020000\ue000\U0010ffff", "□□□"),
        ("e\u0301", "é"),
        ("", ""),
        ("\ufe0f \u0301", None),
    ],
    ids=ascii,
)
def test_what_no_font_has_is_replaced_visibly(captions, monkeypatch, text, wanted):
    monkeypatch.setattr(fonts, "folders", list)
    clear()
    assert wanted is None or drawn(text) == wanted
    sheet.contact_sheet([clip()], [text or "x"])


HUGE = {
    "words": "word " * 20_000,
    "Han": "".join(map(chr, range(0x4E00, 0x9E00))) * 5,
    "no font": "".join(map(chr, range(0x20000, 0x2A000))) * 3,
    "Arabic": "د" * 100_000,
    "accents": "a" + "\u0301" * 100_000,
    "emoji": "👨‍👩‍👧" * 20_000,
    "joiners": "z" + "\u200d\u0301" * 50_000,
    "blanks": " \n" * 50_000,
}


@pytest.mark.parametrize(
    "size", [(1, 208), (16, 3328), (3328, 16), (160, 24)], ids=lambda size: "x".join(map(str, size))
)
@pytest.mark.parametrize("name", HUGE)
def test_any_caption_under_any_clip_takes_less_than_a_second(captions, name, size):
    one, begin = clip(*size), time.process_time()
    picture = sheet.contact_sheet([one], [HUGE[name]], columns=1)
    assert time.process_time() - begin < 1.5  # the first caption opens the fonts
    begin = time.process_time()
    sheet.contact_sheet([one], [HUGE[name]])
    assert time.process_time() - begin < 1
    strip = max(3 * size[0] + 4, sheet.NARROWEST)
    assert picture.size == (strip + 16, size[1] + fonts.LINE + 16)
    caption = np.asarray(picture)[8 + size[1] : -8]
    assert (caption != caption[0, 0]).any() == (name != "blanks") and (caption[:, [0, -1]] == caption[0, 0]).all()


def test_a_caption_is_cut_where_it_no_longer_fits():
    measured = []

    def fits(text: str) -> bool:
        measured.append(text)
        return len(text) <= 7

    assert fonts.fitted("red circle growing", fits) == "red ci…"
    assert fonts.fitted("red cir", fits) == "red cir"
    assert fonts.fitted("x" * 100_000, fits) == "xxxxxx…"
    assert fonts.fitted("red", lambda text: False) == ""
    assert max(map(len, measured)) <= 1001


def test_a_caption_stays_in_its_strip():
    picture = np.asarray(sheet.contact_sheet([clip(), clip()], ["Å̂̂̂̂̂g" * 100, "ÿ"]))
    assert (picture[8:72, 8:104] == clip()[0]).all() and (picture[-8:] == picture[0, 0]).all()
    assert (picture[:, 8 + 3 * 96 + 4 : 16 + 3 * 96 + 4] == picture[0, 0]).all()


def test_a_noto_font_of_the_system_comes_first(monkeypatch, tmp_path):
    place = tmp_path / "fonts" / "deep"
    place.mkdir(parents=True)
    (place / "NotoSans-Regular.ttf").write_bytes(lzma.decompress((fonts.BUNDLED / "west.ttf.xz").read_bytes()))
    (place / "NotoSansCJK-Regular.ttc").write_text("not a font")
    (place / "NotoColorEmoji.ttf").write_text("not a font")
    monkeypatch.setattr(fonts, "folders", lambda: [str(tmp_path)])
    clear()
    try:
        assert [path.name for path in fonts.paths()][:2] == ["NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc"]
        assert len(fonts.paths()) == 4 and fonts.font_of("x").path == place / "NotoSans-Regular.ttf"
        assert drawn("x 红") == "x 红"
    finally:
        clear()


def test_the_bundled_fonts_come_with_their_licences_and_are_small():
    files = {path.name: path.stat().st_size for path in fonts.BUNDLED.iterdir()}
    assert files.keys() == {"README.md", "LICENSE-west", "LICENSE-east", "west.ttf.xz", "east.ttf.xz"}
    assert sum(files.values()) < 2**20


def test_contact_sheet_shows_first_middle_and_last_frames():
    frames = clip()
    shown = np.asarray(sheet.contact_sheet([frames, frames[::-1], frames], ["one", "two " * 50, "three"], columns=2))
    assert (shown[8:72, 8:104] == frames[0]).all()
    assert (shown[8:72, 106:202] == frames[4]).all()
    assert (shown[8:72, 204:300] == frames[8]).all()
    assert shown.shape == (2 * (64 + 18 + 8) + 8, 2 * (3 * 96 + 4 + 8) + 8, 3)


@pytest.mark.parametrize(
    ("clips", "words"),
    [([], None), ([clip(), clip(32, 32)], None), ([clip()], []), ([clip()], ["a", "b"])],
    ids=["none", "sizes", "few captions", "many captions"],
)
def test_clips_that_do_not_make_a_sheet(clips, words):
    if words == []:
        assert sheet.contact_sheet(clips, words, columns=1).size == (3 * 96 + 4 + 16, 64 + 16)
        return
    with pytest.raises(InputError, match="Expected at least one clip"):
        sheet.contact_sheet(clips, words)
