"""Jobs in the background with nano: progress, preview, cancelling, errors in words, and finding them again."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from turbo_nb import catalog, generation
from turbo_nb.errors import InputError, TurboNbError
from turbo_nb.generator import jobs
from turbo_nb.generator.jobs import Request, Studio
from turbo_nb.video import mp4, preview

SMALL = {"prompt": "a large red circle", "num_frames": 5, "num_steps": 2, "resolution": "64x64", "seed": 3}


@pytest.fixture
def made(tmp_path, nano):
    """A studio that need not load nano again"""
    return Studio(tmp_path / "clips", load=lambda **_: nano)


def test_a_clip_is_made_and_found_again(made):
    events = []
    made.listen(lambda job: events.append((job.state, job.stage, job.done, job.total, bool(job.preview))))
    made.submit(Request(**SMALL))
    job = made.wait(60)
    assert (job.state, job.error) == ("finished", "")
    order = list(dict.fromkeys(stage for _, stage, *_ in events))
    assert order == list(jobs.STAGES)
    assert ("running", "denoise", 1, 2, True) in events and events[-1] == ("finished", "write", 0, 0, False)
    found = Studio(made.history.folder).history.clips()
    timings, steps = job.run.record.timings, job.run.record.steps
    assert set(timings) == {"load", "text", "denoise", "decode", "write"} and len(steps) == 2
    timings.pop("write")
    assert found == [job.run]
    assert found[0].settings["seed"] == 3 and found[0].record.machine == jobs.machine()


def test_the_same_folder_is_the_same_studio(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Studio.of("clips") is Studio.of(tmp_path / "clips")
    assert Studio.of("clips") is not Studio.of("others")


def test_the_model_is_loaded_anew_only_where_it_must_be(tmp_path, nano):
    loads = []
    made = Studio(tmp_path, load=lambda **settings: loads.append(settings["attention_type"]) or nano)
    for more in ({}, {"sla_topk": 0.5}, {"model": "nano"}, {"attention_type": "original"}):
        made.make(**SMALL | more)
    assert loads == ["sla", "original"]
    assert [run.settings["sla_topk"] for run in made.history.clips()] == [0.15, 0.15, 0.5, 0.15]


def test_a_random_seed_is_told(made):
    seeds = {made.make(**SMALL | {"seed": None}).settings["seed"] for _ in range(2)}
    assert len(seeds) == 2 and made.job.request.seed in seeds


def test_cancel_ends_the_run_after_the_step_it_is_at(made):
    stop = made.listen(lambda job: (job.stage, job.done) == ("denoise", 1) and made.cancel())
    job = made.submit(Request(**SMALL | {"num_steps": 4}))
    made.wait(60)
    assert (job.state, job.stage, job.done) == ("cancelled", "denoise", 1)
    assert made.history.clips() == []
    stop()
    assert made.make(**SMALL).path.exists()  # the next one works


def test_frames_are_encoded_while_others_are_decoded(made, monkeypatch):
    taken, add = [], mp4.Encoder.add
    monkeypatch.setattr(
        mp4.Encoder, "add", lambda self, frames: taken.append((made.job.stage, len(frames))) or add(self, frames)
    )
    run = made.make(**SMALL)
    assert taken == [("decode", 1), ("decode", 4)]
    assert mp4.read_frames(run.path, 64, 64).shape == (5, 64, 64, 3) and run.path.name.endswith("-3.mp4")


def test_cancelled_while_it_is_decoded_it_leaves_no_file(made):
    made.listen(lambda job: job.stage == "decode" and made.cancel())
    made.submit(Request(**SMALL))
    assert made.wait(60).state == "cancelled" and not list(made.history.folder.iterdir())


def test_one_at_a_time(tmp_path, nano):
    go = threading.Event()

    def slow(**_):
        go.wait(30)
        return nano

    made = Studio(tmp_path, load=slow)
    made.submit(Request(**SMALL))
    with pytest.raises(InputError, match="wait for it or cancel"):
        made.submit(Request(**SMALL))
    go.set()
    assert made.wait(60).state == "finished"


def test_wrong_settings_are_told_before_anything_starts(made):
    for wrong, words in [
        ({"prompt": " "}, "prompt is empty"),
        ({"num_frames": 6}, "4n"),
        ({"sla_topk": 0.0}, "above 0"),
        ({"model": "nona"}, "unknown model"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "text alone"),
    ]:
        with pytest.raises(InputError, match=words):
            made.submit(Request(**SMALL | wrong))
    assert made.job is None


@pytest.mark.parametrize(
    ("error", "words", "has_trace"),
    [
        (TurboNbError("disk full; free some"), "disk full; free some", False),
        (MemoryError(), "fewer frames", True),
        (ZeroDivisionError("x"), "unexpected ZeroDivisionError: x. Try again", True),
    ],
)
def test_errors_are_words(tmp_path, nano, error, words, has_trace):
    def fails(*_, **__):
        raise error

    made = Studio(tmp_path, load=lambda **_: nano, generate=fails)
    with pytest.raises(TurboNbError, match=words):
        made.make(**SMALL)
    assert made.job.state == "failed" and bool(made.job.trace) == has_trace


def test_remarks_of_generate_are_notes(made):
    made.make(**SMALL | {"prompt": "a cat"})
    assert ["only knows moving shapes" in note for note in made.job.notes] == [True]


def test_the_outlook_knows_size_memory_and_earlier_runs(made, tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path / "cache"))
    request = Request(**SMALL)
    before = made.outlook(request)
    assert (before.width, before.height, before.num_frames, before.time, before.loaded) == (64, 64, 5, None, False)
    assert before.memory.needs < 1e9
    begin = time.perf_counter()
    made.make(**SMALL)
    took = time.perf_counter() - begin
    after = made.outlook(request)
    assert after.loaded and after.time.after == 1 and 0 < after.time.seconds < took
    large = made.outlook(Request(prompt="", model="TurboWan2.1-T2V-14B-720P"))
    assert (large.width, large.num_frames) == (1280, 81) and large.memory.needs > 5e9
    with pytest.raises(InputError):
        made.outlook(replace(request, num_frames=6))


def test_a_model_without_colours_learns_them_from_its_first_clip(tmp_path, nano, monkeypatch):
    plain = replace(catalog.NANO, name="plain")
    monkeypatch.setitem(vars(plain), "preview", None)
    monkeypatch.setattr(nano, "spec", plain)
    made = Studio(tmp_path, load=lambda **_: nano)
    previews = []
    made.listen(lambda job: previews.append(job.preview))
    made.make(**SMALL)
    assert not any(previews) and made.has_preview(plain)
    made.make(**SMALL)
    assert any(previews)


def test_a_preview_shows_the_clip(nano):
    seen = []
    video = generation.generate(
        nano, "a large red circle on a white background", num_steps=2, seed=1,
        on_step=lambda *_: seen.append(preview.preview(nano.scheduler.denoised, catalog.NANO.preview)),
    )  # fmt: skip
    cells = video.frames[1:].reshape(6, 4, 16, 8, 16, 8, 3).mean((1, 3, 5))
    for frames in seen:
        assert frames.shape == (7, 16, 16, 3) and frames.dtype == np.uint8
    assert np.abs(seen[-1][1:] - cells).mean() < 8
    assert np.abs(seen[0][1:] - cells).mean() < 25  # the first step's guess, not its noise


def test_fit_preview_finds_the_map():
    import torch

    torch.manual_seed(0)
    latents = torch.randn(1, 4, 3, 2, 5)
    factors = [[10.0, 0, 3], [0, 20, 0], [5, 5, 5], [-9, 0, 8], [128, 100, 120]]
    small = preview.preview(latents, factors)
    frames = small.repeat(8, 1).repeat(8, 2).repeat(4, 0)[3:]
    assert np.abs(np.array(preview.fit_preview(latents, frames)) - factors).max() < 1


def test_last_frame(tmp_path):
    frames = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (0, 100, 200)])
    path = mp4.write_mp4(tmp_path / "clip.mp4", frames, 8)
    assert np.abs(np.asarray(mp4.last_frame(path)).astype(int) - 200).max() < 5
    path.write_text("<html>")
    with pytest.raises(InputError, match="cannot be read"):
        mp4.last_frame(path)
