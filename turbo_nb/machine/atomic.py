"""Files that are whole or not there."""

import hashlib
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which replaces no file that is open
    fcntl = None

PREFIX = ".turbo_nb-"  # of temporary files and folders, by which a sweep finds them
ABANDONED = 86400  # seconds without a write after which those of another machine, or without locks, are abandoned


@contextmanager
def temporary(path: str | os.PathLike) -> Iterator[Path]:
    """Give a new, empty file beside `path`, which is removed when the block ends.

    Its name is random, so no other process can meet it, and ends as `path` does. Its permissions are those that the
    process's umask asks for. A lock that ends with this process keeps it from a `sweep`.

    Args:
        path: a file of the same folder, which need not exist.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    lock = None
    while lock is None:
        file = path.with_name(_name() + path.suffix)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # the kernel applies the umask
        lock = _locked(file)
    with lock:
        try:
            yield file
        finally:
            with suppress(OSError):
                file.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: str | os.PathLike) -> Iterator[Path]:
    """Give a new, empty folder in `parent`, which is made. The new one is removed when the block ends.

    Raises:
        OSError: `parent` cannot be made or written.
    """
    lock = None
    while lock is None:
        folder = Path(parent) / _name()
        folder.mkdir(parents=True)
        lock = _locked(folder)
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _name() -> str:
    return f"{PREFIX}{this_boot()}-{secrets.token_hex(8)}"


def _locked(path: Path) -> ExitStack | None:
    """Keep a new file or folder from a sweep until the stack ends. None where a sweep removed it before that"""
    stack = ExitStack()
    if fcntl is None:
        return stack
    with suppress(OSError):  # removed, or on a file system without locks
        descriptor = _descriptor(path)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if os.path.lexists(path):
        return stack
    stack.close()
    return None


def _descriptor(path: Path) -> int:
    return os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)


@cache
def this_boot() -> str:
    """Return what names this machine since it was started, in 8 letters. Its processes see each other's locks."""
    name = platform.node()
    with suppress(OSError):
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


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
    """Remove the temporary files and folders that processes left in a folder when they were killed.

    Args:
        folder: whose own subfolders are not searched.
        everything: do not wait a day where locks cannot tell. What a process of this machine has locked stays.
    """
    with suppress(OSError):
        for path in Path(folder).glob(f"{PREFIX}*"):
            with suppress(OSError):
                _remove_if_abandoned(path, everything)


def _remove_if_abandoned(path: Path, everything: bool) -> None:
    """Remove what no process writes any more. Raises OSError where it cannot be opened or removed"""
    is_old = everything or path.stat().st_mtime < time.time() - ABANDONED
    if fcntl is None or not path.name.startswith(f"{PREFIX}{this_boot()}-"):
        if is_old:
            _remove(path)
        return
    with ExitStack() as stack:
        stack.callback(os.close, descriptor := _descriptor(path))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a file system without locks
            if not is_old:
                return
        _remove(path)  # while the lock is held, so that a process which has just made it notices


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
