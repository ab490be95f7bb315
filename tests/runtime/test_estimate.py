"""The time of a clip: from this machine's rows, scaled, or a first guess, whatever the file holds."""

import json
from types import SimpleNamespace

import pytest
import torch

import turbo_nb
from turbo_nb import catalog, generation, records
from turbo_nb.machine import environment, probe
from turbo_nb.runtime import estimate
from turbo_nb.runtime.estimate import Row, work_of
from turbo_nb.settings import ClipSettings, resolve_clip

ARCH, HERE = catalog.ARCH_1_3B, estimate.machine("cpu")
WANTED = {
    "model": "small", "attention_type": "sla", "sla_topk": 0.1, "width": 832, "height": 480, "num_frames": 81,
    "num_steps": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path))
    return tmp_path


def row(steps=(2.0, 2.0, 2.0, 2.0), **more) -> Row:
    clip = {name: WANTED[name] for name in ("model", "attention_type", "width", "height", "num_frames", "num_steps")}
    clip |= {"machine": HERE, "timings": {"text": 1.0, "denoise": sum(steps) + 0.5, "decode": 3.0}} | more
    topk = None if clip["attention_type"] == "original" else 0.1
    work = work_of(ARCH, clip["width"], clip["height"], clip["num_frames"], topk)
    return Row(steps=steps, **{"work": work, "warm": True} | clip)


def ask(*rows: Row, **wanted):
    return estimate.estimate(WANTED | wanted, ARCH, device="cpu", known=rows)


def test_the_work_of_a_step_is_that_of_the_measured_models():
    tera = work_of(ARCH, 832, 480, 81, 0.1) / 1e12, work_of(catalog.ARCH_14B, 1280, 720, 81, 0.1) / 1e12
    assert tera == pytest.approx((82 + 19 + 3, 1810 + 468 + 32), rel=0.03)


def test_the_same_clip_takes_as_long_again():
    found = ask(row())
    assert found.seconds == pytest.approx(4 * 2 + 1 + 0.5 + 3) and (found.load, found.after) == (None, 1)
    assert str(found) == "about 12.5 s, from 1 earlier video here"
    assert str(ask(*[row()] * 3)) == "about 12.5 s, from 3 earlier videos here"


def test_steps_pixels_and_attention_scale_it():
    assert ask(row(), num_steps=2).seconds == pytest.approx(2 * 2 + 4.5)
    tokens, topk = work_of(ARCH, 1664, 480, 81, 0.1) / work_of(ARCH, 832, 480, 81, 0.1), 1.3
    assert 2 < tokens < 4  # attention grows with the square
    assert ask(row(), width=1664).seconds == pytest.approx(8 * tokens + 1 + 2 * 3.5)
    assert 12.5 < ask(row(), sla_topk=0.2).seconds < 8 * topk + 4.5
    dense = ask(row(attention_type="original"), attention_type="original", width=1664)
    assert dense.seconds > ask(row(), width=1664).seconds


def test_only_rows_of_the_same_kind_count():
    others = ({"machine": "another"}, {"model": "large"}, {"attention_type": "original"})
    assert [ask(row(**other)) for other in others] == [None, None, None]
    int8, plain = row((1.0,) * 4, quant_linear=True), row(quant_linear=False)
    assert ask(int8, plain, quant_linear=True).after == 1 and ask(int8, plain, quant_linear=None).after == 2
    slow = row((9.0,) * 4, memory_plan="group")
    assert ask(slow, row(memory_plan="resident"), memory_plan="resident").seconds == 12.5
    assert ask(slow, memory_plan="resident").seconds == pytest.approx(40.5)  # better than nothing


def test_clips_of_about_the_size_count_before_others():
    tiny = row((1.0,) * 4, width=64, height=64, num_frames=5)  # a launch takes as long for little work
    assert ask(tiny, row()).seconds == 12.5 and ask(tiny).seconds > 1000
    assert ask(tiny, row(), width=64, height=64, num_frames=5, num_steps=1).seconds < 6


def test_it_is_the_median_of_the_latest():
    compiled = row((30.0, 2.0, 2.0, 2.0), timings={"text": 9.0, "denoise": 36.5, "decode": 3.0, "load": 40.0})
    writing = row((), timings={"write": 0.25})
    found = ask(row(), writing, row(), compiled)
    assert found.seconds == pytest.approx(12.75) and (found.load, found.after) == (40.0, 3)
    assert ask(*[row((1.0,) * 4)] * 5, *[row((50.0,) * 4)] * 50).seconds == pytest.approx(8.5)
    assert ask(writing) is None


def test_clips_that_compiled_kernels_do_not_count_beside_warm_ones():
    cold = row((30.0, 2.5, 2.5, 2.5), warm=False, timings={"text": 9.0, "denoise": 38.0, "decode": 12.0, "load": 40.0})
    found = ask(row(), cold, cold, cold)
    assert found.seconds == pytest.approx(12.5) and (found.load, found.after, found.warm) == (40.0, 1, True)
    writing = row((), warm=False, timings={"write": 0.25})
    assert ask(writing, row(), cold).seconds == pytest.approx(12.75)  # writing compiles nothing


def test_a_clip_that_compiled_kernels_alone_gives_an_upper_limit():
    cold = row((30.0, 2.0, 2.2, 2.4), warm=False, timings={"text": 1.0, "denoise": 37.1, "decode": 12.0})
    found = ask(cold)
    assert found.seconds == pytest.approx(4 * 2.0 + 1.0 + 0.5 + 12.0) and not found.warm
    assert str(found) == "at most 21.5 s, from 1 earlier video here that compiled kernels, too"


def test_a_row_tells_whether_its_kernels_were_compiled_before(folder, monkeypatch):
    settings = WANTED | {"device": "cuda", "quant_linear": False, "memory_plan": "resident"}
    for device, warm in (("cuda", False), ("cuda", True), ("cpu", False)):
        estimate.remember(settings | {"device": device}, {"text": 1.0}, steps=[1.0], warm=warm)
    assert [one.warm for one in estimate.rows()] == [True, True, False]  # a CPU compiles nothing
    line = json.loads((folder / estimate.ROWS).read_text().splitlines()[1])
    del line["warm"]
    (folder / estimate.ROWS).write_text(json.dumps(line))
    assert [one.warm for one in estimate.rows()] == [False]  # of a version that did not tell


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "less than 0.1 s"), (0.04, "less than 0.1 s"), (0.05, "0.1 s"), (8.24, "8.2 s"), (90, "1.5 min")],
)
def test_seconds_in_words(seconds, words):
    assert estimate.in_words(seconds) == words


def test_videos_leave_rows_without_their_words(nano, folder, tmp_path):
    def outlook():
        clip = resolve_clip(ClipSettings(prompt="a blue square", num_frames=5, num_steps=2), catalog.NANO)
        return generation.outlook(nano.turbo_nb, clip)

    before = outlook()
    nano.turbo_nb.load_seconds = 7.0
    for _ in range(2):
        video = turbo_nb.generate(nano, "a red circle", num_frames=5, num_steps=2)
    video.save(tmp_path / "clip.mp4")
    written, second, first = estimate.rows()
    assert (first.timings["load"], first.timings["decode"] > 0, len(first.steps)) == (7.0, True, 2)
    assert "load" not in second.timings and set(written.timings) == {"write"}
    plan = nano.turbo_nb.plan.name
    assert (first.model, first.quant_linear, first.memory_plan, first.machine) == ("nano", False, plan, HERE)
    after = outlook()
    assert before is None and after.after == 2 and after.load == 7.0 and after.warm
    made = sum(video.timings.values()) + written.timings["write"]
    assert made / 3 < after.seconds < made * 3
    assert "circle" not in (folder / estimate.ROWS).read_text()


def test_lines_that_cannot_be_read_are_passed_over(folder):
    good = json.dumps(records.write(row()))
    bad = ["", "{", "null", "[1]", '{"machine": 1}', good[:-20], good + good, good.replace("832", '"x"'),
           good.replace("3.0", "NaN"), good.replace("3.0", "-3"), good.replace("832", "0"),
           good.replace("3.0", "null"), good.replace("832", "1" + "0" * 400), good.replace("3.0", "1e300"),
           json.dumps(records.write(row(work=1e-320))), "[" * 9000, "9" * 9000,
           good.replace("small", "\x00")]  # fmt: skip
    (folder / estimate.ROWS).write_bytes("\n".join([*bad, good, "\udcff", ""]).encode(errors="surrogateescape"))
    assert estimate.rows() == [row(steps=[2.0] * 4)]


def test_a_row_is_read_once_a_process(folder, monkeypatch):
    (folder / estimate.ROWS).write_text(json.dumps(records.write(row(width=48, height=48))))
    (known,) = estimate.rows()
    monkeypatch.delattr(estimate.records, "read")  # which takes 0.3 ms a row, after each change on the page
    assert estimate.rows() == [known]


def test_the_file_stays_small_and_keeps_the_latest(folder, monkeypatch):
    monkeypatch.setattr(estimate, "MOST", 5000)
    settings = WANTED | {"device": "cpu", "quant_linear": False, "memory_plan": "resident"}
    for number in range(60):
        estimate.remember(settings, {"write": float(number)})
        assert (folder / estimate.ROWS).stat().st_size <= 5000
    kept = [one.timings["write"] for one in estimate.rows()]
    assert kept == [float(number) for number in range(59, 59 - len(kept), -1)] and len(kept) > 5
    assert [path.name for path in folder.iterdir()] == [estimate.ROWS]


def test_a_folder_that_cannot_be_written_costs_nothing(folder, monkeypatch, recwarn):
    (folder / "file").touch()
    monkeypatch.setenv("TURBO_NB_CACHE", str(folder / "file"))
    estimate.remember(WANTED | {"device": "cpu", "quant_linear": False, "memory_plan": "resident"}, {"write": 1.0})
    estimate.remember({"prompt": "of another package"}, {"write": 1.0})
    assert estimate.rows() == [] and not recwarn


def test_the_first_guess_is_by_the_gpu(monkeypatch):
    gpus = {"h100": (132, 9, 0), "a100": (108, 8, 0), "laptop": (40, 8, 9)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GPU")
    guesses, nano = [], catalog.NANO
    small = {"model": "nano", "sla_topk": nano.sla_topk, "width": 128, "height": 128, "num_frames": 25}
    for count, major, minor in gpus.values():
        gpu = SimpleNamespace(multi_processor_count=count, major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        guesses.append(estimate.estimate(WANTED, ARCH, known=[]))
        assert str(estimate.estimate(WANTED | small, nano.arch, known=[])) == "about 0.3 s, a first guess"
    assert guesses[0].seconds == pytest.approx(4 * 0.189 + 0.630 + 0.090, rel=0.05)  # as measured
    assert guesses[0].seconds < guesses[1].seconds < guesses[2].seconds and guesses[0].load is None
    assert str(guesses[0]).endswith(" s, a first guess") and guesses[0].after == 0


def test_the_doctor_tells_it(nano, monkeypatch):
    from turbo_nb.checkup import fits

    monkeypatch.setattr(environment, "folder_size", lambda path: 0)
    spec = catalog.NANO
    clip = {"width": 128, "height": 128, "num_frames": 25, "num_steps": 4, "memory_plan": "resident"}
    settings = clip | {"model": "nano", "attention_type": "sla", "quant_linear": False, "device": "cpu"}
    work = work_of(spec.arch, 128, 128, 25, spec.sla_topk)
    estimate.remember(settings, {"denoise": 4.0}, steps=[1.0] * 4, work=work)
    times = {fit.model: fit.time for fit in fits.every_fit(probe.Machine(), 0, None)}
    assert times["nano"] == "about 4.0 s, from 1 earlier video here"
