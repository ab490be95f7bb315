"""mp4 files: imageio-ffmpeg's ffmpeg writes and reads them. `atoms.py` reads their metadata."""

import errno
import json
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO

from .. import records
from ..errors import InputError, OutputError, TurboNbError, first_line, is_full
from ..machine import atomic, environment
from ..values import local, shown
from . import atoms
from .sheet import GROUND

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

METADATA_KEY = "turbo_nb"
FFMPEG = "IMAGEIO_FFMPEG_EXE"
LARGEST_SIDES = {"x264": 16384, "nvenc": 4096}  # pixels: limits of libx264, and of H.264 on NVIDIA's encoders
PATIENCE = 60  # seconds for what takes a second, after which ffmpeg is taken for stuck
PIXELS_A_BYTE = 16  # of a quiet clip; noise takes ten times as much
NAME_BYTES = 255  # limit of a file's name on common file systems
PROBE = "probe.mp4"  # a name to check a folder with
ENCODER = "TURBO_NB_ENCODER"
# Values of TURBO_NB_ENCODER and ffmpeg's options. "veryfast" takes about half of the usual preset's time, for 0.2 dB.
ENCODERS = {
    "x264": ("libx264", "-preset", "veryfast", "-crf", "15"),
    "nvenc": ("h264_nvenc", "-preset", "p5", "-rc", "vbr", "-cq", "17", "-b:v", "0"),
}
# An mp4 from elsewhere may be a playlist in truth, which would have ffmpeg fetch addresses or read other files
SOURCE = ("-protocol_whitelist", "file,pipe", "-f", "mp4", "-i")
# because ffmpeg repeats or drops frames to get an even rate: the option from 5.1 on, and the one before
EACH_ONCE = ("-fps_mode", "passthrough"), ("-vsync", "passthrough")
STRICT = ("-xerror",)  # because a frame that cannot be decoded is left out otherwise
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
            raise _broken(f"cannot encode ({reason})")
        raise InputError(
            f"{ENCODER} is {name!r}, which does not work here ({reason}). Expected an encoder that this machine has. "
            "Unset it for x264."
        )
    return options


def encoder() -> str:
    """Return what encodes here, such as "libx264 of ffmpeg 7.0.2 (/usr/bin/ffmpeg)". Raises as `check_encoder`."""
    _, codec, *_ = check_encoder()
    command = _ffmpeg()[0]
    with suppress(OSError, subprocess.TimeoutExpired):
        text = subprocess.run([command, "-version"], capture_output=True, check=False, timeout=PATIENCE).stdout.decode()
        if found := re.match(r"ffmpeg version (\S+)", text):
            return f"{codec} of ffmpeg {found[1]} ({command})"
    return f"{codec} of {command}"


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
    path = _named(path)
    try:
        if any(len(os.fsencode(part)) > NAME_BYTES for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, f"a name in it has more than {NAME_BYTES} bytes")
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # of the file behind a link, because a link to itself has no file
        environment.require_writable(_target(path).parent)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error
    return path


def check_size(path: Path, width: int, height: int) -> None:
    """Raise OutputError where the encoder takes no pictures of so many pixels."""
    name = os.environ.get(ENCODER) or "x264"
    most = LARGEST_SIDES[name]
    if max(width, height) > most:
        fix = "Unset TURBO_NB_ENCODER." if most < LARGEST_SIDES["x264"] else "Make fewer clips, or leave grid out."
        raise OutputError(
            f"{shown(path)} would be of {width}x{height} pixels. Expected sides of at most {most}, which "
            f"{name} can encode. {fix}"
        )


def check_space(path: Path, width: int, height: int, frames: int) -> None:
    """Raise OutputError where the disk of an mp4 has no space for one clip of so many pixels and frames."""
    needed, free = 2 * width * height * frames // PIXELS_A_BYTE, environment.free_bytes(_target(path).parent)
    if free < needed:  # for the clip and its copy with metadata
        raise _unwritable(path, OSError(errno.ENOSPC, f"it needs about {needed:,} bytes, and {free:,} are free"))


def _named(path: str | os.PathLike) -> Path:
    """Return the path with "~" expanded. Raises OutputError where an mp4 cannot have this name"""
    if not isinstance(path, str | os.PathLike):
        raise OutputError(f"save_path is of type {type(path).__name__}. Expected a path, as text or Path. Convert it.")
    path = Path(local(path, "save_path"))
    if path.suffix.lower() != ".mp4":
        raise OutputError(f"save_path is {str(path)!r}. Expected a name that ends in .mp4. Add .mp4 to it.")
    if environment.is_dir(path):
        raise OutputError(
            f"save_path is {str(path)!r}, which is a folder. Expected a file's name. Take {str(path / path.name)!r}."
        )
    if environment.exists(path) and not environment.is_file(path):  # whose place the mp4 would take
        raise OutputError(f"save_path is {str(path)!r}, a pipe or a device. Expected a file's name. Choose another.")
    return path


def _target(path: Path) -> Path:
    """Return the absolute path of the file itself: where a link leads, which stays a link"""
    return Path(os.path.realpath(path))


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
        OutputError: the file cannot be written. The frames are then in another file, which the message names.
        InputError: the encoder does not work any more. The frames are kept, too.
    """
    if isinstance(path, Encoder) and path.count != len(frames):
        raise OutputError(
            f"encoder has {path.count} of {len(frames)} frames. Expected all of them. Give its `add` to "
            "generate as on_frames, or give a path in its place."
        )
    place = path.path if isinstance(path, Encoder) else _named(path)
    try:
        if isinstance(path, Encoder):
            return path.save(metadata)
        with Encoder(path, fps) as encoder:
            encoder.add(frames)
            return encoder.save(metadata)
    except TurboNbError as error:
        raise with_frames_kept(error, place, frames, fps, metadata) from error


def with_frames_kept(
    error: TurboNbError, path: Path, frames: "np.ndarray", fps: int, metadata: dict | None
) -> TurboNbError:
    """Keep frames that could not be written as an mp4, because making them again takes much longer.

    Args:
        error: what went wrong.
        path: of the mp4. The frames go into its folder, or into the temporary one.
        frames, fps, metadata: as of `write_mp4`. They become the arrays of one npz file.

    Returns:
        The error, with a sentence about where the frames are.
    """
    import numpy as np

    if not len(frames):
        return error
    reasons = []
    for folder in (lambda: _target(path).parent, lambda: Path(tempfile.gettempdir())):
        try:
            kept = atomic.claim(folder(), f"{path.stem[:60]}-frames", ".npz")
            try:
                with kept.open("wb") as file:
                    np.savez(file, frames=frames, fps=fps, metadata=_as_json(metadata or {}))
            except BaseException:
                kept.unlink(missing_ok=True)
                raise
        except (OSError, ValueError) as failure:
            reasons.append(first_line(failure))
        else:
            return type(error)(f"{error} The frames are kept in {str(kept)!r} (numpy.load).")
    return type(error)(f"{error} The frames could not be kept either ({'; '.join(reasons)}).")


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
        self._failure: OSError | None = None  # that kept ffmpeg from starting

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *_) -> None:
        if self._process:
            self._process.kill()
            self._end()
            self._process.wait()
        self._files.close()

    def add(self, frames: "np.ndarray") -> None:
        """Take the next frames. `save` raises what fails here, because the frames that are still decoded are wanted.

        Args:
            frames: (T, H, W, 3) uint8, all of one size. The array may not change any more.
        """
        import numpy as np

        if not self._process and not self._failure:
            try:
                self._start(*frames.shape[1:3])
            except OSError as error:
                self._failure = error
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
            if self._failure:
                raise self._failure
            self._end()
            if self._process.wait():
                self._stderr.seek(0)
                raise OSError(f"ffmpeg ended with {self._process.returncode}: {_reason(self._stderr.read())}")
            with atomic.replaced(_target(self.path), durable=True) as whole:
                _add_metadata(self._raw, whole, metadata)
                if (written := count_frames(whole)) != self.count:  # older ffmpegs do not report every failure
                    raise OSError(f"ffmpeg wrote {written} of {self.count} frames")
        return self.path

    def _start(self, height: int, width: int) -> None:
        target = _target(self.path)  # absolute, because ffmpeg takes "12:30.mp4" for a protocol
        for folder in (target.parent, self.path.parent):  # the second exists beforehand, except for NEW/../clip.mp4
            folder.mkdir(parents=True, exist_ok=True)
        self._raw = self._files.enter_context(atomic.temporary(target))
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


def _unwritable(path: Path, error: Exception) -> OutputError:
    number, text = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
    if number == errno.EFBIG or "File too large" in text or is_full(error):
        fix = "Free some space, or choose another folder."
    elif number in (errno.EMFILE, errno.ENFILE):
        fix = "Close other files of this process, or raise the limit (ulimit -n)."
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        fix = "Choose another folder."
    elif "ffmpeg" in text:
        fix = "Look at what else runs on this machine, and at the free space."
    else:
        fix = "Choose another folder or name."
    return OutputError(f"cannot write {shown(path.parent if path.name == PROBE else path)}: {text}. {fix}")


def _broken(how: str) -> OutputError:
    """Return the error of an ffmpeg that does not work"""
    if exe := os.environ.get(FFMPEG):
        return OutputError(
            f"{FFMPEG} is {exe!r}, which {how}. Expected an ffmpeg with libx264. Unset it for imageio-ffmpeg's own."
        )
    return OutputError(
        f"ffmpeg is imageio-ffmpeg's, which {how}. Expected one with libx264. Reinstall imageio-ffmpeg, or "
        f"set {FFMPEG}."
    )


@cache
def _refusal(ffmpeg: tuple[str, ...], options: tuple[str, ...]) -> str | None:
    """Return why ffmpeg cannot encode by these options, None where it can"""
    command = [*ffmpeg, "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "256x256", "-i", "-", *options, "-f", "h264", "-"]
    try:
        result = subprocess.run(command, input=bytes(3 * 256 * 256), capture_output=True, check=False, timeout=PATIENCE)
    except OSError as error:
        return error.strerror or str(error)
    except subprocess.TimeoutExpired:
        return f"it did not end within {PATIENCE} s"
    if result.returncode:
        return _reason(result.stderr)
    return None if result.stdout.startswith(b"\0\0") else "it is not ffmpeg"  # H.264 starts with zeros


def _add_metadata(source: Path, target: Path, metadata: dict | None) -> None:
    """Copy an mp4 with its index first, so that a browser can start, and with metadata. Raises OSError."""
    # through a pipe, because the system refuses arguments above 128 KiB
    tags = f"{METADATA_KEY}={_escaped(_as_json(metadata))}\n" if metadata else ""
    result = _run(
        *SOURCE, source, "-f", "ffmetadata", "-i", "-", "-map", "0", "-map_metadata", "1", "-c", "copy",
        "-movflags", "+faststart+use_metadata_tags", "-f", "mp4", target, stdin=f";FFMETADATA1\n{tags}".encode(),
    )  # fmt: skip
    if result.returncode:
        raise OSError(f"ffmpeg ended with {result.returncode}: {_reason(result.stderr)}")


def _as_json(metadata: dict) -> str:
    """Return metadata as JSON. A value that JSON does not have becomes a number or text, because the clip is made"""
    return json.dumps(metadata, default=lambda value: value.item() if getattr(value, "shape", 0) == () else str(value))


def _escaped(text: str) -> str:
    """Escape a line for the format ffmetadata"""
    return re.sub(r"([=;#\\])", r"\\\1", text)


def count_frames(path: str | os.PathLike) -> int:
    """Return the number of frames in an mp4's index, or 0 without an index. Raises InputError for a missing file."""
    return read_timing(path)[0]


def read_timing(path: str | os.PathLike) -> tuple[int, list[float]]:
    """Return the number of frames of an mp4 and its frames a second, as `atoms.timing` does. Starts no process.

    Raises:
        InputError: the file does not exist or cannot be read.
    """
    return atoms.timing(_moov(path))


def _ffmpeg(*arguments: str | Path) -> tuple[str, ...]:
    """Return the command of ffmpeg that reports errors only"""
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-nostdin", "-v", "error", *map(str, arguments)
    except RuntimeError as error:
        raise _broken(f"is missing ({first_line(error)})") from error


def _run(*arguments: str | Path, stdin: bytes = b"", timeout: float | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(_ffmpeg(*arguments), input=stdin, capture_output=True, check=False, timeout=timeout)


def _read(path: str | os.PathLike, *arguments: str, before: tuple[str, ...] = ()) -> bytes:
    """Return what ffmpeg makes of an mp4, nothing where it fails. Raises InputError for a missing file."""
    place = _existing(path)
    try:
        result = _run(*before, *SOURCE, place.absolute(), *arguments, "-", timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return b""
    except OSError as error:
        raise _broken(f"cannot run ({error.strerror or error})") from error
    return b"" if result.returncode else result.stdout


def _reason(text: bytes) -> str:
    """Return ffmpeg's words in one line: the first names the cause, the last the outcome"""
    lines = [re.sub(r"^\[[^]]*\] ", "", line).strip() for line in text.decode(errors="replace").splitlines()]
    words = "; ".join(dict.fromkeys(filter(None, lines))) or "it gave no reason"
    return printable(words if len(words) <= 240 else f"{words[:160]} … {words[-75:]}").rstrip(".")


def read_metadata(path: str | os.PathLike) -> dict:
    """Read the metadata that `write_mp4` put into a file. Starts no process.

    Raises:
        InputError: the file does not exist, or has no metadata of turbo-nb, or damaged metadata.
    """
    if (found := metadata_of(_moov(path))) is None:
        raise InputError(
            f"path is {shown(Path(path))}, which says nothing of how it was made. Expected an mp4 that turbo-nb "
            "wrote. Give the file as it was written: other programs drop the metadata."
        )
    return found


def _moov(path: str | os.PathLike) -> bytes:
    """Return the content of a file's `moov` box. Raises InputError for a file that cannot be read"""
    return _from_boxes(path, atoms.read_moov)


def check_whole(path: str | os.PathLike) -> None:
    """Raise InputError for a file whose end is missing, because ffmpeg decodes what is there without a word"""
    if _from_boxes(path, atoms.is_cut):
        raise InputError(
            f"path is {shown(Path(path))}, which ends too early to be read as a video. Expected a whole mp4. Copy or "
            "make it again."
        )


def _from_boxes(path: str | os.PathLike, read: Callable[[BinaryIO], Any]) -> Any:
    """Return what a function of `atoms` reads of a file. Raises InputError for a file that cannot be read"""
    place = _existing(path)
    try:
        with place.open("rb") as file:
            return read(file)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"path is {shown(Path(path))}, which cannot be read ({reason}). Expected an mp4. Check its permissions."
        ) from error


def metadata_of(moov: bytes) -> dict | None:
    """Return the metadata that `write_mp4` put into a file.

    Args:
        moov: the content of the file's `moov` box.

    Returns:
        None where the box has no metadata of turbo-nb, or damaged metadata.
    """
    with suppress(ValueError, RecursionError):
        found = json.loads(atoms.tags(moov).get(METADATA_KEY, "null"))
        return found if isinstance(found, dict) else None
    return None


def _existing(path: str | os.PathLike) -> Path:
    """Return a file's path with "~" expanded. Raises InputError for a missing file"""
    place = Path(local(path))
    if not environment.is_file(place):
        raise InputError(f"path is {shown(Path(path))}, which is not a file. Expected an mp4. Check the path.")
    return place


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
        InputError: the file is not an mp4 that can be decoded to its end.
    """
    import numpy as np

    check_whole(path)

    # not force_original_aspect_ratio, which makes a side of 0 pixels from 16x16384
    sides = f"'max(1,round(min({width},iw*{height}/ih)))':'max(1,round(min({height},ih*{width}/iw)))'"
    fit = f"scale={sides},pad={width}:{height}:-1:-1:{GROUND}"
    for each_once in EACH_ONCE:
        data = _read(path, "-vf", fit, *each_once, "-f", "rawvideo", "-pix_fmt", "rgb24", before=STRICT)
        if data:
            break
    else:
        raise _unreadable(path)
    return np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)


def last_frame(path: str | os.PathLike) -> "Image":
    """Read the last frame of a video, as RGB.

    Raises:
        InputError: the file is not an mp4 that can be decoded to its end.
    """
    from PIL import Image

    check_whole(path)
    # rgb24, because a clip of 10 bits would become a ppm of 16 bits, and a grey one a pgm
    as_pictures = ("-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24")
    # the last 3 seconds, which may have sound alone
    data = _read(path, *as_pictures, before=(*STRICT, "-sseof", "-3")) or _read(path, *as_pictures, before=STRICT)
    if not data:
        raise _unreadable(path)
    width, height = map(int, data.split(b"\n", 2)[1].split())  # of the first frame: "P6\nWIDTH HEIGHT\n255\n", bytes
    return Image.frombytes("RGB", (width, height), data[-3 * width * height :])


def poster(path: str | os.PathLike, width: int = 480) -> bytes:
    """Read the first frame of a video as a JPEG.

    Args:
        path: of the mp4.
        width: the largest width of the picture, in pixels. A higher clip gets a narrower picture.

    Raises:
        InputError: the file is not an mp4 that can be decoded.
    """
    fit = f"scale='min({width},iw)':'min({width},ih)':force_original_aspect_ratio=decrease"
    data = _read(path, "-frames:v", "1", "-vf", fit, "-f", "image2pipe", "-c:v", "mjpeg", "-q:v", "4")
    if not data:
        raise _unreadable(path)
    return data


def _unreadable(path: str | os.PathLike) -> InputError:
    return InputError(f"path is {shown(Path(path))}, which cannot be read as a video. Expected an mp4. Make it again.")
