"""Temporary files: those of a process that was killed go at the next start, those of a living one stay."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from turbo_nb.machine import atomic

WRITER = """
import sys, time
from turbo_nb.machine import atomic
with atomic.temporary(sys.argv[1]) as path, atomic.temporary_folder(path.parent) as folder:
    for file in (path, folder / "part"):
        file.write_text("half")
    print(path.name, folder.name, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """Another process with a temporary file and a temporary folder: the process, the file, the folder"""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a.mp4")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process, *(tmp_path / name for name in process.stdout.readline().split())
        process.kill()


@pytest.mark.skipif(atomic.fcntl is None, reason="files have no locks here")
@pytest.mark.parametrize("everything", [False, True])  # True is a batch's, beside which t2v may write a clip
def test_what_a_killed_process_left_goes_at_once_and_that_of_a_living_one_stays(writer, tmp_path, everything):
    process, path, folder = writer
    for one in (path, folder):
        os.utime(one, (1e9, 1e9))  # a long clip on a CPU writes nothing for hours
    atomic.sweep(tmp_path, everything=everything)
    assert path.read_text() == (folder / "part").read_text() == "half"
    process.send_signal(signal.SIGKILL)
    process.wait()
    for one in (path, folder):
        os.utime(one)
    atomic.sweep(tmp_path, everything=everything)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("why", ["another machine", "no locks"])
def test_without_a_lock_the_age_decides(tmp_path, monkeypatch, why):
    with atomic.temporary(tmp_path / "a.mp4") as path:
        if why == "no locks":
            monkeypatch.setattr(atomic, "fcntl", None)
        else:
            path = path.rename(path.with_name(path.name.replace(atomic.this_boot(), "0" * 8)))
        for age, stays in ((60, True), (2 * atomic.ABANDONED, False)):
            os.utime(path, (time.time() - age,) * 2)
            atomic.sweep(tmp_path)
            assert path.exists() == stays
        path.touch()
        atomic.sweep(tmp_path, everything=True)
        assert not path.exists()


def test_a_file_that_a_sweep_took_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    taken = []

    def flock(file, operation):
        if not taken:
            (path,) = tmp_path.iterdir()
            taken.append(path)
            path.unlink()

    if atomic.fcntl is not None:
        monkeypatch.setattr(atomic.fcntl, "flock", flock)
        with atomic.temporary(tmp_path / "a.mp4") as path:
            assert path.exists() and path != Path(taken[0])
