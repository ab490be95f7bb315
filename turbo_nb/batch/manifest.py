"""Many prompts become videos, here or on every GPU of this machine; stopped at any moment, the next run goes on.

A job's id is the hash of what determines its video, and the video carries it. So what is done can be seen from the
folder alone: the manifest says it quickly, and a file that the manifest does not know yet says it itself.
"""

import json
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..errors import OutputError

if TYPE_CHECKING:
    pass

MANIFEST, LOCK = "manifest.jsonl", ".lock"


# The folder


@contextmanager
def _lock(folder: Path, *, shared: bool = False) -> Iterator[IO[str]]:
    """Keep other runs out of the folder. Raises OutputError if one is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:  # closing it, or dying, lets go
        _take(file, folder, shared=shared)
        if not shared:
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
        yield file


def _take(file: IO[str], folder: Path, *, shared: bool) -> None:
    """Take the lock; the processes of one run hold it together, so that it outlives the one that started them."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there it is the user who keeps two runs apart
        return
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise OutputError(
            f"another run is at work in {str(folder)!r} ({file.read() or 'starting'}); wait for it, or give another "
            "output_dir"
        ) from error
    except OSError as error:
        warnings.warn(f"{str(folder)!r} cannot be locked ({error}); see that no other run writes there", stacklevel=2)


def read_manifest(output_dir: str | os.PathLike) -> list[dict]:
    """The records of a folder's manifest, oldest first; a torn line is left out. Empty if there is none.

    A record has id, status ("done" or "failed"), file, error, prompt, source, image, settings, timings in seconds,
    time, and cost in dollars, None without a price; of workers side by side each pays its share.
    """
    return [record for _, record in _manifest_lines(Path(output_dir) / MANIFEST)]


def _manifest_lines(path: Path) -> list[tuple[bytes, dict]]:
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what follows the last line end is torn
    found = []
    for line in lines:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and record.keys() >= {"id", "status"}:
                found.append((line + b"\n", record))
    return found


def _mend(path: Path) -> None:
    """Take torn lines out of the manifest, which a full disk or a power cut leaves."""
    if not path.exists():
        return
    whole = b"".join(line for line, _ in _manifest_lines(path))
    if whole != path.read_bytes():
        with _whole(path) as temporary, temporary.open("wb") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())


def _append(path: Path, record: dict) -> None:
    """One line with one write, on the disk when this returns"""
    line = json.dumps(record).encode() + b"\n"
    try:
        with path.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError("the disk is full")
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error}; free some space and start again") from error


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end"""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove the temporary files of runs that were killed."""
    for path in folder.glob(".*"):
        if re.match(r"\.([0-9a-f]{12}[.-].*\.mp4|contact_sheet\..*|manifest\..*|turbo_nb-.*)$", path.name):
            path.unlink(missing_ok=True)
