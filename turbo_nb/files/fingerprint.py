"""The identity of weights: a hash that reads 16 MB of 28 GB."""

import hashlib
import os
from pathlib import Path

from ..errors import CheckpointError
from ..machine.environment import is_dir, is_file
from .filenames import CONFIG
from .weight_set import weight_files

WHOLE = 2**26  # bytes up to which a file is hashed as a whole
PIECE, PIECES = 2**14, 1024  # bytes of a hashed piece, and pieces of a larger file: one in every matrix of a model


def fingerprint(path: Path) -> str:
    """Hash files: small ones whole, large ones by their size and evenly spaced pieces.

    Args:
        path: a file. Of a shard or an index, all shards count. Of a folder, its weights and its config.json count, or
            all its files if it has no weights. A missing file adds nothing, because loading reports it.
    """
    digest = hashlib.sha256()
    for file in _files(path):
        if not is_file(file):
            continue
        size = file.stat().st_size
        digest.update(f"{os.path.relpath(file, path)} {size}\n".encode())
        with file.open("rb") as opened:
            for offset in range(0, size, PIECE if size <= WHOLE else size // PIECES):
                opened.seek(offset)
                digest.update(opened.read(PIECE))
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    try:
        files = weight_files(path)
    except (CheckpointError, OSError):  # a tokenizer, or a file that loading refuses
        return sorted(path.rglob("*")) if is_dir(path) else [path]
    return sorted([*files, path / CONFIG] if is_dir(path) else files)
