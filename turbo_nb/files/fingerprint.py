"""The identity of weights: a hash that takes milliseconds for 28 GB."""

import hashlib
from pathlib import Path

PIECE, PIECES = 2**16, 64  # bytes of a hashed piece, and pieces of a file


def fingerprint(path: Path) -> str:
    """Hash the size and evenly spaced pieces of a file, or of every file in a folder.

    A missing file adds nothing to the hash, because loading reports it.
    """
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as opened:
            for offset in range(0, size, max(PIECE, size // PIECES)):
                opened.seek(offset)
                digest.update(opened.read(PIECE))
    return digest.hexdigest()
