"""The time that a clip will take: learned from earlier clips on this machine, and guessed before the first one.

Every clip adds a row with its seconds, and without its prompt, to a file in the package's cache. The file is a help
only: a line that cannot be read is skipped, and a row that cannot be written is lost.
"""

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median

from .. import records
from ..catalog import Arch, tokens_of
from ..machine import atomic, environment

ROWS = "times.jsonl"
MOST = 256_000  # bytes of rows; the newer half stays when they exceed this
LATEST = 5  # rows that the time of a stage is the median of
NEAR = 4  # rows of up to 4 times more or fewer pixels are near, because host time does not scale with pixels
# Rates of the first guess, measured on one H100 (the README's table). Other GPUs are scaled by their multiprocessors
# and by the Tensor Cores of each.
RATE = 550e12  # floating point operations a second in a step
DECODE, WRITE = 2e-8, 3e-9  # seconds for a pixel of a frame; most of the writing happens during decoding
MULTIPROCESSORS, EACH = 132, {(9, 0): 1.0, (8, 0): 0.4, (10, 0): 2.0}
OTHERS = 0.2  # of consumer GPUs
# Least seconds, because the host needs time to launch kernels however small a clip is: nano's step took 25.9 ms on an
# H100. The other stages together are not measured.
HOST_STEP, HOST_STAGES = 0.026, 0.2
TINY = 0.05  # seconds below this would be shown as "0.0 s"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The times of one clip, or of writing one.

    Args:
        timings: seconds of each stage. steps: seconds of each denoising step.
        work: floating point operations of one step, see `work_of`.
        warm: whether the kernels for this clip were compiled before it began.
        decoder: as in `ClipSettings.decoder`.
    """

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
    warm: bool = False
    decoder: str | None = None

    @property
    def pixels(self) -> float:
        """Pixels of all frames."""
        return self.width * self.height * self.num_frames


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The time of a clip.

    Args:
        seconds: of the clip, without loading the model.
        load: seconds of loading the model. None: not known.
        after: the number of earlier clips that it is learned from. 0: a first guess.
        warm: False where all earlier clips compiled kernels too, so that `seconds` is an upper limit.
        stages: `seconds` by stage.
    """

    seconds: float
    load: float | None
    after: int
    warm: bool = True
    stages: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        words = in_words(self.seconds)
        if not self.warm:
            return f"at most {words}, from {_videos(self.after)} here that compiled kernels, too"
        words = words if self.seconds < TINY else f"about {words}"
        return f"{words}, from {_videos(self.after)} here" if self.after else f"{words}, a first guess"


def _videos(count: int) -> str:
    return f"{count} earlier video{'s' * (count > 1)}"


def in_words(seconds: float) -> str:
    """Return seconds as "8.2 s", "1.5 min", "3.0 h", "12 days" or "less than 0.1 s"."""
    if seconds < TINY:
        return "less than 0.1 s"
    for most, unit, size in ((60, "s", 1), (3600, "min", 60), (2 * 86400, "h", 3600)):
        if seconds < most:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:,.0f} days"


def machine(device: str | None = None, gpus: int | None = None) -> str:
    """Return the name of a GPU, or the kind and the cores of the CPU.

    Args:
        device: None: the GPU if this machine has one.
        gpus: how many of them make a clip together. None: one.
    """
    if gpus and gpus > 1:
        return f"{gpus} × {machine(device)}"
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def work_of(arch: Arch | None, width: int, height: int, num_frames: int, topk: float | None) -> float:
    """Return the floating point operations of one denoising step.

    Args:
        arch: the transformer's shape. None: not known, the number of tokens stands for the operations.
        width: in pixels.
        height: in pixels.
        num_frames: 4n + 1.
        topk: the share of keys that self-attention attends to. None: all.
    """
    tokens = tokens_of(width, height, num_frames)
    if arch is None:
        return tokens
    linears = 6 * arch.dim**2 + 2 * arch.dim * arch.ffn_dim
    attention = 2 * arch.dim * ((1 if topk is None else topk) * tokens + 512)  # 512 tokens of the prompt
    return 2.0 * tokens * arch.num_layers * (linears + attention)


def remember(
    settings: dict,
    timings: dict[str, float],
    *,
    steps: Sequence[float] = (),
    work: float = 0,
    warm: bool = False,
) -> None:
    """Add a row to those of this machine. A missing setting or a folder that cannot be written is not an error.

    Args:
        settings: of a video.
        timings: seconds of each stage.
        steps: seconds of each denoising step; none for a row about writing alone.
        work: of `work_of`.
        warm: whether the kernels for this clip were compiled before. A CPU compiles none.
    """
    path = environment.cache() / ROWS
    with suppress(OSError, KeyError):
        names = ("model", "attention_type", "width", "height", "num_frames", "num_steps", "quant_linear", "memory_plan")
        row = Row(
            machine=machine(settings["device"], settings.get("gpus")),
            timings=timings,
            steps=[*steps],
            work=work,
            warm=warm or settings["device"] == "cpu",
            decoder=settings.get("more", {}).get("decoder"),
            **{name: settings[name] for name in names},
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:  # one write, because other processes append as well
            os.write(handle, (json.dumps(records.write(row)) + "\n").encode())
            full = os.fstat(handle).st_size > MOST
        finally:
            os.close(handle)
        if full:
            _halve(path)


def _halve(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    atomic.write(path, b"".join(lines[len(lines) // 2 :]))


def rows() -> list[Row]:
    """Return the rows of earlier clips, the latest first."""
    try:
        lines = (environment.cache() / ROWS).read_bytes().splitlines()
    except OSError:
        return []
    return [row for line in reversed(lines) if (row := _row(line))]


@lru_cache(2048)  # more than MOST bytes have
def _row(line: bytes) -> Row | None:
    """Return the row of a line, None for a damaged line. Read once, because the page asks after each change"""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    row = records.read(Row, data)
    if row is None or not 0 < row.pixels < 1e15 or not (row.work == 0 or 1 <= row.work < 1e30):
        return None
    if any(not 0 <= seconds < 1e9 for seconds in (*row.timings.values(), *row.steps)):
        return None
    read = asdict(row)  # a row that lost a number in reading would make a stage look free
    return row if all(data[name] == value for name, value in read.items() if name in data) else None


def estimate(
    wanted: dict, arch: Arch | None, *, device: str | None = None, known: Iterable[Row] | None = None
) -> Estimate | None:
    """Estimate the time of a clip.

    Rows of this machine, model, attention and linears count. Rows of the same plan, of about the same size and of warm
    clips are preferred. A stage takes the median of its latest rows: steps are scaled by their operations, decoding and
    writing by their pixels. Of a clip that compiled kernels only the fastest step counts, because the compiler delays
    the first one. Without rows the size of the GPU gives a first guess.

    Args:
        wanted: model, attention_type, sla_topk, width, height, num_frames and num_steps; also quant_linear,
            memory_plan and gpus, if they are known.
        arch: the transformer's shape. None: not known.
        device: where the clip will be made. None: on the GPU if this machine has one.
        known: rows to learn from. None: those of `rows`.

    Returns:
        The estimate. None for a CPU without rows.
    """
    gpus = wanted.get("gpus") or 1
    here, topk = machine(device, gpus), None if wanted["attention_type"] == "original" else wanted["sla_topk"]
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
    decoder = wanted.get("more", {}).get("decoder")
    known = _preferred(known, lambda row: row.decoder == decoder)
    known = _preferred(known, lambda row: pixels / NEAR <= row.pixels <= pixels * NEAR)
    load = [row.timings["load"] for row in known if "load" in row.timings]  # cold clips too: they have it
    known = _preferred(known, lambda row: row.warm or not row.steps)
    clips = [row for row in known if row.steps and row.work]
    if not clips:
        return _guess(work / gpus, wanted["num_steps"], pixels / gpus, device)
    step = median(
        seconds * work / row.work for row in clips[:LATEST] for seconds in (row.steps if row.warm else [min(row.steps)])
    )
    names = {name for row in known for name in row.timings} - {"load"}
    stages = {name: median(list(_scaled(name, known, pixels))[:LATEST]) for name in names}
    stages["denoise"] = stages.get("denoise", 0) + step * wanted["num_steps"]
    return Estimate(
        seconds=sum(stages.values()),
        load=median(load[:LATEST]) if load else None,
        after=len(clips),
        stages=stages,
        warm=any(row.warm for row in clips),
    )


def _preferred(known: list[Row], like: Callable[[Row], bool]) -> list[Row]:
    """Return the rows that are like that, or all rows if no clip is"""
    alike = [row for row in known if like(row)]
    return alike if any(row.steps for row in alike) else known


def _scaled(stage: str, known: Iterable[Row], pixels: float) -> Iterator[float]:
    """Return a stage's seconds for so many pixels; for denoise those outside its steps, such as encoding an image"""
    for row in known:
        if stage in row.timings:
            seconds = row.timings[stage]
            if stage == "denoise":
                seconds = max(0.0, seconds - sum(row.steps))
            yield seconds * (pixels / row.pixels if stage in ("denoise", "decode", "write") else 1)


def _guess(work: float, num_steps: int, pixels: float, device: str | None) -> Estimate | None:
    """Return a first guess by the size of the GPU, None on a CPU"""
    if device == "cpu":  # torch may be missing here
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(device)
    share = gpu.multi_processor_count / MULTIPROCESSORS * EACH.get((gpu.major, gpu.minor), OTHERS)
    denoise = num_steps * max(work / RATE / share, HOST_STEP)
    others = max(pixels * DECODE / share + pixels * WRITE, HOST_STAGES)
    return Estimate(seconds=denoise + others, load=None, after=0, stages={"denoise": denoise, "decode": others})
