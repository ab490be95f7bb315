"""The outcome of a batch: a table in text and in HTML, and a contact sheet of its videos."""

import html
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..errors import InputError, collect_warnings, first_line, warn
from ..machine import atomic, environment
from ..runtime import estimate
from ..video import mp4, sheet
from .manifest import MANIFEST, JobRecord, Manifest

SHEET = "contact_sheet.png"
SHEET_CLIPS, SHEET_SIDE = 100, 208  # the most clips on a contact sheet; the longest side of a frame there, in pixels
STAGES = ("text", "denoise", "switch", "decode", "write")
ROWS = 100  # the most jobs that the table shows one by one


@dataclass(kw_only=True)
class Progress:
    """How far a run is; its text is one line.

    Args:
        total: jobs to make. done, failed: those that have ended. running: those that are being made.
        begin: when the first began to run, in seconds of time.monotonic.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    running: int = 0
    begin: float | None = None

    def run(self, running: int, on_status: Callable | None = None) -> None:
        """Take the number of jobs that are being made."""
        if running and self.begin is None:
            self.begin = time.monotonic()
        if running != self.running:
            self.running = running
            if on_status:
                on_status(self)

    def end(self, status: str, on_status: Callable | None = None) -> None:
        """Count a job that has ended."""
        self.done += status == "done"
        self.failed += status == "failed"
        if on_status:
            on_status(self)

    @property
    def rate(self) -> float | None:
        """Clips a minute since the first began to run; None before the first has ended."""
        if self.begin is None or not self.done:
            return None
        return 60 * self.done / max(1e-3, time.monotonic() - self.begin)

    @property
    def left(self) -> float | None:
        """Seconds to the end of the run at this rate."""
        return self.rate and 60 * (self.total - self.done - self.failed) / self.rate

    def __str__(self) -> str:
        words = f"{self.done} of {self.total} done, {self.failed} failed, {self.running} running"
        if self.rate:
            words += f", {self.rate:.3g} clips/min, {estimate.in_words(self.left)} left"
        return words


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The outcome of a batch. The records stay in the manifest.

    Args:
        output_dir: the folder.
        ids: of the jobs, in order.
        made: videos of this run. failures: jobs that failed. repeated: jobs that are the same as an earlier one.
        seconds: of the run. cost: of these seconds in dollars, None where no price was set.
        sheet: path of the contact sheet, None while the folder has no video.
    """

    output_dir: Path
    ids: tuple[str, ...]
    made: int
    failures: int
    repeated: int
    seconds: float
    cost: float | None
    sheet: Path | None

    @property
    def records(self) -> list[JobRecord]:
        """The last record of every job, in the jobs' order, as it is in the manifest now."""
        return [*self._records()]

    @property
    def done(self) -> list[JobRecord]:
        """Records of the videos that are there."""
        return [record for record in self._records() if record.status == "done"]

    @property
    def failed(self) -> list[JobRecord]:
        """Records of the jobs that failed."""
        return [record for record in self._records() if record.status == "failed"]

    def _records(self) -> Iterator[JobRecord]:
        with collect_warnings():  # the run has shown them
            manifest = Manifest(self.output_dir)
        return (manifest[name] for name in self.ids)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the cells of the table, the header row first. Timings are in seconds.

        More than `ROWS` jobs are one row, with the mean of the videos.
        """
        shown = self.records if len(self.ids) <= ROWS else [_mean(self._records())]
        used = {stage for record in shown for stage in record.timings}
        stages = [stage for stage in STAGES if stage != "switch" or stage in used]
        priced = any(record.cost is not None for record in shown)
        yield ("video", "prompt", "seed", *stages, "total", *(["cost"] if priced else []))
        for record in shown:
            timings = record.timings
            cells = [f"{timings[stage]:.2f}" if stage in timings else "" for stage in stages]
            total = f"{sum(timings.values()):.2f}" if timings else ""
            cells += [total, *([environment.dollars(record.cost, "")] if priced else [])]
            seed = record.settings.seed
            yield (record.file or "failed", record.prompt, "" if seed is None else str(seed), *cells)

    def _lines(self) -> list[str]:
        """Return the last lines: up to 20 failed jobs, and the outcome"""
        failed = [*islice((one for one in self._records() if one.status == "failed"), 20)] if self.failures else []
        more = [f"and {self.failures - 20} more failed"] if self.failures > 20 else []
        return [*map(describe, failed), *more, self.line()]

    def __str__(self) -> str:
        rows = [[_shorten(cell, 60) for cell in row] for row in self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *self._lines()])

    def line(self) -> str:
        """Return the outcome in one line."""
        before = len(self.ids) - self.made - self.failures
        counts = f"{self.made} made, {before} there before, {self.failures} failed"
        counts += f", {self.repeated} asked for twice" if self.repeated else ""
        return f"{counts}, in {self.seconds:.1f} s{environment.dollars(self.cost)}; {self.output_dir / MANIFEST}"

    def _repr_html_(self) -> str:
        head, *rows = ([html.escape(_shorten(cell, 200)) for cell in row] for row in self.rows())
        top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
        body = "".join(
            f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
            for row in rows
        )
        caption = "<br>".join(map(html.escape, [self.line(), *self._lines()[:-1]]))
        return f"<table><caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _mean(records: Iterable[JobRecord]) -> JobRecord:
    """Return a record whose timings and cost are the mean of those of the finished videos"""
    count, sums, cost = 0, Counter(), None
    for one in records:
        if one.status == "done":
            count += 1
            sums.update(one.timings)
            cost = cost if one.cost is None else (cost or 0) + one.cost
    timings = {stage: seconds / count for stage, seconds in sums.items()}
    cost = None if cost is None else cost / count
    return JobRecord(id="", status="done", file=f"mean of {count} videos", timings=timings, cost=cost)


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
        shown = (one for one in records if one.status == "done" and one.file in names)
        return _draw(path, [*islice(shown, SHEET_CLIPS)])
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
