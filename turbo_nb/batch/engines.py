"""Engines turn tasks into videos: in this process, or in actors of Ray (`cluster.py`).

An engine has one method: `make` takes the work and yields a record of each task, in the order in which they end.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import generation, pipeline
from ..catalog import ModelSpec
from ..errors import InputError, OutputError, TurboNbError, is_full, warn
from ..files.resolve import ResolvedModel
from ..machine import environment
from ..pipeline import LoadedModel
from ..records import IN_MEMORY
from ..settings import LoadOptions
from ..values import shown
from ..video import images, mp4
from .jobs import Task
from .manifest import JobRecord

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

INSTALL_RAY = "because Ray is not installed. Run: pip install 'turbo-nb[ray]'"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an engine makes: `count` tasks, the first of which may be made before the last is known.

    Args:
        size: width, height and frames of the largest clip.
        prompts: of all tasks, where they are few. The text encoder is not loaded if the cache has all of them.
    """

    count: int
    size: tuple[int, int, int]
    tasks: Iterator[Task]
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A model that a GPU node of the cluster resolved, because this process has no GPU; see `ResolvedModel`."""

    spec: ModelSpec
    identity: dict
    pinned: LoadOptions
    tiny_decoder: bool = False
    device: str = "cuda"
    gpus: int = 1

    def decoding(self, decoder: str) -> "FoundModel":
        """Return the same model with what a clip's decoder needs."""
        return replace(self, tiny_decoder=decoder == "tiny")


Model = LoadedModel | ResolvedModel | FoundModel


class Engine(Protocol):
    """What makes the videos of a run, on `machines` machines with `actors` copies of the model."""

    machines: int
    actors: int

    def make(self, work: Work) -> Iterator[JobRecord]:
        """Make videos; yield a record of each when it is finished or has failed."""


def engine_for(
    model: Model,
    size: tuple[int, int, int],
    folder: Path,
    workers: int | None = None,
    ray_address: str | None = None,
    pictures: images.Pictures | None = None,
    **more: Any,
) -> Engine:
    """Choose the engine of a run; loads nothing.

    Args:
        model: what makes the clips.
        size: width, height and frames of the largest clip.
        folder: of the videos.
        workers: actors. None: one a GPU.
        ray_address: of a cluster. None: this machine.
        pictures: opens the pictures in this process.
        more: callbacks of the engine.

    Raises:
        InputError: the clips cannot be made so.
    """
    import torch

    from .cluster import Actors

    has_ray = environment.version("ray") is not None
    alone = InProcess(model, pictures or images.Pictures(), **more)
    wants_actors = bool(ray_address) or (workers or 1) > 1
    if isinstance(model, LoadedModel) or model.gpus > 1:
        if not wants_actors:
            return alone
        name, got, one = ("ray", ray_address, None) if ray_address else ("workers", workers, 1)
        if isinstance(model, LoadedModel):
            raise InputError(
                f"{name} is {got}. Expected {one}, because a loaded pipeline works in this process alone. Give the "
                "model's name or its options in place of the pipeline."
            )
        raise InputError(
            f"gpus is {model.gpus}. Expected 1 beside {name}, because each actor has one GPU. Leave one of the two out."
        )
    if ray_address:
        if not has_ray:
            raise InputError(f"ray is {ray_address!r}. Expected None, {INSTALL_RAY}")
        return Actors(model, folder, workers, ray_address, **more)
    model.plan(size)  # a plan that does not suit the device is an error
    gpus = {"cpu": 0, "cuda": torch.cuda.device_count()}.get(model.device, 1)
    if gpus and workers is not None and workers > gpus:
        raise InputError(f"workers is {workers}. Expected at most {gpus}, the number of GPUs: each gets one worker.")
    count = workers or max(1, gpus)
    if count > 1 and not has_ray:
        if workers:
            raise InputError(f"workers is {workers}. Expected 1, {INSTALL_RAY}")
        warn(f"this machine has {gpus} GPUs, and the batch uses 1 of them, {INSTALL_RAY}")
        count = 1
    return alone if count == 1 else Actors(model, folder, count, **more)


@dataclass
class InProcess:
    """Makes videos one after the other in this process. A model that is only resolved is loaded for the first task."""

    model: LoadedModel | ResolvedModel
    pictures: images.Pictures = field(default_factory=images.Pictures)
    on_progress: Callable | None = None
    on_running: Callable[[int], None] = lambda count: None
    machines: int = 1
    actors: int = 1

    def make(self, work: Work) -> Iterator[JobRecord]:
        """Make videos; raises TurboNbError when this process has lost its GPU, or the ranks on the other GPUs."""
        if not work.count:
            return
        if isinstance(self.model, LoadedModel):
            loaded = self.model.pipeline
        else:
            loaded = pipeline.load(self.model, clip=work.size, prompts=work.prompts, on_progress=self.on_progress)
        self.on_running(1)
        for task in work.tasks:
            record = make(loaded, task, self.pictures)
            yield record
            if has_lost_gpu(record):
                raise TurboNbError(
                    f"{record.error}. The GPU needs a new process. Start again: finished videos are kept."
                )
            if record.error and LoadedModel.of(loaded).ended:
                raise TurboNbError(f"{record.error} Start again: finished videos are kept.")


def make(loaded: "DiffusionPipeline", task: Task, pictures: images.Pictures) -> JobRecord:
    """Make one video, and return its record or that of its failure, so that the other jobs go on.

    Raises OutputError where the disk is full, or the folder or ffmpeg fail every job.
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
        return task.done(video.record, write=time.perf_counter() - begin)
    except Exception as error:  # any error of a job is its own, except those that every job would have
        if isinstance(error, OutputError):
            if is_full(error):
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


def has_lost_gpu(record: JobRecord) -> bool:
    """Return whether a failure, such as an illegal memory access, leaves this process without its GPU"""
    return "CUDA error" in (record.error or "")
