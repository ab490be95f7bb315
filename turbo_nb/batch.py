"""Many prompts become videos, here or on every GPU of this machine; stopped at any moment, the next run goes on.

A job's id is the hash of what determines its video, and the video carries it. So what is done can be seen from the
folder alone: the manifest says it quickly, and a file that the manifest does not know yet says it itself.
"""

import csv
import hashlib
import html
import inspect
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING

from . import catalog, download, environment, media, pipeline
from .errors import InputError, OutputError, TurboNbError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MANIFEST, SHEET, LOCK = "manifest.jsonl", "contact_sheet.png", ".lock"
SHEET_CLIPS, SHEET_SIDE = 100, 208  # the most clips on a contact sheet, and the longest side of a frame there in pixels
MAX_TRIES = 2  # worker processes that may die over one job

# What a row may set: the arguments of `generate` that determine a clip
SETTINGS = {
    "image": str, "num_frames": int, "num_steps": int, "seed": int, "resolution": str, "aspect_ratio": str,
    "adaptive_resolution": bool, "sigma_max": float, "ode": bool, "boundary": float, "noise_device": str,
}  # fmt: skip
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prompt, the settings of `generate` that are its own, and where it was read, as file:line."""

    prompt: str
    settings: dict = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a batch has come to.

    records: the manifest's last line on every job, in the jobs' order; made: videos of this run; repeated: jobs that
    ask for the same video as an earlier one; cost: dollars for `seconds`, None where no price was set; sheet: the
    contact sheet, None while the folder holds no video.
    """

    output_dir: Path
    records: list[dict]
    made: int
    repeated: int
    seconds: float
    cost: float | None
    sheet: Path | None

    @property
    def done(self) -> list[dict]:
        return [record for record in self.records if record["status"] == "done"]

    @property
    def failed(self) -> list[dict]:
        return [record for record in self.records if record["status"] == "failed"]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Cells of the table, its head first; timings in seconds."""
        stages = [
            stage
            for stage in ("text", "denoise", "switch", "decode", "write")
            if stage != "switch" or any(stage in record["timings"] for record in self.records)
        ]
        priced = any(record.get("cost") is not None for record in self.records)
        yield ("video", "prompt", "seed", *stages, "total", *(["cost"] if priced else []))
        for record in self.records:
            timings = record["timings"]
            cells = [f"{timings[stage]:.2f}" if stage in timings else "" for stage in stages]
            total = f"{sum(timings.values()):.2f}" if timings else ""
            cells += [total, *([environment.dollars(record.get("cost"), "")] if priced else [])]
            yield (record["file"] or "failed", record["prompt"], str(record["settings"]["seed"]), *cells)

    def __str__(self) -> str:
        rows = [[_shorten(cell, 60) for cell in row] for row in self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *map(describe, self.failed), self.line()])

    def line(self) -> str:
        """The outcome in one line"""
        words = f"{self.made} made, {len(self.done) - self.made} there before, {len(self.failed)} failed"
        words += f", {self.repeated} asked for twice" if self.repeated else ""
        return f"{words}, in {self.seconds:.1f} s{environment.dollars(self.cost)}; {self.output_dir / MANIFEST}"

    def _repr_html_(self) -> str:
        head, *rows = ([html.escape(_shorten(cell, 200)) for cell in row] for row in self.rows())
        top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
        lines = (
            f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
            for row in rows
        )
        caption = "<br>".join(html.escape(line) for line in [self.line(), *map(describe, self.failed)])
        return (
            f"<table><caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        )


def describe(record: dict) -> str:
    """A record in one line"""
    if record["status"] == "done":
        seconds = sum(record["timings"].values())
        return f"{record['file']}  {seconds:.2f} s{environment.dollars(record.get('cost'), '  ')}"
    return f"failed: {record['source'] or record['id']}: {record['error']}"


def _shorten(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


# Prompts


def read_prompts(path: str | os.PathLike) -> list[Job]:
    """Jobs from a file: txt (a prompt a line, # comments), csv with a head, or jsonl.

    A csv or jsonl has `prompt`, and any of SETTINGS for rows that differ; an empty cell or null is not given. A
    relative `image` lies beside the file. Raises InputError with file and line.
    """
    path = Path(path)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise InputError(f"{str(path)!r} is no file of prompts; give a .txt, .csv or .jsonl")
    try:
        with path.open(encoding="utf-8-sig", newline="" if path.suffix.lower() == ".csv" else None) as file:
            jobs = list(readers[path.suffix.lower()](file, path))
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror}); give a .txt, .csv or .jsonl") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not in UTF-8 ({error}); save it as UTF-8") from error
    if not jobs:
        raise InputError(f"{path} holds no prompt; write one a line")
    return jobs


def _read_txt(file: IO[str], path: Path) -> Iterator[Job]:
    for number, line in enumerate(file, 1):
        if (prompt := line.strip()) and not prompt.startswith("#"):
            yield Job(prompt=prompt, source=f"{path}:{number}")


def _read_csv(file: IO[str], path: Path) -> Iterator[Job]:
    rows = csv.reader(file, strict=True)
    number = 1
    try:
        head = [name.strip().lower().replace("-", "_") for name in next(rows, [])]
        if "prompt" not in head:
            raise InputError(f"{path}:1: the head is {', '.join(head)!r}; it names the columns, one of them prompt")
        if len(set(head)) < len(head):
            raise InputError(f"{path}:1: the head names a column twice")
        number = rows.line_num + 1
        for row in rows:
            if len(row) > len(head):
                raise InputError(
                    f"{path}:{number}: {len(row)} cells, and the head has {len(head)}; put text with commas in quotes"
                )
            if any(cell.strip() for cell in row):
                yield _job({k: v for k, v in zip(head, row, strict=False) if v.strip()}, path, number)
            number = rows.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{number}: {error}; see to the quotes") from error


def _read_jsonl(file: IO[str], path: Path) -> Iterator[Job]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: no JSON ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise InputError(f'{path}:{number}: {line.strip()[:40]} is no object; write {{"prompt": "…"}}')
        row = {name.replace("-", "_"): value for name, value in row.items() if value is not None}
        yield _job(row, path, number)


def _job(row: dict, path: Path, number: int) -> Job:
    source = f"{path}:{number}"
    try:
        prompt = row.pop("prompt", "")
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError("no prompt; say what to show")
        settings = {name: _value(name, value) for name, value in row.items()}
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    if "image" in settings:
        settings["image"] = str(path.parent / settings["image"])
    return Job(prompt=prompt.strip(), settings=settings, source=source)


def _value(name: str, value):
    """A setting from a cell or from JSON, as the type that it has"""
    _known_setting(name)
    kind, given = SETTINGS[name], value
    if isinstance(value, str) and kind is bool:
        value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(value.lower())
    elif isinstance(value, str):
        with suppress(ValueError):
            value = kind(value.strip())
    elif kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{name} is {given!r}; it is {WORDS[kind]}")
    return value


def _known_setting(name: str) -> None:
    if name not in SETTINGS:
        raise InputError(f"unknown setting {name!r}; known: prompt, {', '.join(SETTINGS)}{_meant(name, SETTINGS)}")


def _meant(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# What is to be made


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A job that is checked: its id, where its video goes, and `generate`'s arguments"""

    id: str
    prompt: str
    arguments: dict
    settings: pipeline.Settings
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
    settings = pipeline.check_job(spec, job.prompt, **arguments)
    determines = {"made of": model, **asdict(settings)}
    del determines["model"]  # a name; `model` knows the weights
    if arguments.get("image") is not None:
        image = media.load_image(arguments["image"])
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
    return [download.fingerprint(Path(path)) for path in paths if path is not None]


# The folder


@contextmanager
def _lock(folder: Path, *, shared: bool = False) -> Iterator[IO[str]]:
    """Keep other runs out of the folder. Raises OutputError if one is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:  # closing it, or dying, lets go
        _take(file, folder, shared=shared)
        if not shared:
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
        yield file


def _take(file: IO[str], folder: Path, *, shared: bool) -> None:
    """Take the lock; the processes of one run hold it together, so that it outlives the one that started them."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there it is the user who keeps two runs apart
        return
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise OutputError(
            f"another run is at work in {str(folder)!r} ({file.read() or 'starting'}); wait for it, or give another "
            "output_dir"
        ) from error
    except OSError as error:
        warnings.warn(f"{str(folder)!r} cannot be locked ({error}); see that no other run writes there", stacklevel=2)


def read_manifest(output_dir: str | os.PathLike) -> list[dict]:
    """The records of a folder's manifest, oldest first; a torn line is left out. Empty if there is none.

    A record has id, status ("done" or "failed"), file, error, prompt, source, image, settings, timings in seconds,
    time, and cost in dollars, None without a price; of workers side by side each pays its share.
    """
    return [record for _, record in _manifest_lines(Path(output_dir) / MANIFEST)]


def _manifest_lines(path: Path) -> list[tuple[bytes, dict]]:
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what follows the last line end is torn
    found = []
    for line in lines:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and record.keys() >= {"id", "status"}:
                found.append((line + b"\n", record))
    return found


def _mend(path: Path) -> None:
    """Take torn lines out of the manifest, which a full disk or a power cut leaves."""
    if not path.exists():
        return
    whole = b"".join(line for line, _ in _manifest_lines(path))
    if whole != path.read_bytes():
        with _whole(path) as temporary, temporary.open("wb") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())


def _append(path: Path, record: dict) -> None:
    """One line with one write, on the disk when this returns"""
    line = json.dumps(record).encode() + b"\n"
    try:
        with path.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError("the disk is full")
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error}; free some space and start again") from error


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end"""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove the temporary files of runs that were killed."""
    for path in folder.glob(".*"):
        if re.match(r"\.([0-9a-f]{12}[.-].*\.mp4|contact_sheet\..*|manifest\..*)$", path.name):
            path.unlink(missing_ok=True)


def _recorded(task: _Task, record: dict | None) -> bool:
    """Whether the manifest knows the video, and it is still there as it was"""
    if record is None or record["status"] != "done" or not task.path.exists():
        return False
    return task.path.stat().st_size == record.get("bytes")


def _found(task: _Task) -> dict | None:
    """The record of a video that is there, from the video itself"""
    try:
        told = media.read_metadata(task.path)
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


def _contact_sheet(folder: Path) -> Path | None:
    """Draw the folder's videos, in the manifest's order, unless the picture is newer than the manifest."""
    path = folder / SHEET
    if path.exists() and path.stat().st_mtime_ns >= (folder / MANIFEST).stat().st_mtime_ns:
        return path
    last = {record["id"]: record for record in read_manifest(folder)}.values()
    shown = [record for record in last if record["status"] == "done" and (folder / record["file"]).exists()]
    shown = shown[:SHEET_CLIPS]
    if not shown:
        return None
    import numpy as np

    sizes = [(record["settings"]["width"], record["settings"]["height"]) for record in shown]
    scales = [min(1, SHEET_SIDE / max(size)) for size in sizes]
    width, height = (max(round(size[i] * s) for size, s in zip(sizes, scales, strict=True)) for i in (0, 1))
    clips, captions = [], []
    for record in shown:
        with suppress(InputError):  # damaged since; it has no place on the sheet
            frames = media.read_frames(folder / record["file"], width, height)
            clips.append(frames[np.linspace(0, len(frames) - 1, 3).round().astype(int)])
            captions.append(f"seed {record['settings']['seed']} · {record['prompt']}")
    if not clips:
        return None
    with _whole(path) as temporary:
        media.contact_sheet(clips, captions).save(temporary)
    return path


# The run


def run(
    jobs: "Iterable[Job | str] | str | Path",
    load: "str | Path | dict | DiffusionPipeline",
    output_dir: str | os.PathLike,
    *,
    workers: int | None = None,
    num_samples: int = 1,
    on_record: Callable[[dict, int, int], None] | None = None,
    on_progress: Callable | None = None,
    **settings,
) -> Summary:
    """Make the videos that are missing in `output_dir`, and its manifest and contact sheet.

    jobs: what `read_prompts` gives, the path of such a file, or prompts. load: a pipeline; a model; or a dict of
    `load_pipeline`'s arguments, loaded when something is missing. settings: those of `generate` that hold for every job
    without its own. num_samples: videos of a job, with seed, seed + 1, …

    workers: processes, each with the model on a GPU of its own; None is one a GPU. One worker, as on a CPU, is this
    process. (A script that asks for more needs the guard `if __name__ == "__main__"`.)

    on_record(record, done, total) is told of every video as it is made or fails; on_progress of downloads, as by
    `download.fetch`. A job that fails is in the manifest with its error, and the next run tries it again, last. Ctrl-C,
    and any kill, lose only what is under way.

    Raises InputError before anything is loaded if any job cannot be made as asked; OutputError if another run is at
    work in the folder, or it cannot be written; and what `load_pipeline` raises.
    """
    begin = time.perf_counter()
    folder = Path(output_dir)
    jobs = read_prompts(jobs) if isinstance(jobs, str | Path) else jobs
    load = {"model": load} if isinstance(load, str | Path) else load
    tasks = _check(jobs, load, folder, settings, num_samples)
    wanted = {}
    for task in tasks:
        wanted.setdefault(task.id, task)
    manifest = media.check_output(tasks[0].path).parent / MANIFEST
    with _lock(folder) as lock:
        _sweep(folder)
        _mend(manifest)
        records = {record["id"]: record for record in read_manifest(folder)}
        missing = []
        for task in wanted.values():
            if _recorded(task, records.get(task.id)):
                continue
            if found := _found(task):
                _append(manifest, found)
                records[task.id] = found
            else:
                missing.append(task)
        missing.sort(key=lambda task: task.id in records)  # what failed before may fail again: last
        made = 0
        with closing(_make_all(missing, load, workers, folder, lock, on_progress)) as results:
            for number, record in enumerate(results, 1):
                _append(manifest, record)
                records[record["id"]] = record
                made += record["status"] == "done"
                if on_record:
                    on_record(record, number, len(missing))
        sheet = _contact_sheet(folder)
    seconds = time.perf_counter() - begin
    return Summary(
        output_dir=folder,
        records=[records[name] for name in wanted],
        made=made,
        repeated=len(tasks) - len(wanted),
        seconds=seconds,
        cost=environment.cost(seconds),
        sheet=sheet,
    )


def _make_all(tasks: list[_Task], load, workers: int | None, folder: Path, lock: IO, on_progress) -> Iterator[dict]:
    """Records of the tasks as they are made"""
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; it is 1 or more")
    if not isinstance(load, dict):
        if workers is not None and workers > 1:
            raise InputError(f"workers is {workers}, and a loaded pipeline is one; give the model's name or arguments")
        yield from _make_here(tasks, load)
    elif tasks:
        gpus = _gpus(load.get("device", "auto"))
        if gpus and workers is not None and workers > gpus:
            raise InputError(f"workers is {workers}, and there is one a GPU, of which torch sees {gpus} here")
        workers = min(workers or max(1, gpus), len(tasks))
        largest = max((task.settings for task in tasks), key=lambda s: s.width * s.height * s.num_frames)
        load = {
            "clip": (largest.width, largest.height, largest.num_frames),
            "prompts": list(dict.fromkeys(task.prompt for task in tasks)),
        } | load
        if workers == 1:
            yield from _make_here(tasks, pipeline.load_pipeline(**{"on_progress": on_progress} | load))
        else:
            _take(lock, folder, shared=True)
            yield from _make_in_processes(tasks, load, folder, workers, bool(gpus))


def _gpus(device: str) -> int:
    """GPUs that workers may have"""
    import torch

    if device not in ("auto", "cuda"):
        return int(device != "cpu")  # one GPU by its number
    return torch.cuda.device_count()


def _make_here(tasks: list[_Task], loaded: "DiffusionPipeline") -> Iterator[dict]:
    for task in tasks:
        record = _make(loaded, task)
        yield record
        if _gpu_is_lost(record):
            raise TurboNbError(f"{record['error']}; the GPU needs a new process: start again, what is done is kept")


def _make(loaded: "DiffusionPipeline", task: _Task, workers: int = 1) -> dict:
    """Make a video, or say why not. Raises OutputError, which is no fault of the job's."""
    if found := _found(task):  # of a worker that died before it could tell
        return found
    try:
        with media.Encoder(task.path, loaded.spec.fps) as encoder:
            video = pipeline.generate(loaded, task.prompt, **task.arguments, on_frames=encoder.add)
            told = video.settings | {"job": task.id, "timings": video.timings, "steps": [*video.steps]}
            begin = time.perf_counter()
            replace(video, settings=told).save(encoder)
            done = _done(task, told, write=time.perf_counter() - begin)
        return done | {"cost": environment.cost(sum(done["timings"].values()) / workers)}
    except OutputError:
        raise
    except Exception as error:  # whatever it is, the other jobs go on
        words = str(error) if isinstance(error, TurboNbError) else f"{type(error).__name__}: {error}"
        return task.record("failed", error=words)


def _gpu_is_lost(record: dict) -> bool:
    """Whether a failure leaves this process without its GPU, as an illegal memory access does"""
    return "CUDA error" in (record["error"] or "")


def _make_in_processes(tasks: list[_Task], load: dict, folder: Path, workers: int, gpu: bool) -> Iterator[dict]:
    """Hand the tasks to worker processes; the task of one that dies goes to another, MAX_TRIES times in all."""
    context = multiprocessing.get_context("spawn")
    waiting, deaths, crew = deque(tasks), Counter(), {}

    def hire(place: int) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, load, folder, place, workers, gpu), daemon=True)
        process.start()
        theirs.close()
        crew[ours] = SimpleNamespace(process=process, place=place, ready=False, task=None)

    try:
        hire(0)  # the others follow when it is ready: then files that were to be fetched are here
        while waiting or any(hand.task for hand in crew.values()):
            for connection, hand in crew.items():
                if waiting and hand.ready and not hand.task:
                    hand.task = waiting.popleft()
                    with suppress(OSError):  # it is dead, which the next lines find out
                        connection.send(hand.task)
            for connection in wait(list(crew)):
                hand = crew[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    hand.process.join()
                    del crew[connection]
                    if hand.task:
                        deaths[hand.task.id] += 1
                        if deaths[hand.task.id] < MAX_TRIES:
                            waiting.appendleft(hand.task)
                        else:
                            words = f"the worker process {_ended(hand.process.exitcode)} over it, {MAX_TRIES} times"
                            yield hand.task.record("failed", error=words)
                    if hand.ready and waiting:
                        hire(hand.place)
                    elif waiting and not crew:
                        raise TurboNbError(
                            f"the worker process {_ended(hand.process.exitcode)} while it loaded the model; take "
                            "fewer workers or a smaller memory plan"
                        ) from None
                    continue
                if isinstance(message, TurboNbError):
                    raise message
                if message is not None:
                    hand.task = None
                    yield message
                elif not hand.ready:
                    hand.ready = True
                    if len(crew) == 1 and hand.place == 0:
                        for place in range(1, workers):
                            hire(place)
    finally:
        for hand in crew.values():
            hand.process.terminate()
        for hand in crew.values():
            hand.process.join(10)
            hand.process.kill()


def _ended(exit_code: int) -> str:
    if exit_code == -9:
        return "was killed, as happens when memory runs out,"
    return f"ended with exit code {exit_code}"


def _work(connection: Connection, load: dict, folder: Path, place: int, workers: int, gpu: bool) -> None:
    """A worker process: load the model on the GPU of its number, say None, then turn tasks into records."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place] if visible else str(place)
    else:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    try:
        with _lock(folder, shared=True):
            loaded = pipeline.load_pipeline(**load)
            connection.send(None)
            while True:
                record = _make(loaded, connection.recv(), workers)
                connection.send(record)
                if _gpu_is_lost(record):
                    return
    except TurboNbError as error:
        connection.send(error)
    except EOFError:  # the first process has ended
        return


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


# The notebook


def run_notebook(notebook: str | os.PathLike, output: str | os.PathLike, parameters: dict | None = None, **options):
    """Run a notebook with papermill and return it; `output` is where its executed copy goes.

    options are those of `papermill.execute_notebook`. Raises InputError for parameters that the notebook does not have
    (papermill only warns of them), TurboNbError if papermill is not installed.
    """
    try:
        import papermill
    except ImportError as error:
        raise TurboNbError("papermill is not installed; pip install 'turbo-nb[notebook]'") from error
    if not Path(notebook).is_file():
        raise InputError(f"no notebook {str(notebook)!r}; give the path of an .ipynb file")
    parameters = parameters or {}
    known = papermill.inspect_notebook(str(notebook))
    if unknown := sorted(parameters.keys() - known.keys()):
        raise InputError(
            f"{Path(notebook).name} has no parameter {', '.join(map(repr, unknown))}; it has: {', '.join(known)}"
            f"{_meant(unknown[0], known)}"
        )
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    return papermill.execute_notebook(
        str(notebook), str(output), parameters, **{"progress_bar": False, "store_widget_state": False} | options
    )
