"""Tables of plain text that print in a shell and show as HTML in a notebook.

rich draws them in a shell. In a notebook rich's HTML is one `<pre>` of box characters. Ours is a real table, because a
screen reader needs its caption and the scope of its headers.
"""

import html
import io
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from typing import Any

from ..errors import presentable
from ..machine.environment import dollars

GIB = 2**30
STYLES = {"error": "red", "warning": "yellow", "FAILED": "red"}  # of a row, by its first cell
# Title, header row (all empty: not shown), rows. A cell is plain text and may have several lines.
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


class Tables:
    """Base of everything that consists of tables, with an optional verdict in one line below them."""

    verdict = ""

    def tables(self) -> Iterator[Table]:
        """Yield the tables."""
        raise NotImplementedError

    def only(self, *titles: str) -> "Shown":
        """Return the tables that have one of these titles, in the order of the titles."""
        found = {table[0]: table for table in self.tables()}
        return Shown(tuple(found[title] for title in titles if title in found))

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table as Drawing
        from rich.text import Text

        drawn = []
        for title, head, rows in self.tables():
            drawing = Drawing(title=title, title_justify="left", show_header=any(head))
            for name in head:
                drawing.add_column(name, overflow="fold")
            for row in rows:
                drawing.add_row(*(Text(presentable(cell)) for cell in row), style=STYLES.get(row[0]))
            drawn.append(drawing)
        return Group(*drawn, *([Text(self.verdict, style="bold")] if self.verdict else []))

    def __repr__(self) -> str:
        from rich.console import Console

        width = shutil.get_terminal_size((120, 24)).columns
        console = Console(file=io.StringIO(), width=width, force_jupyter=False)  # else a notebook shows it twice
        console.print(self)
        return console.file.getvalue()

    def _repr_html_(self) -> str:
        parts = []
        for title, head, rows in self.tables():
            top = "".join(f'<th scope="col">{_escaped(name)}</th>' for name in head)
            lines = "".join(
                f'<tr><th scope="row">{_escaped(row[0])}</th>'
                + "".join(f"<td>{_escaped(cell)}</td>" for cell in row[1:])
                + "</tr>"
                for row in rows
            )
            header = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
            parts.append(f"<table><caption>{_escaped(title)}</caption>{header}<tbody>{lines}</tbody></table>")
        verdict = f"<p><strong>{_escaped(self.verdict)}</strong></p>" if self.verdict else ""
        return "".join(parts) + verdict


@dataclass(frozen=True, repr=False)
class Shown(Tables):
    """Some tables by themselves."""

    parts: tuple[Table, ...]

    def tables(self) -> Iterator[Table]:
        """Yield the tables."""
        yield from self.parts


def clip_times(video) -> Shown:
    """Return a table of a clip's stages: seconds, and peak GPU memory where it was measured.

    Args:
        video: what `generate` returned. With TURBO_NB_PRICE_PER_HOUR set the last row has the cost.
    """
    peaks = video.peaks
    rows = [
        (stage, seconds(time), gib(peaks[stage]) if stage in peaks else "") for stage, time in video.timings.items()
    ]
    rows.append(("all", f"{seconds(sum(video.timings.values()))}{dollars(video.cost)}", ""))
    return Shown((("Times", ("stage", "time", "peak GPU memory"), rows),))


def details(record: Any, title: str = "How it was made") -> Shown:
    """Return a table of a record's fields that are set.

    Args:
        record: a mapping or a dataclass, such as what `read_metadata` returns.
        title: caption of the table.
    """
    fields = asdict(record) if is_dataclass(record) else dict(record)
    units = {"timings": seconds, "steps": seconds, "peaks": gib, "cost": partial(dollars, before="")}
    rows = [
        (name, _value(value, units.get(name, _plain)))
        for name, value in fields.items()
        if value not in (None, "", [], (), {})
    ]
    return Shown(((title, ("", ""), rows),))


def _value(value: Any, plain: Callable[[Any], str]) -> str:
    """Return a field's value as text"""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(one, plain)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(one, plain) for one in value)
    return plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _escaped(cell: str) -> str:
    return html.escape(cell).replace("\n", "<br>")


def seconds(time: float) -> str:
    """Return seconds as "2.56 s"."""
    return f"{time:.2f} s"


def gib(size: float) -> str:
    """Return bytes of memory as "13.5 GiB"."""
    return f"{size / GIB:.1f} GiB"


def decimal(size: int) -> str:
    """Return bytes on a disk as "14.2 GB"."""
    from rich import filesize

    return filesize.decimal(size)
