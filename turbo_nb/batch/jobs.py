"""Jobs and a model become tasks: checked, with an id, and with the path of the video.

The id is the hash of everything that determines the video: the model as it is now, the clip, and the image's pixels.
Two jobs with one id are the same job. The video carries its id, so the folder alone shows what is done.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import generation, records
from ..errors import InputError
from ..files.resolve import ResolvedModel
from ..pipeline import LoadedModel
from ..runtime.place import transformers
from ..settings import ClipSettings, ResolvedClip, build, check_names, resolve_clip, seeds
from ..video import mp4
from .manifest import JobRecord
from .prompts import ROW_OPTIONS, Job, refuse


@dataclass(frozen=True, kw_only=True)
class Task:
    """A video to make.

    Args:
        id: hash of what determines the video.
        settings: as they were asked for. clip: the same with the model's defaults.
        source: where the prompt was read.
        path: of the video.
    """

    id: str
    settings: ClipSettings
    clip: ResolvedClip
    source: str
    path: Path

    def record(self, status: str, **more: Any) -> JobRecord:
        """Return the line of the manifest."""
        image = self.settings.image
        known = {
            "file": self.path.name if status == "done" else None,
            "prompt": self.clip.prompt,
            "source": self.source,
            "image": str(image) if isinstance(image, str | Path) else None,
            "settings": records.VideoRecord(**asdict(self.clip)),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return JobRecord(id=self.id, status=status, **known | more)

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
        """Return the line of a video that is there, from its own metadata."""
        try:
            video = mp4.read_record(self.path)
        except InputError:
            return None
        return self.done(video) if video.job == self.id else None


def tasks_of(
    jobs: Iterable[Job | str | InputError],
    model: LoadedModel | ResolvedModel,
    folder: Path,
    settings: dict,
    num_samples: int = 1,
) -> list[Task]:
    """Check jobs without loading a model, and return their tasks, in order.

    Args:
        jobs: what to make; an InputError stands for a row that could not be read.
        settings: options of the clips for jobs without their own.
        num_samples: videos of each job, with seed, seed + 1, …

    Raises:
        InputError: some jobs cannot be made. The message names each, up to 5.
    """
    check_names("an option", settings, ROW_OPTIONS)
    if isinstance(model, LoadedModel):
        _check_adapters(model)
    identity, pictures, tasks, wrong = model.identity, {}, [], []
    for number, job in enumerate(jobs, 1):
        if isinstance(job, InputError):
            wrong.append(str(job))
            continue
        job = job if isinstance(job, Job) else Job(prompt=job, source=f"prompt {number}")
        try:
            check_names("an option", job.settings, ROW_OPTIONS)
            own = {name: value for name, value in job.settings.items() if value is not None}
            asked = build(ClipSettings, settings | own, prompt=job.prompt)
            clip, picture = _clip(asked, model, pictures)
            tasks += [
                _task(replace(asked, seed=seed), replace(clip, seed=seed), identity, picture, folder, job.source)
                for seed in seeds(asked.seed, num_samples)
            ]
        except InputError as error:
            wrong.append(f"{job.source}: {error}" if job.source else str(error))
    refuse(wrong)
    if not tasks:
        raise InputError("prompts is empty. Expected at least one prompt.")
    return tasks


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


def _clip(asked: ClipSettings, model: LoadedModel | ResolvedModel, pictures: dict) -> tuple[ResolvedClip, list | None]:
    """Return the clip, and its image as size and hash of the pixels; `pictures` remembers those by file"""
    key = str(asked.image) if isinstance(asked.image, str | Path) else id(asked.image)
    if key in pictures:  # a file is decoded once, however many jobs begin with it
        return resolve_clip(asked, model.spec, tuple(pictures[key][:2])), pictures[key]
    prepared = generation.prepare(asked, model.spec)
    if (image := prepared.image) is not None:
        pictures[key] = [*image.size, hashlib.sha256(image.tobytes()).hexdigest()]
    return prepared.clip, pictures.get(key)


def _task(
    asked: ClipSettings, clip: ResolvedClip, identity: dict, picture: list | None, folder: Path, source: str
) -> Task:
    # without the model's name, because `identity` knows the weights, and without None, so that an option that is added
    # later changes no id
    determines = {name: value for name, value in asdict(clip).items() if name != "model" and value is not None}
    text = json.dumps({"made of": identity, "image": picture, **determines}, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = folder / ("-".join(filter(None, (name, _slug(clip.prompt)))) + ".mp4")
    return Task(id=name, settings=asked, clip=clip, source=source, path=path)


def _slug(prompt: str) -> str:
    """Return the prompt's Latin letters and digits, such as a-red-circle"""
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return "-".join(re.findall(r"[a-z0-9]+", ascii_only))[:40].strip("-")
