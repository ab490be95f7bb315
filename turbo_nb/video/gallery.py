"""Finished clips of a folder: mp4s that carry how they were made.

The gallery has no index, because an index could disagree with the files. It ignores files without metadata.
"""

import os
import re
import stat
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..errors import InputError, OutputError
from ..machine import atomic, environment
from ..records import MEASURED, VideoRecord, write
from ..settings import with_home
from . import mp4

ARCHIVE = "turbo_nb.zip"
STALE = 86400  # seconds after which a temporary file is one of a process that was killed


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A finished clip: its file, and how it was made."""

    path: Path
    record: VideoRecord

    @property
    def settings(self) -> dict:
        """The record's fields that determine the clip. Those that the file does not have are None."""
        return {name: value for name, value in asdict(self.record).items() if name not in MEASURED}

    @property
    def seconds(self) -> float:
        """Seconds of all stages except loading the model, because only the first clip pays for that."""
        return sum(seconds for stage, seconds in self.record.timings.items() if stage != "load")


class Gallery:
    """The clips in a folder. Saving the first clip makes the folder."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(with_home(folder)).absolute()
        self._known: dict[tuple[str, int, int], Clip | None] = {}  # by path, time of change and size

    def clips(self, most: int | None = None) -> list[Clip]:
        """Return the clips, the latest first. Each file is read once until it changes.

        Args:
            most: how many clips to return. None: all.
        """
        found = []
        for path, status in sorted(self._files(), key=lambda file: (file[1].st_mtime_ns, file[0]), reverse=True):
            if most is not None and len(found) >= most:
                break
            key = (path, status.st_mtime_ns, status.st_size)
            if key not in self._known:
                self._known[key] = _read(Path(path))
            if self._known[key]:
                found.append(self._known[key])
        return found

    def _files(self) -> list[tuple[str, os.stat_result]]:
        """Return the mp4s that can be seen and are not temporary"""
        found = []
        with suppress(OSError):  # the folder does not exist yet, or cannot be read
            for entry in os.scandir(self.folder):
                if entry.name.lower().endswith(".mp4") and not entry.name.startswith("."):
                    with suppress(OSError):  # deleted since it was listed, or a link that leads nowhere
                        status = entry.stat()
                        if stat.S_ISREG(status.st_mode):
                            found.append((entry.path, status))
        return found

    def encoder(self, fps: int) -> mp4.Encoder:
        """Return an encoder for the frames of a clip that `save` will name. Raises OutputError."""
        return mp4.Encoder(self.folder / "clip.mp4", fps)

    def save(
        self,
        video,
        machine: str = "",
        timings: dict[str, float] | None = None,
        encoder: mp4.Encoder | None = None,
    ) -> Clip:
        """Write a clip under a new name, made of the time, the prompt and the seed.

        Args:
            video: a `generation.Video`.
            machine: what made the clip.
            timings: seconds of stages that the video's own timings lack.
            encoder: of `encoder`, when it has taken the clip's frames.

        Returns:
            The clip. Its timings have "write" in addition, which the file cannot contain: with an encoder, the seconds
            after the last frame was added.

        Raises:
            OutputError: the file cannot be written.
        """
        timings = (timings or {}) | video.timings
        cost = environment.cost(sum(timings.values()))
        record = replace(video.record, timings=timings, machine=machine, cost=cost)
        begin = time.perf_counter()
        try:
            path = self._claim(record.prompt, record.seed)
        except OutputError as error:
            name = self.folder / "clip.mp4"
            raise mp4.with_frames_kept(error, name, video.frames, video.fps, write(record)) from error
        try:
            if encoder:
                encoder.path = path
            mp4.write_mp4(encoder or path, video.frames, video.fps, write(record))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return Clip(path=path, record=replace(record, timings=timings | {"write": time.perf_counter() - begin}))

    def _claim(self, prompt: str, seed: int | list[int]) -> Path:
        """Make an empty file under a name that no other save has"""
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "clip"
        seed = seed if isinstance(seed, int) else "grid"
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{words}-{seed}"
        try:
            path = atomic.claim(self.folder, stem, ".mp4")
        except OSError as error:
            raise OutputError(
                f"cannot write {str(self.folder / stem)!r}: {error.strerror or error}. Choose another folder."
            ) from error
        atomic.sweep(self.folder, time.time() - STALE)
        return path

    def delete(self, clip: Clip) -> None:
        """Delete a clip's file for good. A file that is gone already is not an error.

        Raises:
            InputError: the file is in another folder.
            OutputError: the file cannot be deleted.
        """
        if clip.path.parent != self.folder:
            raise InputError(
                f"clip is {str(clip.path)!r}, which is not in this gallery. Expected one in {str(self.folder)!r}. "
                "Delete the file itself."
            )
        try:
            clip.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot delete {str(clip.path)!r}: {error}. Look at the permissions of the folder."
            ) from error

    def archive(self, clips: Sequence[Clip]) -> Path:
        """Put clips into one zip in the folder, in place of an earlier zip. Clips that are gone are left out.

        Raises:
            InputError: the gallery is empty.
            OutputError: the zip cannot be written.
        """
        if not clips:
            raise InputError("clips is an empty list. Expected at least one clip. Generate one first.")
        path = self.folder / ARCHIVE
        try:
            # mp4s do not get smaller by compression; a zip has no dates before 1980, so those become 1980
            with (
                atomic.replaced(path) as temporary,
                zipfile.ZipFile(temporary, "w", strict_timestamps=False) as archive,
            ):
                for clip in clips:
                    with suppress(FileNotFoundError):
                        archive.write(clip.path, os.fsencode(clip.path.name).decode(errors="replace"))
        except OSError as error:
            raise OutputError(f"cannot write {str(path)!r}: {error}. Free some space.") from error
        return path


def _read(path: Path) -> Clip | None:
    """Return a clip, None for a file that does not carry how it was made"""
    try:
        return Clip(path=path, record=mp4.read_record(path))
    except (InputError, OutputError):  # OutputError: ffmpeg does not work here, which the next save reports
        return None
