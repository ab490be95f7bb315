"""The command line with clips that need no model, for tests that stop real processes: `python stand_in.py batch …`.

Ray's actors call `setup`, see `environment`. A clip whose prompt has "slow" in it waits, with ffmpeg at work, until the
folder STAND_IN has a file named go.
"""

import os
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from turbo_nb import cli, generation, pipeline, records, settings
from turbo_nb.pipeline import LoadedModel


def load(model, **options):
    """Return a pipeline without weights"""
    return SimpleNamespace(turbo_nb=LoadedModel(resolved=model, pipeline=None, prompt_encoder=None, plan=None))


def generate(loaded, prompt, *, on_frames, **options):
    """Return a grey clip"""
    clip = settings.resolve_clip(settings.ClipSettings(prompt=prompt, **options), LoadedModel.of(loaded).spec)
    frames = np.full((clip.num_frames, clip.height, clip.width, 3), 99, np.uint8)
    on_frames(frames)
    if "slow" in prompt:
        marks = Path(os.environ["STAND_IN"])
        (marks / f"begun-{os.getpid()}").touch()
        while not (marks / "go").exists():
            time.sleep(0.01)
    return generation.Video(frames=frames, record=records.VideoRecord(**asdict(clip), fps=16, timings={"text": 0.5}))


def setup():
    """Take the place of the model in this process"""
    pipeline.load, generation.generate = load, generate


def hook(name="stand_in.setup"):
    """Return the variable that lets Ray's actors call a function first"""
    return {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": name}


def environment(**more):
    """Return variables for a batch whose actors call `setup`"""
    here = Path(__file__).parent
    paths = [here, here.parent / "quick", *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | hook() | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"} | more


if __name__ == "__main__":
    setup()
    cli.main()
