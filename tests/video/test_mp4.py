"""mp4 files: what goes in comes out, and nothing half-written stays."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest

from turbo_nb.errors import InputError, OutputError
from turbo_nb.records import VideoRecord
from turbo_nb.video import mp4


@pytest.fixture
def frames():
    y, x = np.mgrid[:64, :96]
    return np.stack([np.stack([x * 2, y * 3, np.full_like(x, 10 * t)], -1) for t in range(9)]).astype(np.uint8)


def test_frames_and_metadata_come_back(tmp_path, frames):
    metadata = {"prompt": 'a = "b"; #c \\ é 图\nsecond line', "seed": 7, "versions": {"torch": "2"}}
    path = mp4.write_mp4(tmp_path / "new" / "clip.mp4", frames, 16, metadata)
    read = iio.imread(path, plugin="FFMPEG")
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 6
    details = iio.immeta(path, plugin="FFMPEG")
    assert (details["fps"], details["codec"], details["pix_fmt"]) == (16, "h264", "yuv420p(progressive)")
    assert mp4.read_metadata(path) == metadata
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_the_index_comes_first_so_that_a_browser_can_start(tmp_path, frames):
    data = mp4.write_mp4(tmp_path / "clip.mp4", frames, 16).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(("size", "kept"), [((48, 80), (48, 80)), ((47, 79), (48, 80))])
def test_a_size_is_kept_up_to_the_pixel_that_yuv420p_needs(tmp_path, frames, size, kept):
    path = mp4.write_mp4(tmp_path / "clip.mp4", frames[:, : size[0], : size[1]], 8)
    assert iio.imread(path, plugin="FFMPEG").shape == (9, *kept, 3)


def kept(error: BaseException) -> dict:
    """The arrays of the file that an error names"""
    place = re.search(r"The frames are kept in '(.*)' \(numpy\.load\)\.$", str(error))[1]
    with np.load(place) as found:
        return {"place": Path(place), **{name: found[name] for name in found}}


def test_a_failure_leaves_the_old_file_and_keeps_the_frames(tmp_path, frames, monkeypatch):
    path = mp4.write_mp4(tmp_path / "clip.mp4", frames, 16)
    before = path.read_bytes()

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mp4.atomic.os, "replace", full_disk)
    for name in ("clip-frames.npz", "clip-frames-2.npz"):
        with pytest.raises(OutputError, match=r"No space left on device\. Free some space") as caught:
            mp4.write_mp4(path, frames[::-1], 16, {"seed": 7})
        found = kept(caught.value)
        assert found["place"] == tmp_path / name and (found["frames"] == frames[::-1]).all() and found["fps"] == 16
        assert json.loads(str(found["metadata"])) == {"seed": 7}
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 3


def test_frames_are_kept_in_the_temporary_folder_or_the_error_says_why_not(tmp_path, frames, monkeypatch):
    other = tmp_path / "tmp"
    other.mkdir()
    monkeypatch.setattr(mp4.tempfile, "tempdir", str(other))
    place = tmp_path / "place"
    place.mkdir()
    encoder = mp4.Encoder(place / "clip.mp4", 16)  # its folder becomes a file while the clip is made
    place.rmdir()
    place.write_text("")
    with encoder:
        encoder.add(frames[:5])  # the frames that are still decoded are not lost
        encoder.add(frames[5:])
        with pytest.raises(OutputError, match=r"cannot write .* The frames are kept") as caught:
            mp4.write_mp4(encoder, frames, 16)
        assert kept(caught.value)["place"].parent == other
        shutil.rmtree(other)
        other.write_text("")
        with pytest.raises(OutputError, match=r"The frames could not be kept either \(.*\)\."):
            mp4.write_mp4(encoder, frames, 16)


def test_a_name_that_cannot_be_one_writes_nothing(tmp_path, frames):
    for name in ("clip.avi", "."):
        with pytest.raises(OutputError, match="Expected"):
            mp4.write_mp4(tmp_path / name, frames, 16)
    assert not list(tmp_path.iterdir())


def test_metadata_that_json_does_not_have_is_written(tmp_path, frames):
    metadata = {
        "ode": np.bool_(True),
        "seed": np.int64(7),
        "sigma": np.float32(80),
        "path": Path("a"),
        "n": [np.int8(1)],
    }
    found = mp4.read_metadata(mp4.write_mp4(tmp_path / "clip.mp4", frames, 16, metadata))
    assert found == {"ode": True, "seed": 7, "sigma": 80.0, "path": "a", "n": [1]}


def test_a_home_is_expanded_and_a_link_is_followed(tmp_path, frames, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link.mp4").symlink_to("new/clip.mp4")
    path = mp4.write_mp4("~/link.mp4", frames, 16, {"seed": 7})
    assert path == tmp_path / "link.mp4" and path.is_symlink() and (tmp_path / "new" / "clip.mp4").is_file()
    assert mp4.read_metadata("~/link.mp4") == {"seed": 7}
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["clip.mp4", "link.mp4", "new"]
    if os.geteuid():
        (tmp_path / "new").chmod(0o500)
        with pytest.raises(OutputError, match=r"no permission in .*new"):
            mp4.check_output("~/link.mp4")


def test_a_folder_that_cannot_be_written_is_named_as_it_was_given(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught:
        mp4.check_output(tmp_path / "file" / "batch" / mp4.PROBE)
    assert str(caught.value).startswith(f"cannot write '{tmp_path / 'file' / 'batch'}': ")


def stand_in(folder, script: str) -> str:
    """An ffmpeg that is a shell script, in which $FFMPEG is the real one"""
    path = folder / "ffmpeg"
    path.write_text(f"#!/bin/sh\nFFMPEG={shlex.quote(imageio_ffmpeg.get_ffmpeg_exe())}\n{script}\n")
    path.chmod(0o755)
    return str(path)


FULL = "trap '' XFSZ; ulimit -f 4"  # what a disk that is full does: writes fail


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (f'{FULL}; exec "$FFMPEG" "$@"', "ffmpeg ended with .*File too large.* Free some space"),
        (f'case "$*" in *"-c copy"*) {FULL};; esac; exec "$FFMPEG" "$@"', "ffmpeg ended with .* Free some space"),
        ("kill -9 $$", "ffmpeg ended with -9: it gave no reason"),
        ("echo no codec >&2; exit 3", "ffmpeg ended with 3: no codec"),
        ('case "$*" in *rawvideo*) exec "$FFMPEG" "$@";; esac', "ffmpeg wrote 0 of 81 frames"),
        ('case "$*" in *rawvideo*) set -- -t 0.43 "$@";; esac; exec "$FFMPEG" "$@"', "ffmpeg wrote 7 of 81 frames"),
    ],
    ids=["disk full", "disk full at the end", "killed", "refused", "nothing", "short"],
)
def test_an_ffmpeg_that_fails_leaves_the_old_file_and_keeps_the_frames(
    tmp_path, tmp_path_factory, monkeypatch, script, words
):
    frames = np.random.default_rng(0).integers(0, 256, (81, 64, 96, 3), np.uint8)  # more than a pipe holds
    path = tmp_path / "clip.mp4"
    path.write_text("old")
    script = f'case "$*" in *256x256*) exec "$FFMPEG" "$@";; esac; {script}'  # the trial before any work succeeds
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", stand_in(tmp_path_factory.mktemp("bin"), script))
    with pytest.raises(OutputError, match=rf"cannot write .*: {words}[.,]") as caught:
        mp4.write_mp4(path, frames, 16)
    assert ("Free some space" in str(caught.value)) == ("Free" in words)
    found = kept(caught.value)
    assert (found["frames"] == frames).all()
    assert path.read_text() == "old" and {*tmp_path.iterdir()} == {path, found["place"]}


# A GPU's encoder: the script stands in for one that works
NVENC = """
case "$*" in *h264_nvenc*)
  echo "$*" >> "$(dirname "$0")/asked"
  set -- $(echo "$*" | sed "s/h264_nvenc.*-b:v 0/libx264/")
esac
exec "$FFMPEG" "$@"
"""


def test_a_gpus_encoder_is_taken_where_it_is_asked_for(tmp_path, tmp_path_factory, monkeypatch, frames):
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", stand_in(folder, NVENC))
    monkeypatch.setenv("TURBO_NB_ENCODER", "nvenc")
    for name in ("a.mp4", "b.mp4"):
        path = mp4.write_mp4(tmp_path / name, frames, 16)
    assert mp4.count_frames(path) == len(frames)
    asked = (folder / "asked").read_text().splitlines()
    assert len(asked) == 3 and "256x256" in asked[0]  # tried once, on a small picture
    assert all("-c:v h264_nvenc" in line for line in asked) and not any("256x256" in line for line in asked[1:])


def test_a_gpus_encoder_that_does_not_work_is_reported_before_any_work(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TURBO_NB_ENCODER", "nvenc")
    refuses = 'case "$*" in *nvenc*) echo "No capable devices found" >&2; exit 1;; esac; exec "$FFMPEG" "$@"'
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", stand_in(tmp_path_factory.mktemp("bin"), refuses))
    with pytest.raises(InputError, match=r"TURBO_NB_ENCODER is 'nvenc', .* here \(No capable.*\)\. .* Unset it"):
        mp4.check_output(tmp_path / "clip.mp4")
    monkeypatch.setenv("TURBO_NB_ENCODER", "av2")
    with pytest.raises(InputError, match=r"TURBO_NB_ENCODER is 'av2'\. Expected one of x264, nvenc"):
        mp4.Encoder(tmp_path / "clip.mp4", 16)


NO_X264 = """
case "$*" in *libx264*)
  cat > /dev/null
  echo "[vost#0:0 @ 0x1] Unknown encoder 'libx264'" >&2
  echo "[vost#0:0 @ 0x1] Error selecting an encoder" >&2
  echo "Error opening output files: Encoder not found" >&2
  exit 8;;
esac
exec "$FFMPEG" "$@"
"""
BROKEN = {
    "missing": (None, "No such file"),
    "folder": ("folder", "Permission denied"),
    "another program": ("true", "it is not ffmpeg"),
    "echo": ("echo", "it is not ffmpeg"),
    "refuses": ("echo no libx264 >&2; exit 3", "no libx264"),
    "no libx264": (NO_X264, "Unknown encoder 'libx264'"),
    "stuck": ("exec sleep 100", "did not end within"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_ffmpeg_that_does_not_work_is_named_before_any_work(tmp_path, tmp_path_factory, monkeypatch, frames, kind):
    script, words = BROKEN[kind]
    clip = mp4.write_mp4(tmp_path / "clip.mp4", frames, 16, {"seed": 7})
    folder, place = tmp_path_factory.mktemp("bin"), tmp_path / "new" / "clip.mp4"
    path = {None: str(folder / "missing"), "folder": str(folder)}.get(script) or stand_in(folder, script)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", path)
    monkeypatch.setattr(mp4, "PATIENCE", 1)
    with pytest.raises(OutputError, match=rf"IMAGEIO_FFMPEG_EXE is '{path}', .*{words}.*libx264\. Unset it") as caught:
        mp4.check_output(place)
    assert "space" not in str(caught.value) and not place.parent.exists()
    assert mp4.read_metadata(clip) == {"seed": 7}  # which needs no ffmpeg
    if kind in ("missing", "folder"):  # not that the file is damaged
        with pytest.raises(OutputError, match=rf"IMAGEIO_FFMPEG_EXE is '{path}', .*{words}"):
            mp4.last_frame(clip)


def test_a_wheel_without_ffmpeg_is_named_before_any_work(tmp_path, monkeypatch):
    def none():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none)
    with pytest.raises(OutputError, match=r"ffmpeg is imageio-ffmpeg's, which is missing .*Reinstall imageio-ffmpeg"):
        mp4.check_output(tmp_path / "clip.mp4")


def test_the_encoder_in_use_is_named():
    assert re.fullmatch(r"libx264 of ffmpeg \S+ \(/.*\)", mp4.encoder())


def test_frames_in_parts_make_the_same_file(tmp_path, frames):
    whole = mp4.write_mp4(tmp_path / "whole.mp4", frames, 16, {"seed": 7})
    with mp4.Encoder(tmp_path / "parts.mp4", 16) as encoder:
        for part in (frames[:1], frames[1:5], frames[5:]):
            encoder.add(part)
        with pytest.raises(OutputError, match=r"has 9 of 8 frames\. .* Give its `add`"):
            mp4.write_mp4(encoder, frames[:8], 16)
        path = mp4.write_mp4(encoder, frames, 16, {"seed": 7})
    assert path.read_bytes() == whole.read_bytes() and path.stat().st_mode == whole.stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.mp4", "whole.mp4"]


def test_an_encoder_that_is_left_takes_its_ffmpeg_with_it(tmp_path, frames):
    with mp4.Encoder(tmp_path / "new" / "clip.mp4", 16):
        pass
    assert not (tmp_path / "new").exists()
    with pytest.raises(ZeroDivisionError), mp4.Encoder(tmp_path / "clip.mp4", 16) as encoder:
        encoder.add(frames)
        assert [p.suffix for p in tmp_path.iterdir()] == [".mp4"] and encoder._process.poll() is None
        1 / 0  # noqa: B018
    assert encoder._process.poll() is not None and not encoder._thread.is_alive()
    assert list(tmp_path.iterdir()) == []


def test_frames_are_fitted_into_the_size_asked_for(tmp_path, frames):
    path = mp4.write_mp4(tmp_path / "clip.mp4", frames, 16)  # 96x64
    read = mp4.read_frames(path, 48, 48)
    assert read.shape == (9, 48, 48, 3)
    assert np.abs(read[:, [0, 7, 40, 47]].astype(int) - 0xF4).max() < 8  # the ground, above and below
    assert np.abs(read[:, 10:38].astype(int) - frames[:, 4:60:2, ::2]).mean() < 8
    path.write_text("")
    with pytest.raises(InputError, match="cannot be read as a video"):
        mp4.read_frames(path, 48, 48)


@pytest.mark.parametrize("size", [(16, 3328), (3328, 16), (16, 16384), (16384, 16)])
def test_frames_of_extreme_aspects_are_fitted(tmp_path, size):
    path = mp4.write_mp4(tmp_path / "clip.mp4", np.full((2, *size[::-1], 3), 60, np.uint8), 16)
    width, height = (max(1, round(208 * side / max(size))) for side in size)
    assert np.abs(mp4.read_frames(path, width, height).astype(int) - 60).max() < 8
    read = mp4.read_frames(path, 208, 208).astype(int)
    assert read.shape == (2, 208, 208, 3) and read.min() < 160 and np.abs(read[:, 0, 0] - 0xF4).max() < 8


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "loop.mp4").symlink_to("loop.mp4/clip")
    for path, words in [
        (tmp_path / "file" / "clip.mp4", "is a file"),
        (tmp_path / "file" / "deeper" / "clip.mp4", "is a file"),
        (tmp_path / "folder.mp4", "is a folder"),
        (tmp_path / "clip.avi", "ends in .mp4"),
        (tmp_path / f"{'é' * 128}.mp4", "more than 255 bytes"),
        (tmp_path / ("x" * 256) / "clip.mp4", "more than 255 bytes"),
        (tmp_path.joinpath(*["long"] * 1000, "clip.mp4"), "too long"),
        (tmp_path / "nul\0.mp4", "null byte"),
        (tmp_path / "loop.mp4" / "clip.mp4", "symbolic links"),
    ]:
        with pytest.raises(OutputError, match=words):
            mp4.check_output(path)
    mp4.check_output(tmp_path / "new" / "clip.mp4")
    assert not (tmp_path / "new").exists()


def test_a_file_without_metadata(tmp_path, frames):
    with pytest.raises(InputError, match="says nothing"):
        mp4.read_metadata(mp4.write_mp4(tmp_path / "clip.mp4", frames, 16))
    (tmp_path / "page.mp4").write_text("<html>")
    with pytest.raises(InputError, match="says nothing"):
        mp4.read_metadata(tmp_path / "page.mp4")
    for missing in ("missing.mp4", "x" * 300 + ".mp4"):
        with pytest.raises(InputError, match="is not a file"):
            mp4.read_metadata(tmp_path / missing)


LARGE = {"prompt": "x" * 300_000, "seed": 7}


@pytest.mark.parametrize("place", ["12:30.mp4", "a:b/clip.mp4", "file:clip.mp4", "-i.mp4", "%03d.mp4", "new/../c.mp4"])
def test_a_name_that_ffmpeg_could_take_for_something_else(tmp_path, monkeypatch, frames, place):
    monkeypatch.chdir(tmp_path)
    assert mp4.write_mp4(place, frames, 16, {"seed": 7}) == mp4.Path(place)
    assert mp4.read_metadata(place) == {"seed": 7}
    assert mp4.read_frames(place, 96, 64).shape == frames.shape and mp4.last_frame(place).size == (96, 64)


def test_metadata_may_be_larger_than_an_argument(tmp_path, frames):
    assert mp4.read_metadata(mp4.write_mp4(tmp_path / "clip.mp4", frames, 16, LARGE)) == LARGE


def with_metadata(path, frames, text: str):
    """An mp4 whose metadata is any text"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mp4, "_as_json", lambda data: text)
        return mp4.write_mp4(path, frames, 16, {"any": 1})


@pytest.mark.parametrize("text", ['{"seed": 7', "null", "[1, 2]", "7", "[" * 5000, "\\", ""], ids=lambda text: text[:9])
def test_damaged_or_foreign_metadata_is_an_input_error(tmp_path, frames, text):
    path = with_metadata(tmp_path / "clip.mp4", frames[:1], text)
    with pytest.raises(InputError, match="says nothing"):
        mp4.read_metadata(path)


def test_a_record_has_defaults_for_what_is_missing_or_foreign(tmp_path, frames):
    foreign = {"prompt": None, "seed": [1, 2], "width": "wide", "timings": {"text": 1.5, "x": "y"}, "of another": 1}
    record = mp4.read_record(mp4.write_mp4(tmp_path / "clip.mp4", frames, 16, foreign))
    assert record == VideoRecord(seed=[1, 2], timings={"text": 1.5})


def test_a_playlist_named_mp4_reads_no_other_file(tmp_path, frames):
    clip = mp4.write_mp4(tmp_path / "clip.mp4", frames, 16, {"seed": 7})
    for text in (f"ffconcat version 1.0\nfile {clip}\n", f"#EXTM3U\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n"):
        (tmp_path / "list.mp4").write_text(text)
        with pytest.raises(InputError, match="cannot be read as a video"):
            mp4.read_frames(tmp_path / "list.mp4", 96, 64)


@pytest.mark.parametrize("lost", [1, 70, 400])
def test_a_clip_without_its_last_bytes_is_not_read_as_a_shorter_one(tmp_path, frames, lost):
    path = mp4.write_mp4(tmp_path / "clip.mp4", frames, 16, {"seed": 7})
    path.write_bytes(path.read_bytes()[:-lost])
    for read in (mp4.last_frame, lambda path: mp4.read_frames(path, 96, 64)):
        with pytest.raises(InputError, match=r"ends too early to be read as a video\. Expected a whole mp4\. Copy"):
            read(path)


def test_a_clip_that_begins_later_than_its_sound_has_no_frames_more(tmp_path, frames):
    path, late = mp4.write_mp4(tmp_path / "clip.mp4", frames[:5], 16), tmp_path / "late.mp4"
    command = ["-itsoffset", "2", "-i", path, "-f", "lavfi", "-t", "3", "-i", "anullsrc", "-c:v", "copy", late]
    subprocess.run(mp4._ffmpeg(*command), check=True)
    assert mp4.count_frames(late) == len(mp4.read_frames(late, 96, 64)) == 5


def test_an_ffmpeg_before_5_1_reads_each_frame_once(tmp_path, frames, monkeypatch):
    path = mp4.write_mp4(tmp_path / "clip.mp4", frames[:5], 16)
    script = (
        'case "$*" in *-fps_mode*) exit 1;; esac; '
        'for a; do shift; [ "$a" = -vsync ] && a=-fps_mode; set -- "$@" "$a"; done; exec "$FFMPEG" "$@"'
    )
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", stand_in(tmp_path, script))
    assert len(mp4.read_frames(path, 96, 64)) == 5


def test_text_for_a_terminal_has_no_escapes():
    text = "a \x1b[31;1mred\x1b[0m\x1b]0;title\x07 \x1b]8;;http://x\x1b\\circle\x9b\x08\x7f \u202e图\n\tend\x1b"
    assert mp4.printable(text) == "a red circle 图\n\tend"
    assert mp4.printable(["\x1bc", 7]) == "['\\x1bc', 7]"


def test_an_encoder_without_frames_cannot_save(tmp_path):
    with mp4.Encoder(tmp_path / "new" / "clip.mp4", 16) as encoder, pytest.raises(OutputError, match="0 frames"):
        encoder.save()
    with pytest.raises(OutputError, match="0 frames"):
        mp4.write_mp4(tmp_path / "new" / "clip.mp4", np.zeros((0, 64, 96, 3), np.uint8), 16)
    assert not [*tmp_path.rglob("*.mp4")]


def test_a_file_has_the_permissions_of_the_umask_which_never_changes(tmp_path, frames, monkeypatch):
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", None)
            path = mp4.write_mp4(tmp_path / "clip.mp4", frames, 16, {"seed": 7})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_pipe_keeps_its_place(tmp_path):
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="a pipe or a device"):
        mp4.check_output(pipe)
    assert pipe.is_fifo()


def test_too_many_open_files_are_named_as_such():
    error = mp4._unwritable(Path("a.mp4"), OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    assert "Too many open files" in str(error) and "ulimit -n" in str(error)


def test_a_link_that_leads_to_itself_is_refused_and_stays(tmp_path):
    loop = tmp_path / "loop.mp4"
    loop.symlink_to(loop)
    with pytest.raises(OutputError, match=r"loop\.mp4.*symbolic links"):
        mp4.check_output(loop)
    assert loop.is_symlink()
    gone = tmp_path / "gone.mp4"
    gone.symlink_to(tmp_path / "target.mp4")  # which the video makes
    assert mp4.check_output(gone) == gone
