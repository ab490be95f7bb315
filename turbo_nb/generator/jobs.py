"""Clips made in the background, one after the other: a request becomes a job, a job becomes an mp4. No widgets here.

`JobRunner.of(folder)` returns the same object however often a cell runs, because jobs outlive the cell and the page
that began them. A page calls `listen` to hear of every change. The jobs are rows on disk (`batch.queue`), so that the
next kernel can go on with them.
"""

import hashlib
import io
import logging
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import generation, preparation, settings
from ..batch.queue import QueueFile, QueueRecord
from ..errors import InputError, OutputError, TurboNbError, collect_warnings, explained, space_or
from ..machine import atomic, mapped
from ..runtime import estimate
from ..runtime.plan import Plan
from ..runtime.progress import Progress
from ..settings import LoadOptions
from ..video import preview
from ..video.gallery import Clip, Gallery
from .choices import Choices
from .downloads import Download
from .request import Job, Request, require_downloaded

log = logging.getLogger("turbo_nb")
RANDOM_SEEDS = 2**31
IMAGES = "images"  # folder of the pictures that were uploaded, because a job needs its picture after a restart, too
STATUS = {"waiting": "waiting", "running": "running", "finished": "done", "failed": "failed", "cancelled": "cancelled"}


class _Cancelled(Exception):
    pass


class JobRunner:
    """Makes clips in a thread, one at a time, with one model in memory.

    Args:
        folder: where the clips go.
        load, generate: `pipeline.load` and `generation.generate`, or what stands in for them.

    `choices` resolves the models, and has the loaded one.
    """

    _all: "dict[Path, JobRunner]" = {}  # noqa: RUF012  one for each folder of this process

    def __init__(self, folder: str | os.PathLike, *, load: Callable | None = None, generate: Callable | None = None):
        self.gallery = Gallery(folder)
        self.jobs: list[Job] = []  # those that wait, the one at work, and those that failed
        self.downloading: Download | None = None  # the latest download
        self.job: Job | None = None  # the one that began last
        self.choices = Choices(load)
        self._generate = generate or generation.generate
        self._listeners: list[Callable[[Job | Download], None]] = []
        self._rows = QueueFile(self.gallery.folder)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._working = False

    @classmethod
    def of(cls, folder: str | os.PathLike) -> "JobRunner":
        """Return the runner of a folder, which is the same for all callers in this process."""
        runner = cls(folder)
        return cls._all.setdefault(Path(os.path.realpath(runner.gallery.folder)), runner)

    def listen(self, listener: Callable[[Job | Download], None]) -> Callable[[], None]:
        """Call listener(job) at every change of a job, and listener(download) when a download begins or ends.

        The calls come from the threads of the worker and of the download. Returns a function that ends this.
        """
        self._listeners.append(listener)

        def stop() -> None:
            with suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    def refresh(self) -> None:
        """Forget what was resolved, because files may have come or gone. A loaded model keeps its choices."""
        if self.choices.model is None and not (self.job and self.job.running):
            self.choices.forget()

    def submit(self, request: Request, *, download: bool = False) -> Job:
        """Put a job at the end of the queue.

        Args:
            request: the clip.
            download: download what is missing of the model.

        Raises:
            UnknownModelError, InputError, BackendError, CheckpointError: the request cannot be met.
            InputError: the model is not downloaded, and `download` is False.
        """
        return self.submit_all([request], download=download)[0]

    def submit_all(self, requests: Sequence[Request], *, download: bool = False) -> list[Job]:
        """Put several jobs at the end of the queue, or none where one cannot be made; else as `submit`."""
        made = []
        for request in requests:
            paths = [self.gallery.folder / "clip.mp4"]
            resolved, _ = preparation.preflight(request.clip, lambda one=request: self.choices.resolve(one.load), paths)
            if not download:
                require_downloaded(resolved)
            seed = random.randrange(RANDOM_SEEDS) if request.random_seed else request.clip.seed
            kept = {name: self._kept(getattr(request.clip, name)) for name in settings.PICTURES}
            clip = replace(request.clip, seed=seed, **kept)
            made.append(Job(request=replace(request, clip=clip, random_seed=False), download=download))
        self._add(made)
        return made

    @property
    def busy(self) -> bool:
        """Whether a job or a download is at work."""
        return bool((self.job and self.job.running) or (self.downloading and self.downloading.running))

    def download(self, options: LoadOptions, decoder: str = "full") -> Download:
        """Download what is missing of a model, in the background.

        Args:
            options: the model.
            decoder: of the clips, as in `ClipSettings.decoder`.

        Raises:
            InputError: another download runs.
        """
        if self.downloading and self.downloading.running:
            raise InputError(
                f"a download of {self.downloading.model.spec.name} is at work. Expected one download at a time. Wait "
                "for it or cancel it."
            )
        self.downloading = Download(self.choices.resolve(options).decoding(decoder), self._on_download)
        self.downloading.start()
        return self.downloading

    def _on_download(self, download: Download) -> None:
        if not download.running:
            self.choices.forget()
        self._notify(download)

    def left_over(self) -> int:
        """Return how many jobs earlier kernels left in the queue."""
        return len(self._rows.left_over())

    def take_over(self) -> list[Job]:
        """Put the jobs that earlier kernels left at the end of the queue."""
        jobs = []
        for record in self._rows.take_over():
            load, clip = record.options()
            jobs.append(Job(request=Request(load=load, clip=clip), id=record.id))
        self._add(jobs)
        return jobs

    def cancel(self, job: Job | None = None) -> None:
        """Cancel a job that waits, or ask the running one to end, which it does after the present step.

        Args:
            job: None: the running one.
        """
        with self._lock:
            job = job or self.job
            if job is None or job.state not in ("waiting", "running") or job.cancelling.is_set():
                return
            job.cancelling.set()
            if job.state == "waiting":
                self._end(job, "cancelled")
        self._notify(job)

    def clear(self) -> None:
        """Cancel all jobs that wait, and forget those that failed."""
        for job in tuple(self.jobs):
            if job.state == "failed":
                self.forget(job)
            elif job.state == "waiting":
                self.cancel(job)

    def forget(self, job: Job) -> None:
        """Take a job that failed off the list."""
        with self._lock, suppress(ValueError):
            self.jobs.remove(job)
        self._notify(job)

    def wait(self, timeout: float | None = None) -> Job | None:
        """Wait until no job is left, or for `timeout` seconds; return the job that began last."""
        if self._thread:
            self._thread.join(timeout)
        return self.job

    def make(self, prompt: str, **options) -> Clip:
        """Make one clip and wait for it.

        Args:
            prompt, options: as of `Request.of`.

        Raises:
            TurboNbError: the job failed or was cancelled.
        """
        job = self.submit(Request.of(prompt, **options), download=True)
        self.wait()
        if job.clip is None:
            raise TurboNbError(job.error or "The job was cancelled. Nothing was written.")
        return job.clip

    def _notify(self, job: Job | Download) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(job)
            except Exception:  # because a page that cannot show a job must not end it
                log.exception("the page cannot show a change of the job")

    def _add(self, jobs: Sequence[Job]) -> None:
        """Put jobs into the queue, and start the worker unless it is at work"""
        with self._lock:
            self.jobs += jobs
            for job in jobs:
                self._record(job)
            if jobs and not (self._thread and self._thread.is_alive() and self._working):
                self._working = True
                self._thread = threading.Thread(target=self._work, name="turbo_nb jobs", daemon=True)
                self._thread.start()
        for job in jobs:
            self._notify(job)

    def _work(self) -> None:
        """Make the jobs that wait, in order"""
        while True:
            with self._lock:
                job = next((one for one in self.jobs if one.state == "waiting"), None)
                if job is None:
                    self._working = False
                    return
                job.state, self.job = "running", job
            self._run(job)

    def _end(self, job: Job, state: str) -> None:
        """Note how a job ended; one that failed stays in the list"""
        job.state, job.preview = state, None
        if state != "failed":
            self.jobs.remove(job)
        self._record(job)

    def _record(self, job: Job) -> None:
        """Add a row of the job to those on disk. Without them the next kernel cannot go on, and nothing else is lost"""
        with suppress(OutputError):
            self._rows.add(
                QueueRecord(
                    id=job.id,
                    status=STATUS[job.state],
                    load=settings.asked(job.request.load),
                    clip=settings.asked(job.request.clip),
                    file=job.clip.path.name if job.clip else None,
                    error=job.error or None,
                )
            )

    def _kept(self, image: Any) -> Any:
        """Return a picture's path. A picture without a path is saved beside the clips, under a name by its content"""
        if image is None or isinstance(image, str | Path):
            return image
        from ..video import images

        picture, file = images.load_image(image), io.BytesIO()
        picture.save(file, "PNG")
        path = self.gallery.folder / IMAGES / f"{hashlib.sha256(picture.tobytes()).hexdigest()[:16]}.png"
        try:
            if not path.exists():
                atomic.write(path, file.getvalue())
        except OSError as error:
            raise OutputError(
                f"{str(path)!r} cannot be written ({error}). {space_or('choose another folder', error)}"
            ) from error
        return str(path)

    def _advance(self, job: Job, stage: str, done: int = 0, total: int = 0) -> None:
        """Record where the job is; a cancelled job ends here"""
        if job.cancelling.is_set():
            raise _Cancelled
        job.progress.at(stage, done, total)
        self._notify(job)

    def _run(self, job: Job) -> None:
        state = "failed"
        try:
            with collect_warnings() as job.notes:
                job.progress = Progress(self._expected(job))
                self._record(job)
                job.clip = self._make(job)
            state = "finished"
        except _Cancelled:
            state = "cancelled"
        except TurboNbError as error:
            job.error = explained(error)
        except BaseException as error:  # because nobody else sees an exception of a thread
            job.error, job.trace = explained(error), traceback.format_exc()
        with self._lock:
            self._end(job, state)
        self._notify(job)
        mapped.trim()  # because clips in a row would take more and more of the main memory

    def _expected(self, job: Job) -> dict[str, float]:
        """Return the seconds that each stage is expected to take; empty where nothing is known"""
        image = preparation.prepare(job.request.clip, self.choices.resolve(job.request.load).spec).image
        outlook = self.choices.outlook(job.request, image and image.size)
        if outlook.time is None:
            return {}
        load = 0.0 if outlook.loaded else outlook.time.load
        return outlook.time.stages | {"load": outlook.time.seconds / 4 if load is None else load}

    def _make(self, job: Job) -> Clip:
        request, timings = job.request, {}
        self._advance(job, "load")
        resolved = self.choices.resolve(request.load)
        if not job.download:
            require_downloaded(resolved)
        if not self.choices.has(resolved):
            begin = time.perf_counter()
            self.choices.load(
                resolved,
                request.clip,
                on_plan=partial(self._note_plan, job),
                on_progress=lambda fetched: self._advance(job, "load", fetched.done, fetched.total or 0),
            )
            timings["load"] = time.perf_counter() - begin
        self.choices.set_changeable(resolved)
        model, colours, denoised = self.choices.model, self.choices.colours, None

        def after_step(done: int, total: int, latents) -> None:
            nonlocal denoised
            denoised = model.pipeline.scheduler.denoised
            if (small := colours.frames(model, denoised)) is not None:
                job.preview = preview.animation(small, model.spec.fps / 4)
            self._advance(job, "denoise", done, total)

        steps, frames, decoded = request.clip.num_steps, preparation.count_frames(request.clip, model.spec), 0

        def after_chunk(encoder, chunk) -> None:
            nonlocal decoded
            encoder.add(chunk)
            decoded += len(chunk)
            self._advance(job, "decode", decoded, frames)

        totals = {"denoise": steps, "decode": frames}
        with self.gallery.encoder(model.spec.fps) as encoder:
            video = self._generate(
                model.pipeline,
                **vars(request.clip),
                on_stage=lambda name: self._advance(job, name, total=totals.get(name, 0)),
                on_step=after_step,
                on_frames=partial(after_chunk, encoder),
            )
            self._advance(job, "write")
            clip = self.gallery.save(video, estimate.machine(model.device), timings, encoder)
        estimate.remember(asdict(video.record), {"write": clip.record.timings["write"]})
        if denoised is not None:
            colours.learn(model, denoised, video.frames)
        return clip

    def _note_plan(self, job: Job, plan: Plan) -> None:
        if plan.name != "resident":
            job.notes.append(str(plan))
        self._advance(job, "load")
