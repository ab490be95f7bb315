"""Clips in a row, and the page shown again and again, leave no widgets, threads or open files behind."""

import gc
import os
import threading
import time

import pytest
from ipywidgets.widgets import widget

from turbo_nb import presets
from turbo_nb.generator import widgets
from turbo_nb.generator.jobs import JobRunner
from turbo_nb.machine import mapped

FEW = 3  # clips or pages after which nothing may grow any more
SMALLEST = {"prompt": "a large red circle", "resolution": "32x32", "num_frames": 1, "num_steps": 1}


@pytest.fixture
def runner(tmp_path, nano, monkeypatch):
    monkeypatch.setattr(widgets, "TICK", 0.01)
    presets.remember(SMALLEST)
    made = JobRunner(tmp_path / "clips", load=lambda *_, **__: nano)
    monkeypatch.setitem(JobRunner._all, made.gallery.folder.resolve(), made)
    yield made
    if page := widgets._shown.pop(made, None):
        page.close()


def alive() -> dict[str, int]:
    """Count widgets, threads of this package, and open files, after those that are ending have ended"""
    deadline = time.monotonic() + 10
    while any(one.name == "turbo_nb page" for one in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    gc.collect()
    threads = sorted(one.name for one in threading.enumerate() if one.name.startswith("turbo_nb"))
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    return {"widgets": len(widget._instances), "threads": threads, "files": files}


def assert_nothing_more(before: dict[str, int]) -> None:
    """Require the counts of before, or fewer open files. On a busy machine a thread may still read one, so wait"""
    deadline = time.monotonic() + 30
    while (now := alive())["files"] > before["files"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert now == before | {"files": min(now["files"], before["files"])}


def test_clips_in_a_row_leave_nothing_behind(runner, monkeypatch):
    trims = []
    monkeypatch.setattr(mapped, "trim", lambda: trims.append(1))
    page = widgets.show(runner.gallery.folder, model="nano")
    counts = []
    for number in range(3 * FEW):
        page.form.prompt.text.value = f"a large red circle {number}"
        assert page.run.start()
        assert runner.wait(60).state == "finished"
        counts.append(alive())
    assert len(runner.gallery.clips()) == 3 * FEW
    assert_nothing_more(counts[FEW - 1])
    assert runner.jobs == []
    assert len(trims) == 3 * FEW  # memory that the allocator would keep


def test_pages_in_a_row_leave_nothing_behind(runner):
    runner.make(**SMALLEST)
    counts = []
    for _ in range(2 * FEW):
        page = widgets.show(runner.gallery.folder, model="nano")
        page.form.loras.add_row.click()
        page.run.show_error(ValueError("x"))
        counts.append(alive())
    assert_nothing_more(counts[FEW - 1])
    assert len(runner._listeners) == 1
