"""Files that are whole or not there."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".turbo_nb-"  # of temporary files, so that a sweep finds those of a process that was killed
ABANDONED = 86400  # seconds without a write after which a temporary file is one of a process that was killed


@contextmanager
def temporary(path: str | os.PathLike) -> Iterator[Path]:
    """Give a new, empty file beside `path`, which is removed when the block ends.

    Its name is random, so no other process can meet it, and ends as `path` does. Its permissions are those that the
    process's umask asks for.

    Args:
        path: a file of the same folder, which need not exist.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    file = path.with_name(f"{PREFIX}{secrets.token_hex(8)}{path.suffix}")
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # the kernel applies the umask
    try:
        yield file
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)


@contextmanager
def replaced(path: str | os.PathLike, *, durable: bool = False) -> Iterator[Path]:
    """Give a `temporary` file; when the block ends well, the file takes the name `path`.

    If the block raises, `path` stays as it was.

    Args:
        path: the file to write.
        durable: wait until the bytes are on the disk before the name changes.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    with temporary(path) as file:
        yield file
        if durable:
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        os.replace(file, path)


def write(path: str | os.PathLike, data: bytes | str, *, durable: bool = False) -> None:
    """Write a small file that appears whole; its folder is made. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path, durable=durable) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def claim(folder: str | os.PathLike, stem: str, suffix: str) -> Path:
    """Make an empty file under a name that no file has: the stem, or the stem with -2, -3, …

    Two processes that claim one name at the same moment get two names. The folder is made. Raises OSError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    number, path = 1, folder / f"{stem}{suffix}"
    while True:
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            number += 1
            path = folder / f"{stem}-{number}{suffix}"


def sweep(folder: str | os.PathLike, *, everything: bool = False) -> None:
    """Remove the temporary files of a folder that processes left that were killed.

    Args:
        folder: whose subfolders are not searched.
        everything: remove young files, too, because the caller knows that no other process writes into the folder.
    """
    before = time.time() - ABANDONED
    with suppress(OSError):
        for path in Path(folder).glob(f"{PREFIX}*"):
            with suppress(OSError):
                if everything or path.stat().st_mtime < before:
                    path.unlink()
