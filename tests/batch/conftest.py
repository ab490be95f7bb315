import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from helpers import home_or

from turbo_nb import generation, preparation, records, settings
from turbo_nb.errors import TurboNbError
from turbo_nb.pipeline import LoadedModel

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside the tests


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """Give Ray a home to write in where the home of the user does not exist"""
    for name, value in home_or(tmp_path_factory.mktemp("home")).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def made(monkeypatch):
    """The prompts that were made, by a `generate` that needs no model; prompts with "bad" in them fail."""
    prompts = []

    def generate(loaded, prompt, *, on_frames, **options):
        clip = preparation.prepare(settings.ClipSettings(prompt=prompt, **options), LoadedModel.of(loaded).spec).clip
        if "bad" in prompt:
            raise TurboNbError("the model's output is not finite")
        prompts.append(prompt)
        frames = np.full((clip.num_frames, clip.height, clip.width, 3), 40 * len(prompts) % 256, np.uint8)
        on_frames(frames)
        timings = {"text": 0.5, "denoise": 1.5}
        return generation.Video(frames=frames, record=records.VideoRecord(**asdict(clip), fps=16, timings=timings))

    monkeypatch.setattr(generation, "generate", generate)
    return prompts
