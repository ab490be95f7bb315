"""The folder of a batch: the manifest, the lock, and what killed runs left.

`manifest.jsonl` has one JSON object a line, appended when a job ends. The last line of a job counts. A run remembers
where a job's line is, and not what it holds, because a folder may have 100,000 of them.
"""

import errno
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from .. import records
from ..errors import OutputError, collect_warnings, space_or, warn
from ..machine import atomic, environment
from ..values import local

MANIFEST = "manifest.jsonl"
WORKERS_END = 8  # seconds within which the actors of a killed run end by themselves
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
    return read_rows(Path(local(output_dir, "output_dir")) / MANIFEST, JobRecord)


def read_rows(path: Path, cls: type[records.Record]) -> list[records.Record]:
    """Return the lines of a file as records. Warns of lines that are torn or foreign. Raises OutputError."""
    return [record for _, record in _rows(path, cls)]


def _rows(path: Path, cls: type[records.Record]) -> Iterator[tuple[int, records.Record]]:
    """Yield where each line begins, and its record; as `read_rows`"""
    wrong = []
    for number, (begin, line, data) in enumerate(_lines(path), 1):
        record = records.read(cls, data)
        if record:
            yield begin, record
        elif line.strip():
            wrong.append(number)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        warn(f"{str(path)!r}: line {wrong[0]}{more} cannot be read as a job's record, and is skipped.")


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict | None]]:
    """Yield where each line of a file begins, the line, and its JSON object; None for one that is torn or else"""
    with as_output_error(path.parent):
        if environment.exists(path) and not environment.is_file(path):  # a pipe or a device may never end
            raise OSError(f"{path.name} is not a file")
        with suppress(FileNotFoundError), path.open("rb") as file:
            begin = 0
            for line in file:
                yield begin, line, _object(line) if line.endswith(b"\n") else None
                begin += len(line)


def _object(line: bytes) -> dict | None:
    with suppress(ValueError, RecursionError):
        return data if isinstance(data := json.loads(line), dict) else None
    return None


class Manifest(Mapping[str, JobRecord]):
    """The last record of each job in a folder, by id, in the order in which the jobs first ended.

    Memory holds only where the lines are. Raises OutputError where the file cannot be read.
    """

    def __init__(self, folder: Path):
        self.path = folder / MANIFEST
        self._begins = self._read()

    def _read(self) -> dict[str, int]:
        return {record.id: begin for begin, record in _rows(self.path, JobRecord)}

    def repair(self) -> None:
        """Make the file if it does not exist, and remove the torn lines that a full disk or a power cut leaves."""
        self.path.open("ab").close()  # raises before the work where `append` would raise after it
        if any(data is None for _, _, data in _lines(self.path)):
            with atomic.replaced(self.path, durable=True) as whole, whole.open("wb") as file:
                file.writelines(line for _, line, data in _lines(self.path) if data is not None)
            with collect_warnings():  # they were shown before
                self._begins = self._read()

    def append(self, record: JobRecord) -> None:
        """Add a line with one write, and wait until it is on the disk."""
        data = records.write(record) | {"settings": records.write(record.settings)}
        self._begins[record.id] = append_row(self.path, data)

    def __getitem__(self, name: str) -> JobRecord:
        with self.path.open("rb") as file:
            file.seek(self._begins[name])
            return records.read(JobRecord, _object(file.readline()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._begins)

    def __len__(self) -> int:
        return len(self._begins)


def append_row(path: Path, data: dict) -> int:
    """Add an object as a line to a file, as `Manifest.append` does. Returns where the line begins."""
    line = json.dumps(data).encode() + b"\n"
    with as_output_error(path), path.open("ab", buffering=0) as file:
        begin = file.tell()
        if file.write(line) != len(line):
            raise OSError("the disk is full")
        os.fsync(file.fileno())
    return begin


@contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Raise an OutputError for an error of the operating system."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot use {str(path)!r}: {error}. Expected a folder that can be written. "
            f"{space_or('choose another output_dir', error)}"
        ) from error


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made.

    The lock ends with the process, even with one that is killed.

    Raises:
        OutputError: another run, or an actor of one that was killed, is at work in the folder.
    """
    with as_output_error(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(held(folder, LOCK))
        wait_for_workers(folder)
        with suppress(OSError):  # only the error of a second run reads it
            atomic.write(folder / OWNER, f"process {os.getpid()} on {socket.gethostname()}")
            stack.callback((folder / OWNER).unlink, missing_ok=True)
        locks = stack.pop_all()
    with locks:
        yield


def worker_lock(folder: Path, name: str):
    """Keep new runs out of a folder until an actor has ended, even where its run was killed."""
    return held(folder, f"{WORKER_LOCK}{name}")


def wait_for_workers(folder: Path) -> None:
    """Wait until the actors that write into a folder have ended. Raises OutputError where one goes on."""
    for path in folder.glob(f"{WORKER_LOCK}*"):
        with held(folder, path.name, timeout=WORKERS_END):
            path.unlink(missing_ok=True)


@contextmanager
def held(folder: Path, name: str, timeout: float = 0) -> Iterator[None]:
    """Hold one lock file of a folder inside a block. Warns on a file system without locks.

    Args:
        folder: of the lock file, which exists.
        name: of the lock file.
        timeout: seconds to wait for another process that holds it; -1: for ever.

    Raises:
        OutputError: another process holds it.
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
    atomic.sweep(folder, everything=True)
    for path in folder.glob(".*"):
        if OLD_TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
