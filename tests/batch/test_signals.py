"""Signals to a batch with Ray's real actors: nothing stays behind, and no clip is lost or made twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_in

from turbo_nb import generation, pipeline
from turbo_nb.batch import manifest, runner
from turbo_nb.machine import atomic
from turbo_nb.video import mp4

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
PROMPTS = ["a quick circle", "a quick square", *(f"a slow circle {n}" for n in range(3))]
CLIP = ["--num-frames", "1", "--num-steps", "1", "--resolution", "16x16", "--device", "cpu", "--model", "nano"]


class Batch:
    """A batch in a process group of its own, with two actors."""

    def __init__(self, folder: Path):
        self.marks, self.out, self.list = folder / "marks", folder / "out", folder / "p.txt"
        self.marks.mkdir()
        self.list.write_text("\n".join(PROMPTS))

    def start(self) -> subprocess.Popen:
        command = [sys.executable, stand_in.__file__, "batch", self.list, *CLIP, "--output-dir", self.out]
        return subprocess.Popen(
            [*command, "--workers", "2"], env=stand_in.environment(STAND_IN=str(self.marks)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def actors(self) -> list[int]:
        """Wait until both actors are in the middle of a clip; return their process ids"""
        return until(lambda: [int(one.name.split("-")[1]) for one in self.marks.glob("begun-*")], 2)

    def processes(self) -> list[int]:
        """Return the processes that belong to the batch: Ray's, actors and ffmpegs"""
        found, mark = [], f"STAND_IN={self.marks}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
            except OSError:  # it has ended
                continue
        return found

    def left(self) -> list[str]:
        return [path.name for path in self.out.glob(f"{atomic.PREFIX}*.mp4")]

    def videos(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.out.glob("[!.]*.mp4")}

    def finish(self, monkeypatch) -> None:
        """Run the batch to its end in this process, and check that it made what was missing, and nothing twice"""
        before = self.videos()
        assert len(before) == 2
        (self.marks / "go").touch()
        monkeypatch.setenv("STAND_IN", str(self.marks))
        monkeypatch.setattr(pipeline, "load", stand_in.load)
        monkeypatch.setattr(generation, "generate", stand_in.generate)
        load = {"model": "nano", "device": "cpu"}
        summary = runner.run(self.list, load, self.out, num_frames=1, num_steps=1, resolution="16x16")
        assert (summary.made, len(summary.done)) == (3, len(PROMPTS)) and self.left() == []
        assert self.videos().items() >= before.items()
        assert len(self.videos()) == len(PROMPTS) == len(manifest.read_manifest(self.out))
        assert all(mp4.read_frames(self.out / name, 16, 16).shape == (1, 16, 16, 3) for name in self.videos())


def until(value, wanted):
    """Wait until a function returns what is wanted, or that many things, and return it"""
    end = time.monotonic() + 500
    while (got := value()) != wanted and (not isinstance(got, list) or len(got) < wanted):
        assert time.monotonic() < end, got
        time.sleep(0.02)
    return got


def blocked(process: int) -> set[int]:
    """Return the signals that a process blocks"""
    status = (Path("/proc") / str(process) / "status").read_text()
    mask = int(status.split("SigBlk:")[1].split()[0], 16)
    return {number for number in range(1, 64) if mask >> (number - 1) & 1}


def shows_pages(process: int) -> bool:
    """Return whether a process belongs to the pages of ray[default], which no clip needs"""
    command = (Path("/proc") / str(process) / "cmdline").read_bytes()
    return b"dashboard.py" in command or b"multiprocessing." in command


@pytest.fixture
def batch(tmp_path):
    made = Batch(tmp_path)
    yield made
    for process in made.processes():
        os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize(
    ("name", "to_all", "code"),
    [
        ("SIGTERM", False, 143),  # docker stop, a pod that ends
        ("SIGINT", True, 130),  # Ctrl-C, twice
        ("SIGKILL", False, -9),
    ],
)
def test_a_signal_ends_all_processes_and_loses_nothing(batch, monkeypatch, name, to_all, code):
    process = batch.start()
    actors = batch.actors()
    assert len(batch.left()) == 2  # both ffmpegs are at work
    group = {one for one in batch.processes() if os.getpgid(one) == process.pid} - {process.pid}
    assert group and not {*actors} & group  # the terminal's signals do not reach actors, and Ray's servers block them
    assert {os.getpriority(os.PRIO_PROCESS, one) for one in (process.pid, *actors)} == {os.nice(0)}
    assert all(blocked(one) >= {signal.SIGINT, signal.SIGHUP, signal.SIGQUIT} for one in group if not shows_pages(one))
    send = os.killpg if to_all else os.kill
    send(process.pid, getattr(signal, name))
    if to_all:
        time.sleep(0.3)
        send(process.pid, getattr(signal, name))
    text, errors = process.communicate()
    assert process.returncode == code and "Traceback" not in errors, (text, errors)
    until(lambda: not batch.processes(), True)
    batch.finish(monkeypatch)
