"""mp4 files: frames and metadata are written and read by imageio-ffmpeg's ffmpeg."""

import json
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from .. import records
from ..errors import InputError, OutputError
from ..machine import atomic, environment
from .sheet import GROUND

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

METADATA_KEY = "turbo_nb"
NAME_BYTES = 255  # limit of a file's name on common file systems
ENCODER = "TURBO_NB_ENCODER"
# Values of TURBO_NB_ENCODER and ffmpeg's options. "veryfast" takes about half of the usual preset's time, for 0.2 dB.
ENCODERS = {
    "x264": ("libx264", "-preset", "veryfast", "-crf", "15"),
    "nvenc": ("h264_nvenc", "-preset", "p5", "-rc", "vbr", "-cq", "17", "-b:v", "0"),
}
# An mp4 from elsewhere may be a playlist in truth, which would have ffmpeg fetch addresses or read other files
SOURCE = ("-protocol_whitelist", "file,pipe", "-f", "mp4", "-i")
ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?"  # sequences that a terminal obeys
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"  # other control characters, and those that turn text
)


def check_encoder() -> tuple[str, ...]:
    """Encode one small picture with the encoder of TURBO_NB_ENCODER (x264 by default), once in a process.

    Returns:
        ffmpeg's options for the encoder.

    Raises:
        InputError: TURBO_NB_ENCODER is unknown or does not work on this machine.
        OutputError: ffmpeg does not work on this machine.
    """
    name = os.environ.get(ENCODER) or "x264"
    if name not in ENCODERS:
        raise InputError(f"{ENCODER} is {name!r}. Expected one of {', '.join(ENCODERS)}. Unset it for x264.")
    options = "-c:v", *ENCODERS[name], "-pix_fmt", "yuv420p"
    if reason := _refusal(_ffmpeg(), options):
        if name == "x264":
            raise OutputError(
                f"ffmpeg is {_ffmpeg()[0]!r}, which cannot encode ({reason}). Expected one with libx264. Reinstall "
                "imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE."
            )
        raise InputError(
            f"{ENCODER} is {name!r}, which does not work here ({reason}). Expected an encoder that this machine has. "
            "Unset it for x264."
        )
    return options


def check_output(path: str | os.PathLike) -> Path:
    """Check before any work that an mp4 can be written. Writes nothing.

    Args:
        path: of the mp4. Its folder need not exist.

    Returns:
        The path.

    Raises:
        OutputError: the path is not one of an mp4, or cannot be written.
        InputError: the encoder does not work, see `check_encoder`.
    """
    check_encoder()
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise OutputError(f"save_path is {str(path)!r}. Expected a name that ends in .mp4. Add .mp4 to it.")
    if environment.is_dir(path):
        raise OutputError(
            f"save_path is {str(path)!r}, which is a folder. Expected a file's name. Take {str(path / path.name)!r}."
        )
    try:
        parent = path.absolute().parent
        if any(len(os.fsencode(part)) > NAME_BYTES for part in path.parts):
            raise OSError(f"a name in it has more than {NAME_BYTES} bytes")
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error
    parent = environment.existing(parent)
    if not environment.is_dir(parent):
        raise _unwritable(path, f"{str(parent)!r} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _unwritable(path, f"no permission in {str(parent)!r}")
    return path


def write_mp4(
    path: "str | os.PathLike | Encoder", frames: "np.ndarray", fps: int, metadata: dict | None = None
) -> Path:
    """Write frames as H.264 (yuv420p, which browsers play). The file appears under its name when it is whole.

    Args:
        path: of the mp4, or an encoder that has taken these frames.
        frames: (T, H, W, 3) uint8.
        fps: frames a second.
        metadata: kept in the file as JSON. None: nothing is kept.

    Returns:
        The path.

    Raises:
        OutputError: the file cannot be written.
    """
    if not isinstance(path, Encoder):
        with Encoder(path, fps) as encoder:
            encoder.add(frames)
            return encoder.save(metadata)
    if path.count != len(frames):
        raise OutputError(
            f"encoder has {path.count} of {len(frames)} frames. Expected all of them. Give its `add` to "
            "generate as on_frames, or give a path in its place."
        )
    return path.save(metadata)


class Encoder:
    """The mp4 of `write_mp4` in the making: ffmpeg encodes frames in its own process while later ones are decoded.

    Use it as a context. If the context ends without `save`, no file is left.

    Args:
        path: of the mp4.
        fps: frames a second.

    Raises:
        OutputError: the path cannot be written, see `check_output`.
        InputError: the encoder does not work, see `check_encoder`.
    """

    def __init__(self, path: str | os.PathLike, fps: int):
        self.path, self.count, self._fps, self._options = check_output(path), 0, fps, check_encoder()
        self._files, self._process, self._queue = ExitStack(), None, SimpleQueue()

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *_) -> None:
        if self._process:
            self._process.kill()
            self._end()
            self._process.wait()
        self._files.close()

    def add(self, frames: "np.ndarray") -> None:
        """Take the next frames. A failure of ffmpeg is raised by `save`.

        Args:
            frames: (T, H, W, 3) uint8, all of one size. The array may not change any more.

        Raises:
            OutputError: the folder cannot be written.
        """
        import numpy as np

        if not self._process:
            with self._as_output_error():
                self._start(*frames.shape[1:3])
        self._queue.put(np.ascontiguousarray(frames))
        self.count += len(frames)

    def save(self, metadata: dict | None = None) -> Path:
        """Wait for ffmpeg, then give the file its metadata and its name.

        Raises:
            OutputError: no frames were added, or the file cannot be written.
        """
        if not self.count:
            raise OutputError("encoder has 0 frames. Expected at least 1. Call its `add` first.")
        with self._as_output_error():
            self._end()
            if self._process.wait():
                self._stderr.seek(0)
                raise OSError(f"ffmpeg ended with {self._process.returncode}: {_last_line(self._stderr.read())}")
            with atomic.replaced(self.path.absolute(), durable=True) as whole:
                _add_metadata(self._raw, whole, metadata)
                if (written := _count_frames(whole)) != self.count:  # older ffmpegs do not report every failure
                    raise OSError(f"ffmpeg wrote {written} of {self.count} frames")
        return self.path

    def _start(self, height: int, width: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # absolute, because ffmpeg takes "12:30.mp4" for a protocol
        self._raw = self._files.enter_context(atomic.temporary(self.path.absolute()))
        self._stderr = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  the stack closes it
        command = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self._fps), "-i", "-"]
        command += ["-vf", "scale=ceil(iw/2)*2:ceil(ih/2)*2", *self._options, "-f", "mp4", self._raw]
        self._process = subprocess.Popen(
            _ffmpeg(*command), stdin=subprocess.PIPE, stderr=self._stderr,
            start_new_session=True,  # an interrupt must not reach ffmpeg, which would finish a file that is too short
        )  # fmt: skip
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        with suppress(OSError), self._process.stdin as pipe:  # a broken pipe: `save` raises ffmpeg's own reason
            while (frames := self._queue.get()) is not None:
                pipe.write(frames)

    def _end(self) -> None:
        self._queue.put(None)
        self._thread.join()

    @contextmanager
    def _as_output_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _unwritable(self.path, error) from error


def _unwritable(path: Path, reason: object) -> OutputError:
    return OutputError(f"cannot write {str(path)!r}: {reason}. Free some space, or choose another folder or name.")


@cache
def _refusal(ffmpeg: tuple[str, ...], options: tuple[str, ...]) -> str | None:
    """Return ffmpeg's own words why it cannot encode by these options, None where it can"""
    command = [*ffmpeg, "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "256x256", "-i", "-", *options, "-f", "null", "-"]
    try:
        result = subprocess.run(command, input=bytes(3 * 256 * 256), capture_output=True, check=False)
    except OSError as error:
        return str(error)
    return _last_line(result.stderr) if result.returncode else None


def _add_metadata(source: Path, target: Path, metadata: dict | None) -> None:
    """Copy an mp4 with its index first, so that a browser can start, and with metadata. Raises OSError."""
    # through a pipe, because the system refuses arguments above 128 KiB
    tags = f"{METADATA_KEY}={_escaped(json.dumps(metadata))}\n" if metadata else ""
    result = _run(
        *SOURCE, source, "-f", "ffmetadata", "-i", "-", "-map", "0", "-map_metadata", "1", "-c", "copy",
        "-movflags", "+faststart+use_metadata_tags", "-f", "mp4", target, stdin=f";FFMETADATA1\n{tags}".encode(),
    )  # fmt: skip
    if result.returncode:
        raise OSError(f"ffmpeg ended with {result.returncode}: {_last_line(result.stderr)}")


def _escaped(text: str) -> str:
    """Escape a line for the format ffmetadata"""
    return re.sub(r"([=;#\\])", r"\\\1", text)


def _count_frames(path: Path) -> int:
    """Return the number of frames in an mp4's index, which comes first, or 0 without an index"""
    data = path.read_bytes()
    found = data.find(b"stsz")  # then 4 bytes of version, 4 of a size, 4 of the count
    return int.from_bytes(data[found + 12 : found + 16]) if found >= 0 else 0


def _ffmpeg(*arguments: str | Path) -> tuple[str, ...]:
    """Return the command of ffmpeg that reports errors only"""
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-nostdin", "-v", "error", *map(str, arguments)
    except RuntimeError as error:
        raise OutputError(
            f"ffmpeg is missing ({error}). Expected imageio-ffmpeg's. Reinstall it, or set IMAGEIO_FFMPEG_EXE."
        ) from error


def _run(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess:
    return subprocess.run(_ffmpeg(*arguments), input=stdin, capture_output=True, check=False)


def _read(path: str | os.PathLike, *arguments: str, before: tuple[str, ...] = ()) -> bytes:
    """Return what ffmpeg makes of an mp4, nothing where it fails. Raises InputError for a missing file."""
    if not environment.is_file(path):
        raise InputError(f"path is {str(path)!r}, which is not a file. Expected an mp4. Check the path.")
    with suppress(OSError):
        result = _run(*before, *SOURCE, Path(path).absolute(), *arguments, "-")
        if not result.returncode:
            return result.stdout
    return b""


def _last_line(text: bytes) -> str:
    return (text.decode(errors="replace").strip().splitlines() or ["it gave no reason"])[-1]


def read_metadata(path: str | os.PathLike) -> dict:
    """Read the metadata that `write_mp4` put into a file.

    Raises:
        InputError: the file does not exist, or has no metadata of turbo-nb, or damaged metadata.
    """
    text = _read(path, "-f", "ffmetadata").decode(errors="replace")
    # ffmetadata escapes =, ;, #, \ and line ends with a backslash
    match = re.search(rf"^{METADATA_KEY}=((?:[^\\\n]|\\.)*)$", text, re.MULTILINE | re.DOTALL)
    found = None
    with suppress(ValueError, RecursionError):
        found = json.loads(re.sub(r"\\(.)", r"\1", match[1], flags=re.DOTALL)) if match else None
    if not isinstance(found, dict):
        raise InputError(
            f"path is {str(path)!r}, which says nothing of how it was made. Expected an mp4 that turbo-nb wrote. Give "
            "the file as it was written: other programs drop the metadata."
        )
    return found


def read_record(path: str | os.PathLike) -> records.VideoRecord:
    """Read how a clip was made. Fields that are missing, or of another type, have their defaults.

    Raises:
        InputError: as of `read_metadata`.
    """
    return records.read(records.VideoRecord, read_metadata(path))


def printable(value: Any) -> str:
    """Return a value's text without what a terminal obeys: escape sequences and control characters."""
    return ESCAPES.sub("", str(value))


def read_frames(path: str | os.PathLike, width: int, height: int) -> "np.ndarray":
    """Read all frames of a video, fitted into a size on the contact sheet's ground.

    Returns:
        Frames (T, height, width, 3) uint8.

    Raises:
        InputError: the file is not an mp4 that can be decoded.
    """
    import numpy as np

    fit = f"scale={width}:{height}:force_original_aspect_ratio=decrease,pad={width}:{height}:-1:-1:{GROUND}"
    data = _read(path, "-vf", fit, "-f", "rawvideo", "-pix_fmt", "rgb24")
    if not data:
        raise _unreadable(path)
    return np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)


def last_frame(path: str | os.PathLike) -> "Image":
    """Read the last frame of a video, as RGB.

    Raises:
        InputError: the file is not an mp4 that can be decoded.
    """
    from PIL import Image

    data = _read(path, "-f", "image2pipe", "-c:v", "ppm", before=("-sseof", "-3"))  # the last 3 seconds
    if not data:
        raise _unreadable(path)
    width, height = map(int, data.split(b"\n", 2)[1].split())  # of the first frame: "P6\nWIDTH HEIGHT\n255\n", bytes
    return Image.frombytes("RGB", (width, height), data[-3 * width * height :])


def _unreadable(path: str | os.PathLike) -> InputError:
    return InputError(f"path is {str(path)!r}, which cannot be read as a video. Expected an mp4. Make it again.")
