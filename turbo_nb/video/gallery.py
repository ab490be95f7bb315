"""Finished clips of a folder: mp4s that say how they were made.

The mp4s are all there is: no index that could disagree with them. A file that says nothing is left alone.
"""

import os
import re
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError, OutputError
from ..machine import environment
from ..runtime import estimate
from . import mp4

ARCHIVE = "turbo_nb.zip"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished clip. settings: as in `Video.settings`; timings: seconds a stage; steps: of each step of denoise;
    machine: what made it; cost: dollars for all stages, None where no price was set."""

    path: Path
    settings: dict
    timings: dict[str, float] = field(default_factory=dict)
    steps: Sequence[float] = ()
    machine: str = ""
    cost: float | None = None

    @property
    def seconds(self) -> float:
        """Of all stages but loading the model, which only the first clip pays."""
        return sum(seconds for stage, seconds in self.timings.items() if stage != "load")


class History:
    """The clips in a folder, which is made with the first one."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).absolute()
        self._known: dict[tuple[Path, int, int], Run | None] = {}  # (path, mtime, size) → what the file says

    def runs(self, most: int | None = None) -> list[Run]:
        """The latest first, at most so many. Each file is read once, for as long as it does not change."""
        found = []
        for path, status in sorted(self._files(), key=lambda file: (file[1].st_mtime_ns, file[0]), reverse=True):
            if most is not None and len(found) >= most:
                break
            key = (path, status.st_mtime_ns, status.st_size)
            if key not in self._known:
                self._known[key] = _read(path)
            if self._known[key]:
                found.append(self._known[key])
        return found

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.folder.glob("*.mp4"):
            if not path.name.startswith("."):  # one that is being written
                try:
                    found.append((path, path.stat()))
                except FileNotFoundError:  # gone since it was listed
                    continue
        return found

    def encoder(self, fps: int) -> mp4.Encoder:
        """For the frames of a clip to come, which `save` takes; a context. Raises OutputError."""
        return mp4.Encoder(self.folder / "clip.mp4", fps)

    def save(
        self,
        video,
        machine: str = "",
        timings: dict[str, float] | None = None,
        encoder: mp4.Encoder | None = None,
    ) -> Run:
        """Write a clip (a `pipeline.Video`) under a new name made of the time, its prompt and its seed.

        timings: more stages than the video's own. encoder: of `encoder`, with the clip's frames. The file cannot know
        how long its writing takes; the Run has that as "write": with an encoder, what was left of it. Raises
        OutputError.
        """
        timings = (timings or {}) | video.timings
        cost = environment.cost(sum(timings.values()))
        path, begin = self._new_path(video.settings["prompt"], video.settings["seed"]), time.perf_counter()
        if encoder:
            encoder.path = path
        mp4.write_mp4(
            encoder or path,
            video.frames,
            video.fps,
            video.settings
            | {"timings": timings, "steps": video.steps, "peaks": video.peaks, "machine": machine, "cost": cost},
        )
        timings = timings | {"write": time.perf_counter() - begin}
        estimate.remember(video.settings, {"write": timings["write"]})
        return Run(
            path=path, settings=video.settings, timings=timings, steps=[*video.steps], machine=machine, cost=cost
        )

    def _new_path(self, prompt: str, seed: int) -> Path:
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "clip"
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{words}-{seed}"
        path, number = self.folder / f"{stem}.mp4", 1
        while path.exists():
            number += 1
            path = self.folder / f"{stem}-{number}.mp4"
        return path

    def delete(self, run: Run) -> None:
        """Remove a clip for good; one that is gone already is no error. Raises InputError for a file elsewhere."""
        if run.path.parent != self.folder:
            raise InputError(
                f"{str(run.path)!r} is not in {str(self.folder)!r}; only clips of this gallery are deleted"
            )
        try:
            run.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot delete {str(run.path)!r}: {error}; look at the folder's permissions") from error

    def archive(self, runs: Sequence[Run]) -> Path:
        """All these clips in one zip in the folder, in place of an earlier one. Raises InputError or OutputError."""
        if not runs:
            raise InputError("there is no clip to put into a zip yet; generate one first")
        path, temporary = self.folder / ARCHIVE, None
        try:
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".zip")
            with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:  # mp4s do not get smaller
                for run in runs:
                    archive.write(run.path, run.path.name)
            os.replace(temporary, path)
        except OSError as error:
            raise OutputError(f"cannot write {str(path)!r}: {error}; free some space") from error
        finally:
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)
        return path


def _read(path: Path) -> Run | None:
    try:
        settings = mp4.read_metadata(path)
    except (InputError, ValueError):  # not ours, or damaged
        return None
    if not isinstance(settings, dict):
        return None
    told = {name: settings.pop(name) for name in ("timings", "steps", "machine", "cost") if name in settings}
    settings.pop("peaks", None)
    return Run(path=path, settings=settings, **told)
