"""Tables: numbers for reading, and HTML that a screen reader can follow."""

import numpy as np
import pytest

from turbo_nb.checkup import tables
from turbo_nb.checkup.tables import Shown
from turbo_nb.generation import Video
from turbo_nb.records import VideoRecord

RECORD = VideoRecord(
    model="nano", prompt="<red>", seed=3, ode=True, sla_topk=0.15, timings={"text": 0.0098, "denoise": 2.5633},
    steps=[1.28, 1.283], peaks={"denoise": 1.5 * 2**30}, cost=0.00425,
)  # fmt: skip


def cells(shown):
    ((_, _, rows),) = shown.tables()
    return {row[0]: row[1:] for row in rows}


def test_html_has_captions_scopes_and_lines():
    page = Shown((("A & B", ("name", "what"), [("one", "first\n<second>")]),))._repr_html_()
    assert "<caption>A &amp; B</caption>" in page and "first<br>&lt;second&gt;" in page
    assert page.count('<th scope="col">') == 2 and '<th scope="row">one</th>' in page


def test_times_of_a_clip_have_units(monkeypatch):
    video = Video(frames=np.zeros((1, 8, 8, 3), np.uint8), record=RECORD)
    monkeypatch.delenv("TURBO_NB_PRICE_PER_HOUR", raising=False)
    assert cells(tables.clip_times(video)) == {
        "text": ("0.01 s", ""),
        "denoise": ("2.56 s", "1.5 GiB"),
        "all": ("2.57 s", ""),
    }
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "7.2")
    assert cells(tables.clip_times(video))["all"] == ("2.57 s, $0.0051", "")


@pytest.mark.parametrize("record", [RECORD, vars(RECORD)], ids=["record", "mapping"])
def test_details_leave_out_what_is_not_set(record):
    shown = {name: value for name, (value,) in cells(tables.details(record)).items()}
    assert shown["ode"] == "yes" and shown["seed"] == "3" and shown["sla_topk"] == "0.15"
    assert shown["timings"] == "text 0.01 s, denoise 2.56 s" and shown["steps"] == "1.28 s, 1.28 s"
    assert shown["peaks"] == "denoise 1.5 GiB" and shown["cost"] == "$0.0043"
    assert not shown.keys() & {"image", "versions", "boundary", "machine"}


def test_a_video_is_shown_without_its_pixels():
    shown = repr(Video(frames=np.zeros((1, 8, 8, 3), np.uint8), record=RECORD))
    assert shown == f"Video(record={RECORD})"
