"""Many prompts become videos, here or on every GPU of this machine; stopped at any moment, the next run goes on.

A job's id is the hash of what determines its video, and the video carries it. So what is done can be seen from the
folder alone: the manifest says it quickly, and a file that the manifest does not know yet says it itself.
"""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from ..machine import environment
from ..video import mp4
from .engines import _make_all
from .jobs import _check, _found, _recorded
from .manifest import MANIFEST, _append, _lock, _mend, _sweep, read_manifest
from .prompts import Job, read_prompts
from .summary import Summary, _contact_sheet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# The run


def run(
    jobs: "Iterable[Job | str] | str | Path",
    load: "str | Path | dict | DiffusionPipeline",
    output_dir: str | os.PathLike,
    *,
    workers: int | None = None,
    num_samples: int = 1,
    on_record: Callable[[dict, int, int], None] | None = None,
    on_progress: Callable | None = None,
    **settings,
) -> Summary:
    """Make the videos that are missing in `output_dir`, and its manifest and contact sheet.

    jobs: what `read_prompts` gives, the path of such a file, or prompts. load: a pipeline; a model; or a dict of
    `load_pipeline`'s arguments, loaded when something is missing. settings: those of `generate` that hold for every job
    without its own. num_samples: videos of a job, with seed, seed + 1, …

    workers: processes, each with the model on a GPU of its own; None is one a GPU. One worker, as on a CPU, is this
    process. (A script that asks for more needs the guard `if __name__ == "__main__"`.)

    on_record(record, done, total) is told of every video as it is made or fails; on_progress of downloads, as by
    `hub.fetch`. A job that fails is in the manifest with its error, and the next run tries it again, last. Ctrl-C,
    and any kill, lose only what is under way.

    Raises InputError before anything is loaded if any job cannot be made as asked; OutputError if another run is at
    work in the folder, or it cannot be written; and what `load_pipeline` raises.
    """
    begin = time.perf_counter()
    folder = Path(output_dir)
    jobs = read_prompts(jobs) if isinstance(jobs, str | Path) else jobs
    load = {"model": load} if isinstance(load, str | Path) else load
    tasks = _check(jobs, load, folder, settings, num_samples)
    wanted = {}
    for task in tasks:
        wanted.setdefault(task.id, task)
    manifest = mp4.check_output(tasks[0].path).parent / MANIFEST
    with _lock(folder) as lock:
        _sweep(folder)
        _mend(manifest)
        records = {record["id"]: record for record in read_manifest(folder)}
        missing = []
        for task in wanted.values():
            if _recorded(task, records.get(task.id)):
                continue
            if found := _found(task):
                _append(manifest, found)
                records[task.id] = found
            else:
                missing.append(task)
        missing.sort(key=lambda task: task.id in records)  # what failed before may fail again: last
        made = 0
        with closing(_make_all(missing, load, workers, folder, lock, on_progress)) as results:
            for number, record in enumerate(results, 1):
                _append(manifest, record)
                records[record["id"]] = record
                made += record["status"] == "done"
                if on_record:
                    on_record(record, number, len(missing))
        sheet = _contact_sheet(folder)
    seconds = time.perf_counter() - begin
    return Summary(
        output_dir=folder,
        records=[records[name] for name in wanted],
        made=made,
        repeated=len(tasks) - len(wanted),
        seconds=seconds,
        cost=environment.cost(seconds),
        sheet=sheet,
    )
