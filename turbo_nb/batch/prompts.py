"""Rows of prompts: a txt, csv or jsonl file, or Python's own objects, become a list of jobs."""

import csv
import io
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, warn
from ..machine import environment
from ..settings import PICTURES, ClipSettings, check_names, options
from ..values import PathLike, shown, with_home
from ..video import images
from ..video.mp4 import printable

ROW_OPTIONS = {name: option for name, option in options(ClipSettings).items() if option.row}
MAX_SHOWN = 20  # wrong rows that one error names
SUFFIXES = ".txt, .csv or .jsonl"
LONGEST_CELL = 100_000_000  # characters; Python's own limit is 131072
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_widening = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A prompt to make videos of.

    Args:
        prompt: what to show.
        settings: options of `generate` for this job alone.
        source: where the job comes from, such as prompts.csv:3.
    """

    prompt: str
    settings: dict = field(default_factory=dict)
    source: str = ""


def read_prompts(path: Any) -> list[Job]:
    """Read jobs from a file, or from a list of prompts and rows.

    Args:
        path: a txt (one prompt a line, # begins a comment), a csv with a header row, or a jsonl (one object a line).
            A csv or jsonl has `prompt`, and any option that a row may set. An empty cell or null stands for the
            option of the whole run. A relative path of a picture begins at the file's folder. Or a list of prompts,
            `Job`s and dictionaries like a jsonl's rows.

    Returns:
        The jobs, in order.

    Raises:
        InputError: the file cannot be read, or some rows are wrong. The message has file:line of each, up to 20.
    """
    rows = [*rows_of(path)]
    refuse([str(row) for row in rows if isinstance(row, InputError)])
    return rows


def refuse(wrong: list[str]) -> None:
    """Raise an InputError that names wrong rows, if there are any."""
    if wrong:
        more = [f"and {len(wrong) - MAX_SHOWN} more"] if len(wrong) > MAX_SHOWN else []
        raise InputError("\n".join([*wrong[:MAX_SHOWN], *more]))


def rows_of(jobs: Any) -> Iterator[Job | InputError]:
    """Yield the jobs of whatever `run` takes, with an InputError in the place of each wrong row.

    Args:
        jobs: the path of a file; or prompts, `Job`s and objects like a jsonl's rows. A single one needs no list, except
            a prompt, because text is a path.

    Raises:
        InputError: the file cannot be read, or jobs is something else.
    """
    if isinstance(jobs, str | os.PathLike):
        yield from read_rows(jobs)
        return
    if isinstance(jobs, Job | Mapping):
        jobs = [jobs]
    if isinstance(jobs, bytes | bytearray) or hasattr(jobs, "columns") or not isinstance(jobs, Iterable):
        fix = 'Give its to_dict("records").' if hasattr(jobs, "columns") else "Put it into a list."
        raise InputError(f"prompts is a {type(jobs).__name__}. Expected a list of prompts, or a file's path. {fix}")
    for number, job in enumerate(jobs, 1):
        if isinstance(job, Mapping):
            yield _job([*job.items()], f"prompt {number}", None)
        elif isinstance(job, Job | InputError):
            yield job
        else:
            yield Job(prompt=job, source=f"prompt {number}")


def read_rows(path: str | os.PathLike) -> list[Job | InputError]:
    """Read a file as `read_prompts` does, with an InputError in the place of each wrong row."""
    path = Path(PathLike()("prompts", path))
    name = shown(path)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    suffix = path.suffix.lower()
    if suffix not in readers:
        fix = "Rename or convert the file." if environment.is_file(path) else "A prompt goes into a list: [PROMPT]."
        raise InputError(f"prompts is {name}. Expected a {SUFFIXES}. {fix}")
    if environment.exists(path) and not environment.is_file(path):  # a pipe or a device may never end
        raise InputError(f"prompts is {name}, which is not a file. Expected a {SUFFIXES}.")
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # a ValueError for a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"prompts is {name}, which cannot be read ({reason}). Expected a {SUFFIXES}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"prompts is {name}, which is in UTF-16. Expected UTF-8. Save it as UTF-8.") from error
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: the line is not in UTF-8. Expected UTF-8. Save it as UTF-8.") from error
    if "\0" in text and suffix != ".jsonl":  # JSON has its own way to write a zero byte
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(
            f"{path}:{line}: the line has a zero byte, as UTF-16 has many. Expected UTF-8. Save it as UTF-8."
        )
    text = re.sub("(?m)^\ufeff+", "", text)  # files that were joined have the mark of each
    rows = list(readers[suffix](io.StringIO(text, newline="" if suffix == ".csv" else None), path))
    if not rows:
        what = "no prompt" + (" beside comments (#)" if suffix == ".txt" and text.strip() else "")
        raise InputError(f"prompts is {name}, which holds {what}. Expected at least one. Write one a line.")
    return rows


def _read_txt(file: io.StringIO, path: Path) -> Iterator[Job]:
    dropped, first = [], True
    for number, line in enumerate(file, 1):
        line = line.strip()
        if line.startswith("#"):
            if line[1:2] not in ("", " ", "\t", "#", "!"):  # a comment seldom has its first word here
                dropped.append((number, line))
        elif line:
            if first:
                _check_is_text(line, f"{path}:{number}")
            first = False
            yield Job(prompt=line, source=f"{path}:{number}")
    if dropped:
        number, line = dropped[0]
        more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
        warn(
            f"{path}:{number}{more}: {shown(line, 40)} is left out, because # begins a comment. A prompt that begins "
            "with # goes into a csv or jsonl."
        )


def _check_is_text(line: str, source: str) -> None:
    """Raise InputError where the first prompt of a txt is the beginning of another format"""
    row: Any = None
    with suppress(ValueError, RecursionError):
        row = json.loads(line)
    names = [_option_name(name.strip('"')) for name in re.split(f"[,{''.join(SEPARATORS)}]", line)]
    if isinstance(row, dict) and "prompt" in map(_option_name, row):
        kind, fix = "a jsonl", "Rename the file to .jsonl."
    elif line in ("[", "{") or isinstance(row, list):
        kind, fix = "JSON", "Write one object a line into a .jsonl."
    elif len(names) > 1 and {"prompt"} < {*names} <= {"prompt", *ROW_OPTIONS}:
        kind, fix = "a csv", "Rename the file to .csv."
    elif re.match("(?i)<!doctype html|<html", line):
        kind, fix = "a web page", "Download the file itself."
    else:
        return
    raise InputError(f"{source}: the line is {shown(line, 40)}, as {kind} begins. Expected a prompt a line. {fix}")


@contextmanager
def _wide_cells() -> Iterator[None]:
    """Let csv read long cells. The limit is one of the whole process"""
    with _widening:
        before = csv.field_size_limit(LONGEST_CELL)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _read_csv(file: io.StringIO, path: Path) -> list[Job | InputError]:
    _check_separator(file.readline(), path)
    file.seek(0)
    with _wide_cells():
        return [*_csv_rows(csv.reader(file, strict=True), path)]


def _check_separator(line: str, path: Path) -> None:
    """Raise InputError for a header row with semicolons or tabs, as spreadsheets write it in some countries"""
    for separator, words in SEPARATORS.items():
        names = [_option_name(name.strip().strip('"')) for name in line.split(separator)]
        if line.strip("\r\n") == f"sep={separator}" or (len(names) > 1 and "prompt" in names):
            raise InputError(
                f"{path}:1: the header row is {shown(line.strip())}, with {words} between the columns. Expected commas."
                " Save the file with commas."
            )


def _csv_rows(rows: Any, path: Path) -> Iterator[Job | InputError]:
    number = 1
    try:
        header = [_option_name(name) for name in next(rows, [])]
        _check_header(header, path)
        number = rows.line_num + 1
        for row in rows:
            if len(row) > len(header):
                yield InputError(
                    f"{path}:{number}: the row has {len(row)} cells. Expected {len(header)}, as the header row has. "
                    "Put text with commas in quotes."
                )
            elif any(cell.strip() for cell in row):
                cells = [(k, v) for k, v in zip(header, row, strict=False) if v.strip()]
                yield _job(cells, f"{path}:{number}", path.parent)
            number = rows.line_num + 1
    except csv.Error as error:  # the rest of the file cannot be divided into rows
        yield InputError(f"{path}:{number}: the row is not csv ({error}). Expected a closing quote for each quote.")


def _check_header(header: list[str], path: Path) -> None:
    try:
        if "prompt" not in header:
            raise InputError(
                f"the header row is {shown(','.join(header))}. Expected names of columns with prompt in them."
            )
        for number, name in enumerate(header, 1):
            if not name or name.startswith("unnamed:"):  # as pandas calls it after a second reading
                raise InputError(
                    f"column {number} is without a name. Expected a name for each. Remove the column, which in pandas "
                    "is to_csv(…, index=False)."
                )
        check_names("a column", header, ["prompt", *ROW_OPTIONS])
        if twice := [name for name in header if header.count(name) > 1]:
            raise InputError(f"the header row names {twice[0][:40]} twice. Expected each column once.")
    except InputError as error:
        raise InputError(f"{path}:1: {error}") from error


class _Object(dict):
    """A JSON object that remembers its pairs, because a dict forgets a key that is there twice"""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.pairs = pairs


def _read_jsonl(file: io.StringIO, path: Path) -> Iterator[Job | InputError]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_Object)
        except (ValueError, RecursionError) as error:
            yield InputError(f"{path}:{number}: the line is not JSON ({error}). Expected one object.")
            continue
        if isinstance(row, _Object):
            yield _job(row.pairs, f"{path}:{number}", path.parent)
        else:
            yield InputError(
                f'{path}:{number}: the line is {printable(line.strip()[:40])}. Expected {{"prompt": "…"}}.'
            )


def _option_name(name: Any) -> str:
    return name.strip().lower().replace("-", "_") if isinstance(name, str) else name


def _job(pairs: list[tuple[Any, Any]], source: str, folder: Path | None) -> Job | InputError:
    """Return the job of a row, or what is wrong with it. A file's row has text for values, and a folder for images"""
    try:
        row = {}
        for name, value in pairs:
            if (name := _option_name(name)) in row:
                raise InputError(f"the row names {shown(name)} twice. Expected each option once.")
            row[name] = value
        check_names("an option", row, ["prompt", *ROW_OPTIONS])
        prompt = options(ClipSettings)["prompt"].check("prompt", row.pop("prompt", None)).strip()
        settings = {name: _value(name, value, folder) for name, value in row.items() if value is not None}
    except InputError as error:
        return InputError(f"{source}: {error}")
    return Job(prompt=prompt, settings=settings, source=source)


def _value(name: str, value: Any, folder: Path | None) -> Any:
    """Return an option's value from a cell, from JSON, or from Python (without a folder)"""
    option = ROW_OPTIONS[name]
    if folder is None:
        return option.check(name, value)
    if name in PICTURES:
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{name} is {shown(value)}. Expected the path of a picture.")
        image = with_home(value.strip())
        beside = folder / image
        return image if images.is_address(image) and not environment.is_file(beside) else str(beside)
    return option.parse(name, value) if isinstance(value, str) else option.check(name, value)
