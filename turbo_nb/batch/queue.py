"""The queue of an interactive session on disk: rows like a batch's, from which another session can go on.

Each session has a file of its own in the folder `.queue`, and holds a lock on it. A file without a lock belongs to a
session that has ended. Its rows that are not done can be taken over.
"""

import os
import secrets
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from .. import records, settings
from ..errors import OutputError
from ..settings import ClipSettings, LoadOptions
from .manifest import append_row, as_output_error, held, read_rows

FOLDER = ".queue"
ENDED = ("done", "failed", "cancelled")


@dataclass(frozen=True, kw_only=True)
class QueueRecord:
    """A row of the queue. The last row of a job counts.

    Args:
        load, clip: the options that differ from their defaults, by name, of LoadOptions and ClipSettings.
        random_seed: the seed is drawn when the job begins.
        file: name of the finished clip. error: why the job failed.
        time: of the row, in ISO 8601.
    """

    id: str
    status: Literal["waiting", "running", "done", "failed", "cancelled"]
    load: dict[str, Any] = field(default_factory=dict)
    clip: dict[str, Any] = field(default_factory=dict)
    random_seed: bool = False
    file: str | None = None
    error: str | None = None
    time: str = ""

    def options(self) -> tuple[LoadOptions, ClipSettings] | None:
        """Return the options, None where this version cannot use them."""
        load, clip = settings.build_known(LoadOptions, self.load), settings.build_known(ClipSettings, self.clip)
        return None if clip[0] is None or load[1] or clip[1] else (load[0], clip[0])


class QueueFile:
    """The rows of this session. The file and its lock are made with the first row.

    Args:
        folder: of the clips.
    """

    def __init__(self, folder: Path):
        self._folder, self._lock = folder / FOLDER, ExitStack()
        self.path = self._folder / f"{secrets.token_hex(8)}.jsonl"

    def add(self, record: QueueRecord) -> None:
        """Add a row. Raises OutputError."""
        with as_output_error(self._folder):
            if not self.path.exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                self._lock.enter_context(held(self._folder, f"{self.path.stem}.lock"))
        time = datetime.now(UTC).isoformat(timespec="seconds")
        append_row(self.path, records.write(replace(record, time=time)))

    def close(self) -> None:
        """Give the lock back, as the end of the process does."""
        self._lock.close()

    def left_over(self) -> list[QueueRecord]:
        """Return the jobs that ended sessions did not finish, in order."""
        return [record for path in self._files() for record in _unfinished(path)]

    def take_over(self) -> list[QueueRecord]:
        """Return the jobs of `left_over`, and remove their files. The caller adds them to this session."""
        taken = []
        for path in self._files():
            with suppress(OutputError), held(self._folder, f"{path.stem}.lock"):
                taken += _unfinished(path)
                path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
        return taken

    def _files(self) -> list[Path]:
        """Return the files of sessions that have ended, the oldest first; remove those with nothing left to do"""
        found, names = [], []
        with suppress(OSError):  # no folder yet, or one that cannot be read
            names = os.listdir(self._folder)
        for path in (self._folder / name for name in names if name.endswith(".jsonl")):
            with suppress(OSError, OutputError):
                if path != self.path:
                    with held(self._folder, f"{path.stem}.lock"):
                        if _unfinished(path):
                            found.append((path.stat().st_mtime_ns, path))
                        else:
                            path.unlink(missing_ok=True)
                            path.with_suffix(".lock").unlink(missing_ok=True)
        return [path for _, path in sorted(found)]


def _unfinished(path: Path) -> list[QueueRecord]:
    latest = {record.id: record for record in read_rows(path, QueueRecord)}
    return [record for record in latest.values() if record.status not in ENDED and record.options()]
