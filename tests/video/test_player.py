"""The player of a finished clip: embedded where it is small, a poster with the path where it is large."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

import turbo_nb
from turbo_nb.errors import InputError
from turbo_nb.video import mp4, player


@pytest.fixture
def clip(tmp_path):
    frames = np.zeros((5, 48, 64, 3), np.uint8)
    frames[..., 0] = 200
    return mp4.write_mp4(tmp_path / "a <b> 红.mp4", frames, 8)


def test_a_small_clip_is_inside_the_page(clip):
    page = turbo_nb.play(clip)._repr_html_()
    data = re.search(r'src="data:video/mp4;base64,([^"]+)"', page)[1]
    assert base64.b64decode(data) == clip.read_bytes()
    assert "a &lt;b&gt; 红.mp4" in page and "<b>" not in page
    assert all(word in page for word in ("controls", "autoplay", "loop", "muted", "playsinline"))


def test_a_large_clip_is_a_poster_and_a_link(clip, monkeypatch):
    monkeypatch.setattr(player, "EMBED", clip.stat().st_size - 1)
    monkeypatch.chdir(clip.parent)
    page = turbo_nb.play(clip.name, width=300)._repr_html_()
    assert "<video" not in page and "width:300px" in page and 'href="a%20%3Cb%3E%20%E7%BA%A2.mp4"' in page
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r"image/jpeg;base64,([^\"]+)", page)[1])))
    assert picture.size == (64, 48) and picture.getpixel((30, 20))[0] > 150


@pytest.mark.parametrize(("width", "size"), [(480, (64, 48)), (32, (32, 24)), (16, (16, 12))])
def test_a_poster_keeps_the_aspect(clip, width, size):
    assert Image.open(io.BytesIO(mp4.poster(clip, width))).size == size


@pytest.mark.parametrize("data", [None, b"", b"not a video"], ids=["missing", "empty", "text"])
def test_what_is_not_a_video_is_an_error_and_no_black_player(tmp_path, data):
    path = tmp_path / "x.mp4"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match="Expected an mp4"):
        turbo_nb.play(path)
