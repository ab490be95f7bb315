"""Files of prompts: a txt, csv or jsonl becomes a list of jobs."""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import InputError
from ..settings import ClipSettings, check_names, options, shown

ROW_OPTIONS = {name: option for name, option in options(ClipSettings).items() if option.row}
MAX_SHOWN = 5  # wrong rows that one error names
SUFFIXES = ".txt, .csv or .jsonl"


@dataclass(frozen=True, kw_only=True)
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


def read_prompts(path: str | os.PathLike) -> list[Job]:
    """Read jobs from a file.

    Args:
        path: a txt (one prompt a line, # begins a comment), a csv with a header row, or a jsonl (one object a line).
            A csv or jsonl has `prompt`, and any option that a row may set. An empty cell or null stands for the
            option of the whole run. A relative `image` lies beside the file.

    Returns:
        The jobs, in order.

    Raises:
        InputError: the file cannot be read, or some rows are wrong. The message has file:line of each, up to 5.
    """
    rows = read_rows(path)
    refuse([str(row) for row in rows if isinstance(row, InputError)])
    return rows


def refuse(wrong: list[str]) -> None:
    """Raise an InputError that names wrong rows, if there are any."""
    if wrong:
        more = [f"and {len(wrong) - MAX_SHOWN} more"] if len(wrong) > MAX_SHOWN else []
        raise InputError("\n".join([*wrong[:MAX_SHOWN], *more]))


def read_rows(path: str | os.PathLike) -> list[Job | InputError]:
    """Read a file as `read_prompts` does, with an InputError in the place of each wrong row."""
    path = Path(path)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise InputError(f"prompts is {str(path)!r}. Expected a {SUFFIXES}. Rename or convert the file.")
    try:
        with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as file:
            rows = list(readers[suffix](file, path))
    except OSError as error:
        raise InputError(
            f"prompts is {str(path)!r}, which cannot be read ({error.strerror}). Expected a {SUFFIXES}."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"prompts is {str(path)!r}, which is not in UTF-8 ({error}). Save it as UTF-8.") from error
    if not rows:
        raise InputError(f"prompts is {str(path)!r}, which holds no prompt. Expected at least one. Write one a line.")
    return rows


def _read_txt(file: IO[str], path: Path) -> Iterator[Job]:
    for number, line in enumerate(file, 1):
        if (prompt := line.strip()) and not prompt.startswith("#"):
            yield Job(prompt=prompt, source=f"{path}:{number}")


def _read_csv(file: IO[str], path: Path) -> Iterator[Job | InputError]:
    rows, number = csv.reader(file, strict=True), 1
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
                yield _job([(k, v) for k, v in zip(header, row, strict=False) if v.strip()], path, number)
            number = rows.line_num + 1
    except csv.Error as error:  # the rest of the file cannot be divided into rows
        yield InputError(f"{path}:{number}: the row is not csv ({error}). Expected a closing quote for each quote.")


def _check_header(header: list[str], path: Path) -> None:
    try:
        if "prompt" not in header:
            raise InputError(f"the header row is {', '.join(header)!r}. Expected names of columns with prompt in them.")
        check_names("a column", header, ["prompt", *ROW_OPTIONS])
        if twice := [name for name in header if header.count(name) > 1]:
            raise InputError(f"the header row names {twice[0]} twice. Expected each column once.")
    except InputError as error:
        raise InputError(f"{path}:1: {error}") from error


def _read_jsonl(file: IO[str], path: Path) -> Iterator[Job | InputError]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            pairs = json.loads(line, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError) as error:
            yield InputError(f"{path}:{number}: the line is not JSON ({error}). Expected one object.")
            continue
        if isinstance(pairs, _Pairs):
            yield _job([(_option_name(name), value) for name, value in pairs if value is not None], path, number)
        else:
            yield InputError(f'{path}:{number}: the line is {line.strip()[:40]}. Expected {{"prompt": "…"}}.')


class _Pairs(list):
    """The keys and values of a JSON object, with keys that are there twice"""


def _option_name(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _job(pairs: list[tuple[str, Any]], path: Path, number: int) -> Job | InputError:
    """Return the job of a row, or what is wrong with it"""
    try:
        row = dict(pairs)
        if len(row) < len(pairs):
            raise InputError(f"the row names one of {', '.join(name for name, _ in pairs)} twice. Expected each once.")
        prompt = options(ClipSettings)["prompt"].check("prompt", row.pop("prompt", None)).strip()
        check_names("an option", row, ROW_OPTIONS)
        settings = {name: _value(name, value) for name, value in row.items()}
    except InputError as error:
        return InputError(f"{path}:{number}: {error}")
    if "image" in settings:
        image = os.path.expanduser(settings["image"])
        settings["image"] = image if "://" in image else str(path.parent / image)  # `load_image` names an address
    return Job(prompt=prompt, settings=settings, source=f"{path}:{number}")


def _value(name: str, value: Any) -> Any:
    """Return an option's value from a cell or from JSON"""
    if name == "image" and not isinstance(value, str):
        raise InputError(f"image is {shown(value)}. Expected the path of a picture.")
    option = ROW_OPTIONS[name]
    return option.parse(name, value) if isinstance(value, str) else option.check(name, value)
