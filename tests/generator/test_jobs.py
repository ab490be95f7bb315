"""Jobs in the background with nano: progress, preview, cancelling, errors in words, and finding them again."""

import io
import subprocess
import threading
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from turbo_nb import catalog, generation
from turbo_nb.batch import queue
from turbo_nb.errors import InputError, OutputError, TurboNbError, warn
from turbo_nb.files import hub
from turbo_nb.generator import choices
from turbo_nb.generator.jobs import JobRunner
from turbo_nb.generator.request import Request
from turbo_nb.machine import probe
from turbo_nb.pipeline import LoadedModel
from turbo_nb.runtime import estimate, plan
from turbo_nb.runtime.plan import GB
from turbo_nb.runtime.progress import STAGES
from turbo_nb.settings import LoadOptions, adaptive_size
from turbo_nb.video import mp4, preview

SMALLER, LARGER, I2V = "TurboWan2.1-T2V-1.3B-480P", "TurboWan2.1-T2V-14B-720P", "TurboWan2.2-I2V-A14B-720P"
SMALL = {"prompt": "a large red circle", "num_frames": 5, "num_steps": 2, "resolution": "64x64", "seed": 3}


@pytest.fixture
def made(tmp_path, nano):
    """A runner that need not load nano again"""
    return JobRunner(tmp_path / "clips", load=lambda *_, **__: nano)


def test_a_clip_is_made_and_found_again(made):
    events = []
    made.listen(lambda job: events.append((job.state, job.stage, job.done, job.progress.total, bool(job.preview))))
    made.submit(Request.of(**SMALL))
    job = made.wait(60)
    assert (job.state, job.error) == ("finished", "")
    order = list(dict.fromkeys(stage for _, stage, *_ in events))
    assert order == list(STAGES)
    assert events[0][0] == "waiting" and events[-1] == ("finished", "write", 0, 0, False)
    assert ("running", "denoise", 1, 2, True) in events and ("running", "decode", 1, 5, True) in events
    found = JobRunner(made.gallery.folder).gallery.clips()
    timings, steps = job.clip.record.timings, job.clip.record.steps
    assert set(timings) == {"load", "text", "denoise", "decode", "write"} and len(steps) == 2
    timings.pop("write")
    assert found == [job.clip]
    assert found[0].settings["seed"] == 3 and found[0].record.machine == estimate.machine("cpu")


def test_the_same_folder_is_the_same_runner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert JobRunner.of("clips") is JobRunner.of(tmp_path / "clips")
    assert JobRunner.of("clips") is not JobRunner.of("others")


@pytest.mark.parametrize("folder", [None, 7, "", [], "a\0b"], ids=repr)
def test_a_folder_that_is_not_a_path_is_an_input_error(folder):
    with pytest.raises(InputError, match=r"(folder|path) is .*Expected a path"):
        JobRunner.of(folder)
    with pytest.raises(InputError, match=r"path is .*Expected"):
        mp4.read_metadata(folder)


def test_a_folder_with_too_long_a_name_has_no_jobs(tmp_path):
    assert JobRunner(tmp_path / ("x" * 300)).left_over() == 0


def test_the_model_is_loaded_anew_only_where_it_must_be(tmp_path, nano):
    loads = []
    made = JobRunner(tmp_path, load=lambda resolved, **_: loads.append(resolved.attention_type) or nano)
    for more in ({}, {"sla_topk": 0.5}, {"model": "nano"}, {"attention_type": "original"}):
        made.make(**SMALL | more)
    assert loads == ["sla", "original"]
    assert [run.settings["sla_topk"] for run in made.gallery.clips()] == [0.15, 0.15, 0.5, 0.15]


def test_a_model_whose_ranks_have_ended_is_loaded_anew(tmp_path, nano, monkeypatch):
    loads = []
    made = JobRunner(tmp_path, load=lambda resolved, **_: loads.append(resolved) or nano)
    made.make(**SMALL)
    monkeypatch.setattr(nano.turbo_nb, "team", SimpleNamespace(failure="rank 1 ended by SIGKILL."))
    made.submit(Request.of(**SMALL))
    made.wait(60)
    assert len(loads) == 2


def test_a_random_seed_is_recorded(made):
    seeds = {made.make(**SMALL | {"seed": None}).settings["seed"] for _ in range(2)}
    assert len(seeds) == 2 and made.job.request.clip.seed in seeds


def test_cancel_ends_the_run_after_the_step_it_is_at(made):
    stop = made.listen(lambda job: (job.stage, job.done) == ("denoise", 1) and made.cancel())
    job = made.submit(Request.of(**SMALL | {"num_steps": 4}))
    made.wait(60)
    assert (job.state, job.stage, job.done) == ("cancelled", "denoise", 1)
    assert made.gallery.clips() == []
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
    made.submit(Request.of(**SMALL))
    assert made.wait(60).state == "cancelled" and [path.name for path in made.gallery.folder.iterdir()] == [".queue"]


@pytest.fixture
def slow(tmp_path, nano):
    """A runner that waits for `go` before its first clip"""
    go = threading.Event()

    def load(*_, **__):
        go.wait(30)
        return nano

    made = JobRunner(tmp_path / "clips", load=load)
    made.go = go
    yield made
    go.set()
    made.wait(60)


def test_jobs_wait_in_order(slow):
    request = Request.of(**SMALL)
    added = slow.submit_all(request.spread(["a red circle", "a blue square"], 2))
    assert [(job.request.clip.prompt, job.request.clip.seed) for job in added] == [
        ("a red circle", 3), ("a red circle", 4), ("a blue square", 3), ("a blue square", 4)
    ]  # fmt: skip
    assert slow.jobs == added
    slow.cancel(added[1])
    assert slow.jobs == [added[0], *added[2:]] and added[1].state == "cancelled"
    slow.go.set()
    slow.wait(60)
    assert [job.state for job in added] == ["finished", "cancelled", "finished", "finished"] and slow.jobs == []
    assert [clip.record.prompt for clip in reversed(slow.gallery.clips())] == [
        "a red circle", "a blue square", "a blue square"
    ]  # fmt: skip
    assert slow.submit(request).state in ("waiting", "running")  # the worker starts again


def test_clear_leaves_the_running_job(slow):
    added = slow.submit_all(Request.of(**SMALL | {"seed": None}).spread(["a red circle"], 3))
    assert len({job.request.clip.seed for job in added}) == 3
    while not added[0].running:
        time.sleep(0.01)
    slow.clear()
    assert slow.jobs == added[:1]
    slow.go.set()
    slow.wait(60)
    assert [job.state for job in added] == ["finished", "cancelled", "cancelled"]


def test_a_job_that_failed_stays_with_its_reason(tmp_path, nano):
    made = JobRunner(tmp_path, load=lambda *_, **__: nano)
    generate = made._generate
    made._generate = lambda *_, **__: 1 / 0
    failed = made.submit(Request.of(**SMALL))
    made.wait(60)
    made._generate = generate
    assert made.jobs == [failed] and "ZeroDivisionError" in failed.error
    assert made.make(**SMALL).path.exists() and made.jobs == [failed]
    made.forget(failed)
    assert made.jobs == []


def test_one_wrong_job_of_several_adds_none(made):
    wrong = replace(Request.of(**SMALL), load=LoadOptions(model="nona"))
    with pytest.raises(InputError, match="unknown model"):
        made.submit_all([Request.of(**SMALL), wrong])
    assert made.jobs == [] and made.job is None


def test_another_kernel_goes_on_with_the_queue(slow, nano, tmp_path):
    image = np.full((64, 64, 3), 200, np.uint8)
    kept = slow._kept(image)
    assert kept.endswith(".png") and slow._kept(image) == kept and slow._kept("cat.png") == "cat.png"
    added = slow.submit_all(Request.of(**SMALL | {"seed": 2**60, "sla_topk": 0.005}).spread(["a red circle"], 3))
    while not added[0].running:
        time.sleep(0.01)
    later = JobRunner(tmp_path / "clips", load=lambda *_, **__: nano)
    assert later.left_over() == 0
    rows = slow._rows.path.read_bytes()  # as a kernel that is killed leaves them
    slow.clear()
    slow.cancel()
    slow.go.set()
    slow.wait(60)
    slow._rows.path.write_bytes(rows)
    slow._rows.close()
    assert later.left_over() == 3
    taken = later.take_over()
    assert later.left_over() == 0 and [job.request for job in taken] == [job.request for job in added]
    later.wait(60)
    assert [job.state for job in taken] == ["finished"] * 3
    assert next(clip.record.seed for clip in later.gallery.clips()) == 2**60 + 2


def test_a_folder_that_takes_no_rows_still_makes_clips(made, monkeypatch):
    monkeypatch.setattr(queue, "append_row", lambda *_: (_ for _ in ()).throw(OutputError("full")))
    assert made.make(**SMALL).path.exists()


def test_a_page_that_cannot_show_a_job_does_not_end_it(made):
    made.listen(lambda job: 1 / 0)
    assert made.make(**SMALL).path.exists() and made.make(**SMALL).path.exists()


def test_nothing_is_downloaded_without_being_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda *_, **__: pytest.fail("downloads"))
    made = JobRunner(tmp_path)
    request = Request.of("x", model=SMALLER)
    assert made.choices.outlook(request).to_fetch == pytest.approx(2.6e9 + 11.4e9 + 0.25e9, rel=0.1)
    with pytest.raises(InputError, match=r"not downloaded .* Download it first"):
        made.submit(request)
    assert made.jobs == []


def test_wrong_settings_raise_before_anything_starts(made):
    for wrong, words in [
        ({"prompt": " "}, "prompt is ' '"),
        ({"num_frames": 6}, "4n"),
        ({"sla_topk": 0.0}, "above 0"),
        ({"model": "nona"}, "unknown model"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "text alone"),
    ]:
        with pytest.raises(InputError, match=words):
            made.submit(Request.of(**SMALL | wrong))
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

    made = JobRunner(tmp_path, load=lambda *_, **__: nano, generate=fails)
    with pytest.raises(TurboNbError, match=words):
        made.make(**SMALL)
    assert made.job.state == "failed" and bool(made.job.trace) == has_trace


def test_remarks_of_generate_are_notes(made):
    made.make(**SMALL | {"prompt": "a cat"})
    assert ["only knows moving shapes" in note for note in made.job.notes] == [True]


def test_the_outlook_knows_size_memory_and_earlier_runs(made, tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path / "cache"))
    request = Request.of(**SMALL)
    before = made.choices.outlook(request)
    assert (before.width, before.height, before.num_frames, before.time, before.loaded) == (64, 64, 5, None, False)
    assert before.memory.needs < 1e9
    begin = time.perf_counter()
    made.make(**SMALL)
    took = time.perf_counter() - begin
    after = made.choices.outlook(request)
    assert after.loaded and after.time.after == 1 and 0 < after.time.seconds < took
    large = made.choices.outlook(Request.of("x", model="TurboWan2.1-T2V-14B-720P"))
    assert (large.width, large.num_frames) == (1280, 81) and large.memory.needs > 5e9
    with pytest.raises(InputError):
        made.choices.outlook(Request.of("x", model="nano", boundary=0.9))


def test_the_outlook_of_an_image_keeps_its_aspect(made):
    request = Request.of("x", model=I2V, adaptive_resolution=True)
    outlook = made.choices.outlook(request, (500, 1000))
    assert (outlook.width, outlook.height) == adaptive_size(1280 * 720, 500, 1000)


def test_a_model_without_colours_learns_them_from_its_first_clip(tmp_path, nano, monkeypatch):
    monkeypatch.setitem(vars(catalog.NANO), "preview", None)
    made = JobRunner(tmp_path, load=lambda *_, **__: nano)
    previews = []
    made.listen(lambda job: previews.append(job.preview))
    assert made.choices.outlook(Request.of(**SMALL)).has_preview
    clip = made.make(**SMALL)
    with Image.open(io.BytesIO(next(filter(None, reversed(previews))))) as shown:
        shown.seek(1)
        small = np.asarray(shown.convert("RGB")).astype(float)
    frames = mp4.read_frames(clip.path, 64, 64)[1:5].astype(float)
    assert np.abs(small - frames.mean(0).reshape(8, 8, 8, 8, 3).mean((1, 3))).mean() < 20


def test_a_plan_that_offloads_has_its_preview_after_the_first_clip(tmp_path, nano, monkeypatch):
    monkeypatch.setitem(vars(catalog.NANO), "preview", None)
    made = JobRunner(tmp_path, load=lambda *_, **__: nano)
    monkeypatch.setattr(nano.turbo_nb, "plan", replace(nano.turbo_nb.plan, offload="group"))
    previews = []
    made.listen(lambda job: previews.append(job.preview))
    made.make(**SMALL)
    assert not any(previews)
    made.make(**SMALL)
    assert any(previews)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(gigabytes, (model, int8), …): a GPU with so much free memory, and those models in the cache.

    Returns what holds the free bytes, so that a test can change them.
    """

    def make(gigabytes, *downloaded):
        known, free = {catalog.find(name).needs(quantized) for name, quantized in downloaded}, {"cuda": gigabytes * GB}
        monkeypatch.setattr(probe, "device_of", lambda device: "cuda" if device == "auto" else device)
        monkeypatch.setattr(probe, "free_memory", lambda device: free.get(device, 500 * GB))
        monkeypatch.setattr(plan, "fused_on", lambda device: True)
        monkeypatch.setattr(hub, "cached", lambda files: ["here"] if files in known else None)
        return free

    return make


class FakeModels:
    """Stands in for `pipeline.load` and `generate`: a model takes GPU memory, and gives it back when the next comes"""

    def __init__(self, free: dict, nano):
        self.free, self.nano, self.loaded, self.used = free, nano, [], []

    def load(self, resolved, *, clip, **_):
        self.loaded.append(resolved)
        self.free["cuda"] -= 30 * GB
        made = SimpleNamespace(transformer=self.nano.transformer, vae=self.nano.vae)
        made.turbo_nb = LoadedModel(resolved=resolved, pipeline=made, prompt_encoder=None, plan=resolved.plan(clip))
        return made

    def generate(self, pipeline, prompt, **_):
        self.used.append(pipeline.turbo_nb.spec.name)
        raise TurboNbError("enough")

    def make(self, runner: JobRunner, **options) -> None:
        runner.submit(Request.of("x", **options), download=True)
        runner.wait(60)


@pytest.mark.parametrize(("first", "second"), [("auto", SMALLER), (SMALLER, "auto")])
def test_auto_stays_what_it_was_after_loading(tmp_path, gpu, nano, first, second):
    free = gpu(48, (SMALLER, False), (LARGER, False))
    models = FakeModels(free, nano)
    runner = JobRunner(tmp_path, load=models.load, generate=models.generate)
    names = {"auto": LARGER, SMALLER: SMALLER}
    models.make(runner, model=first)
    assert runner.choices.resolve(LoadOptions(model="auto")).spec.name == LARGER
    assert [runner.choices.outlook(Request.of("x", model=name)).loaded for name in (first, second)] == [True, False]
    models.make(runner, model=names[first])  # the same model by its name: nothing to load
    assert len(models.loaded) == 1
    models.make(runner, model=second)
    assert models.used == [names[first], names[first], names[second]]
    assert [one.spec.name for one in models.loaded] == [names[first], names[second]]


def test_memory_of_the_loaded_model_counts_as_free_for_the_next(tmp_path, gpu, nano):
    free = gpu(48, (SMALLER, False), (LARGER, False))
    models = FakeModels(free, nano)
    runner = JobRunner(tmp_path, load=models.load, generate=models.generate)
    models.make(runner)
    assert free["cuda"] == 18 * GB
    assert runner.choices.outlook(Request.of("x")).memory.budget == 48 * GB
    assert runner.choices.outlook(Request.of("x", model=SMALLER)).memory.budget == 48 * GB
    free["cuda"] = 40 * GB  # given back, and another process took some
    models.make(runner, model=SMALLER)
    assert models.loaded[1].memory == 40 * GB


def test_the_memory_option_of_a_job_does_not_limit_later_choices(tmp_path, gpu, nano):
    models = FakeModels(gpu(48, (SMALLER, False), (LARGER, False)), nano)
    runner = JobRunner(tmp_path, load=models.load, generate=models.generate)
    models.make(runner, model="auto", memory=8e9)
    assert models.loaded[0].memory == 8e9
    later = runner.choices.resolve(LoadOptions(model="auto"))
    assert (later.memory, later.spec.name) == (48 * GB, LARGER)
    assert runner.choices.resolve(LoadOptions(model="auto", memory=8e9)).memory == 8e9


def test_cuda_and_the_current_gpu_by_its_index_are_one_device(tmp_path, gpu, nano):
    free = gpu(48, (SMALLER, False))
    models = FakeModels(free, nano)
    runner = JobRunner(tmp_path, load=models.load, generate=models.generate)
    models.make(runner, model=SMALLER, device="cuda")
    free |= {"cuda:0": free["cuda"], "cuda:1": 40 * GB}
    budgets = [runner.choices.resolve(LoadOptions(model=SMALLER, device=f"cuda:{index}")).memory for index in (0, 1)]
    assert budgets == [48 * GB, 40 * GB]
    outlooks = [runner.choices.outlook(Request.of("x", model=SMALLER, device=f"cuda:{index}")) for index in (0, 1)]
    assert [outlook.loaded for outlook in outlooks] == [True, False]
    models.make(runner, model=SMALLER, device="cuda:0")
    assert len(models.loaded) == 1


def test_the_outlook_takes_the_memory_of_the_files_that_are_here(tmp_path, gpu):
    needs = {}
    for quantized in (False, True):
        gpu(500, (LARGER, quantized))
        needs[quantized] = JobRunner(tmp_path).choices.outlook(Request.of("x", model=LARGER)).memory.needs
    assert needs[True] < needs[False] - 10 * GB


def test_a_choice_is_resolved_once_and_a_failed_load_forgets_it(tmp_path, monkeypatch):
    calls, resolve = [], choices.resolve
    monkeypatch.setattr(choices, "resolve", lambda options, **_: calls.append(options) or resolve(options))

    def fails(*_, **__):
        raise TurboNbError("damaged")

    runner = JobRunner(tmp_path, load=fails)
    for topk in (0.1, 0.2, None):
        runner.choices.outlook(Request.of("x", model="nano", sla_topk=topk))
    assert len(calls) == 1
    runner.submit(Request.of("x", model="nano"))
    assert runner.wait(60).error == "damaged"
    runner.choices.resolve(LoadOptions(model="nano"))
    assert len(calls) == 2


def test_what_auto_would_rather_take_is_a_note(tmp_path, gpu):
    gpu(48)
    runner = JobRunner(tmp_path)
    for _ in range(2):
        (note,) = runner.choices.outlook(Request.of("x", model="auto")).notes
        assert "which is not downloaded" in note


def test_overlapping_jobs_leave_the_filters_of_warnings_alone(tmp_path):
    begun, go = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def runner(number: int) -> JobRunner:
        def load(*_, **__):
            begun[number].set()
            go[number].wait(30)
            warn(f"warning of {number}")
            warnings.warn("of a library", DeprecationWarning, stacklevel=1)
            raise TurboNbError("enough")

        return JobRunner(tmp_path / str(number), load=load)

    runners = [runner(0), runner(1)]
    before = warnings.filters[:], warnings.showwarning, warnings._showwarnmsg_impl
    for number in (0, 1):
        runners[number].submit(Request.of("a red circle"))
        assert begun[number].wait(30)
    for number in (0, 1):  # the first to begin ends while the second is at work
        go[number].set()
        assert runners[number].wait(30).notes == [f"warning of {number}"]
    assert (warnings.filters[:], warnings.showwarning, warnings._showwarnmsg_impl) == before


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
    for options in (("-pix_fmt", "yuv420p10le"), ("-pix_fmt", "gray"), ("-f", "lavfi", "-i", "anullsrc=d=20")):
        other = tmp_path / "other.mp4"
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-i", path, *options, other], check=True)
        assert np.abs(np.asarray(mp4.last_frame(other)).astype(int) - 200).max() < 5, options
    path.write_text("<html>")
    with pytest.raises(InputError, match="cannot be read"):
        mp4.last_frame(path)
