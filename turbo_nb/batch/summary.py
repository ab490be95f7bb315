"""The outcome of a batch: a table in text and in HTML, and a contact sheet of its videos."""

import html
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, first_line, warn
from ..machine import atomic, environment
from ..video import mp4, sheet
from .manifest import MANIFEST, JobRecord

SHEET = "contact_sheet.png"
SHEET_CLIPS, SHEET_SIDE = 100, 208  # the most clips on a contact sheet; the longest side of a frame there, in pixels
STAGES = ("text", "denoise", "switch", "decode", "write")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The outcome of a batch.

    Args:
        output_dir: the folder.
        records: the last record of every job, in the jobs' order.
        made: videos of this run. repeated: jobs that are the same as an earlier one.
        seconds: of the run. cost: of these seconds in dollars, None where no price was set.
        sheet: path of the contact sheet, None while the folder has no video.
    """

    output_dir: Path
    records: list[JobRecord]
    made: int
    repeated: int
    seconds: float
    cost: float | None
    sheet: Path | None

    @property
    def done(self) -> list[JobRecord]:
        """Records of the videos that are there."""
        return [record for record in self.records if record.status == "done"]

    @property
    def failed(self) -> list[JobRecord]:
        """Records of the jobs that failed."""
        return [record for record in self.records if record.status == "failed"]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the cells of the table, the header row first. Timings are in seconds."""
        used = {stage for record in self.records for stage in record.timings}
        stages = [stage for stage in STAGES if stage != "switch" or stage in used]
        priced = any(record.cost is not None for record in self.records)
        yield ("video", "prompt", "seed", *stages, "total", *(["cost"] if priced else []))
        for record in self.records:
            timings = record.timings
            cells = [f"{timings[stage]:.2f}" if stage in timings else "" for stage in stages]
            total = f"{sum(timings.values()):.2f}" if timings else ""
            cells += [total, *([environment.dollars(record.cost, "")] if priced else [])]
            yield (record.file or "failed", record.prompt, str(record.settings.seed), *cells)

    def __str__(self) -> str:
        rows = [[_shorten(cell, 60) for cell in row] for row in self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *map(describe, self.failed), self.line()])

    def line(self) -> str:
        """Return the outcome in one line."""
        counts = f"{self.made} made, {len(self.done) - self.made} there before, {len(self.failed)} failed"
        counts += f", {self.repeated} asked for twice" if self.repeated else ""
        return f"{counts}, in {self.seconds:.1f} s{environment.dollars(self.cost)}; {self.output_dir / MANIFEST}"

    def _repr_html_(self) -> str:
        head, *rows = ([html.escape(_shorten(cell, 200)) for cell in row] for row in self.rows())
        top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
        body = "".join(
            f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
            for row in rows
        )
        caption = "<br>".join(html.escape(line) for line in [self.line(), *map(describe, self.failed)])
        return f"<table><caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def describe(record: JobRecord) -> str:
    """Return a record in one line."""
    if record.status == "done":
        return f"{record.file}  {sum(record.timings.values()):.2f} s{environment.dollars(record.cost, '  ')}"
    return f"failed: {_shorten(record.source or record.id, 300)}: {_shorten(record.error or '', 600)}"


def _shorten(text: str, length: int) -> str:
    text = " ".join(mp4.printable(text[: 2 * length]).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def contact_sheet(folder: Path, records: Iterable[JobRecord]) -> Path | None:
    """Draw the videos of some records, unless the picture is newer than the manifest; return its path.

    A sheet that cannot be drawn is a warning, because the videos are worth more. Without a video the path is None.
    """
    path = folder / SHEET
    try:
        if path.exists() and path.stat().st_mtime_ns >= (folder / MANIFEST).stat().st_mtime_ns:
            return path
        names = {video.name for video in folder.glob("*.mp4")}
        return _draw(path, [one for one in records if one.status == "done" and one.file in names][:SHEET_CLIPS])
    except Exception as error:  # any, because records and videos come from other versions and other programs
        warn(f"the contact sheet {str(path)!r} cannot be drawn ({first_line(error)}). The videos are kept.")
        return None


def _draw(path: Path, records: list[JobRecord]) -> Path | None:
    import numpy as np

    shown = [one for one in records if min(one.settings.width or 0, one.settings.height or 0) > 0]
    sizes = [(one.settings.width, one.settings.height) for one in shown]
    scales = [min(1, SHEET_SIDE / max(size)) for size in sizes]
    width, height = (
        max((max(1, round(size[i] * s)) for size, s in zip(sizes, scales, strict=True)), default=0) for i in (0, 1)
    )
    clips, captions = [], []
    for record in shown:
        with suppress(InputError):  # the file was damaged since
            frames = mp4.read_frames(path.parent / record.file, width, height)
            clips.append(frames[np.linspace(0, len(frames) - 1, 3).round().astype(int)])
            captions.append(f"seed {record.settings.seed} · {record.prompt}")
    if not clips:
        return None
    picture = sheet.contact_sheet(clips, captions)
    with atomic.replaced(path) as temporary:
        picture.save(temporary)
    return path
