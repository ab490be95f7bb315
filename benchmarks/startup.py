"""Run `turbo-nb t2v` as a user does, and time it from the start of the process to the mp4.

There is one row for each phase that `--timing` prints, and "all": the wall time of the process, its end included. The
mode "cold" has empty caches of kernels, facts and embeddings. The mode "warm" follows it with the same caches. Beside
each run a bare Python imports torch and `WanPipeline`, and the weight files are read once, as a bound for the rest.

The check: every run writes the same frames, and the picture is not flat.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from turbo_nb.errors import InputError, TurboNbError
from turbo_nb.video import mp4

from . import harness
from .e2e import FLAT
from .harness import Check, Job, Timing

PHASE = re.compile(r"^ *(\d+\.\d+) s  (\S.*)$", re.MULTILINE)
MODES = ("cold", "warm")
BARE = "import torch; from diffusers import WanPipeline"
PIECE = 1 << 24  # bytes that are read at a time


def jobs(arguments: Sequence[str], device: str, modes: Sequence[str], runs: int) -> Iterator[Job]:
    """Yield a job for each phase of each mode.

    Args:
        arguments: of `turbo-nb t2v`, without --save_path and --device.
        device: where it runs.
        modes: of `MODES`.
        runs: of the mode "warm".

    Raises:
        InputError: a mode is unknown.
        TurboNbError: the command failed.
    """
    for mode in modes:
        if mode not in MODES:
            raise InputError(f"mode is {mode!r}. Expected one of {', '.join(MODES)}.")
    with tempfile.TemporaryDirectory() as folder:
        made = [make(Path(folder), arguments, device) for _ in range(1 + (runs if "warm" in modes else 0))]
        frames = [frames for *_, frames in made]
    first, spread = frames[0], frames[0].std()
    errors = [harness.relative_error(*(torch.from_numpy(x.astype(np.float32)) for x in (one, first))) for one in frames]
    check = Check(
        error=max(errors) if spread >= FLAT else math.inf,
        limit=harness.WORST,
        what=f"the frames of all runs against the first's; their standard deviation {spread:.1f}, {FLAT} is flat",
    )
    for mode in modes:
        some = [seconds for seconds, _ in (made[:1] if mode == "cold" else made[1:])]
        for work in some[0]:
            times = [1e3 * seconds.get(work, 0.0) for seconds in some]
            timing = Timing(
                ms=median(times), ms_min=min(times), n=len(times), first_ms=1e3 * made[0][0].get(work, 0.0),
                peak_gib=None,
            )  # fmt: skip
            height, width = first.shape[1:3]
            yield Job(
                work=work,
                shape=f"{width}x{height}x{len(first)}",
                mode=mode,
                weights=" ".join(map(str, arguments)) or "nano",
                run=lambda timing=timing: (timing, check),
            )


def make(folder: Path, arguments: Sequence[str], device: str) -> tuple[dict[str, float], np.ndarray]:
    """Run the command with the caches of a folder.

    Returns:
        Work → seconds, and the frames (T, H, W, 3).
    """
    path = folder / "video.mp4"
    caches = {"TRITON_CACHE_DIR": str(folder / "kernels"), "TURBO_NB_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "turbo_nb.cli", "t2v", *arguments, "--device", device, "--save_path", str(path)]
    begin = time.perf_counter()
    result = subprocess.run([*command, "--timing"], env=os.environ | caches, capture_output=True, text=True)
    wall = time.perf_counter() - begin
    if result.returncode:
        raise TurboNbError(f"turbo-nb t2v failed with code {result.returncode}: {result.stderr[-500:]}")
    seconds = {name: float(value) for value, name in PHASE.findall(result.stderr) if name != "all"}
    inside = sum(seconds.values())
    record = mp4.read_record(path)
    frames = mp4.read_frames(path, record.width, record.height)
    phases = seconds | {"end the process": wall - inside, "all": wall}
    given = [path for path in map(Path, arguments) if path.exists()]
    files = [file for path in given for file in (path, *path.rglob("*")) if file.is_file()]
    beside = {
        "import torch and WanPipeline": _seconds(subprocess.run, [sys.executable, "-c", BARE], check=True),
        "read the files": sum(_seconds(_read, file) for file in files),
    }
    rows = {f"startup, {name}": value for name, value in phases.items()}
    return rows | {f"beside it, {name}": value for name, value in beside.items()}, frames


def _read(path: Path) -> None:
    buffer = bytearray(PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _seconds(work: Callable, *arguments, **options) -> float:
    begin = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - begin
