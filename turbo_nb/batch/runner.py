"""`run()`: check all jobs, find what is done, make the rest, record each.

A run can be stopped at any moment, even by a kill; the next run makes what is missing.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError
from ..files.resolve import ResolvedModel, resolve
from ..machine import environment
from ..pipeline import LoadedModel
from ..settings import LoadOptions, RunOptions, build
from ..video import images, mp4
from .engines import Engine, engine_for
from .jobs import Task, tasks_of
from .manifest import MANIFEST, JobRecord, append, as_output_error, mend, read_manifest, run_lock, sweep
from .prompts import Job, rows_of
from .summary import Summary, contact_sheet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def run(
    jobs: "Iterable[Job | Mapping | str] | str | Path",
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

    A job that fails gets a record with its error, and the others go on. The next run tries it again, last. An image
    that cannot be read and a file that cannot be written fail their own jobs. A full disk ends the run, because every
    job would fail.

    Args:
        jobs: a list of prompts, `Job`s or rows ({"prompt": …, "seed": …}), or the path of a file that `read_prompts`
            reads.
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
        InputError: jobs have settings that cannot be used; all are named, up to 20. Nothing was loaded, downloaded or
            written.
        OutputError: another run is at work in the folder, or it cannot be written. Finished videos are kept.
        TurboNbError: the model cannot be loaded.
    """
    begin = time.perf_counter()
    options = build(RunOptions, {"output_dir": output_dir, "workers": workers, "num_samples": num_samples})
    folder = Path(options.output_dir)
    rows = list(rows_of(jobs))
    mp4.check_output(folder / mp4.PROBE)  # before the model, because a reference asks the Hub
    model, pictures = model_of(load), images.Pictures()
    tasks = tasks_of(rows, model, folder, settings, options.num_samples, pictures)
    if isinstance(model, ResolvedModel) and any(task.settings.decoder == "tiny" for task in tasks):
        model = model.decoding("tiny")
    engine = engine_for(model, tasks, folder, options.workers, on_progress, pictures)
    wanted: dict[str, Task] = {}
    for task in tasks:
        wanted.setdefault(task.id, task)
    with run_lock(folder):
        records, missing = _find(wanted, folder)
        try:
            made = _make(engine, missing, records, folder, on_record)
        finally:
            with suppress(OSError):
                sweep(folder)  # what worker processes left that were killed
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
        records = {record.id: record for record in read_manifest(folder)}
        mend(manifest)
        missing = []
        for task in wanted.values():
            if task.is_recorded(records.get(task.id)):
                continue
            if found := task.found():
                append(manifest, found)
                records[task.id] = found
                continue
            try:
                mp4.check_output(task.path)
            except OutputError as error:  # a folder has its name
                task = replace(task, error=task.error or str(error))
            missing.append(task)
    missing.sort(key=lambda task: task.id in records)  # last, because a job that failed may fail again
    return records, missing


def _make(engine: Engine, missing: list[Task], records: dict[str, JobRecord], folder: Path, on_record) -> int:
    """Make tasks, record each, and return how many were made"""
    made = 0
    unmakeable = [task.record("failed", error=task.error) for task in missing if task.error]
    with closing(engine.make([task for task in missing if not task.error])) as results:
        for number, record in enumerate(chain(unmakeable, results), 1):
            append(folder / MANIFEST, record)
            records[record.id] = record
            made += record.status == "done"
            if on_record:
                on_record(record, number, len(missing))
    return made
