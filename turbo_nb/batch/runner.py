"""`run()`: check all jobs, find what is done, make the rest, record each.

A run can be stopped at any moment, even by a kill; the next run makes what is missing.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError
from ..files.resolve import ResolvedModel, resolve
from ..machine import environment
from ..pipeline import LoadedModel
from ..settings import LoadOptions, RunOptions, build
from ..video import images, mp4
from . import cluster
from .engines import Model, Work, engine_for
from .jobs import Task, Tasks
from .manifest import JobRecord, Manifest, as_output_error, run_lock, sweep
from .prompts import Job, rows_of
from .summary import Progress, Summary, contact_sheet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FEW = 1000  # prompts that an engine receives before their tasks


def run(
    jobs: "Iterable[Job | Mapping | str] | str | Path",
    load: "str | Path | tuple | dict | LoadOptions | ResolvedModel | DiffusionPipeline",
    output_dir: str | os.PathLike,
    *,
    workers: int | None = None,
    ray_address: str | None = None,
    num_samples: int = 1,
    on_record: Callable[[JobRecord, int, int], None] | None = None,
    on_status: Callable[[Progress], None] | None = None,
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
        workers: copies of the model, each on a GPU of its own. None: one a GPU. One on this machine is this process.
            More are Ray's actors, which need `pip install 'turbo-nb[ray]'`.
        ray_address: of a Ray cluster, whose GPUs make the videos. None: RAY_ADDRESS, which Ray's jobs set, else this
            machine.
        num_samples: videos of each job, with seed, seed + 1, …
        on_record: called as on_record(record, done, total) when a video is finished or has failed.
        on_status: called with one `Progress` before `on_record`, and when jobs begin to run.
        on_progress: called as bytes of a download arrive on this machine.
        settings: options of `generate` for jobs without their own.

    Returns:
        What was made; it prints as a table.

    Raises:
        InputError: jobs have settings that cannot be used; all are named, up to 20. Nothing was loaded, downloaded or
            written.
        OutputError: another run is at work in the folder, it cannot be written, or the disk has no space for one video.
            Finished videos are kept.
        TurboNbError: the model cannot be loaded.
    """
    begin = time.perf_counter()
    options = build(
        RunOptions,
        {"output_dir": output_dir, "workers": workers, "ray_address": ray_address, "num_samples": num_samples},
    )
    folder, address = Path(options.output_dir), options.ray_address or os.environ.get("RAY_ADDRESS")
    address = None if address == "local" or (hasattr(load, "turbo_nb") and not options.ray_address) else address
    rows = [*rows_of(jobs)]
    mp4.check_output(folder / mp4.PROBE)  # before the model, because a reference asks the Hub
    with cluster.connected(address) if address else nullcontext():
        model, pictures = model_of(load, address), images.Pictures()
        tasks = Tasks(rows, model, folder, settings, options.num_samples, pictures)
        ids, count, size, tiny = {}, 0, (0, 0, 0), False
        for task in tasks:
            ids[task.id], count, size = None, count + 1, _larger(size, task)
            tiny |= task.settings.decoder == "tiny"
        if tiny and not isinstance(model, LoadedModel):
            model = model.decoding("tiny")
        progress = Progress()
        engine = engine_for(
            model, size, folder, options.workers, address, on_progress=on_progress, pictures=pictures,
            on_running=lambda running: progress.run(running, on_status),
        )  # fmt: skip
        with run_lock(folder):
            manifest = _opened(folder)
            hopeless, work = _find(tasks, ids, manifest)
            progress.total = len(hopeless) + work.count
            if work.count:
                mp4.check_space(folder / mp4.PROBE, *work.size)
            try:
                with closing(engine.make(work)) as records:
                    for number, record in enumerate(chain(_failed(tasks, hopeless), records), 1):
                        if record.status == "done":
                            share = engine.machines / engine.actors
                            record = replace(record, cost=environment.cost(sum(record.timings.values()) * share))
                        manifest.append(record)
                        progress.end(record.status, on_status)
                        if on_record:
                            on_record(record, number, progress.total)
            finally:
                with suppress(OSError):
                    sweep(folder)  # what actors left that were killed
            sheet = contact_sheet(folder, manifest.values())
    seconds = time.perf_counter() - begin
    return Summary(
        output_dir=folder,
        ids=tuple(ids),
        made=progress.done,
        failures=progress.failed,
        repeated=count - len(ids),
        seconds=seconds,
        cost=environment.cost(seconds * engine.machines),
        sheet=sheet,
    )


def model_of(load: Any, address: str | None = None) -> Model:
    """Return the model that a run uses, resolved once: for the ids and for loading"""
    if isinstance(load, ResolvedModel):
        return load
    if isinstance(load, dict):
        load = build(LoadOptions, load)
    elif isinstance(load, str | Path | tuple):
        load = LoadOptions(model=load)
    if not isinstance(load, LoadOptions):
        return LoadedModel.of(load)
    return (cluster.find_model(load, address) if address else None) or resolve(load)


def _larger(size: tuple[int, int, int], task: Task) -> tuple[int, int, int]:
    """Return the size (width, height, frames) of the clip that needs more memory"""
    return max(size, task.clip.size, key=lambda one: one[0] * one[1] * one[2])


def _opened(folder: Path) -> Manifest:
    """Return the folder's manifest without torn lines, after removing temporary files of killed runs"""
    with as_output_error(folder):
        sweep(folder)
        manifest = Manifest(folder)
        manifest.repair()
        return manifest


def _find(tasks: Tasks, ids: Iterable[str], manifest: Manifest) -> tuple[dict[str, str], Work]:
    """Add the lines of videos that lack one. Return why some jobs cannot be made, by id, and the work that is left"""
    hopeless: dict[str, str] = {}
    new, again, prompts, size = set(), set(), {}, (0, 0, 0)
    for task in _those(tasks, set(ids)):
        known = task.id in manifest
        if known and task.is_recorded(manifest[task.id]):
            continue
        if found := task.found():
            manifest.append(found)
            continue
        error = task.error
        try:
            mp4.check_output(task.path)
        except OutputError as failure:  # a folder has its name
            error = error or str(failure)
        if error:
            hopeless[task.id] = error
            continue
        (again if known else new).add(task.id)
        size = _larger(size, task)
        if len(prompts) <= FEW:
            prompts[task.clip.prompt] = None
    few = tuple(prompts) if len(prompts) <= FEW else ()
    count = len(new) + len(again)  # those that failed before come last, because they may fail again
    return hopeless, Work(count=count, size=size, prompts=few, tasks=_those(tasks, new, again))


def _those(tasks: Tasks, *groups: set[str]) -> Iterator[Task]:
    """Yield the tasks whose ids are in a group, one group after the other, and take them out of it"""
    for group in groups:
        for task in tasks if group else ():
            if task.id in group:
                group.remove(task.id)
                yield task
            if not group:
                break


def _failed(tasks: Tasks, hopeless: dict[str, str]) -> Iterator[JobRecord]:
    """Yield the records of jobs that cannot be made"""
    for task in _those(tasks, set(hopeless)):
        yield task.record("failed", error=hopeless[task.id])
