"""Engines turn tasks into videos: in this process, or in worker processes with one GPU each.

An engine has one method: `make` takes tasks and yields a record of each, in the order in which they end.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import generation, pipeline
from ..errors import InputError, OutputError, TurboNbError
from ..files.resolve import ResolvedModel, resolve
from ..machine import environment
from ..pipeline import LoadedModel
from ..records import IN_MEMORY
from ..settings import LoadOptions, shown
from ..video import images, mp4
from .jobs import Task
from .manifest import JobRecord, worker_lock

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LAST_SECONDS = 5  # that a worker process has to remove its temporary files
MAX_TRIES = 2  # worker processes that may die over one job
# What a terminal sends to all its processes
TERMINAL = tuple(getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name))


class Engine(Protocol):
    """What makes the videos of a run."""

    def make(self, tasks: Sequence[Task]) -> Iterator[JobRecord]:
        """Make videos; yield a record of each when it is finished or has failed."""


def engine_for(
    model: LoadedModel | ResolvedModel,
    tasks: Sequence[Task],
    folder: Path,
    workers: int | None = None,
    on_progress: Callable | None = None,
    pictures: images.Pictures | None = None,
) -> Engine:
    """Choose the engine of a run. Raises InputError where the tasks cannot be made so; loads nothing."""
    import torch

    if isinstance(model, LoadedModel):
        if workers is not None and workers > 1:
            raise InputError(
                f"workers is {workers}. Expected 1, because a loaded pipeline works in this process alone. Give the "
                "model's name or its options in place of the pipeline."
            )
        return InProcess(model, on_progress, pictures)
    model.plan(_largest(tasks))  # a plan that does not suit the device is an error
    gpus = {"cpu": 0, "cuda": torch.cuda.device_count()}.get(model.device, 1)
    if gpus and workers is not None and workers > gpus:
        raise InputError(f"workers is {workers}. Expected at most {gpus}, the number of GPUs: each gets one worker.")
    return WorkerProcesses(model, folder, workers or max(1, gpus), on_progress, pictures)


def _largest(tasks: Sequence[Task]) -> tuple[int, int, int]:
    """Return the size (width, height, frames) of the clip that needs most memory"""
    return max((task.clip.size for task in tasks), key=lambda size: size[0] * size[1] * size[2])


def _prompts(tasks: Sequence[Task]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(task.clip.prompt for task in tasks))


@dataclass(frozen=True)
class InProcess:
    """Makes videos one after the other in this process. A model that is only resolved is loaded for the first task."""

    model: LoadedModel | ResolvedModel
    on_progress: Callable | None = None
    pictures: images.Pictures | None = None

    def make(self, tasks: Sequence[Task]) -> Iterator[JobRecord]:
        """Make videos; raises TurboNbError when this process has lost its GPU."""
        if not tasks:
            return
        if isinstance(self.model, LoadedModel):
            loaded = self.model.pipeline
        else:
            loaded = pipeline.load(
                self.model, clip=_largest(tasks), prompts=_prompts(tasks), on_progress=self.on_progress
            )
        pictures = self.pictures or images.Pictures()
        for task in tasks:
            record = make(loaded, task, pictures)
            yield record
            if _has_lost_gpu(record):
                raise TurboNbError(
                    f"{record.error}. The GPU needs a new process. Start again: finished videos are kept."
                )


def make(loaded: "DiffusionPipeline", task: Task, pictures: images.Pictures, workers: int = 1) -> JobRecord:
    """Make one video, and return its record or that of its failure, so that the other jobs go on.

    `workers` share the machine's price. Raises OutputError where the disk is full, or the folder or ffmpeg fail every
    job.
    """
    if record := task.found():  # a worker died between the file and its record
        return record
    try:
        opened = _opened(task, pictures)
        with mp4.Encoder(task.path, LoadedModel.of(loaded).spec.fps) as encoder:
            video = generation.generate(loaded, **vars(task.settings) | opened, on_frames=encoder.add)
            video = replace(video, record=replace(video.record, job=task.id, **task.picture_paths))
            begin = time.perf_counter()
            video.save(encoder)
        record = task.done(video.record, write=time.perf_counter() - begin)
        return replace(record, cost=environment.cost(sum(record.timings.values()) / workers))
    except Exception as error:  # any error of a job is its own, except those that every job would have
        if isinstance(error, OutputError):
            if mp4.is_full(error):
                raise
            mp4.check_output(task.path.with_name(mp4.PROBE))
        message = str(error) if isinstance(error, TurboNbError) else f"{type(error).__name__}: {error}"
        return task.record("failed", error=message)


def _opened(task: Task, pictures: images.Pictures) -> dict[str, Any]:
    """Return the pictures of a task by name. Raises InputError where one is not that which the id was computed for"""
    opened = {}
    for name, digest in task.digests.items():
        opened[name] = pictures.open(getattr(task.settings, name), name)
        if images.digest(opened[name]) != digest:
            what = shown(task.picture_paths.get(name, IN_MEMORY), 300)
            raise InputError(f"{name} is {what}, which changed during the run. Start again.")
    return opened


def _has_lost_gpu(record: JobRecord) -> bool:
    """Return whether a failure, such as an illegal memory access, leaves this process without its GPU"""
    return "CUDA error" in (record.error or "")


# Worker processes


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker process receives. It can be pickled, and leaves nothing to decide.

    Args:
        options: of the model, with every decision of `resolve` pinned.
        identity: of the model that the job ids were computed for.
        clip: width, height and frames of the largest clip. prompts: of all tasks.
        folder: of the videos. place: number of the worker, from 0 to workers - 1.
    """

    options: LoadOptions
    identity: dict
    clip: tuple[int, int, int]
    prompts: tuple[str, ...]
    folder: Path
    place: int
    workers: int

    def resolve(self) -> ResolvedModel:
        """Resolve the model. Raises TurboNbError where it is not the one that the ids were computed for."""
        model = resolve(self.options)
        if model.identity != self.identity:
            raise TurboNbError(
                f"the model is {model.identity} in a worker process. Expected {self.identity}, for which the job ids "
                "were computed. Leave the model's files alone during a run, and start again."
            )
        return model


def pinned(model: ResolvedModel, device: str) -> LoadOptions:
    """Return options that mean this model, whatever "auto" would stand for on that device."""
    asked = model.options
    return replace(
        asked,
        model=model.spec.name if asked.model == "auto" and asked.checkpoint is None else asked.model,
        device=device,
        attention_type=model.attention_type,
        sla_topk=model.sla_topk,
        quant_linear=model.quant_linear,
    )


@dataclass
class _Worker:
    process: multiprocessing.Process
    place: int
    ready: bool = False
    task: Task | None = None


@dataclass(frozen=True)
class WorkerProcesses:
    """Hands tasks to worker processes, each with the model on a GPU of its own, or on its share of the CPU.

    The task of a process that dies goes to another one, `MAX_TRIES` times in all. One worker is this process.
    """

    model: ResolvedModel
    folder: Path
    workers: int
    on_progress: Callable | None = None
    pictures: images.Pictures | None = None

    def make(self, tasks: Sequence[Task]) -> Iterator[JobRecord]:
        """Make videos; raises TurboNbError where the model cannot be loaded."""
        workers = min(self.workers, len(tasks))
        if workers <= 1:
            yield from InProcess(self.model, self.on_progress, self.pictures).make(tasks)
            return
        self.model.fetch(self.on_progress)  # here, because the workers would all download
        context = multiprocessing.get_context("spawn")
        waiting, deaths, crew = deque(tasks), Counter(), {}

        def start(place: int) -> None:
            order = Order(
                options=pinned(self.model, "cpu" if self.model.device == "cpu" else f"cuda:{place}"),
                identity=self.model.identity,
                clip=_largest(tasks),
                prompts=_prompts(tasks),
                folder=self.folder,
                place=place,
                workers=workers,
            )
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, order), daemon=True)
            with _terminal_blocked():
                process.start()
            theirs.close()
            crew[ours] = _Worker(process, place)

        try:
            for place in range(workers):
                start(place)
            while waiting or any(worker.task for worker in crew.values()):
                for connection, worker in crew.items():
                    if waiting and worker.ready and not worker.task:
                        worker.task = waiting.popleft()
                        with suppress(OSError):  # the process is dead: its connection ends below
                            connection.send(worker.task)
                for connection in wait(list(crew)):
                    worker = crew[connection]
                    try:
                        message = connection.recv()
                    except (EOFError, OSError):
                        del crew[connection]
                        how = _ending(worker.process)
                        if worker.task:
                            deaths[worker.task.id] += 1
                            if deaths[worker.task.id] < MAX_TRIES:
                                waiting.appendleft(worker.task)
                            else:
                                error = f"the worker process {how} over it, {MAX_TRIES} times"
                                yield worker.task.record("failed", error=error)
                        if worker.ready and waiting:
                            start(worker.place)
                        elif waiting and not crew:
                            raise TurboNbError(
                                f"the worker process {how} while it loaded the model. Take fewer workers or a smaller "
                                "memory plan."
                            ) from None
                        continue
                    if isinstance(message, TurboNbError):
                        raise message
                    if message is None:
                        worker.ready = True
                    else:
                        worker.task = None
                        yield message
        finally:
            for worker in crew.values():
                worker.process.terminate()
            for worker in crew.values():
                worker.process.join(10)
                worker.process.kill()


def _ending(process: multiprocessing.Process) -> str:
    """Wait for a process, and return how it ended"""
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return "was killed, as happens when memory runs out,"
    return f"ended with exit code {process.exitcode}"


@contextmanager
def _terminal_blocked() -> Iterator[None]:
    """Keep the signals of the terminal from processes that start in this block: the first process ends them"""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work(connection: Connection, order: Order) -> None:
    """Be a worker process: load the model, send None, then turn tasks into records."""
    for one in TERMINAL:  # where they cannot be blocked
        signal.signal(one, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    if order.options.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // order.workers))
    else:
        torch.cuda.set_device(order.options.device)  # so that nothing of this process takes memory of GPU 0
    try:
        with worker_lock(order.folder, order.place):
            loaded = pipeline.load(order.resolve(), clip=order.clip, prompts=order.prompts)
            connection.send(None)
            pictures = images.Pictures()
            while True:
                record = make(loaded, connection.recv(), pictures, order.workers)
                connection.send(record)
                if _has_lost_gpu(record):
                    return
    except TurboNbError as error:
        with suppress(OSError):
            connection.send(error)
    except (EOFError, ConnectionError):  # the first process has ended
        return


def _end(number: int, frame: Any) -> None:
    """End this process so that each `with` removes its temporary files"""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # because a second signal would interrupt the removal
    sys.exit(1)


def _end_with_parent() -> None:
    """Wait until the first process is gone, even by a kill; then end this one"""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_SECONDS)  # the main thread cannot end while it is inside of a long operation of torch
    os._exit(1)
