"""One clip at a time in the background: a request becomes a job, and a job becomes an mp4. No widgets here.

`JobRunner.of(folder)` returns the same object however often a cell runs, because a job outlives the cell and the page
that began it. A page calls `listen` to hear of every change.
"""

import gc
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from .. import catalog, generation, pipeline, settings, sla
from ..errors import InputError, TurboNbError, collect_warnings
from ..files import lora
from ..files.resolve import ResolvedModel, resolve
from ..machine import probe
from ..pipeline import LoadedModel
from ..runtime import estimate
from ..runtime.place import transformers
from ..runtime.plan import Plan
from ..settings import ClipSettings, LoadOptions
from ..video import preview
from ..video.gallery import Clip, Gallery

STAGES = ("load", "text", "denoise", "decode", "write")
RANDOM_SEEDS = 2**31


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asks for.

    Args:
        load: the model, and how it is loaded.
        clip: the clip.
        random_seed: draw a new seed in place of the clip's.
    """

    load: LoadOptions = field(default_factory=LoadOptions)
    clip: ClipSettings
    random_seed: bool = False

    @classmethod
    def of(cls, prompt: str, *, seed: int | None = None, **options) -> "Request":
        """Make a request from options by name.

        Args:
            prompt: what to show.
            seed: None: a random seed.
            options: those of `LoadOptions` and `ClipSettings`.

        Raises:
            InputError: an option is unknown or has a value that cannot be used.
        """
        load = {name: options.pop(name) for name in settings.options(LoadOptions) if name in options}
        clip = settings.build(ClipSettings, options, prompt=prompt, seed=seed)
        return cls(load=settings.build(LoadOptions, load), clip=clip, random_seed=seed is None)


@dataclass(kw_only=True)
class Job:
    """A request at work or done.

    Args:
        state: "running", "finished", "cancelled" or "failed".
        stage: one of STAGES.
        done, total: steps, or bytes of a download. total 0: not known.
        preview: an animated WebP of the clip so far.
        notes: warnings, and where the memory plan puts the model.
        error: why the job failed. trace: the traceback of an error that this package does not raise on purpose.
        clip: the finished clip.
    """

    request: Request
    state: str = "running"
    stage: str = "load"
    done: int = 0
    total: int = 0
    preview: bytes | None = None
    notes: list[str] = field(default_factory=list)
    error: str = ""
    trace: str = ""
    clip: Clip | None = None
    began: float = field(default_factory=time.monotonic)
    cancelling: threading.Event = field(default_factory=threading.Event)

    @property
    def running(self) -> bool:
        """Whether the job is at work."""
        return self.state == "running"


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What is known of a clip before it is made.

    Args:
        width, height: in pixels. num_frames, fps: frames, and how many of them a second.
        memory: the memory plan.
        time: None where nothing is known about this machine.
        loaded: whether the model is in memory.
        has_preview: whether the clip can be shown while it is made.
        notes: warnings about the choice of model.
    """

    width: int
    height: int
    num_frames: int
    fps: int
    memory: Plan
    time: estimate.Estimate | None
    loaded: bool
    has_preview: bool
    notes: tuple[str, ...]


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
        self.job: Job | None = None
        self.model: LoadedModel | None = None
        self._load, self._generate = load or pipeline.load, generate or generation.generate
        self._choices: dict[LoadOptions, tuple[ResolvedModel, tuple[str, ...]]] = {}  # and their warnings
        self._loras: tuple[lora.Applied, ...] = ()  # of the latest choice
        self._loaded: LoadOptions | None = None  # what `model` is, as `_identity` describes it
        self._before: _Free | None = None
        self._learned: dict[tuple, list[list[float]]] = {}  # factors of previews, by the VAE's means
        self._listeners: list[Callable[[Job], None]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, folder: str | os.PathLike) -> "JobRunner":
        """Return the runner of a folder, which is the same for all callers in this process."""
        return cls._all.setdefault(Path(settings.with_home(folder)).resolve(), cls(folder))

    def listen(self, listener: Callable[[Job], None]) -> Callable[[], None]:
        """Call listener(job) at every change, from the worker's thread. Returns a function that ends this."""
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
            self._choices.clear()

    def submit(self, request: Request) -> Job:
        """Start a job in the background.

        Raises:
            UnknownModelError, InputError, BackendError, CheckpointError: the request cannot be met.
            InputError: another job is running.
        """
        generation.preflight(request.clip, lambda: self.resolve(request.load), [self.gallery.folder / "clip.mp4"])
        if request.random_seed:
            clip = replace(request.clip, seed=random.randrange(RANDOM_SEEDS))
            request = replace(request, clip=clip, random_seed=False)
        with self._lock:
            if self.job and self.job.running:
                raise InputError("job is running. Expected one clip at a time. Wait for it or cancel it first.")
            job = self.job = Job(request=request)
            self._thread = threading.Thread(target=self._work, args=(job,), name="turbo_nb jobs", daemon=True)
        self._thread.start()
        return job

    def cancel(self) -> None:
        """Ask the running job to end. It ends after the present step."""
        if self.job and self.job.running and not self.job.cancelling.is_set():
            self.job.cancelling.set()
            self._notify(self.job)

    def wait(self, timeout: float | None = None) -> Job | None:
        """Wait until the job has ended, or for `timeout` seconds."""
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
        self.submit(Request.of(prompt, **options))
        job = self.wait()
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
            has_preview=self._factors() is not None if loaded else _has_known_colours(resolved),
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

    def _notify(self, job: Job) -> None:
        for listener in tuple(self._listeners):
            listener(job)

    def _advance(self, job: Job, stage: str, done: int = 0, total: int = 0) -> None:
        """Record where the job is; a cancelled job ends here"""
        if job.cancelling.is_set():
            raise _Cancelled
        job.stage, job.done, job.total = stage, done, total
        self._notify(job)

    def _work(self, job: Job) -> None:
        try:
            with collect_warnings() as job.notes:
                job.clip = self._make(job)
            job.state = "finished"
        except _Cancelled:
            job.state = "cancelled"
        except TurboNbError as error:
            job.state, job.error = "failed", str(error)
        except BaseException as error:  # because nobody else sees an exception of a thread
            job.state, job.error, job.trace = "failed", _in_words(error), traceback.format_exc()
        job.preview = None
        self._notify(job)

    def _make(self, job: Job) -> Clip:
        request, timings = job.request, {}
        self._advance(job, "load")
        resolved = self.resolve(request.load)
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
            if factors := self._factors():
                job.preview = preview.animation(preview.preview(denoised, factors), model.spec.fps / 4)
            self._advance(job, "denoise", done, total)

        steps = request.clip.num_steps
        with self.gallery.encoder(model.spec.fps) as encoder:
            video = self._generate(
                model.pipeline,
                **vars(request.clip),
                on_stage=lambda name: self._advance(job, name, total=steps if name == "denoise" else 0),
                on_step=after_step,
                on_frames=encoder.add,
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
