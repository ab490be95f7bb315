"""Every time and every size on the pages is a row of benchmarks/results, or is marked as calculated or reported.

A measured table row, or the line above a paragraph, names its CSV rows in a comment that readers do not see:
`<!-- COMMIT; WORK; SHAPE; MODE -->`, several of them joined by ` + `. A `*` in WORK stands for anything.
A cell, its column's title, the paragraph before a table, or the paragraph itself may have a mark of `MARKS` instead.
"""

import csv
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest
from pages import REPOSITORY, read

PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md"))))
MARKS = re.compile(r"\b(calculated|reported)\b", re.IGNORECASE)
QUANTITY = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?) ?(ms|s|GB|GiB)\b")
UNITS = {"ms": 1.0, "s": 1e-3, "GiB": 1.0, "GB": 2**30 / 1e9}  # from a row's milliseconds or GiB

ROWS = [
    row
    for path in sorted((REPOSITORY / "benchmarks/results").glob("*.csv"))
    for row in csv.DictReader(path.open(encoding="utf-8"))
]


def rows(key: str) -> list[dict]:
    """The rows that a comment names"""
    commit, work, shape, mode = (part.strip() for part in key.split(";"))
    return [
        row
        for row in ROWS
        if row["commit"].startswith(commit) and fnmatchcase(row["work"], work)
        and (row["shape"], row["mode"]) == (shape, mode)
    ]  # fmt: skip


def is_in(number: str, unit: str, row: dict) -> bool:
    """Whether a row has the number, as exact as the number is written"""
    names = ("ms", "first_ms", "ms_min") if unit in ("ms", "s") else ("peak_gib",)
    half = 0.5 * 10.0 ** -len(number.partition(".")[2])
    values = [float(row[name]) * UNITS[unit] for name in names if row[name]]
    values += [float(ms) * UNITS[unit] for ms in re.findall(r"step in the same process ([\d.]+) ms", row["check"])]
    return any(abs(value - float(number)) <= half * 1.0001 for value in values)


def without_source(number: str, unit: str, named: list[dict]) -> bool:
    return not any(is_in(number, unit, row) for row in named)


def faults(text: str) -> Iterator[str]:
    """A line for each number whose source is not named, and for each name without a row"""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^<!-- (.*?) -->\n(.*)", r"\2 <!-- \1 -->", text, flags=re.MULTILINE)
    before = ""  # the paragraph before a table
    for block in re.split(r"\n\s*\n", text):
        titles: list[str] = []
        lines = block.splitlines() if block.startswith("|") else [" ".join(block.split())]
        for line in lines:
            keys = [key for found in re.findall(r"<!-- (.*?) -->", line) for key in found.split(" + ")]
            named = [row for key in keys for row in rows(key)]
            yield from (f"no row of benchmarks/results is {key!r}" for key in keys if not rows(key))
            line = re.sub(r"<!-- .*? -->|`[^`]*`|H100 80GB", "", line)
            cells = line.strip("|").split("|") if block.startswith("|") else [line]
            titles = titles or (cells if block.startswith("|") else [])
            for number, cell in enumerate(cells):
                place = f"{cell} {titles[number]} {before}" if number < len(titles) else cell
                if not MARKS.search(place):
                    for amount, unit in QUANTITY.findall(cell):
                        if without_source(amount, unit, named):
                            yield f"{amount} {unit} has no source: {line.strip()[:100]}"
        before = "" if block.startswith("|") else block


@pytest.mark.parametrize("name", PAGES)
def test_every_number_of_a_page_has_a_source(name):
    wrong = list(faults(read(name)))
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def test_the_pages_with_measurements_name_rows():
    assert all("<!-- " in read(name) for name in ("README.md", "docs/speed.md"))


KEY = "<!-- f919eec; all of a clip, 4 steps, sagesla 0.1, int8; 832x480x81; as loaded -->"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{KEY}\nIt takes 1.4 s.", None),
        (f"{KEY}\nIt takes 1379 ms.", None),
        (f"{KEY}\nIt takes 1.3 s.", "1.3 s has no source"),
        ("It takes 1.4 s.", "1.4 s has no source"),
        ("It takes 1.3 s (reported).", None),
        (f"| a | b |\n|---|---|\n| c | 1.38 s |{KEY}", None),
        (f"| a | b |\n|---|---|\n| c | 1.39 s |{KEY}", "1.39 s has no source"),
        ("| a | b (calculated) |\n|---|---|\n| c | 9 GB |", None),
        ("| a (calculated) | b |\n|---|---|\n| c | 9 GB |", "9 GB has no source"),
        ("Reported numbers:\n\n| a | b |\n|---|---|\n| c | 9 GB |", None),
        (KEY.replace("f919eec", "0000000"), "no row of benchmarks/results is '0000000;"),
    ],
)
def test_a_number_without_its_row_is_found(text, words):
    found = list(faults(text))
    assert found == [] if words is None else words in "".join(found)
