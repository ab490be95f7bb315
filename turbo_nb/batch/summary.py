"""Many prompts become videos, here or on every GPU of this machine; stopped at any moment, the next run goes on.

A job's id is the hash of what determines its video, and the video carries it. So what is done can be seen from the
folder alone: the manifest says it quickly, and a file that the manifest does not know yet says it itself.
"""

import html
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..machine import environment
from ..video import mp4, sheet
from .manifest import MANIFEST, _whole, read_manifest

if TYPE_CHECKING:
    pass
SHEET = "contact_sheet.png"
SHEET_CLIPS, SHEET_SIDE = 100, 208  # the most clips on a contact sheet, and the longest side of a frame there in pixels


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a batch has come to.

    records: the manifest's last line on every job, in the jobs' order; made: videos of this run; repeated: jobs that
    ask for the same video as an earlier one; cost: dollars for `seconds`, None where no price was set; sheet: the
    contact sheet, None while the folder holds no video.
    """

    output_dir: Path
    records: list[dict]
    made: int
    repeated: int
    seconds: float
    cost: float | None
    sheet: Path | None

    @property
    def done(self) -> list[dict]:
        return [record for record in self.records if record["status"] == "done"]

    @property
    def failed(self) -> list[dict]:
        return [record for record in self.records if record["status"] == "failed"]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Cells of the table, its head first; timings in seconds."""
        stages = [
            stage
            for stage in ("text", "denoise", "switch", "decode", "write")
            if stage != "switch" or any(stage in record["timings"] for record in self.records)
        ]
        priced = any(record.get("cost") is not None for record in self.records)
        yield ("video", "prompt", "seed", *stages, "total", *(["cost"] if priced else []))
        for record in self.records:
            timings = record["timings"]
            cells = [f"{timings[stage]:.2f}" if stage in timings else "" for stage in stages]
            total = f"{sum(timings.values()):.2f}" if timings else ""
            cells += [total, *([environment.dollars(record.get("cost"), "")] if priced else [])]
            yield (record["file"] or "failed", record["prompt"], str(record["settings"]["seed"]), *cells)

    def __str__(self) -> str:
        rows = [[_shorten(cell, 60) for cell in row] for row in self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *map(describe, self.failed), self.line()])

    def line(self) -> str:
        """The outcome in one line"""
        words = f"{self.made} made, {len(self.done) - self.made} there before, {len(self.failed)} failed"
        words += f", {self.repeated} asked for twice" if self.repeated else ""
        return f"{words}, in {self.seconds:.1f} s{environment.dollars(self.cost)}; {self.output_dir / MANIFEST}"

    def _repr_html_(self) -> str:
        head, *rows = ([html.escape(_shorten(cell, 200)) for cell in row] for row in self.rows())
        top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
        lines = (
            f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
            for row in rows
        )
        caption = "<br>".join(html.escape(line) for line in [self.line(), *map(describe, self.failed)])
        return (
            f"<table><caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        )


def describe(record: dict) -> str:
    """A record in one line"""
    if record["status"] == "done":
        seconds = sum(record["timings"].values())
        return f"{record['file']}  {seconds:.2f} s{environment.dollars(record.get('cost'), '  ')}"
    return f"failed: {record['source'] or record['id']}: {record['error']}"


def _shorten(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _contact_sheet(folder: Path) -> Path | None:
    """Draw the folder's videos, in the manifest's order, unless the picture is newer than the manifest."""
    path = folder / SHEET
    if path.exists() and path.stat().st_mtime_ns >= (folder / MANIFEST).stat().st_mtime_ns:
        return path
    last = {record["id"]: record for record in read_manifest(folder)}.values()
    shown = [record for record in last if record["status"] == "done" and (folder / record["file"]).exists()]
    shown = shown[:SHEET_CLIPS]
    if not shown:
        return None
    import numpy as np

    sizes = [(record["settings"]["width"], record["settings"]["height"]) for record in shown]
    scales = [min(1, SHEET_SIDE / max(size)) for size in sizes]
    width, height = (max(round(size[i] * s) for size, s in zip(sizes, scales, strict=True)) for i in (0, 1))
    clips, captions = [], []
    for record in shown:
        with suppress(InputError):  # damaged since; it has no place on the sheet
            frames = mp4.read_frames(folder / record["file"], width, height)
            clips.append(frames[np.linspace(0, len(frames) - 1, 3).round().astype(int)])
            captions.append(f"seed {record['settings']['seed']} · {record['prompt']}")
    if not clips:
        return None
    with _whole(path) as temporary:
        sheet.contact_sheet(clips, captions).save(temporary)
    return path
