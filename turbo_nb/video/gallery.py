"""Finished clips of a folder: mp4s that carry how they were made.

The gallery has no index, because an index could disagree with the files. It ignores files without metadata.
"""

import json
import os
import re
import stat
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..errors import InputError, OutputError, space_or
from ..machine import atomic, environment
from ..records import MEASURED, VideoRecord, write
from ..values import PathLike
from . import mp4

ARCHIVE = "turbo_nb.zip"
STARS = ".stars.json"  # a list of names
ORDERS = ("newest", "oldest", "prompt", "slowest")
POSTER = 320  # pixels: the width of a poster
POSTERS = 1000  # posters in memory, of about 10 KB each


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
        self.folder = Path(PathLike()("folder", folder)).absolute()
        self._known: dict[tuple[str, int, int], Clip | None] = {}  # by path, time of change and size
        self._posters: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._lock = threading.RLock()  # because a page and the thread that makes clips look at the same time

    def clips(self, most: int | None = None) -> list[Clip]:
        """Return the clips, the latest first. Each file is read once until it changes.

        Args:
            most: how many clips to return. None: all.
        """
        return self.find(count=most)[0]

    def find(
        self, *, first: int = 0, count: int | None = None, order: str = "newest", words: str = "", starred: bool = False
    ) -> tuple[list[Clip], int]:
        """Return some of the clips, and how many there are.

        By time and without words, it reads only the files up to the last clip that it returns.

        Args:
            first, count: the part to return. count None: all from the first on.
            order: one of `ORDERS`.
            words: those that a prompt contains, in any order. Case does not matter.
            starred: leave out clips without a star.

        Returns:
            The clips, and the number of all that fit. Files that have not been read count as clips.
        """
        with self._lock:
            files = [(path, status.st_mtime_ns, status.st_size) for path, status in self._files()]
            kept = set(files)
            self._known = {key: clip for key, clip in self._known.items() if key in kept}
            if starred:
                stars = self.stars()
                files = [key for key in files if os.path.basename(key[0]) in stars]
            files = sorted(files, key=lambda key: (key[1], key[0]), reverse=order != "oldest")
            end = None if count is None else first + count
            if words or order not in ("newest", "oldest"):
                found = [clip for key in files if (clip := self._clip(key)) and _has(clip.record.prompt, words)]
                if order == "prompt":
                    found.sort(key=lambda clip: clip.record.prompt.casefold())
                elif order == "slowest":
                    found.sort(key=lambda clip: clip.seconds, reverse=True)
                return found[first:end], len(found)
            found, files = [], iter(files)
            while end is None or len(found) < end:
                if (key := next(files, None)) is None:
                    break
                if clip := self._clip(key):
                    found.append(clip)
            return found[first:], len(found) + sum(self._known.get(key, True) is not None for key in files)

    def _clip(self, key: tuple[str, int, int]) -> Clip | None:
        if key not in self._known:
            self._known[key] = _read(Path(key[0]))
        return self._known[key]

    def named(self, name: str) -> Clip | None:
        """Return the clip with this file name; None for a name that is not of a clip in the folder."""
        path = self.folder / name
        if path.parent == self.folder and path.name == name and _is_clip(name):
            with suppress(OSError, ValueError), self._lock:  # ValueError: NUL in the name
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    return self._clip((str(path), status.st_mtime_ns, status.st_size))
        return None

    def poster(self, clip: Clip) -> bytes:
        """Return a clip's first frame as a JPEG, which is made once until the file changes.

        Raises:
            InputError: the file is gone, or cannot be decoded.
            OutputError: ffmpeg does not work on this machine.
        """
        key = key_of(clip)
        with self._lock:
            if key in self._posters:
                self._posters.move_to_end(key)
                return self._posters[key]
        data = mp4.poster(clip.path, POSTER)
        with self._lock:
            self._posters[key] = data
            while len(self._posters) > POSTERS:
                self._posters.popitem(last=False)
        return data

    def stars(self) -> set[str]:
        """Return the names of the files with a star. A file of stars that is damaged has no stars."""
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads((self.folder / STARS).read_text(encoding="utf-8"))
            return {name for name in found if isinstance(name, str)} if isinstance(found, list) else set()
        return set()

    def star(self, clip: Clip, on: bool = True) -> None:
        """Give a clip a star or take it away. The stars are in a hidden file beside the clips.

        Raises:
            OutputError: the file of stars cannot be written.
        """
        with self._lock:
            stars, name = self.stars(), clip.path.name
            stars = {one for one in stars if (self.folder / one).exists()} - {name} | ({name} if on else set())
            try:
                atomic.write(self.folder / STARS, json.dumps(sorted(stars), ensure_ascii=False))
            except (OSError, ValueError) as error:
                raise OutputError(
                    f"cannot write {str(self.folder / STARS)!r}: {error}. Look at the permissions of the folder."
                ) from error

    def _files(self) -> list[tuple[str, os.stat_result]]:
        """Return the mp4s that can be seen and are not temporary"""
        found = []
        with suppress(OSError):  # the folder does not exist yet, or cannot be read
            for entry in os.scandir(self.folder):
                if _is_clip(entry.name):
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
        atomic.sweep(self.folder)
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
            fix = space_or("remove what is in its place", error)
            raise OutputError(f"cannot write {str(path)!r}: {error}. {fix}") from error
        return path


def key_of(clip: Clip) -> tuple[str, int, int]:
    """Return a clip's path, time of change in ns and size in bytes, which are 0 for a file that is gone."""
    with suppress(OSError):
        status = clip.path.stat()
        return str(clip.path), status.st_mtime_ns, status.st_size
    return str(clip.path), 0, 0


def _is_clip(name: str) -> bool:
    return name.lower().endswith(".mp4") and not name.startswith(".")


def _has(prompt: str, words: str) -> bool:
    prompt = prompt.casefold()
    return all(word in prompt for word in words.casefold().split())


def _read(path: Path) -> Clip | None:
    """Return a clip, None for a file that does not carry how it was made"""
    try:
        return Clip(path=path, record=mp4.read_record(path))
    except InputError:
        return None
