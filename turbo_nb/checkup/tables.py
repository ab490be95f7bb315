"""The doctor: what this machine is, what will run here, and for every problem one line with its remedy."""

import html
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

GIB = 2**30
STYLES = {"error": "red", "warning": "yellow", "FAILED": "red"}  # of a row by its first cell
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, head, rows, all plain text


class Tables:
    """Something whose `tables()` print as tables, and show as HTML in a notebook."""

    def tables(self) -> Iterator[Table]:
        raise NotImplementedError

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
                style = STYLES.get(row[0])
                drawing.add_row(*map(Text, row), style=style)
            drawn.append(drawing)
        return Group(*drawn)

    def __repr__(self) -> str:
        from rich.console import Console

        width = shutil.get_terminal_size((120, 24)).columns
        console = Console(file=io.StringIO(), width=width, force_jupyter=False)  # else a notebook shows it twice
        console.print(self)
        return console.file.getvalue()

    def _repr_html_(self) -> str:
        parts = []
        for title, head, rows in self.tables():
            top = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
            lines = "".join(
                f'<tr><th scope="row">{html.escape(row[0])}</th>'
                + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
                + "</tr>"
                for row in rows
            )
            header = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
            parts.append(f"<table><caption>{html.escape(title)}</caption>{header}<tbody>{lines}</tbody></table>")
        return "".join(parts)


@dataclass(frozen=True, repr=False)
class Shown(Tables):
    """Tables by themselves."""

    parts: tuple[Table, ...]

    def tables(self) -> Iterator[Table]:
        """The tables."""
        yield from self.parts


def gib(size: float) -> str:
    """Bytes of memory → "13.5 GiB" """
    return f"{size / GIB:.1f} GiB"


def decimal(size: int) -> str:
    """Bytes on a disk → "14.2 GB" """
    from rich import filesize

    return filesize.decimal(size)
