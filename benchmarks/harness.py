"""Time a configuration, check it, and write the row of a CSV only after the check has passed."""

import csv
import math
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from turbo_nb.errors import InputError, OutputError, TurboNbError, first_line
from turbo_nb.machine import probe
from turbo_nb.ops import compare

COMMIT = "TURBO_NB_COMMIT"  # the commit of a copy without .git
WORST = 0.05  # the limit of the relative error of every bf16 configuration
CACHE_BYTES = 256 << 20  # written between timed calls, because they are more than the L2 cache of any GPU


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of n calls after warm-up and of the first call, and peak GiB of GPU memory (None on a CPU)."""

    ms: float
    ms_min: float
    n: int
    first_ms: float
    peak_gib: float | None


@dataclass(frozen=True, kw_only=True)
class Check:
    """The relative error ‖out − ref‖ / ‖ref‖ and its limit. `what` describes the reference and the limit."""

    error: float
    limit: float
    what: str

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN does not pass

    def __str__(self) -> str:
        return f"rel. L2 {self.error:.2e}, at most {self.limit:.2e}; {self.what}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A configuration. weights: "random", or the name of the file. run: times and checks it. gpus: that share it."""

    work: str
    shape: str
    mode: str
    weights: str
    run: Callable[[], tuple[Timing, Check]]
    gpus: int = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the CSV. The names of the fields are its columns. check: the reference of `error` (relative L2)."""

    date: str
    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    work: str
    shape: str
    mode: str
    weights: str
    ms: float
    ms_min: float
    n: int
    first_ms: float
    peak_gib: float | None
    error: float
    limit: float
    check: str
    gpus: int = 1


COLUMNS = [field.name for field in fields(Row)]


def run(jobs: Iterable[Job], device: str, path: Path | None) -> int:
    """Run the jobs one by one, and print and write a row for each job that passes its check.

    Args:
        jobs: the configurations.
        device: "cpu" or a GPU such as "cuda:0".
        path: the CSV that gets the rows. None: rows are only printed.

    Returns:
        The exit code: 1 if a job failed, else 0.

    Raises:
        InputError, OutputError: the file cannot take the rows. This is found before any work.
    """
    if path:
        check_file(path)
    if device != "cpu":
        torch.backends.cudnn.allow_tf32 = False  # because TF32 would round the float32 references
    machine, failed = facts(device), False
    for job in jobs:
        name = f"{job.work}, {job.shape}, {job.mode}" + (f", {job.gpus} GPUs" if job.gpus > 1 else "")
        try:
            timing, check = job.run()
        except Exception as error:  # because the other modes can still be measured
            if not isinstance(error, TurboNbError):
                traceback.print_exc()
            print(f"FAILED {name}: {type(error).__name__}: {first_line(error)}", flush=True)
            failed = True
            continue
        if not check.passed:
            print(f"FAILED {name}: {check}", flush=True)
            failed = True
            continue
        row = Row(
            date=datetime.now(UTC).isoformat(timespec="seconds"), **machine,
            work=job.work, shape=job.shape, mode=job.mode, weights=job.weights,
            **asdict(timing), error=check.error, limit=check.limit, check=check.what, gpus=job.gpus,
        )  # fmt: skip
        peak = "" if row.peak_gib is None else f", {row.peak_gib:.2f} GiB"
        print(f"{name}: {row.ms:.3f} ms (min {row.ms_min:.3f}, n {row.n}, first {row.first_ms:.0f}{peak}); {check}")
        if path:
            append(path, row)
    return int(failed)


def measure(work: Callable[[], object], device: str, *, runs: int, warmup: int) -> Timing:
    """Time the first call of work(), which may compile, then `runs` calls after `warmup` others.

    On a GPU, events measure the time, and the L2 cache is overwritten before each call. The peak is of the warm-up.
    """
    with torch.inference_mode():
        if device == "cpu":
            first, *rest = (_seconds(work) for _ in range(1 + warmup + runs))
            times, peak = [1e3 * seconds for seconds in rest[warmup:]], None
        else:
            torch.cuda.synchronize(device)
            first = _seconds(lambda: (work(), torch.cuda.synchronize(device)))
            torch.cuda.reset_peak_memory_stats(device)
            for _ in range(max(1, warmup)):
                work()
            torch.cuda.synchronize(device)
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            times = _events(work, device, runs)
    return Timing(ms=median(times), ms_min=min(times), n=runs, first_ms=1e3 * first, peak_gib=peak)


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _events(work: Callable[[], object], device: str, runs: int) -> list[float]:
    with torch.cuda.device(device):
        cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for begin, end in marks:
            cache.zero_()
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in marks]


def relative_error(out: Tensor, ref: Tensor) -> float:
    """Return ‖out − ref‖ / ‖ref‖; infinity for another shape, because a wrong shape is a failed check."""
    return compare.relative_error(out, ref) if out.shape == ref.shape else math.inf


def limit(own: float | None, worst: float = WORST) -> float:
    """Return the largest allowed error of a mode: 1.1 times the plain module's error, and at most `worst`.

    Args:
        own: the error of the plain module against float32. None: the mode is the plain module.
        worst: the limit of every mode.
    """
    return worst if own is None else min(1.1 * own + 1e-3, worst)


def facts(device: str) -> dict[str, str]:
    """Return the columns that describe the machine, the libraries and the code."""
    name, _, version = probe.device_name(device).partition(", torch ")
    machine = probe.probe()
    triton = machine.libraries.get("triton")
    return {
        "gpu": name,
        "driver": (device != "cpu" and machine.driver) or "",
        "torch": version,
        "triton": (triton and triton.version) or "",
        "commit": commit(),
    }


def commit() -> str:
    """Return TURBO_NB_COMMIT, else the commit of the checkout, else "unknown"."""
    if os.environ.get(COMMIT):
        return os.environ[COMMIT]
    command = ["git", "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def check_file(path: Path) -> None:
    """Raise InputError for a file with other columns, and OutputError for a file that cannot be written."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OutputError(f"csv is {str(path)!r}. Expected a file in an existing folder, such as speed.csv.")
    if path.exists() and path.stat().st_size:
        read(path)


def append(path: Path, row: Row) -> None:
    """Append a row. Write the header first if the file is new, and the number of GPUs into a file without it."""
    new = not path.exists() or not path.stat().st_size
    if not new and path.open(encoding="utf-8").readline().strip() != ",".join(COLUMNS):
        rows = read(path)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: _short(value) for name, value in asdict(row).items()})


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else value


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file. Raises InputError if it does not exist, or has other columns."""
    if not path.is_file():
        raise InputError(f"{str(path)!r} does not exist. Expected a CSV that python -m benchmarks wrote.")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames not in (COLUMNS, COLUMNS[:-1]):  # older files are of one GPU
            raise InputError(
                f"{str(path)!r} has the columns {','.join(reader.fieldnames or ['none'])}. Expected "
                f"{','.join(COLUMNS)}. Give another file."
            )
        return [{**row, "gpus": row.get("gpus") or "1"} for row in reader]


def table(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table with the latest row of each work, shape and mode on each machine."""
    latest = {(row["work"], row["shape"], row["mode"], row["gpu"], row["gpus"]): row for row in rows}
    lines = ["| work | shape | mode | ms (min, n) | first, s | peak, GiB | rel. error | GPU | commit |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in latest.values():
        cells = (
            f"{row['work']}, {row['weights']} weights" if row["weights"] == "random" else row["work"],
            row["shape"],
            row["mode"],
            f"{row['ms']} ({row['ms_min']}, {row['n']})",
            f"{float(row['first_ms']) / 1e3:.1f}",
            row["peak_gib"],
            row["error"],
            row["gpu"] if row["gpus"] == "1" else f"{row['gpus']} × {row['gpu']}",
            row["commit"][:8],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
