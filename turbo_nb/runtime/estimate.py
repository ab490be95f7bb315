"""How long a clip will take: learned from the clips made on this machine, and before the first one guessed.

Every clip leaves a row with its seconds, and no word of its prompt, in a file of the package's cache. A row is worth
little: a line that cannot be read is passed over, a row that cannot be written is not missed.
"""

import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from ..catalog import Arch
from ..machine import environment

ROWS = "times.jsonl"
MOST = 256_000  # bytes of rows; half of them stay when they are more
LATEST = 5  # rows that a stage's time is the median of
NEAR = 4  # times as many pixels, or as few: further off, what does not grow with a clip counts too much
# One H100 as measured (the README's table), and others beside it by their multiprocessors and the Tensor Cores of each
RATE = 550e12  # floating point operations a second in a step
DECODE, WRITE = 2e-8, 3e-9  # seconds a pixel of a frame; most of the writing is beside the decoding
MULTIPROCESSORS, EACH = 132, {(9, 0): 1.0, (8, 0): 0.4, (10, 0): 2.0}
OTHERS = 0.2  # of consumer GPUs


@dataclass(frozen=True, kw_only=True)
class Row:
    """The times of one clip, or of writing one, in seconds; work: operations of one of its steps (`work_of`)."""

    machine: str
    model: str
    attention_type: str
    quant_linear: bool | None = None
    memory_plan: str | None = None
    width: int
    height: int
    num_frames: int
    num_steps: int
    work: float = 0
    timings: dict[str, float] = field(default_factory=dict)
    steps: Sequence[float] = ()

    @property
    def pixels(self) -> float:
        """Of all frames."""
        return self.width * self.height * self.num_frames


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds that a clip will take, and of loading its model (None: not known); after: how many earlier clips say so,
    0 for a first guess."""

    seconds: float
    load: float | None
    after: int

    def __str__(self) -> str:
        if not self.after:
            return f"about {in_words(self.seconds)}, a first guess"
        return f"about {in_words(self.seconds)}, from {self.after} earlier video{'s' * (self.after > 1)} here"


def in_words(seconds: float) -> str:
    """ "8.2 s" or "1.5 min" """
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def machine(device: str | None = None) -> str:
    """What the time of a clip depends on: a GPU's name, or the CPU's kind and cores. None: the GPU if there is one."""
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def work_of(arch: Arch | None, width: int, height: int, num_frames: int, topk: float | None) -> float:
    """Floating point operations of one step. topk: the share of keys that self-attention attends to; None is all.

    arch None: of a model whose shape is not known, the tokens.
    """
    tokens = (1 + (num_frames - 1) // 4) * (height // 16) * (width // 16)
    if arch is None:
        return tokens
    linears = 6 * arch.dim**2 + 2 * arch.dim * arch.ffn_dim
    attention = 2 * arch.dim * ((1 if topk is None else topk) * tokens + 512)  # and to the prompt
    return 2.0 * tokens * arch.num_layers * (linears + attention)


def remember(settings: dict, timings: dict[str, float], *, steps: Sequence[float] = (), work: float = 0) -> None:
    """Add a row to those of this machine, from a video's settings. What is not there, or not written, is no error."""
    path = environment.cache() / ROWS
    with suppress(OSError, KeyError):
        row = Row(
            machine=machine(settings["device"]),
            timings=timings,
            steps=[*steps],
            work=work,
            **{name: settings[name] for name in ("model", "attention_type", "width", "height", "num_frames")},
            **{name: settings[name] for name in ("num_steps", "quant_linear", "memory_plan")},
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(asdict(row)) + "\n").encode())  # at once: other processes write as well
            full = os.fstat(handle).st_size > MOST
        finally:
            os.close(handle)
        if full:
            _halve(path)


def _halve(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.writelines(lines[len(lines) // 2 :])
    os.replace(temporary, path)


def rows() -> list[Row]:
    """What is remembered, the latest first."""
    try:
        lines = (environment.cache() / ROWS).read_bytes().splitlines()
    except OSError:
        return []
    return [row for line in reversed(lines) if (row := _row(line))]


def _row(line: bytes) -> Row | None:
    try:
        row = Row(**json.loads(line))
        numbers = [*row.timings.values(), *row.steps, row.work, row.pixels]
        return row if all(math.isfinite(number) and number >= 0 for number in numbers) and row.pixels else None
    except (ValueError, TypeError, AttributeError):
        return None


def estimate(
    wanted: dict, arch: Arch | None, *, device: str | None = None, known: Iterable[Row] | None = None
) -> Estimate | None:
    """How long a clip will take on `device` (None: the GPU if there is one); None where nothing is known.

    wanted: model, attention_type, sla_topk, width, height, num_frames and num_steps; quant_linear and memory_plan, if
    they are known. Rows (None: those of `rows()`) of this machine, model, attention and linears count, those of the
    same plan, and of about the same size, if there are any. Of each stage it is the median of the latest: a step
    scaled by its operations, decoding and writing by pixels. Without rows it is a first guess by the GPU's size; there
    is none for a CPU.
    """
    here, topk = machine(device), None if wanted["attention_type"] == "original" else wanted["sla_topk"]
    work = work_of(arch, wanted["width"], wanted["height"], wanted["num_frames"], topk)
    pixels = wanted["width"] * wanted["height"] * wanted["num_frames"]
    known = [
        row
        for row in (rows() if known is None else known)
        if row.machine == here
        and all(getattr(row, name) == wanted[name] for name in ("model", "attention_type"))
        and wanted.get("quant_linear") in (None, row.quant_linear)
    ]
    known = _preferred(known, lambda row: row.memory_plan == wanted.get("memory_plan"))
    known = _preferred(known, lambda row: pixels / NEAR <= row.pixels <= pixels * NEAR)
    clips = [row for row in known if row.steps and row.work]
    if not clips:
        return _guess(work * wanted["num_steps"], pixels, device)
    step = median(seconds * work / row.work for row in clips[:LATEST] for seconds in row.steps)
    stages = {stage: list(_scaled(stage, known, pixels)) for stage in {s for row in known for s in row.timings}}
    load = stages.pop("load", None)
    return Estimate(
        seconds=step * wanted["num_steps"] + sum(median(seconds[:LATEST]) for seconds in stages.values()),
        load=load and median(load[:LATEST]),
        after=len(clips),
    )


def _preferred(known: list[Row], like: Callable[[Row], bool]) -> list[Row]:
    """The rows that are like that, all if no clip is"""
    alike = [row for row in known if like(row)]
    return alike if any(row.steps for row in alike) else known


def _scaled(stage: str, known: Iterable[Row], pixels: float) -> Iterator[float]:
    """Seconds of a stage for so many pixels; of denoise what is not in its steps, such as encoding an image"""
    for row in known:
        if stage in row.timings:
            seconds = row.timings[stage]
            if stage == "denoise":
                seconds = max(0.0, seconds - sum(row.steps))
            yield seconds * (pixels / row.pixels if stage in ("denoise", "decode", "write") else 1)


def _guess(work: float, pixels: float, device: str | None) -> Estimate | None:
    if device == "cpu":  # where torch may be missing
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(device)
    share = gpu.multi_processor_count / MULTIPROCESSORS * EACH.get((gpu.major, gpu.minor), OTHERS)
    return Estimate(seconds=(work / RATE + pixels * DECODE) / share + pixels * WRITE, load=None, after=0)
