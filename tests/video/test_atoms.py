"""Tags of an mp4 without ffmpeg: as ffmpeg reads them, and nothing from damaged boxes."""

import io
import random
import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from turbo_nb.video import atoms, mp4


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    return mp4.write_mp4(tmp_path_factory.mktemp("clip") / "a.mp4", frames, 8, {"prompt": 'a = "红"; #\\ \n', "n": 1})


def copied(clip, folder, *options: str):
    path = folder / "copy.mp4"
    inputs, options = (options[:4], options[4:]) if "lavfi" in options else ((), options)
    codec = () if "-c:v" in options else ("-c:v", "copy")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", clip, *inputs, *codec, *options, path]
    subprocess.run(command, check=True)
    return path


def box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


@pytest.mark.parametrize(
    "options",
    [
        ("-movflags", "use_metadata_tags"),  # the index comes last
        ("-movflags", "use_metadata_tags+faststart", "-metadata", "title=x"),
        ("-movflags", "use_metadata_tags", "-f", "mov"),
        ("-movflags", "use_metadata_tags+frag_keyframe+empty_moov"),
    ],
    ids=["last", "faststart", "mov", "fragments"],
)
def test_tags_are_found_wherever_ffmpeg_puts_them(clip, tmp_path, options):
    assert mp4.read_metadata(copied(clip, tmp_path, *options)) == {"prompt": 'a = "红"; #\\ \n', "n": 1}


SOUND = ("-f", "lavfi", "-i", "anullsrc", "-t", "9")
TIMES = {
    "as written": ((), (5, [8.0])),
    "sound first": ((*SOUND, "-map", "1:a", "-map", "0:v"), (5, [8.0])),
    "another rate": (("-r", "24", "-c:v", "libx264"), (15, [24.0])),
    "two rates": (
        (
            "-vf",
            "setpts='if(gt(N,2),N+9,N)/8/TB'",
            "-use_editlist",
            "0",
            "-fps_mode",
            "vfr",
            "-bf",
            "0",
            "-c:v",
            "libx264",
        ),
        (5, [0.8, 8.0]),
    ),
    "no video": ((*SOUND, "-map", "1:a"), (0, [])),
}


@pytest.mark.parametrize("kind", TIMES)
def test_frames_and_their_rate_are_those_of_the_video_track(clip, tmp_path, kind):
    options, expected = TIMES[kind]
    path = copied(clip, tmp_path, *options)
    assert mp4.read_timing(path) == expected
    if expected[0]:  # none is repeated in a gap, or left out
        assert len(mp4.read_frames(path, 16, 16)) == expected[0]
    data = path.read_bytes()
    for end in range(0, len(data), 97):
        atoms.timing(data[:end])


def test_a_copy_without_tags_has_none(clip, tmp_path):
    with pytest.raises(mp4.InputError, match="says nothing"):
        mp4.read_metadata(copied(clip, tmp_path, "-map_metadata", "-1"))


def test_lengths_of_64_bits_and_up_to_the_end(clip):
    data = clip.read_bytes()
    moov = atoms.read_moov(io.BytesIO(data))
    assert mp4.metadata_of(moov)["n"] == 1
    large = (1).to_bytes(4, "big") + b"mdat" + (24).to_bytes(8, "big") + bytes(8)
    for file in (large + box(b"moov", moov), large + bytes(4) + b"moov" + moov):
        assert atoms.read_moov(io.BytesIO(file)) == moov


RAW = b"\0\0\0\1\x67\x64\0\x0b" + b"\xac" * 100  # of H.264 alone: a box with a length of 64 bits, if it were an mp4


@pytest.mark.parametrize("data", [b"", b"moov", bytes(100), b"\xff" * 100, box(b"moov", b""), b"\0\0\0\4moov", RAW])
def test_what_is_not_an_mp4_has_no_tags(data):
    assert atoms.tags(atoms.read_moov(io.BytesIO(data))) == {} and atoms.tags(data) == {}


def test_a_length_beyond_the_end_reads_nothing():
    assert atoms.read_moov(io.BytesIO((1 << 30).to_bytes(4, "big") + b"moov" + bytes(100))) == b""


def test_damaged_boxes_raise_nothing(clip):
    good, rng = clip.read_bytes(), random.Random(0)
    end = re.search(b"mdat", good).start()
    for _ in range(500):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(end)] = rng.randrange(256)
        found = mp4.metadata_of(atoms.read_moov(io.BytesIO(data[: rng.randrange(len(data))])))
        assert found is None or isinstance(found, dict)
