"""Many prompts become videos, here or on every GPU of this machine; stopped at any moment, the next run goes on.

A job's id is the hash of what determines its video, and the video carries it. So what is done can be seen from the
folder alone: the manifest says it quickly, and a file that the manifest does not know yet says it itself.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    pass

# What a row may set: the arguments of `generate` that determine a clip
SETTINGS = {
    "image": str, "num_frames": int, "num_steps": int, "seed": int, "resolution": str, "aspect_ratio": str,
    "adaptive_resolution": bool, "sigma_max": float, "ode": bool, "boundary": float, "noise_device": str,
}  # fmt: skip
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prompt, the settings of `generate` that are its own, and where it was read, as file:line."""

    prompt: str
    settings: dict = field(default_factory=dict)
    source: str = ""


# Prompts


def read_prompts(path: str | os.PathLike) -> list[Job]:
    """Jobs from a file: txt (a prompt a line, # comments), csv with a head, or jsonl.

    A csv or jsonl has `prompt`, and any of SETTINGS for rows that differ; an empty cell or null is not given. A
    relative `image` lies beside the file. Raises InputError with file and line.
    """
    path = Path(path)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise InputError(f"{str(path)!r} is no file of prompts; give a .txt, .csv or .jsonl")
    try:
        with path.open(encoding="utf-8-sig", newline="" if path.suffix.lower() == ".csv" else None) as file:
            jobs = list(readers[path.suffix.lower()](file, path))
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror}); give a .txt, .csv or .jsonl") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not in UTF-8 ({error}); save it as UTF-8") from error
    if not jobs:
        raise InputError(f"{path} holds no prompt; write one a line")
    return jobs


def _read_txt(file: IO[str], path: Path) -> Iterator[Job]:
    for number, line in enumerate(file, 1):
        if (prompt := line.strip()) and not prompt.startswith("#"):
            yield Job(prompt=prompt, source=f"{path}:{number}")


def _read_csv(file: IO[str], path: Path) -> Iterator[Job]:
    rows = csv.reader(file, strict=True)
    number = 1
    try:
        head = [name.strip().lower().replace("-", "_") for name in next(rows, [])]
        if "prompt" not in head:
            raise InputError(f"{path}:1: the head is {', '.join(head)!r}; it names the columns, one of them prompt")
        if len(set(head)) < len(head):
            raise InputError(f"{path}:1: the head names a column twice")
        number = rows.line_num + 1
        for row in rows:
            if len(row) > len(head):
                raise InputError(
                    f"{path}:{number}: {len(row)} cells, and the head has {len(head)}; put text with commas in quotes"
                )
            if any(cell.strip() for cell in row):
                yield _job({k: v for k, v in zip(head, row, strict=False) if v.strip()}, path, number)
            number = rows.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{number}: {error}; see to the quotes") from error


def _read_jsonl(file: IO[str], path: Path) -> Iterator[Job]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: no JSON ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise InputError(f'{path}:{number}: {line.strip()[:40]} is no object; write {{"prompt": "…"}}')
        row = {name.replace("-", "_"): value for name, value in row.items() if value is not None}
        yield _job(row, path, number)


def _job(row: dict, path: Path, number: int) -> Job:
    source = f"{path}:{number}"
    try:
        prompt = row.pop("prompt", "")
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError("no prompt; say what to show")
        settings = {name: _value(name, value) for name, value in row.items()}
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    if "image" in settings:
        settings["image"] = str(path.parent / settings["image"])
    return Job(prompt=prompt.strip(), settings=settings, source=source)


def _value(name: str, value):
    """A setting from a cell or from JSON, as the type that it has"""
    _known_setting(name)
    kind, given = SETTINGS[name], value
    if isinstance(value, str) and kind is bool:
        value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(value.lower())
    elif isinstance(value, str):
        with suppress(ValueError):
            value = kind(value.strip())
    elif kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{name} is {given!r}; it is {WORDS[kind]}")
    return value


def _known_setting(name: str) -> None:
    if name not in SETTINGS:
        raise InputError(f"unknown setting {name!r}; known: prompt, {', '.join(SETTINGS)}{_meant(name, SETTINGS)}")


def _meant(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
