"""Hostile manifests: a batch still plans, makes nothing twice, and can be shown."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from fuzz.harness import NUMBERS, as_json, bent, deep, fuzz, odd, value

from turbo_nb import batch, generation, preparation, records, settings
from turbo_nb.batch import manifest, runner
from turbo_nb.pipeline import LoadedModel

FIELDS = [*manifest.JobRecord.__dataclass_fields__]
PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture
def made(monkeypatch):
    """The prompts that were made, by a `generate` that needs no model"""
    prompts = []

    def generate(loaded, prompt, *, on_frames, **options):
        clip = preparation.prepare(settings.ClipSettings(prompt=prompt, **options), LoadedModel.of(loaded).spec).clip
        prompts.append(prompt)
        frames = np.zeros((clip.num_frames, clip.height, clip.width, 3), np.uint8)
        on_frames(frames)
        return generation.Video(
            frames=frames, record=records.VideoRecord(**asdict(clip), fps=16, timings={"text": 0.5})
        )

    monkeypatch.setattr(generation, "generate", generate)
    return prompts


def line(chance, whole: list[dict]) -> bytes:
    """Return a line of a manifest"""
    record = dict(chance.choice(whole)) if chance.random() < 0.8 else {}
    for _ in range(chance.choice([1, 1, 2, 5])):
        name = chance.choice(FIELDS)
        how = chance.random()
        if how < 0.2:
            record.pop(name, None)
        elif how < 0.4 and isinstance(record.get("settings"), dict):
            record["settings"] = record["settings"] | {
                chance.choice(["seed", "width", "prompt", "more", "loras"]): value(chance)
            }
        elif how < 0.9:
            record[name] = value(chance)
        else:
            record[odd(chance)] = value(chance)
    text = as_json(record, chance)
    kind = chance.choice(["record"] * 8 + ["deep", "number", "odd", "bent", "cut", "bytes", "wide"])
    if kind == "deep":
        text = chance.choice([deep(chance), text[:-1] + f', "settings": {deep(chance)}}}'])
    elif kind == "number":
        text = text[:-1] + f', "bytes": {chance.choice(NUMBERS)}, "cost": {chance.choice(NUMBERS)}}}'
    elif kind == "odd":
        text = odd(chance)
    elif kind == "wide":
        text = text[:-1] + ', "error": "' + "long " * 100_000 + '"}'
    data = text.encode("utf-8", "surrogatepass" if chance.random() < 0.2 else "replace")
    if kind == "bent":
        return bent(data, chance)
    return (
        data[: chance.randrange(len(data) + 1)] if kind == "cut" else chance.randbytes(200) if kind == "bytes" else data
    )


def test_a_batch_plans_whatever_its_manifest_has(folder, nano, made):
    place = folder / "batch"
    clip = {"num_frames": 1, "resolution": "16x16"}
    runner.run(PROMPTS, nano, place, **clip)
    path = place / manifest.MANIFEST
    first = path.read_bytes()
    whole = [json.loads(one) for one in first.splitlines()]

    def attempt(chance):
        made.clear()
        rows = [line(chance, whole) for _ in range(chance.choice([1, 2, 5, 20]))]
        if chance.random() < 0.1:
            rows = [b""]
        path.write_bytes(
            (first if chance.random() < 0.5 else b"") + b"\n".join(rows) + chance.choice([b"\n", b"", b"\r\n"])
        )
        again = runner.run(PROMPTS, nano, place, **clip)
        assert made == [] and again.failed == [] and str(again) and again._repr_html_()  # the videos are there
        for record in batch.read_manifest(place):
            str(batch.describe(record)).encode("utf-8")
        assert runner.run(PROMPTS, nano, place, **clip).made == 0

    fuzz("manifests", 60, attempt)
