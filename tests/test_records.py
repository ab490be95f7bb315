"""Records are read from JSON of any origin: what does not fit is left out."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import pytest

from turbo_nb import records
from turbo_nb.records import VideoRecord, read, write


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    state: Literal["done", "failed"] = "done"
    seconds: float | None = None
    numbers: list[int] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    clip: VideoRecord | None = None


def test_what_was_written_is_read():
    video = VideoRecord(
        model="nano", prompt="红圆", seed=[1, 2], width=64, height=48, steps=[0.5], timings={"text": 1.0}
    )
    assert read(VideoRecord, json.loads(json.dumps(write(video)))) == video
    row = Row(name="a", seconds=2, clip=video)
    assert read(Row, json.loads(json.dumps(write(row)))) == row


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"name": "a", "colour": "red"}, Row(name="a")),
        ({"name": "a", "seconds": "long", "state": "odd"}, Row(name="a")),
        ({"name": "a", "seconds": float("nan")}, Row(name="a")),
        ({"name": "a", "seconds": 10**400}, Row(name="a")),
        ({"name": "a", "seconds": True}, Row(name="a")),
        ({"name": "a", "numbers": [1, "2"]}, Row(name="a")),
        ({"name": "a", "numbers": [True]}, Row(name="a")),
        ({"name": "a", "numbers": [10**400]}, Row(name="a")),
        ({"name": "a", "timings": {"text": 1, "odd": None}}, Row(name="a", timings={"text": 1.0})),
        ({"name": "a", "timings": [["text", 1]]}, Row(name="a")),
        ({"name": "a", "clip": {"seed": {}, "prompt": 3}}, Row(name="a", clip=VideoRecord())),
        ({"name": None}, None), ({}, None), ([], None), (None, None), ("name", None), (3, None),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_left_out(data, expected):
    assert read(Row, data) == expected


def test_every_field_of_a_video_may_be_foreign():
    for name in asdict(VideoRecord()):
        for value in (None, 3, "x", [], {}, [[]], {"a": {}}, float("inf"), 10**400):
            assert isinstance(read(VideoRecord, {name: value}), VideoRecord)


@pytest.mark.parametrize("opened", ['{"a":', "["])
def test_values_of_many_levels_are_left_out(opened):
    deep = json.loads(opened * 900 + "1" + {"[": "]"}.get(opened, "}") * 900)
    few = json.loads(opened * 20 + "1" + {"[": "]"}.get(opened, "}") * 20)
    video = read(VideoRecord, {"prompt": "x", "more": {"deep": deep, "few": few}})
    assert video == VideoRecord(prompt="x", more={"few": few})
    assert json.dumps(write(video))


def test_a_record_without_measurements_is_the_same_for_equal_clips():
    made = VideoRecord(prompt="x", job="1", versions={"torch": "2"})
    one = replace(made, timings={"text": 1.0}, steps=[0.5], peaks={"text": 9.0}, machine="H100", cost=0.1)
    assert one.without_measurements() == made


@pytest.mark.parametrize(("gpus", "words"), [(None, ""), (1, ""), (2, "2 GPUs"), (-1, "")])
def test_several_gpus_are_in_words(gpus, words):
    assert read(VideoRecord, {"gpus": gpus}).several_gpus == words


def test_empty_fields_are_not_written():
    assert write(VideoRecord(model="nano", prompt="x", seed=0, ode=False)) == {
        "model": "nano", "prompt": "x", "seed": 0, "num_steps": 4, "ode": False, "noise_device": "cpu",
    }  # fmt: skip
    assert records.read(VideoRecord, {}) == VideoRecord()
