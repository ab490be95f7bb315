"""Presets: named settings of the generator. Some are built in, and others are small files that the user keeps.

A preset has the options that it sets; all others stay as they are. The settings of the latest session are kept in the
same way, beside the presets. All sessions share that file, also those of other machines with the same home folder. So
each session writes only what its user has changed.
"""

import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from .catalog import ModelSpec
from .errors import InputError, OutputError, first_line, listed
from .machine import atomic, environment
from .settings import ClipSettings, LoadOptions, check_names, options
from .values import shown

FOLDER, LATEST = "presets", "latest.json"
LONGEST = 60  # characters of a name
BUILT_IN = {
    "fast": "2 steps: half the time, with less detail",
    "normal": "4 steps and the model's own values",
    "best": "4 steps, and attention to half as many key blocks again",
}
MOST = 1 << 20  # bytes of a file that is read
PATIENCE = 5.0  # seconds to wait for another process that keeps its settings
KNOWN = {*options(ClipSettings), *options(LoadOptions), "random_seed"}


def built_in(name: str, spec: ModelSpec) -> dict[str, Any]:
    """Return the options of a built-in preset for a model. None stands for the model's own value."""
    topk = min(1.0, round(1.5 * spec.sla_topk, 4))  # upstream advises 0.15 in place of 0.1 for quality
    return {"num_steps": 2 if name == "fast" else 4, "sla_topk": topk if name == "best" else None}


def own() -> dict[str, dict[str, Any]]:
    """Return the user's presets by name. Files that cannot be read are left out."""
    with suppress(OSError):
        paths = sorted((environment.config() / FOLDER).glob("*.json"))
        return {path.stem: values for path in paths if KNOWN & (values := _read_or_empty(path)).keys()}
    return {}


def save(name: str, values: Mapping[str, Any]) -> None:
    """Save a preset in place of an earlier one with that name.

    Args:
        name: letters, digits, spaces and . _ ( ) + -
        values: options of ClipSettings and LoadOptions by name, as JSON takes them.

    Raises:
        InputError: the name cannot be used, or an option is unknown.
        OutputError: the file cannot be written.
    """
    name = name.strip()
    if not re.fullmatch(rf"[\w][\w .()+-]{{0,{LONGEST - 1}}}", name) or name in BUILT_IN:
        raise InputError(
            f"the preset's name is {shown(name)}. Expected up to {LONGEST} letters, digits and spaces, and not "
            f"{listed(BUILT_IN)}."
        )
    check_names("an option", values, {**options(ClipSettings), **options(LoadOptions)})
    _write(environment.config() / FOLDER / f"{name}.json", values)


def delete(name: str) -> None:
    """Delete a preset of the user. Raises OutputError."""
    try:
        (environment.config() / FOLDER / f"{Path(name).name}.json").unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"the preset {name!r} cannot be deleted ({error}). Look at its folder.") from error


def latest() -> dict[str, Any]:
    """Return the settings of the latest session as its file has them; empty where no session has kept any.

    Raises:
        InputError: the file cannot be read.
    """
    path = environment.config() / LATEST
    return _read(path) if os.path.lexists(path) else {}


def remember(changes: Mapping[str, Any]) -> None:
    """Put changed settings into the file of the latest session, which keeps all others, whoever wrote them.

    Args:
        changes: options by name, as JSON takes them. None: forget the option.

    Raises:
        OutputError: the file cannot be written.
    """
    path = environment.config() / LATEST
    with ExitStack() as stack:
        with suppress(OSError, NotImplementedError):  # on a file system without locks the last change wins whole
            # without soft fallback, because a soft lock outlives a process that was killed
            stack.enter_context(FileLock(f"{path}.lock", timeout=PATIENCE, fallback_to_soft=False))
        kept = {**_read_or_empty(path), **changes}
        _write(path, {name: value for name, value in kept.items() if value is not None or name not in changes})


def _read(path: Path) -> dict[str, Any]:
    """Return what a file holds, unknown options included. Raises InputError"""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # because a pipe would be waited for
            raise ValueError("it is not a file")
        if found.st_size > MOST:
            raise ValueError(f"it has {found.st_size} bytes, and {MOST} are the most that are read")
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(data, dict):
            raise ValueError("it has no settings")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{shown(path)} cannot be used ({reason}). Expected settings as JSON. Delete it.") from error
    return data


def _read_or_empty(path: Path) -> dict[str, Any]:
    with suppress(InputError):
        return _read(path)
    return {}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    try:
        atomic.write(path, json.dumps(dict(values), indent=1, ensure_ascii=False))
    except (OSError, TypeError, ValueError) as error:  # ValueError: a lone surrogate in a path
        raise OutputError(f"{str(path)!r} cannot be written ({error}). Set TURBO_NB_CONFIG.") from error
