"""One clip at a time in the background: a request becomes a job, a job a file. No widgets here.

`Studio.of(folder)` is the same object however often a cell runs, so that a job outlives the cell and the page that
began it. Whoever wants to know listens.
"""

import gc
import os
import random
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import catalog, generation, pipeline, settings, sla
from ..errors import InputError, TurboNbError
from ..machine import probe
from ..runtime import estimate, plan
from ..runtime.estimate import Estimate, machine
from ..text import prompt_encoder
from ..video import preview
from ..video.gallery import Clip, Gallery

if TYPE_CHECKING:
    from PIL.Image import Image

STAGES = ("load", "text", "denoise", "decode", "write")
RANDOM_SEEDS = 2**31


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asks for; None stands for the model's own, and for a random seed."""

    prompt: str
    model: "str | Path" = "auto"
    image: "str | Path | Image | None" = None
    adaptive_resolution: bool = False
    resolution: str | None = None
    aspect_ratio: str | None = None
    num_frames: int | None = None
    num_steps: int = 4
    seed: int | None = None
    attention_type: str = "sla"
    sla_topk: float | None = None
    quant_linear: bool | str = "auto"

    @property
    def spec(self) -> catalog.ModelSpec:
        """Of the model. Raises UnknownModelError, CheckpointError or InputError."""
        return pipeline.find_spec(self.model)

    @property
    def clip(self) -> dict:
        """The arguments of `generate` that shape the clip."""
        return {
            "image": self.image,
            "adaptive_resolution": self.adaptive_resolution,
            "resolution": self.resolution,
            "aspect_ratio": self.aspect_ratio,
            "num_frames": self.num_frames,
            "num_steps": self.num_steps,
            "seed": self.seed or 0,
        }

    @property
    def load(self) -> dict:
        """The arguments of `load_pipeline`: where they change, the model is loaded anew. topk can change in place."""
        model = self.spec.name if catalog.is_name(self.model) else self.model  # "auto" is the model that it stands for
        return {"model": model, "attention_type": self.attention_type, "quant_linear": self.quant_linear}


@dataclass(kw_only=True)
class Job:
    """A request at work or done.

    state: "running", "finished", "cancelled" or "failed". stage: one of STAGES; done of total: steps, or bytes of a
    download (total 0: not known). preview: an animated WebP. error: in words; trace: where it came from,
    if it was not foreseen. run: the finished clip.
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
    run: Clip | None = None
    began: float = field(default_factory=time.monotonic)
    cancelling: threading.Event = field(default_factory=threading.Event)

    @property
    def running(self) -> bool:
        return self.state == "running"


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What is known before a run. time: None where nothing tells; loaded: the model is in memory."""

    width: int
    height: int
    num_frames: int
    memory: plan.Plan
    time: Estimate | None
    loaded: bool


class _Cancelled(Exception):
    pass


class Studio:
    """The clips of a folder, the model in memory, and the job at work.

    load and generate: `pipeline.load_pipeline` and `generation.generate`, or what stands in for them.
    """

    _all: "dict[Path, Studio]" = {}  # noqa: RUF012  one for each folder of this process

    def __init__(self, folder: str | os.PathLike, *, load: Callable | None = None, generate: Callable | None = None):
        self.history = Gallery(folder)
        self.job: Job | None = None
        self.pipeline = None
        self._load, self._generate = load or pipeline.load_pipeline, generate or generation.generate
        self._loaded: dict | None = None  # the arguments that `pipeline` was loaded with
        self._learned: dict[tuple, list[list[float]]] = {}  # the preview's colours by the VAE's means
        self._listeners: list[Callable[[Job], None]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, folder: str | os.PathLike) -> "Studio":
        """The one of this folder, now and whenever asked again in this process."""
        return cls._all.setdefault(Path(folder).resolve(), cls(folder))

    def listen(self, listener: Callable[[Job], None]) -> Callable[[], None]:
        """Have listener(job) called at every change, from the worker's thread; returns what ends that."""
        self._listeners.append(listener)

        def stop() -> None:
            with suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    def submit(self, request: Request) -> Job:
        """Start a job in the background. Raises what `check_clip` raises, and InputError while another one runs."""
        generation.check_clip(request.model, request.prompt, **request.clip)
        if request.sla_topk is not None:
            sla.check_topk(request.sla_topk)
        if request.seed is None:
            request = replace(request, seed=random.randrange(RANDOM_SEEDS))
        with self._lock:
            if self.job and self.job.running:
                raise InputError("a clip is being made; wait for it or cancel it first")
            job = self.job = Job(request=request)
            self._thread = threading.Thread(target=self._work, args=(job,), name="turbo_nb studio", daemon=True)
        self._thread.start()
        return job

    def cancel(self) -> None:
        """Ask the running job to end, which it does after the step it is at."""
        if self.job and self.job.running and not self.job.cancelling.is_set():
            self.job.cancelling.set()
            self._tell(self.job)

    def wait(self, timeout: float | None = None) -> Job | None:
        """Wait until the job has ended, or for `timeout` seconds."""
        if self._thread:
            self._thread.join(timeout)
        return self.job

    def make(self, prompt: str, **settings) -> Clip:
        """One clip, in the foreground: settings are those of `Request`. Raises what went wrong as a TurboNbError."""
        self.submit(Request(prompt=prompt, **settings))
        job = self.wait()
        if job.run is None:
            raise TurboNbError(job.error or "cancelled; nothing was written")
        return job.run

    def outlook(self, request: Request) -> Outlook:
        """Size, time and memory of a clip before it is made. Raises what `check_clip` raises, but for its image."""
        import torch

        spec = request.spec
        clip = {name: value for name, value in request.clip.items() if name not in ("image", "adaptive_resolution")}
        checked = settings.check_settings(spec, request.prompt.strip() or "?", **clip)
        loaded = self._loaded == request.load
        device = "cuda" if torch.cuda.is_available() else "cpu"
        size = (checked.width, checked.height, checked.num_frames)
        memory = plan.choose(
            plan.sizes(spec, quantised=request.quant_linear is True),
            spec.arch,
            *size,
            budget=self.pipeline.plan.budget if loaded else probe.free_memory(device),
            host_budget=self.pipeline.plan.host_budget if loaded else probe.free_memory("cpu"),
            device=device,
            fused=plan.fused_on(),
        )
        wanted = asdict(checked) | {
            "attention_type": request.attention_type,
            "sla_topk": spec.sla_topk if request.sla_topk is None else request.sla_topk,
            "quant_linear": None if request.quant_linear == "auto" else request.quant_linear,
            "memory_plan": memory.name,
        }
        return Outlook(
            width=checked.width,
            height=checked.height,
            num_frames=checked.num_frames,
            memory=memory,
            time=estimate.estimate(wanted, spec.arch, device=device),
            loaded=loaded,
        )

    def has_preview(self, spec: catalog.ModelSpec) -> bool:
        """Return whether the next clip of this model can be shown while it is made."""
        if self.pipeline is not None and self.pipeline.spec == spec:
            return self._factors(spec) is not None
        return spec.preview is not None or bool(spec.files)  # the released models have Wan2.1's VAE

    def _factors(self, spec: catalog.ModelSpec) -> list[list[float]] | None:
        """Return the preview's colours: known before the first clip, or learned from it"""
        return preview.factors_for(spec, self.pipeline.vae.config) or self._learned.get(self._vae_key())

    def _tell(self, job: Job) -> None:
        for listener in tuple(self._listeners):
            listener(job)

    def _advance(self, job: Job, stage: str, done: int = 0, total: int = 0) -> None:
        """Note where the job is; here it ends if it was cancelled"""
        if job.cancelling.is_set():
            raise _Cancelled
        job.stage, job.done, job.total = stage, done, total
        self._tell(job)

    def _work(self, job: Job) -> None:
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    job.run = self._make(job)
                finally:
                    job.notes += [str(w.message) for w in said if "turbo_nb" in w.filename]
            job.state = "finished"
        except _Cancelled:
            job.state = "cancelled"
        except TurboNbError as error:
            job.state, job.error = "failed", str(error)
        except BaseException as error:  # a thread's exception is seen by nobody else
            job.state, job.error, job.trace = "failed", _in_words(error), traceback.format_exc()
        job.preview = None
        self._tell(job)

    def _make(self, job: Job) -> Clip:
        request = job.request
        self._advance(job, "load")
        timings = {}
        if self._loaded != request.load:
            begin = time.perf_counter()
            self._replace_pipeline(job)
            timings["load"] = time.perf_counter() - begin
        loaded, spec = self.pipeline, self.pipeline.spec
        for transformer in filter(None, (loaded.transformer, getattr(loaded, "transformer_2", None))):
            sla.set_topk(transformer, spec.sla_topk if request.sla_topk is None else request.sla_topk)
        denoised = None

        def after_step(done: int, total: int, latents) -> None:
            nonlocal denoised
            denoised = loaded.scheduler.denoised
            if factors := self._factors(spec):
                job.preview = preview.animation(preview.preview(denoised, factors), spec.fps / 4)
            self._advance(job, "denoise", done, total)

        with self.history.encoder(spec.fps) as encoder:
            video = self._generate(
                loaded,
                request.prompt,
                **request.clip,
                on_stage=lambda name: self._advance(job, name, total=request.num_steps if name == "denoise" else 0),
                on_step=after_step,
                on_frames=encoder.add,
            )
            self._advance(job, "write")
            run = self.history.save(video, machine(), timings, encoder)
            estimate.remember(asdict(run.record), {"write": run.record.timings["write"]})
        if denoised is not None and self._factors(spec) is None:
            self._learned[self._vae_key()] = preview.fit_preview(denoised, video.frames)
        return run

    def _replace_pipeline(self, job: Job) -> None:
        """Load another model, after the memory of the one before is given back"""
        request = job.request
        self.pipeline = self._loaded = None
        gc.collect()
        prompt_encoder.empty_cache()

        def note(chosen: plan.Plan) -> None:
            if chosen.name != "resident":
                job.notes.append(str(chosen))
            self._advance(job, "load")

        self.pipeline = self._load(
            **request.load,
            clip=generation.check_clip(request.model, request.prompt, **request.clip),
            prompts=[request.prompt],
            on_plan=note,
            on_progress=lambda fetched: self._advance(job, "load", fetched.done, fetched.total or 0),
        )
        self._loaded = request.load

    def _vae_key(self) -> tuple:
        return tuple(self.pipeline.vae.config.latents_mean)


def _in_words(error: BaseException) -> str:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; take fewer frames, a smaller resolution, or the int8 checkpoint, and restart the kernel"
    return (
        f"unexpected {type(error).__name__}: {error}. Try again; if it stays, restart the kernel and report the details"
    )
