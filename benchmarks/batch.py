"""Clips a minute of a batch: in this process, and with Ray's actors. Run as `python3 benchmarks/batch.py --out FOLDER`.

A row's `ms` is the time of a clip while all actors work: between the last warm-up clip and the last clip. `first_ms` is
the time of a clip with everything, from the call of `batch.run` to its end. The check: the clips of every mode have the
same frames. Random weights are those of `e2e`; without a GPU the script takes nano's own.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

sys.path[0] = str(Path(__file__).parents[1])  # because kernels.py beside this file has the name of a package

import numpy as np
import torch

from benchmarks import harness
from turbo_nb import batch, pipeline
from turbo_nb.batch import cluster, engines, runner
from turbo_nb.files.resolve import ResolvedModel
from turbo_nb.video import mp4

RANDOM = "TURBO_NB_RANDOM"  # the shape of the random weights, for actors
HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"  # Ray's variable of a function that each worker calls first
NAMES = {"1.3B": "TurboWan2.1-T2V-1.3B-480P", "nano": "nano"}


def random_weights() -> None:
    """Let this process load random weights in place of the files of a model."""
    from benchmarks import e2e

    original = pipeline.load

    def load(model: ResolvedModel, clip=None, **_):
        asked = {name: getattr(model, name) for name in ("attention_type", "sla_topk", "quant_linear")}
        options = asked | {"device": "cuda:0", "memory_plan": "resident", "text_cache": False, "clip": clip}
        with patch.object(pipeline, "load", original):
            return e2e.random_pipeline(os.environ[RANDOM], options)

    pipeline.load = load
    ResolvedModel.fetch = lambda self, on_progress=None: self


def measure(folder: Path, load: dict, clip: dict, clips: int, actors: int) -> tuple[float, float, np.ndarray]:
    """Return seconds of a clip while all actors work, and with the start, and the frames of the first clip"""
    warm, ends, begin = 2 * actors, [], time.perf_counter()
    prompts = [f"a large red circle moving from left to right, number {n}" for n in range(clips + warm)]

    def engine(model, size, folder, *_, **more):  # because one actor is not the choice for one GPU
        return cluster.Actors(model, folder, actors, **more) if actors else engines.InProcess(model, **more)

    with patch.object(runner, "engine_for", engine):
        summary = batch.run(prompts, load, folder, **clip, on_record=lambda *_: ends.append(time.perf_counter()))
    whole = (time.perf_counter() - begin) / len(prompts)
    assert not summary.failures, summary.failed[0].error
    first = summary.records[0]
    frames = mp4.read_frames(folder / first.file, first.settings.width, first.settings.height)
    return (ends[-1] - ends[-1 - clips]) / clips, whole, frames


def jobs(arguments: argparse.Namespace) -> Iterator[harness.Job]:
    """Yield a job for each mode."""
    gpu = torch.cuda.is_available()
    model = "1.3B" if gpu else "nano"
    load = {"model": NAMES[model], "device": "cuda" if gpu else "cpu"}
    load |= {"attention_type": "sagesla", "quant_linear": True, "sla_topk": 0.1} if gpu else {}
    size = ("832x480", 81) if gpu else ("128x128", arguments.frames)
    if gpu:
        path = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
        os.environ |= {RANDOM: model, HOOK: "benchmarks.batch.random_weights", "PYTHONPATH": path}
        random_weights()
    known: list[np.ndarray] = []

    def run(actors: int) -> tuple[harness.Timing, harness.Check]:
        folder = arguments.out / f"actors-{actors}"
        shutil.rmtree(folder, ignore_errors=True)
        seconds, whole, frames = measure(
            folder, load, {"num_steps": 4, "resolution": size[0], "num_frames": size[1]}, arguments.clips, actors
        )
        known.append(frames.astype(np.float32))
        check = harness.Check(
            error=float(harness.relative_error(*map(torch.from_numpy, (known[-1], known[0])))),
            limit=harness.WORST,
            what=f"frames of the first clip against those of the first mode; {60 / seconds:.1f} clips a minute",
        )
        shutil.rmtree(folder)
        return harness.Timing(
            ms=1e3 * seconds, ms_min=1e3 * seconds, n=arguments.clips, first_ms=1e3 * whole, peak_gib=None
        ), check

    for actors in arguments.actors:
        yield harness.Job(
            work=f"clip of a batch of {arguments.clips}, 4 steps",
            shape=f"{size[0]}x{size[1]}",
            mode=f"{actors} actors" if actors else "in process",
            weights=f"random {model}" if gpu else model,
            run=lambda actors=actors: run(actors),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=8, help="measured ones; two more for each actor come before")
    parser.add_argument("--frames", type=int, default=25, help="of a clip on a CPU")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 0], help="0: this process")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    sys.exit(harness.run(jobs(arguments), device, arguments.out / "batch.csv"))
