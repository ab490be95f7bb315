"""Jobs and a model become tasks: checked, with an id, and with the path of the video.

The id is the hash of everything that determines the video: the model as it is now, the clip, and its pictures' pixels.
Two jobs with one id are the same job. The video carries its id, so the folder alone shows what is done.

A setting that cannot be used is an error of the whole list, because the list must be changed. So is an address in place
of a picture. A picture that cannot be read fails its own jobs alone, because the file may come later.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import preparation, records
from ..errors import InputError
from ..files.resolve import ResolvedModel
from ..pipeline import LoadedModel
from ..runtime.place import transformers
from ..settings import PICTURES, ClipSettings, ResolvedClip, build, check_names, resolve_clip, seeds
from ..values import shown
from ..video import images, mp4
from .manifest import JobRecord
from .prompts import ROW_OPTIONS, Job, refuse, rows_of


@dataclass(frozen=True, kw_only=True)
class Task:
    """A video to make.

    Args:
        id: hash of what determines the video.
        settings: as they were asked for. clip: the same with the model's defaults.
        source: where the prompt was read.
        path: of the video.
        digests: hashes of the pixels of its pictures, by the name of the option.
        error: why the video cannot be made, where that is known before the run.
    """

    id: str
    settings: ClipSettings
    clip: ResolvedClip
    source: str
    path: Path
    digests: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def picture_paths(self) -> dict[str, str]:
        """The paths of its pictures, by the name of the option. A picture in memory has no path."""
        given = {name: getattr(self.settings, name) for name in PICTURES}
        return {name: str(value) for name, value in given.items() if isinstance(value, str | Path)}

    def record(self, status: str, **more: Any) -> JobRecord:
        """Return the line of the manifest."""
        known = {
            "file": self.path.name if status == "done" else None,
            "prompt": self.clip.prompt,
            "source": self.source,
            "settings": records.VideoRecord(**asdict(self.clip)),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return JobRecord(id=self.id, status=status, **known | self.picture_paths | more)

    def done(self, video: records.VideoRecord, **timings: float) -> JobRecord:
        """Return the line of a finished video, from its metadata; `timings` are added to those."""
        return self.record(
            "done",
            settings=replace(video.without_measurements(), job=None),
            timings=video.timings | timings,
            steps=video.steps,
            peaks=video.peaks,
            bytes=self.path.stat().st_size,
        )

    def is_recorded(self, record: JobRecord | None) -> bool:
        """Return whether a line of the manifest describes the video, and the file has the size that it had."""
        described = ("done", self.path.name, self.clip.prompt)
        if record is None or (record.status, record.file, record.prompt) != described:
            return False
        return self.path.is_file() and self.path.stat().st_size == record.bytes

    def found(self) -> JobRecord | None:
        """Return the line of a video that is there to its end, from its own metadata."""
        try:
            video = mp4.read_record(self.path)
            mp4.check_whole(self.path)
        except InputError:
            return None
        return self.done(video) if video.job == self.id else None


class Tasks:
    """Tasks of jobs, in order. They are made anew in each iteration, because 100,000 of them do not fit in memory.

    Args:
        jobs: what to make, as `rows_of` takes it.
        model: what makes it; it needs no weights.
        folder: of the videos.
        settings: options of the clips for jobs without their own.
        num_samples: videos of each job, with seed, seed + 1, …
        pictures: opens the pictures.

    Raises:
        InputError: some jobs have settings that cannot be used. The message names each, up to 20. An iteration raises
            it at its end.
    """

    def __init__(
        self,
        jobs: Any,
        model: LoadedModel | ResolvedModel,
        folder: Path,
        settings: dict,
        num_samples: int = 1,
        pictures: images.Pictures | None = None,
    ):
        check_names("an option", settings, ROW_OPTIONS)
        if isinstance(model, LoadedModel):
            _check_adapters(model)
        self._rows = [*rows_of(jobs)]
        self._model, self._folder, self._settings, self._num_samples = model, folder, settings, num_samples
        self._identity, self._known, self._pictures = model.identity, {}, pictures or images.Pictures()

    def __iter__(self) -> Iterator[Task]:
        wrong, task = [], None
        for job in self._rows:
            try:
                for task in self._of(job):
                    yield task
            except InputError as error:
                source = "" if isinstance(job, InputError) else job.source
                wrong.append(f"{source}: {error}" if source else str(error))
        refuse(wrong)
        if task is None:
            raise InputError("prompts is empty. Expected at least one prompt.")

    def _of(self, job: Job | InputError) -> Iterator[Task]:
        """Yield the tasks of a job"""
        if isinstance(job, InputError):
            raise job
        if not isinstance(job.settings, Mapping):
            raise InputError(f"settings is {shown(job.settings)}. Expected a dictionary of options.")
        check_names("an option", job.settings, ROW_OPTIONS)
        own = {name: value for name, value in job.settings.items() if value is not None}
        asked = build(ClipSettings, self._settings | own, prompt=job.prompt)
        clip, found, error = _clip(asked, self._model, self._known, self._pictures)
        for seed in seeds(asked.seed, self._num_samples):
            one, its = (asked, clip) if seed == asked.seed else (replace(asked, seed=seed), replace(clip, seed=seed))
            yield _task(one, its, self._identity, found, self._folder, job.source, error)


def _check_adapters(model: LoadedModel) -> None:
    """Raise InputError for a LoRA that is attached but not fused, because the weights do not show it"""
    for transformer in transformers(model.pipeline):
        if getattr(transformer, "peft_config", None):
            layers = [module for module in transformer.modules() if hasattr(module, "merged_adapters")]
            if not layers or not all(layer.merged for layer in layers):
                raise InputError(
                    "pipeline is one with a LoRA that is not fused. Expected none, or a fused one. Call its "
                    "fuse_lora(), or merge the LoRA first: turbo_nb.set_loras(pipeline, [FILE])"
                )


def _clip(
    asked: ClipSettings, model: LoadedModel | ResolvedModel, known: dict, pictures: images.Pictures
) -> tuple[ResolvedClip, dict[str, tuple], str | None]:
    """Return the clip, its pictures as (width, height, hash) by name, and why one of them cannot be used.

    `known` remembers the pictures by name and file, because one may begin 10,000 jobs.
    """
    preparation.check(asked, model.spec)
    (model.resolved if isinstance(model, LoadedModel) else model).decoding(asked.decoder)
    clip, found, errors = resolve_clip(asked, model.spec), {}, []
    for name in PICTURES:
        if (given := getattr(asked, name)) is None:
            continue
        key = name, str(given) if isinstance(given, str | Path) else id(given)
        if key not in known:
            known[key] = _picture(given, name, pictures)
        found[name], error = known[key]
        errors += [error] if error else []
    if "image" in found and not errors:
        try:
            clip = resolve_clip(asked, model.spec, found["image"][:2])
        except InputError as failure:  # its aspect is too extreme for adaptive_resolution
            errors.append(str(failure))
    return clip, found, errors[0] if errors else None


def _picture(given: Any, name: str, pictures: images.Pictures) -> tuple[tuple, str | None]:
    """Return a picture as (width, height, hash), and why it cannot be used"""
    try:
        picture = pictures.open(given, name, evict=False)
    except InputError as error:
        if images.is_address(given):
            raise
        return ("unreadable", shown(given, 10_000)), str(error)
    return (*picture.size, images.digest(picture)), None


def _task(
    asked: ClipSettings,
    clip: ResolvedClip,
    identity: dict,
    found: dict[str, tuple],
    folder: Path,
    source: str,
    error: str | None,
) -> Task:
    # without the model's name, because `identity` knows the weights, and without None, so that an option that is added
    # later changes no id
    determines = {name: value for name, value in asdict(clip).items() if name != "model" and value is not None}
    text = json.dumps({"made of": identity, "image": None, **found, **determines}, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = folder / ("-".join(filter(None, (name, _slug(clip.prompt)))) + ".mp4")
    digests = {name: picture[-1] for name, picture in found.items()}
    return Task(id=name, settings=asked, clip=clip, source=source, path=path, digests=digests, error=error)


def _slug(prompt: str) -> str:
    """Return the prompt's Latin letters and digits, such as a-red-circle"""
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return "-".join(re.findall(r"[a-z0-9]+", ascii_only))[:40].strip("-")
