"""Files that are whole or not there."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".turbo_nb-"  # of temporary files, so that a sweep finds those of a process that was killed


@contextmanager
def replaced(path: str | os.PathLike, *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, the file there takes the name `path`.

    The temporary name is random, so no other process can meet it, and ends as `path` does. The file exists, empty, with
    the permissions that the process's umask asks for. If the block raises, `path` stays as it was.

    Args:
        path: the file to write.
        durable: wait until the bytes are on the disk before the name changes.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{PREFIX}{secrets.token_hex(8)}{path.suffix}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # the kernel applies the umask
    try:
        yield temporary
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path: str | os.PathLike, data: bytes | str, *, durable: bool = False) -> None:
    """Write a small file that appears whole; its folder is made. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path, durable=durable) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def sweep(folder: str | os.PathLike, older_than: float) -> None:
    """Remove temporary files of `folder` that were last written before `older_than`, in seconds as of time.time."""
    with suppress(OSError):
        for path in Path(folder).glob(f"{PREFIX}*"):
            with suppress(OSError):
                if path.stat().st_mtime < older_than:
                    path.unlink()
