"""Rows of a session's queue: a session that has ended leaves its unfinished jobs to the next one."""

import json

import pytest

from turbo_nb import settings
from turbo_nb.batch.queue import FOLDER, QueueFile, QueueRecord
from turbo_nb.errors import InputError
from turbo_nb.settings import ClipSettings, LoadOptions


def row(name: str, status: str = "waiting", prompt: str = "a red circle", **more) -> QueueRecord:
    return QueueRecord(id=name, status=status, clip={"prompt": prompt, "num_steps": 2} | more)


def test_the_next_session_finds_what_an_ended_one_left(tmp_path):
    first = QueueFile(tmp_path)
    for name, status in (("a", "waiting"), ("b", "waiting"), ("c", "waiting"), ("a", "done"), ("b", "running")):
        first.add(row(name, status))
    second = QueueFile(tmp_path)
    assert second.left_over() == []  # the first one is at work
    first.close()
    assert [one.id for one in second.left_over()] == ["b", "c"]
    taken = second.take_over()
    assert [one.id for one in taken] == ["b", "c"] and second.left_over() == []
    load, clip = taken[0].options()
    assert (clip.prompt, clip.num_steps, load) == ("a red circle", 2, LoadOptions())
    assert not first.path.exists()


@pytest.mark.parametrize(
    "line", ["", "{", "[]", '{"id": 5}', '{"id": "x", "status": "waiting"}',
             '{"id": "x", "status": "waiting", "clip": {"prompt": "x", "num_steps": 99}}',
             '{"id": "x", "status": "waiting", "clip": {"prompt": "x"}, "load": {"colour": 1}}',
             "[" * 5000 + "]" * 5000],
)  # fmt: skip
def test_foreign_rows_are_left_out(tmp_path, line):
    (tmp_path / FOLDER).mkdir()
    good = json.dumps({"id": "good", "status": "waiting", "clip": {"prompt": "x"}, "later": 1})
    (tmp_path / FOLDER / "old.jsonl").write_text(f"{line}\n{good}\n{line}")
    assert [one.id for one in QueueFile(tmp_path).left_over()] == ["good"]


def test_a_finished_session_leaves_no_file(tmp_path):
    first = QueueFile(tmp_path)
    first.add(row("a", "done"))
    first.close()
    assert QueueFile(tmp_path).left_over() == [] and list((tmp_path / FOLDER).iterdir()) == []
    assert QueueFile(tmp_path / "none").left_over() == []


def test_options_come_back_from_json(tmp_path):
    asked = LoadOptions(model=("a.pth", "b.pth"), loras=["style:0.8", ("high=other", 0.5)], sla_topk=0.005)
    clip = ClipSettings(prompt="红圆", image="~/cat.png", seed=2**60, resolution="128 × 128")
    for one in (asked, clip):
        data = json.loads(json.dumps(settings.asked(one)))
        assert settings.build_known(type(one), data) == (one, [])
    assert settings.asked(LoadOptions()) == {}
    assert settings.build_known(ClipSettings, {"seed": 1}) == (None, [])
    found, left_out = settings.build_known(ClipSettings, {"prompt": "x", "num_steps": 9, 5: 5})
    assert (found, left_out) == (ClipSettings(prompt="x"), ["num_steps", "5"])
    with pytest.raises(InputError):
        settings.build(ClipSettings, {"prompt": "x", "num_steps": 9})
