"""What verify prints of a GPU's speed: this clip, the same clip on an H100, and the launches that were timed."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest

from turbo_nb import generation
from turbo_nb.catalog import NANO
from turbo_nb.checkup import selftest, speed
from turbo_nb.ops.tuning import Launch, Measured
from turbo_nb.pipeline import LoadedModel

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h100.csv"
FAST, SLOW = Launch((1,), 4, 2), Launch((2,), 8, 2)


def test_the_numbers_of_the_h100_are_rows_of_the_results():
    with RESULTS.open(newline="") as file:
        rows = {(row["commit"][:7], row["work"].split(" ")[0], float(row["ms"])) for row in csv.DictReader(file)}
    for both in speed.H100.values():
        for (ms, commit), name in zip(both, ("step", "decode"), strict=True):
            assert (commit[:7], name, ms) in rows


@pytest.fixture
def found(monkeypatch):
    """The speed of nano on a GPU whose first step compiles"""
    video = SimpleNamespace(steps=[9.0, 0.002, 0.001, 0.003], timings={"decode": 0.055})
    attention = {"attention_type": "sla", "sla_topk": 0.15, "quant_linear": False}
    monkeypatch.setattr(LoadedModel, "of", lambda pipeline: SimpleNamespace(spec=NANO, attention=attention))
    asked = {}
    monkeypatch.setattr(generation, "generate", lambda pipeline, prompt, **more: (asked.update(more), video)[1])
    result = speed.measure(None)
    assert "num_frames" not in asked and asked["num_steps"] == speed.NUM_STEPS  # a clip of the model's own size
    return result


def test_the_first_step_does_not_count(found):
    assert found.step == pytest.approx(2.0) and found.decode == pytest.approx(55.0)
    assert found.clip == "128x128x25, sla, 16-bit linears" and found.h100 == (0.9135, 27.53)


def test_a_bug_report_carries_the_benchmark(found):
    launches = {("sla", (128, 128, 64)): Measured(FAST, {SLOW: 2.0, FAST: 1.0})}
    result = selftest.Result(
        model="nano", report=SimpleNamespace(to_dict=dict, only=lambda *_: SimpleNamespace(tables=list),
        environment=SimpleNamespace(packages=[]), backends=SimpleNamespace(libraries={})),
        checks=(), speed=found, launches=launches,
    )  # fmt: skip
    *_, (title, head, rows), (_, _, timed) = result.tables()
    assert title == "Speed of 128x128x25, sla, 16-bit linears" and head[1:3] == ("ms here", "ms on an H100")
    assert rows == [("a step", "2.0", "0.9", "2.2"), ("decode", "55.0", "27.5", "2.0")]
    assert timed == [("sla", "128x128x64", "1, 4 warps, 2 stages", "2.00, 1.00 *")]
    told = result.to_dict()
    assert told["speed"]["step"] == pytest.approx(2.0) and told["launches"] == timed


def test_a_model_that_was_not_measured_on_an_h100_says_so(found):
    assert speed.rows(speed.Speed(clip="", step=1.0, decode=2.0))[0] == ("a step", "1.0", "not measured", "")


def test_a_gpu_is_timed_after_its_clip_and_a_cpu_is_not(monkeypatch):
    monkeypatch.setattr(selftest, "load", lambda spec, quantized, device, into: (into.append(object()), (True, ""))[1])
    monkeypatch.setattr(selftest, "clip", lambda pipeline: (True, ""))
    monkeypatch.setattr(selftest, "_model", lambda pipeline: SimpleNamespace(plan=SimpleNamespace(offload="group")))
    monkeypatch.setattr(speed, "measure", lambda pipeline: speed.Speed(clip="a clip", step=1.0, decode=2.0))
    measured = []
    names = [check.name for check in selftest.check_model(NANO, False, "cuda", measured)]
    assert names == ["load", "clip", "speed"] and measured[0].step == 1.0
    names = [check.name for check in selftest.check_model(NANO, False, "cpu", measured)]
    assert names == ["load", "clip"] and len(measured) == 1
