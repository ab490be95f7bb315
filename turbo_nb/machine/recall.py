"""Facts that take seconds to find out, kept in the cache folder with everything that they depend on.

A fact is believed only if the file names exactly the same circumstances. A damaged file, one of other circumstances
and a folder that cannot be read all mean that the fact is found out again.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import atomic, environment


def recall(name: str, circumstances: dict[str, Any]) -> Any:
    """Return a fact that `remember` kept under the same circumstances, None if there is nothing to believe."""
    try:
        kept = json.loads(_file(name, circumstances).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    same = isinstance(kept, dict) and kept.get("circumstances") == _plain(circumstances)
    return kept.get("fact") if same else None


def remember(name: str, circumstances: dict[str, Any], fact: Any) -> None:
    """Keep a fact. A folder that cannot be written keeps nothing.

    Args:
        name: of the fact, part of a file's name.
        circumstances: what the fact depends on; JSON takes it.
        fact: JSON takes it.
    """
    text = json.dumps({"circumstances": circumstances, "fact": fact}, indent=1)
    with suppress(OSError):
        atomic.write(_file(name, circumstances), text.encode())


def stamp(path: str | Path | None) -> list | None:
    """Return what changes with a file: its path, size and time of change. None for no file."""
    try:
        status = path and Path(path).resolve().stat()
    except OSError:
        return None
    return status and [str(Path(path).resolve()), status.st_size, status.st_mtime_ns]


def _file(name: str, circumstances: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()
    return environment.cache() / "facts" / f"{name}-{digest[:16]}.json"


def _plain(circumstances: dict[str, Any]) -> Any:
    return json.loads(json.dumps(circumstances))
