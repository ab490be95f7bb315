"""Clips a minute of a batch: in this process, and with Ray's actors.

A row's `ms` is the time of a clip while all actors work: between the last warm-up clip and the last clip. `first_ms` is
the time of a clip with everything, from the call of `batch.run` to its end. The check: the clips of every mode have the
same frames. Random weights are those of `e2e`; without a GPU nano makes the clips.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from turbo_nb import batch, pipeline
from turbo_nb.batch import cluster, engines, runner
from turbo_nb.batch.actor import Reply, TurboNbActor
from turbo_nb.files.resolve import ResolvedModel
from turbo_nb.video import mp4

from . import e2e, harness

RANDOM = "TURBO_NB_RANDOM"  # the shape of the random weights, for actors
NAMES = {"1.3B": "TurboWan2.1-T2V-1.3B-480P", "nano": "nano"}


def random_weights() -> None:
    """Let this process load random weights in place of the files of a model."""
    original = pipeline.load

    def load(model: ResolvedModel, clip=None, **_):
        asked = {name: getattr(model, name) for name in ("attention_type", "sla_topk", "quant_linear")}
        options = asked | {"device": model.device, "memory_plan": "resident", "text_cache": False, "clip": clip}
        with patch.object(pipeline, "load", original):
            return e2e.random_pipeline(os.environ[RANDOM], options)

    pipeline.load = load
    ResolvedModel.fetch = lambda self, on_progress=None: self


class RandomActor(TurboNbActor):
    """An actor with random weights. (A hook of Ray's would run before Ray hides the other actors' GPUs.)"""

    def load(self) -> Reply:
        """Load as any actor does."""
        random_weights()
        return super().load()


def measure(folder: Path, load: dict, clip: dict, clips: int, actors: int) -> tuple[float, float, np.ndarray]:
    """Return seconds of a clip while all actors work, and with the start, and the frames of the first clip"""
    warm, ends, begin = 2 * max(1, actors), [], time.perf_counter()
    prompts = [f"a large red circle moving from left to right, number {n}" for n in range(clips + warm)]

    def engine(model, size, folder, *_, pictures, **more):  # because one actor is not the choice for one GPU
        return cluster.Actors(model, folder, actors, **more) if actors else engines.InProcess(model, pictures, **more)

    actor = RandomActor if RANDOM in os.environ else TurboNbActor
    with patch.object(runner, "engine_for", engine), patch.object(cluster, "TurboNbActor", actor):
        summary = batch.run(prompts, load, folder, **clip, on_record=lambda *_: ends.append(time.perf_counter()))
    whole = (time.perf_counter() - begin) / len(prompts)
    assert not summary.failures, summary.failed[0].error
    first = summary.records[0]
    frames = mp4.read_frames(folder / first.file, first.settings.width, first.settings.height)
    return (ends[-1] - ends[-1 - clips]) / clips, whole, frames


def jobs(device: str, actors: list[int], clips: int, frames: int) -> Iterator[harness.Job]:
    """Yield a job for each mode.

    Args:
        device: "cpu" or a GPU such as "cuda:0".
        actors: of each mode; 0 is this process.
        clips: measured ones. Two more, or two for each actor, come before them.
        frames: of a clip on a CPU.
    """
    gpu = device != "cpu"
    model = "1.3B" if gpu else "nano"
    load = {"model": NAMES[model], "device": "cuda" if gpu else "cpu"}
    load |= {"attention_type": "sagesla", "quant_linear": True, "sla_topk": 0.1} if gpu else {}
    size, frames = ("832x480", 81) if gpu else ("128x128", frames)
    if gpu:
        path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
        os.environ |= {RANDOM: model, "PYTHONPATH": path}
        random_weights()
    known: list[torch.Tensor] = []

    def run(count: int) -> tuple[harness.Timing, harness.Check]:
        clip = {"num_steps": 4, "resolution": size, "num_frames": frames}
        with tempfile.TemporaryDirectory() as folder:
            seconds, whole, made = measure(Path(folder), load, clip, clips, count)
        known.append(torch.from_numpy(made.astype(np.float32)))
        check = harness.Check(
            error=float(harness.relative_error(known[-1], known[0])),
            limit=harness.WORST,
            what=f"frames of the first clip against those of the first mode; {60 / seconds:.1f} clips a minute",
        )
        timing = harness.Timing(ms=1e3 * seconds, ms_min=1e3 * seconds, n=clips, first_ms=1e3 * whole, peak_gib=None)
        return timing, check

    for count in actors:
        yield harness.Job(
            work=f"clip of a batch of {clips}, 4 steps",
            shape=f"{size}x{frames}",
            mode=f"{count} actor{'s' * (count > 1)}" if count else "in process",
            weights=f"random {model}" if gpu else model,
            run=lambda count=count: run(count),
        )
