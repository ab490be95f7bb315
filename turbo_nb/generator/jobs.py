"""Clips made in the background, one after the other: a request becomes a job, a job becomes an mp4. No widgets here.

`JobRunner.of(folder)` returns the same object however often a cell runs, because jobs outlive the cell and the page
that began them. A page calls `listen` to hear of every change. The jobs are rows on disk (`batch.queue`), so that the
next kernel can go on with them.
"""

import gc
import hashlib
import io
import logging
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import catalog, generation, pipeline, settings, sla
from ..batch.queue import QueueFile, QueueRecord
from ..errors import InputError, OutputError, TurboNbError, collect_warnings
from ..files import lora
from ..files.resolve import ResolvedModel, resolve
from ..machine import atomic, probe
from ..pipeline import LoadedModel
from ..runtime import estimate
from ..runtime.place import transformers
from ..runtime.plan import Plan
from ..runtime.progress import Progress
from ..settings import LoadOptions
from ..video import preview
from ..video.gallery import Clip, Gallery
from .downloads import Download
from .request import Job, Outlook, Request, require_downloaded

if TYPE_CHECKING:
    import torch

log = logging.getLogger("turbo_nb")
RANDOM_SEEDS = 2**31
PART = 32  # sides of the part of a latent frame from which colours are learned before the first clip is decoded
IMAGES = "images"  # folder of the pictures that were uploaded, because a job needs its picture after a restart, too
STATUS = {"waiting": "waiting", "running": "running", "finished": "done", "failed": "failed", "cancelled": "cancelled"}


class _Cancelled(Exception):
    pass


@dataclass(frozen=True)
class _Free:
    """The bytes of a device and of main memory that were free before the latest load, whatever its `memory` was"""

    device: str
    memory: float
    host_memory: float


class JobRunner:
    """Makes clips in a thread, one at a time, with one model in memory.

    Args:
        folder: where the clips go.
        load, generate: `pipeline.load` and `generation.generate`, or what stands in for them.
    """

    _all: "dict[Path, JobRunner]" = {}  # noqa: RUF012  one for each folder of this process

    def __init__(self, folder: str | os.PathLike, *, load: Callable | None = None, generate: Callable | None = None):
        self.gallery = Gallery(folder)
        self.jobs: list[Job] = []  # those that wait, the one at work, and those that failed
        self.downloading: Download | None = None  # the latest download
        self.job: Job | None = None  # the one that began last
        self.model: LoadedModel | None = None
        self._load, self._generate = load or pipeline.load, generate or generation.generate
        self._choices: dict[LoadOptions, tuple[ResolvedModel, tuple[str, ...]]] = {}  # and their warnings
        self._loras: tuple[lora.Applied, ...] = ()  # of the latest choice
        self._loaded: LoadOptions | None = None  # what `model` is, as `_identity` describes it
        self._before: _Free | None = None
        self._learned: dict[tuple, list[list[float]]] = {}  # factors of previews, by the VAE's means
        self._tokenizers: dict[Any, Any] = {}
        self._listeners: list[Callable[[Job | Download], None]] = []
        self._rows = QueueFile(self.gallery.folder)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._working = False

    @classmethod
    def of(cls, folder: str | os.PathLike) -> "JobRunner":
        """Return the runner of a folder, which is the same for all callers in this process."""
        return cls._all.setdefault(Path(settings.with_home(folder)).resolve(), cls(folder))

    def listen(self, listener: Callable[[Job | Download], None]) -> Callable[[], None]:
        """Call listener(job) at every change of a job, and listener(download) when a download begins or ends.

        The calls come from the threads of the worker and of the download. Returns a function that ends this.
        """
        self._listeners.append(listener)

        def stop() -> None:
            with suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    def resolve(self, options: LoadOptions) -> ResolvedModel:
        """Find out what a choice of model means here, once for each choice. Raises what `files.resolve.resolve` raises.

        The memory of a model that is loaded counts as free, because that model goes before the next one comes.
        """
        return self._choice(options)[0]

    def refresh(self) -> None:
        """Forget what was resolved, because files may have come or gone. A loaded model keeps its choices."""
        if self.model is None and not (self.job and self.job.running):
            self.forget_choices()

    def forget_choices(self) -> None:
        """Resolve every choice of model anew, because files came or went."""
        self._choices.clear()

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
            resolved, _ = generation.preflight(request.clip, lambda one=request: self.resolve(one.load), paths)
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

    def download(self, options: LoadOptions) -> Download:
        """Download what is missing of a model, in the background. Raises InputError while another download runs."""
        if self.downloading and self.downloading.running:
            raise InputError(
                f"a download of {self.downloading.model.spec.name} is at work. Expected one download at a time. Wait "
                "for it or cancel it."
            )
        self.downloading = Download(self.resolve(options), self._on_download)
        self.downloading.start()
        return self.downloading

    def _on_download(self, download: Download) -> None:
        if not download.running:
            self.forget_choices()
        self._notify(download)

    def tokenizer(self, options: LoadOptions) -> Any:
        """Return the tokenizer of a model, None where it is not on the disk. Each is loaded once, which takes seconds.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        from ..checkpoint import load_tokenizer

        part = self.resolve(options).tokenizer
        if isinstance(part, catalog.HubFile):
            return None
        key = getattr(part, "path", part)
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(part)
        return self._tokenizers[key]

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
            self.forget(job) if job.state == "failed" else self.cancel(job) if job.state == "waiting" else None

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

    def outlook(self, request: Request, image_size: tuple[int, int] | None = None) -> Outlook:
        """Return size, time and memory of a clip before it is made. Opens no checkpoint that `resolve` has read.

        Args:
            request: what would be submitted. Its image is not opened.
            image_size: width and height of the image.

        Raises:
            UnknownModelError, InputError, BackendError, CheckpointError: the request cannot be met.
        """
        resolved, notes = self._choice(request.load)
        clip = settings.resolve_clip(request.clip, resolved.spec, image_size)
        memory, loaded = resolved.plan(clip.size), self._identity(resolved) == self._loaded
        return Outlook(
            width=clip.width,
            height=clip.height,
            num_frames=clip.num_frames,
            fps=resolved.spec.fps,
            memory=memory,
            time=generation.outlook(resolved, clip, self.model.plan.name if loaded else memory.name),
            loaded=loaded,
            has_preview=memory.offload == "none"
            or (self._factors() is not None if loaded else _has_known_colours(resolved)),
            to_fetch=resolved.to_fetch if resolved.downloads else 0,
            notes=notes,
        )

    def _choice(self, options: LoadOptions) -> tuple[ResolvedModel, tuple[str, ...]]:
        """Return the resolved model, and the warnings of resolving it"""
        base = _without_changeable(options)
        if base not in self._choices:
            self._choices[base] = self._resolve(base)
        found, notes = self._choices[base]
        topk = found.spec.sla_topk if options.sla_topk is None else options.sla_topk
        found, model = replace(found, sla_topk=topk, options=options), self.model
        if options.loras:  # those that were read before are not read again
            merged = model.resolved.loras if model else ()
            found = replace(found, loras=(*merged, *self._loras)).with_loras(options.loras, quiet=True)
            self._loras = found.loras
        return found, notes

    def _resolve(self, options: LoadOptions) -> tuple[ResolvedModel, tuple[str, ...]]:
        before = self._before
        if before and before.device != _with_index(probe.device_of(options.device)):
            before = None
        with collect_warnings() as notes:
            found = resolve(
                replace(options, memory=options.memory or (before and before.memory)),
                host_memory=before and before.host_memory,
            )
        return found, tuple(notes)

    @staticmethod
    def _identity(resolved: ResolvedModel) -> LoadOptions:
        """Return options that are equal for two choices of the same model"""
        options = _without_changeable(resolved.options)
        named = options.checkpoint is None and str(options.model) in ("auto", *catalog.MODELS, *catalog.UPSTREAM_NAMES)
        return replace(
            options,
            model=resolved.spec.name if named else options.model,
            attention_type=resolved.attention_type,
            quant_linear=resolved.quant_linear,
            device=_with_index(resolved.device),
        )

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
            raise OutputError(f"{str(path)!r} cannot be written ({error}). Free some space.") from error
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
            job.error = str(error)
        except BaseException as error:  # because nobody else sees an exception of a thread
            job.error, job.trace = _in_words(error), traceback.format_exc()
        with self._lock:
            self._end(job, state)
        self._notify(job)

    def _expected(self, job: Job) -> dict[str, float]:
        """Return the seconds that each stage is expected to take; empty where nothing is known"""
        image = generation.prepare(job.request.clip, self.resolve(job.request.load).spec).image
        outlook = self.outlook(job.request, image and image.size)
        if outlook.time is None:
            return {}
        load = 0.0 if outlook.loaded else outlook.time.load
        return outlook.time.stages | {"load": outlook.time.seconds / 4 if load is None else load}

    def _make(self, job: Job) -> Clip:
        request, timings = job.request, {}
        self._advance(job, "load")
        resolved = self.resolve(request.load)
        if not job.download:
            require_downloaded(resolved)
        if self._identity(resolved) != self._loaded:
            begin = time.perf_counter()
            self._replace_model(job, resolved)
            timings["load"] = time.perf_counter() - begin
        model, denoised = self.model, None
        if _effects(resolved.loras) != _effects(model.resolved.loras):
            pipeline.set_loras(model.pipeline, request.load.loras)
        for transformer in transformers(model.pipeline):
            sla.set_topk(transformer, resolved.sla_topk)

        def after_step(done: int, total: int, latents) -> None:
            nonlocal denoised
            denoised = model.pipeline.scheduler.denoised
            if factors := self._factors() or self._learn_early(denoised):
                job.preview = preview.animation(preview.preview(denoised, factors), model.spec.fps / 4)
            self._advance(job, "denoise", done, total)

        steps, frames, decoded = request.clip.num_steps, generation.count_frames(request.clip, model.spec), 0

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
        if denoised is not None and self._factors() is None:
            self._learned[self._vae_key()] = preview.fit_preview(denoised, video.frames)
        return clip

    def _replace_model(self, job: Job, resolved: ResolvedModel) -> None:
        """Load another model, after the memory of the earlier model is given back"""
        request = job.request
        self.model = self._loaded = None
        gc.collect()
        probe.release_memory()
        device = resolved.device
        free = self._before = _Free(_with_index(device), probe.free_memory(device), probe.free_memory("cpu"))
        resolved = replace(
            resolved,
            memory=request.load.memory or free.memory,
            host_memory=free.host_memory,
            loras=tuple(replace(one, changed=set()) for one in resolved.loras),  # nothing of this model yet
        )

        def note(plan: Plan) -> None:
            if plan.name != "resident":
                job.notes.append(str(plan))
            self._advance(job, "load")

        try:
            loaded = self._load(
                resolved,
                clip=generation.prepare(request.clip, resolved.spec).clip.size,
                prompts=[request.clip.prompt],
                on_plan=note,
                on_progress=lambda fetched: self._advance(job, "load", fetched.done, fetched.total or 0),
            )
        except TurboNbError:
            self._choices.clear()  # because the person may replace the file that cannot be loaded
            raise
        self.model, self._loaded = LoadedModel.of(loaded), self._identity(resolved)
        here = replace(self.model.resolved, loras=())  # its parts are downloaded now
        self._choices[_without_changeable(request.load)] = here, ()

    def _factors(self) -> list[list[float]] | None:
        """Return the colours of the loaded model's latents: known ones, or those learned from its first clip"""
        config = self.model.pipeline.vae.config
        return preview.factors_for(self.model.spec, config) or self._learned.get(self._vae_key())

    def _learn_early(self, denoised: "torch.Tensor") -> list[list[float]] | None:
        """Learn the colours of the latents (1, C, T, h, w) from a decoded part of their first frame.

        A plan that offloads models would move the transformer for it, so there the first clip has no preview.
        """
        if self.model.plan.offload != "none":
            return None
        top, left = (max(0, (side - PART) // 2) for side in denoised.shape[-2:])
        part = denoised[:, :, :1, top : top + PART, left : left + PART]
        frames = generation.decode(self.model.pipeline, part)
        return preview.fit_preview(part, frames)

    def _vae_key(self) -> tuple:
        return tuple(self.model.pipeline.vae.config.latents_mean)


def _without_changeable(options: LoadOptions) -> LoadOptions:
    """Return options without those that can change while the model stays loaded"""
    return replace(options, sla_topk=None, loras=())


def _effects(loras: Iterable[lora.Applied]) -> list[tuple]:
    """Return what LoRAs do, for comparison: the content of their files, strengths and experts"""
    return [(one.lora.path, one.lora.stamp, one.strength, one.expert) for one in loras]


def _with_index(device: str) -> str:
    """Return a device by its index, because "cuda" and "cuda:0" can be the same GPU"""
    index = probe.gpu_index(device)
    return "cpu" if index is None else f"cuda:{index}"


def _has_known_colours(resolved: ResolvedModel) -> bool:
    """Return whether previews need no clip to learn from: the released models have Wan2.1's VAE"""
    return resolved.spec.preview is not None or bool(resolved.spec.files and resolved.options.vae is None)


def _in_words(error: BaseException) -> str:
    """Return the text for an error that this package does not raise on purpose"""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "Out of memory. Take fewer frames, a smaller resolution, or the int8 checkpoint, and restart the kernel."
    return (
        f"unexpected {type(error).__name__}: {error}. Try again. If it happens again, restart the kernel and report "
        "the details."
    )
