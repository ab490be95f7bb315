"""Many prompts become videos, here or on every GPU of this machine; stopped at any moment, the next run goes on.

A job's id is the hash of what determines its video, and the video carries it. So what is done can be seen from the
folder alone: the manifest says it quickly, and a file that the manifest does not know yet says it itself.
"""

import hashlib
import inspect
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .. import catalog, generation, pipeline, settings
from ..errors import InputError
from ..files import fingerprint
from ..video import images, mp4
from .prompts import Job, _known_setting

if TYPE_CHECKING:
    pass


# What is to be made


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A job that is checked: its id, where its video goes, and `generate`'s arguments"""

    id: str
    prompt: str
    arguments: dict
    settings: settings.Settings
    source: str
    path: Path

    def record(self, status: str, **more) -> dict:
        """A line of the manifest"""
        image = self.arguments.get("image")
        record = {
            "id": self.id, "status": status, "file": self.path.name if status == "done" else None, "error": None,
            "prompt": self.prompt, "source": self.source,
            "image": str(image) if isinstance(image, str | Path) else None,
            "settings": asdict(self.settings), "timings": {},
        }  # fmt: skip
        return record | more | {"time": datetime.now(UTC).isoformat(timespec="seconds")}


def _check(jobs: Iterable[Job | str], load, folder: Path, settings: dict, num_samples: int) -> list[_Task]:
    """Tasks of the jobs, all checked without a model. Raises InputError that names every job that cannot be made."""
    if isinstance(load, dict):
        parameters = inspect.signature(pipeline.load_pipeline).parameters
        if unknown := load.keys() - parameters.keys():
            raise InputError(f"load_pipeline takes no {', '.join(sorted(unknown))}; it takes {', '.join(parameters)}")
        made_of = {name: parameter.default for name, parameter in parameters.items()} | load
        spec = pipeline.find_spec(made_of["model"])
    else:
        made_of, spec = load.made_of, load.spec
        if getattr(load.transformer, "peft_config", None):
            raise InputError("a LoRA was added to this pipeline; merge it first (turbo-nb convert IN OUT --lora FILE)")
    for name in settings:
        _known_setting(name)
    if num_samples < 1:
        raise InputError(f"num_samples is {num_samples}; it is 1 or more")
    model = _identity(made_of, spec)
    tasks, wrong = [], []
    for number, job in enumerate(jobs, 1):
        job = Job(prompt=job, source=f"prompt {number}") if isinstance(job, str) else job
        arguments = settings | job.settings
        first = arguments.get("seed", 0)
        try:
            for name in job.settings:
                _known_setting(name)
            for seed in range(first, first + num_samples):
                tasks.append(_task(job, arguments | {"seed": seed}, spec, model, folder))
        except InputError as error:
            wrong.append(f"{job.source}: {error}" if job.source else str(error))
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise InputError("; ".join(wrong[:5]) + more)
    if not tasks:
        raise InputError("no prompts; give at least one")
    return tasks


def _task(job: Job, arguments: dict, spec, model: dict, folder: Path) -> _Task:
    settings = generation.check_job(spec, job.prompt, **arguments)
    determines = {"made of": model, **asdict(settings)}
    del determines["model"]  # a name; `model` knows the weights
    if arguments.get("image") is not None:
        image = images.load_image(arguments["image"])
        determines["image"] = [*image.size, hashlib.sha256(image.tobytes()).hexdigest()]
    text = json.dumps(determines, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = folder / ("-".join(filter(None, (name, _slug(job.prompt)))) + ".mp4")
    return _Task(id=name, prompt=job.prompt, arguments=arguments, settings=settings, source=job.source, path=path)


def _slug(prompt: str) -> str:
    """The prompt's Latin letters and digits, such as a-red-circle"""
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return "-".join(re.findall(r"[a-z0-9]+", ascii_only))[:40].strip("-")


def _identity(made_of: dict, spec) -> dict:
    """What a pipeline's videos depend on, weights by their content: a moved file is the same, a changed one is not"""
    model = made_of["model"]
    named = catalog.is_name(model)
    return {
        "model": spec.name if named else _fingerprints(model),
        "attention_type": made_of["attention_type"],
        "sla_topk": spec.sla_topk if made_of["sla_topk"] is None else made_of["sla_topk"],
        "quant_linear": made_of["quant_linear"],
    } | {name: _fingerprints(made_of[name]) for name in ("checkpoint", "vae", "text_encoder", "tokenizer")}


def _fingerprints(paths) -> list[str]:
    paths = paths if isinstance(paths, tuple | list) else [paths]
    return [fingerprint.fingerprint(Path(path)) for path in paths if path is not None]


def _recorded(task: _Task, record: dict | None) -> bool:
    """Whether the manifest knows the video, and it is still there as it was"""
    if record is None or record["status"] != "done" or not task.path.exists():
        return False
    return task.path.stat().st_size == record.get("bytes")


def _found(task: _Task) -> dict | None:
    """The record of a video that is there, from the video itself"""
    try:
        told = mp4.read_metadata(task.path)
    except (InputError, ValueError):
        return None
    return _done(task, told) if told.get("job") == task.id else None


def _done(task: _Task, told: dict, **timings: float) -> dict:
    """The record of a finished video, from the metadata in it"""
    settings = {name: value for name, value in told.items() if name not in ("job", "timings", "steps")}
    size = task.path.stat().st_size
    return task.record(
        "done", settings=settings, timings=told["timings"] | timings, steps=told.get("steps", []), bytes=size
    )
