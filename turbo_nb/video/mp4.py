"""Images in, mp4 with metadata out (imageio-ffmpeg), several clips in one picture, and previews of latents."""

import json
import os
import re
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from ..errors import InputError, OutputError
from .sheet import GROUND

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

METADATA_KEY = "turbo_nb"
# What TURBO_NB_ENCODER may say → ffmpeg's options; x264's take about half of the usual preset's time, for 0.2 dB
ENCODERS = {
    "x264": ("libx264", "-preset", "veryfast", "-crf", "15"),
    "nvenc": ("h264_nvenc", "-preset", "p5", "-rc", "vbr", "-cq", "17", "-b:v", "0"),
}


def check_output(path: str | os.PathLike) -> Path:
    """The path of an mp4 that can be written, found out before any work; makes nothing.

    Raises OutputError if it does not end in .mp4, is a folder, or lies where no folder can be made, and InputError for
    a TURBO_NB_ENCODER that is unknown or does not work here.
    """
    _encoder_options()
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise OutputError(f"save_path is {str(path)!r}; it must end in .mp4")
    if path.is_dir():
        raise OutputError(
            f"save_path {str(path)!r} is a folder; give the name of a file in it, such as {path / 'video.mp4'}"
        )
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"cannot make the folder of {str(path)!r}: {str(parent)!r} is a file; choose another folder")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write {str(path)!r}: no permission in {str(parent)!r}; choose another folder")
    return path


def write_mp4(
    path: "str | os.PathLike | Encoder", frames: "np.ndarray", fps: int, metadata: dict | None = None
) -> Path:
    """Write frames (T, H, W, 3) uint8 as H.264 (yuv420p, plays in a browser), with `metadata` as JSON inside.

    path: also an encoder that has taken these frames. The file appears under its name only when it is whole. Raises
    OutputError if it cannot be written.
    """
    if not isinstance(path, Encoder):
        with Encoder(path, fps) as encoder:
            encoder.add(frames)
            return encoder.save(metadata)
    if path.count != len(frames):
        raise OutputError(
            f"the encoder has {path.count} of {len(frames)} frames; give its `add` to generate as on_frames, or give "
            "a path in its place"
        )
    return path.save(metadata)


class Encoder:
    """The mp4 of `write_mp4` in the making: ffmpeg takes frames in a thread, while others are decoded.

    A context; if it ends without `save`, nothing is left. TURBO_NB_ENCODER names one of `ENCODERS`, x264 if it is not
    set. Raises OutputError for a path that cannot be written, InputError for an encoder that does not work here.
    """

    def __init__(self, path: str | os.PathLike, fps: int):
        self.path, self.count, self._fps, self._options = check_output(path), 0, fps, _encoder_options()
        self._temporary, self._process, self._queue = [], None, SimpleQueue()

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *_) -> None:
        if self._process:
            self._process.kill()
            self._end()
            self._process.wait()
            self._said.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def add(self, frames: "np.ndarray") -> None:
        """Take the next frames (T, H, W, 3) uint8, all of one size, which may not change any more.

        Raises OutputError if there is no place for them; that ffmpeg failed is told by `save`.
        """
        import numpy as np

        if not self._process:
            with self._told():
                self._start(*frames.shape[1:3])
        self._queue.put(np.ascontiguousarray(frames))
        self.count += len(frames)

    def save(self, metadata: dict | None = None) -> Path:
        """Wait for ffmpeg, and give the file its metadata and its name. Raises OutputError if it cannot be written."""
        with self._told():
            self._end()
            if self._process.wait():
                self._said.seek(0)
                raise OSError(f"ffmpeg ended with {self._process.returncode}: {_last_line(self._said.read())}")
            whole = self._new_file()
            _add_metadata(self._temporary[0], whole, metadata)
            if (written := _count_frames(whole)) != self.count:  # older ffmpegs do not tell of all that failed
                raise OSError(f"ffmpeg wrote {written} of {self.count} frames")
            with whole.open("rb+") as file:
                os.fsync(file.fileno())
            whole.chmod(0o666 & ~_umask())
            whole.replace(self.path)
        return self.path

    def _start(self, height: int, width: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        command = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self._fps), "-i", "-"]
        command += ["-vf", "scale=ceil(iw/2)*2:ceil(ih/2)*2", *self._options]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            _ffmpeg(*command, self._new_file()), stdin=subprocess.PIPE, stderr=self._said,
            start_new_session=True,  # an interrupt is not for ffmpeg, whose file would be whole, and short
        )  # fmt: skip
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        with suppress(OSError), self._process.stdin as pipe:  # ffmpeg has ended, and told why
            while (frames := self._queue.get()) is not None:
                pipe.write(frames)

    def _end(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _new_file(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.stem[:40]}.", suffix=".mp4")
        os.close(handle)
        self._temporary.append(Path(name))
        return self._temporary[-1]

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write {str(self.path)!r}: {error}; free some space or choose another folder"
            ) from error


def _encoder_options() -> tuple[str, ...]:
    """ffmpeg's options for what TURBO_NB_ENCODER says"""
    name = os.environ.get("TURBO_NB_ENCODER") or "x264"
    if name not in ENCODERS:
        raise InputError(f"TURBO_NB_ENCODER is {name!r}; it is one of {', '.join(ENCODERS)}")
    options = "-c:v", *ENCODERS[name], "-pix_fmt", "yuv420p"
    if name != "x264" and (reason := _refusal(_ffmpeg(), options)):
        raise InputError(f"TURBO_NB_ENCODER={name} does not work here: {reason}; leave it out for x264")
    return options


@cache
def _refusal(ffmpeg: tuple[str, ...], options: tuple[str, ...]) -> str | None:
    """Why ffmpeg cannot encode by these options, in its own words; None where it can"""
    command = [*ffmpeg, "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "256x256", "-i", "-", *options, "-f", "null", "-"]
    result = subprocess.run(command, input=bytes(3 * 256 * 256), capture_output=True, check=False)
    return _last_line(result.stderr) if result.returncode else None


def _add_metadata(source: Path, target: Path, metadata: dict | None) -> None:
    """Copy an mp4, with the index first and metadata. Raises OSError."""
    tags = ["-metadata", f"{METADATA_KEY}={json.dumps(metadata)}"] if metadata else []
    options = ["-c", "copy", "-map_metadata", "-1", *tags, "-movflags", "+faststart+use_metadata_tags"]
    result = subprocess.run(_ffmpeg("-i", source, *options, target), capture_output=True, check=False)
    if result.returncode:
        raise OSError(f"ffmpeg ended with {result.returncode}: {_last_line(result.stderr)}")


def _count_frames(path: Path) -> int:
    """The frames that an mp4's index has, which comes first; 0 if there is none"""
    data = path.read_bytes()
    found = data.find(b"stsz")  # and after it 4 bytes of version, 4 of a size, 4 of the count
    return int.from_bytes(data[found + 12 : found + 16]) if found >= 0 else 0


def _ffmpeg(*arguments: str | Path) -> tuple[str, ...]:
    """The command that writes the last of the arguments, and says no more than errors"""
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-nostdin", "-v", "error", *map(str, arguments)


def _last_line(text: bytes) -> str:
    return (text.decode(errors="replace").strip().splitlines() or ["no word of why"])[-1]


def read_frames(path: str | os.PathLike, width: int, height: int) -> "np.ndarray":
    """All frames (T, height, width, 3) uint8 of a video, fitted into width × height on the contact sheet's ground.

    Raises InputError if it is no video.
    """
    import imageio_ffmpeg
    import numpy as np

    fit = f"scale={width}:{height}:force_original_aspect_ratio=decrease,pad={width}:{height}:-1:-1:{GROUND}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-vf", fit]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    result = subprocess.run(command, capture_output=True, check=False)
    if result.returncode or not result.stdout:
        raise InputError(f"{str(path)!r} is no video that can be read; make it again")
    return np.frombuffer(result.stdout, np.uint8).reshape(-1, height, width, 3)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_metadata(path: str | os.PathLike) -> dict:
    """What `write_mp4` put into a file. Raises InputError if there is no such file, or it says nothing."""
    import imageio_ffmpeg

    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}; give an mp4 that turbo-nb made")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    text = subprocess.run(command, capture_output=True, check=False).stdout.decode(errors="replace")
    # ffmetadata escapes =, ;, #, \ and line ends with a backslash
    match = re.search(rf"^{METADATA_KEY}=((?:[^\\\n]|\\.)*)$", text, re.MULTILINE | re.DOTALL)
    if not match:
        raise InputError(f"{str(path)!r} says nothing of how it was made; only an mp4 that turbo-nb wrote does")
    return json.loads(re.sub(r"\\(.)", r"\1", match[1], flags=re.DOTALL))


def last_frame(path: str | os.PathLike) -> "Image":
    """The last frame of a video, as RGB. Raises InputError if it cannot be read."""
    import imageio.v3 as iio
    from PIL import Image

    try:
        last = deque(iio.imiter(path, plugin="FFMPEG"), maxlen=1)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{str(path)!r} cannot be read as a video ({error}); give an mp4 that turbo-nb made"
        ) from error
    if not last:
        raise InputError(f"{str(path)!r} has no frames; give an mp4 that turbo-nb made")
    return Image.fromarray(last[0])
