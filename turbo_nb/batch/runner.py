"""`run()`: check all jobs, find what is done, make the rest, record each.

A run can be stopped at any moment, even by a kill; the next run makes what is missing.
"""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from ..files.resolve import ResolvedModel, resolve
from ..machine import environment
from ..pipeline import LoadedModel
from ..settings import LoadOptions, RunOptions, build
from ..video import mp4
from .engines import Engine, engine_for
from .jobs import Task, tasks_of
from .manifest import MANIFEST, JobRecord, append, as_output_error, mend, read_manifest, run_lock, sweep
from .prompts import Job, read_rows
from .summary import Summary, contact_sheet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def run(
    jobs: "Iterable[Job | str] | str | Path",
    load: "str | Path | tuple | dict | LoadOptions | ResolvedModel | DiffusionPipeline",
    output_dir: str | os.PathLike,
    *,
    workers: int | None = None,
    num_samples: int = 1,
    on_record: Callable[[JobRecord, int, int], None] | None = None,
    on_progress: Callable | None = None,
    **settings,
) -> Summary:
    """Make the videos that are missing in a folder, with a manifest and a contact sheet.

    A job that fails gets a record with its error, and the others go on. The next run tries it again, last.

    Args:
        jobs: prompts, `Job`s, or the path of a file that `read_prompts` reads.
        load: a model's name or path, options of `load_pipeline` (LoadOptions or a dict), or a pipeline. A model that
            is not loaded is loaded when a video is missing.
        output_dir: the folder. One run at a time works there, and removes temporary files of earlier ones.
        workers: processes, each with the model on a GPU of its own. None: one a GPU. One worker, as on a CPU, is this
            process. A script that asks for more needs the guard `if __name__ == "__main__"`.
        num_samples: videos of each job, with seed, seed + 1, …
        on_record: called as on_record(record, done, total) when a video is finished or has failed.
        on_progress: called as bytes of a download arrive.
        settings: options of `generate` for jobs without their own.

    Returns:
        What was made; it prints as a table.

    Raises:
        InputError: a job or an option cannot be used. Nothing was loaded, downloaded or written.
        OutputError: another run is at work in the folder, or it cannot be written.
        TurboNbError: the model cannot be loaded.
    """
    begin = time.perf_counter()
    options = build(RunOptions, {"output_dir": output_dir, "workers": workers, "num_samples": num_samples})
    folder = Path(options.output_dir)
    rows = read_rows(jobs) if isinstance(jobs, str | Path) else jobs
    model = model_of(load)
    tasks = tasks_of(rows, model, folder, settings, options.num_samples)
    mp4.check_output(tasks[0].path)
    engine = engine_for(model, tasks, folder, options.workers, on_progress)
    wanted: dict[str, Task] = {}
    for task in tasks:
        wanted.setdefault(task.id, task)
    with run_lock(folder):
        records, missing = _find(wanted, folder)
        made = _make(engine, missing, records, folder, on_record)
        sheet = contact_sheet(folder, records.values())
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


def model_of(load) -> LoadedModel | ResolvedModel:
    """Return the model that a run uses, resolved once: for the ids and for loading"""
    if isinstance(load, ResolvedModel):
        return load
    if isinstance(load, LoadOptions):
        return resolve(load)
    if isinstance(load, dict):
        return resolve(build(LoadOptions, load))
    if isinstance(load, str | Path | tuple):
        return resolve(LoadOptions(model=load))
    return LoadedModel.of(load)


def _find(wanted: dict[str, Task], folder: Path) -> tuple[dict[str, JobRecord], list[Task]]:
    """Return the folder's records by id, after adding those of videos that lack one, and the tasks that are missing"""
    manifest = folder / MANIFEST
    with as_output_error(folder):
        sweep(folder)
        mend(manifest)
        records = {record.id: record for record in read_manifest(folder)}
        missing = []
        for task in wanted.values():
            if task.is_recorded(records.get(task.id)):
                continue
            if found := task.found():
                append(manifest, found)
                records[task.id] = found
            else:
                mp4.check_output(task.path)
                missing.append(task)
    missing.sort(key=lambda task: task.id in records)  # last, because a job that failed may fail again
    return records, missing


def _make(engine: Engine, missing: list[Task], records: dict[str, JobRecord], folder: Path, on_record) -> int:
    """Make tasks, record each, and return how many were made"""
    made = 0
    with closing(engine.make(missing)) as results:
        for number, record in enumerate(results, 1):
            append(folder / MANIFEST, record)
            records[record.id] = record
            made += record.status == "done"
            if on_record:
                on_record(record, number, len(missing))
    return made
