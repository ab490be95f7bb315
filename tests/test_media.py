"""mp4 files: what goes in comes out, and nothing half-written stays."""

import imageio.v3 as iio
import numpy as np
import pytest

from turbo_nb import media
from turbo_nb.errors import InputError, OutputError


@pytest.fixture
def frames():
    y, x = np.mgrid[:64, :96]
    return np.stack([np.stack([x * 2, y * 3, np.full_like(x, 10 * t)], -1) for t in range(9)]).astype(np.uint8)


def test_frames_and_metadata_come_back(tmp_path, frames):
    metadata = {"prompt": 'a = "b"; #c \\ é 图\nsecond line', "seed": 7, "versions": {"torch": "2"}}
    path = media.write_mp4(tmp_path / "new" / "clip.mp4", frames, 16, metadata)
    read = iio.imread(path, plugin="FFMPEG")
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 6
    details = iio.immeta(path, plugin="FFMPEG")
    assert (details["fps"], details["codec"], details["pix_fmt"]) == (16, "h264", "yuv420p(progressive)")
    assert media.read_metadata(path) == metadata
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_the_index_comes_first_so_that_a_browser_can_start(tmp_path, frames):
    data = media.write_mp4(tmp_path / "clip.mp4", frames, 16).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_an_odd_size_is_kept(tmp_path, frames):
    path = media.write_mp4(tmp_path / "clip.mp4", frames[:, :48, :80], 8)
    assert iio.imread(path, plugin="FFMPEG").shape == (9, 48, 80, 3)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, frames, monkeypatch):
    path = media.write_mp4(tmp_path / "clip.mp4", frames, 16)
    before = path.read_bytes()

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(media.os, "replace", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        media.write_mp4(path, frames[::-1], 16)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_ffmpeg_that_fails_leaves_nothing(tmp_path, frames, monkeypatch):
    import imageio_ffmpeg

    def failing(*args, **kwargs):
        while True:
            yield

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", failing)
    with pytest.raises(OutputError, match="ffmpeg wrote 0 of 9 frames"):
        media.write_mp4(tmp_path / "clip.mp4", frames, 16)
    assert list(tmp_path.iterdir()) == []


def test_frames_are_fitted_into_the_size_asked_for(tmp_path, frames):
    path = media.write_mp4(tmp_path / "clip.mp4", frames, 16)  # 96x64
    read = media.read_frames(path, 48, 48)
    assert read.shape == (9, 48, 48, 3)
    assert np.abs(read[:, [0, 7, 40, 47]].astype(int) - 0xF4).max() < 8  # the ground, above and below
    assert np.abs(read[:, 10:38].astype(int) - frames[:, 4:60:2, ::2]).mean() < 8
    path.write_text("")
    with pytest.raises(InputError, match="no video that can be read"):
        media.read_frames(path, 48, 48)


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for path, words in [
        (tmp_path / "file" / "clip.mp4", "is a file"),
        (tmp_path / "file" / "deeper" / "clip.mp4", "is a file"),
        (tmp_path / "folder.mp4", "is a folder"),
        (tmp_path / "clip.avi", "must end in .mp4"),
    ]:
        with pytest.raises(OutputError, match=words):
            media.check_output(path)
    media.check_output(tmp_path / "new" / "clip.mp4")
    assert not (tmp_path / "new").exists()


def test_a_file_without_metadata(tmp_path, frames):
    with pytest.raises(InputError, match="says nothing"):
        media.read_metadata(media.write_mp4(tmp_path / "clip.mp4", frames, 16))
    (tmp_path / "page.mp4").write_text("<html>")
    with pytest.raises(InputError, match="says nothing"):
        media.read_metadata(tmp_path / "page.mp4")
    with pytest.raises(InputError, match="no file"):
        media.read_metadata(tmp_path / "missing.mp4")


def test_contact_sheet_shows_first_middle_and_last_frames(frames):
    sheet = np.asarray(media.contact_sheet([frames, frames[::-1], frames], ["one", "two " * 50, "three"], columns=2))
    assert (sheet[8:72, 8:104] == frames[0]).all()
    assert (sheet[8:72, 106:202] == frames[4]).all()
    assert (sheet[8:72, 204:300] == frames[8]).all()
    assert sheet.shape == (2 * (64 + 18 + 8) + 8, 2 * (3 * 96 + 4 + 8) + 8, 3)
