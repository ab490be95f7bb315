"""The folder of a batch: the manifest, the lock, and what killed runs left.

`manifest.jsonl` has one JSON object a line, appended when a job ends. The last line of a job counts.
"""

import errno
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from .. import records
from ..errors import OutputError, warn
from ..machine import atomic
from ..settings import with_home
from ..video import mp4

MANIFEST = "manifest.jsonl"
WORKERS_END = 8  # seconds within which the worker processes of a killed run end by themselves
LOCK, OWNER, WORKER_LOCK = ".lock", ".lock.owner", ".lock.worker-"
# Temporary names of versions that did not use machine.atomic
OLD_TEMPORARY = re.compile(r"\.([0-9a-f]{12}[.-].*\.mp4|contact_sheet\..*|manifest\..*)")
CANNOT_LOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO}  # as on some network drives


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A line of the manifest.

    Args:
        id: hash of what determines the video.
        file: name of the video. error: why the job failed.
        source: where the prompt was read, such as prompts.csv:3.
        image, last_image: paths of the job's pictures.
        settings: of the clip; of a finished one also how it was made.
        timings: seconds by stage. steps: seconds of each denoising step. peaks: bytes of GPU memory by stage.
        bytes: size of the file.
        time: when the job ended, in ISO 8601.
        cost: in dollars, None where no price was set. Workers side by side each pay their share.
    """

    id: str
    status: Literal["done", "failed"]
    file: str | None = None
    error: str | None = None
    prompt: str = ""
    source: str = ""
    image: str | None = None
    last_image: str | None = None
    settings: records.VideoRecord = field(default_factory=records.VideoRecord)
    timings: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    bytes: int | None = None
    time: str = ""
    cost: float | None = None


def read_manifest(output_dir: str | os.PathLike) -> list[JobRecord]:
    """Read the manifest of a folder.

    Args:
        output_dir: the folder of a batch.

    Returns:
        Its records, oldest first. A warning counts the lines that are torn or foreign. Empty where the manifest does
        not exist.

    Raises:
        OutputError: the file cannot be read.
    """
    return read_rows(Path(with_home(output_dir)) / MANIFEST, JobRecord)


def read_rows(path: Path, cls: type[records.Record]) -> list[records.Record]:
    """Return the lines of a file as records. Warns of lines that are torn or foreign. Raises OutputError."""
    with as_output_error(path.parent):
        lines = _lines(path)
    found = [records.read(cls, data) for _, data in lines]
    skipped = [n for n, record in enumerate(found) if record is None and lines[n][0].strip()]
    if skipped:
        more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        warn(f"{str(path)!r}: line {skipped[0] + 1}{more} cannot be read as a job's record, and is skipped.")
    return [record for record in found if record]


def _lines(path: Path) -> list[tuple[bytes, dict | None]]:
    """Return the lines of a file and their JSON objects; None for a line that is torn or something else"""
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [(line + b"\n", _object(line)) for line in lines] + ([(torn, None)] if torn else [])


def _object(line: bytes) -> dict | None:
    with suppress(ValueError, RecursionError):
        return data if isinstance(data := json.loads(line), dict) else None
    return None


def mend(path: Path) -> None:
    """Remove torn lines, which a full disk or a power cut leaves, from a manifest, which is made."""
    path.open("ab").close()  # raises before the work where `append` would raise after it
    lines = _lines(path)
    if any(data is None for _, data in lines):
        atomic.write(path, b"".join(line for line, data in lines if data is not None), durable=True)


def append(path: Path, record: JobRecord) -> None:
    """Add a line to a manifest with one write, and wait until the disk has it."""
    append_row(path, records.write(record) | {"settings": records.write(record.settings)})


def append_row(path: Path, data: dict) -> None:
    """Add an object as a line to a file, as `append` does."""
    line = json.dumps(data).encode() + b"\n"
    with as_output_error(path), path.open("ab", buffering=0) as file:
        if file.write(line) != len(line):
            raise OSError("the disk is full")
        os.fsync(file.fileno())


@contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Raise an OutputError for an error of the operating system."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        fix = "Free some space, or choose" if mp4.is_full(error) else "Choose"
        raise OutputError(
            f"cannot use {str(path)!r}: {error}. Expected a folder that can be written. {fix} another output_dir."
        ) from error


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made.

    The lock ends with the process, even with one that is killed.

    Raises:
        OutputError: another run, or a worker process of one that was killed, is at work in the folder.
    """
    with as_output_error(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(held(folder, LOCK))
        for path in folder.glob(f"{WORKER_LOCK}*"):
            with held(folder, path.name, timeout=WORKERS_END):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # only the error of a second run reads it
            atomic.write(folder / OWNER, f"process {os.getpid()} on {socket.gethostname()}")
            stack.callback((folder / OWNER).unlink, missing_ok=True)
        locks = stack.pop_all()
    with locks:
        yield


def worker_lock(folder: Path, place: int):
    """Keep new runs out of a folder until a worker process has ended, even where its run was killed."""
    return held(folder, f"{WORKER_LOCK}{place}")


@contextmanager
def held(folder: Path, name: str, timeout: float = 0) -> Iterator[None]:
    """Hold one lock file of a folder, for which it waits some seconds. Raises OutputError where it is held.

    Warns on a file system without locks.
    """
    # Without soft fallback, because a soft lock outlives a process that was killed
    lock = FileLock(folder / name, timeout=timeout, fallback_to_soft=False)
    with ExitStack() as stack:
        try:
            lock.acquire()
            stack.callback(lock.release)
        except Timeout as error:
            owner = "starting"
            with suppress(OSError):
                owner = (folder / OWNER).read_text(encoding="utf-8", errors="replace")
            raise OutputError(
                f"output_dir is {str(folder)!r}, where another run is at work ({owner}). Expected a folder without a "
                "run. Wait for it, or give another output_dir."
            ) from error
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in CANNOT_LOCK:
                raise
            warn(f"{str(folder)!r} cannot be locked ({error}). Start no other run in this folder.")
        yield


def sweep(folder: Path) -> None:
    """Remove the temporary files of runs that were killed. The caller holds the folder's lock."""
    atomic.sweep(folder, time.time() + 1)
    for path in folder.glob(".*"):
        if OLD_TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
