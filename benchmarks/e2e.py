"""A prompt becomes an mp4, twice, in one process that keeps everything loaded; the second, warm run is the row's.

One row for each stage that `Video.timings` has, for the writing of the mp4, and for all of it; first_ms is the first
run's. The check. The second run must give the first one's frames again, and a picture that is not flat; how far a
step is from float32 is what `step` checks.
"""

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import turbo_nb

from . import harness
from .harness import Check, Job, Timing

FLAT = 2  # standard deviation of 8-bit frames


def jobs(model: str, prompt: str | None, device: str, load: dict, clip: dict) -> Iterator[Job]:
    """A job for each stage. prompt: None for one that suits the model. load, clip: as for `load_pipeline` and
    `generate`. Raises what these raise."""
    pipeline = turbo_nb.load_pipeline(model, device=device, memory_plan="resident", text_cache=False, **load)
    prompt = pipeline.spec.example if prompt is None else prompt
    first, first_timings = make(pipeline, prompt, clip)
    video, timings = make(pipeline, prompt + " ", clip)  # the same text, and not a prompt that is remembered
    frames, height, width, _ = video.frames.shape
    settings, spread = video.settings, video.frames.std()
    topk = "" if settings["sla_topk"] is None else f" {settings['sla_topk']:g}"
    linears = "int8" if settings["quant_linear"] else str(pipeline.transformer.dtype).removeprefix("torch.")
    out, ref = (torch.from_numpy(v.frames.astype(np.float32)) for v in (video, first))
    check = Check(
        error=harness.relative_error(out, ref) if spread >= FLAT else math.inf,
        limit=harness.WORST,
        what=f"the second run's frames against the first's; their standard deviation {spread:.1f}, {FLAT} is flat",
    )
    for stage, seconds in timings.items():
        peak = video.peaks.get(stage)
        timing = Timing(
            ms=1e3 * seconds, ms_min=1e3 * seconds, n=1, first_ms=1e3 * first_timings[stage],
            peak_gib=peak and peak / 2**30,
        )  # fmt: skip
        yield Job(
            work=f"{stage} of a clip, {settings['num_steps']} steps, {settings['attention_type']}{topk}, {linears}",
            shape=f"{width}x{height}x{frames}",
            mode="as loaded",
            weights=pipeline.spec.name,
            run=lambda timing=timing: (timing, check),
        )


def make(pipeline, prompt: str, clip: dict) -> tuple[turbo_nb.Video, dict[str, float]]:
    """A clip, and seconds by stage: Video's own, "write", and "all" of them."""
    begin = time.perf_counter()
    video = turbo_nb.generate(pipeline, prompt, **clip)
    with tempfile.TemporaryDirectory() as folder:
        write = time.perf_counter()
        video.save(Path(folder) / "video.mp4")
        end = time.perf_counter()
    return video, video.timings | {"write": end - write, "all": end - begin}
