"""A model's files from the Hub: what is needed, whether it fits the disk, then fetched, checked, and found again.

huggingface_hub owns the transfer and the cache ($HF_HOME). It takes bytes of the right size for right and moves a
branch in the cache before its files are there; so every file is hashed once against the Hub's record, a marker in the
repository's cache remembers it, and the branch moves last. A broken transfer starts again at the file it broke in.
"""

import hashlib
from pathlib import Path

PIECE, PIECES = 2**16, 64  # bytes and number of the pieces that a weights file is known by


def fingerprint(path: Path) -> str:
    """A hash of sizes and evenly spaced pieces of a file, or of a folder's: 28 GB take milliseconds, not minutes"""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():  # a folder; what is missing is told when it is loaded
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as opened:
            for offset in range(0, size, max(PIECE, size // PIECES)):
                opened.seek(offset)
                digest.update(opened.read(PIECE))
    return digest.hexdigest()
