"""Signals to a batch with real worker processes: nothing stays behind, and no clip is lost or made twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for stand_in

from turbo_nb import generation, pipeline
from turbo_nb.batch import manifest, runner
from turbo_nb.machine import atomic
from turbo_nb.video import mp4

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
PROMPTS = ["a quick circle", "a quick square", *(f"a slow circle {n}" for n in range(3))]
CLIP = ["--num-frames", "1", "--num-steps", "1", "--resolution", "16x16", "--device", "cpu", "--model", "nano"]


class Batch:
    """A batch in a process group of its own, with two worker processes."""

    def __init__(self, folder: Path):
        self.marks, self.out, self.list = folder / "marks", folder / "out", folder / "p.txt"
        self.marks.mkdir()
        self.list.write_text("\n".join(PROMPTS))

    def start(self) -> subprocess.Popen:
        command = [sys.executable, Path(__file__).with_name("stand_in.py"), "batch", self.list, *CLIP]
        return subprocess.Popen(
            [*command, "--output-dir", self.out, "--workers", "2"], env=os.environ | {"STAND_IN": str(self.marks)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def workers(self) -> list[int]:
        """Wait until both workers are in the middle of a clip; return their process ids"""
        return until(lambda: [int(one.name.split("-")[1]) for one in self.marks.glob("begun-*")], 2)

    def processes(self) -> list[int]:
        """Return the processes that belong to the batch: workers, ffmpegs and Python's own helpers"""
        found, mark = [], f"STAND_IN={self.marks}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
            except OSError:  # it has ended
                continue
        return found

    def left(self) -> list[str]:
        return [path.name for path in self.out.glob(f"{atomic.PREFIX}*")]

    def videos(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.out.glob("[!.]*.mp4")}

    def finish(self, before: dict[str, int], monkeypatch) -> None:
        """Run the batch to its end in this process, and check that it made what was missing, and nothing twice"""
        import stand_in

        (self.marks / "go").touch()
        monkeypatch.setenv("STAND_IN", str(self.marks))
        monkeypatch.setattr(pipeline, "load", stand_in.load)
        monkeypatch.setattr(generation, "generate", stand_in.generate)
        load = {"model": "nano", "device": "cpu"}
        summary = runner.run(self.list, load, self.out, num_frames=1, num_steps=1, resolution="16x16")
        assert (summary.made, len(summary.done)) == (len(PROMPTS) - len(before), len(PROMPTS))
        monkeypatch.delenv("STAND_IN")
        self.check(before)

    def check(self, before: dict[str, int]) -> None:
        assert self.videos().items() >= before.items()
        assert len(self.videos()) == len(PROMPTS) == len(manifest.read_manifest(self.out))
        assert all(mp4.read_frames(self.out / name, 16, 16).shape == (1, 16, 16, 3) for name in self.videos())
        until(lambda: not self.processes(), True)
        assert self.left() == []


def until(value, wanted):
    """Wait until a function returns what is wanted, or that many things, and return it"""
    while (got := value()) != wanted and (not isinstance(got, list) or len(got) < wanted):
        time.sleep(0.02)
    return got


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
        ("SIGINT", True, 130),  # Ctrl-C
        ("SIGHUP", True, 129),  # a closed terminal
        ("SIGQUIT", True, 131),
        ("SIGKILL", False, -9),
    ],
)
def test_a_signal_ends_all_processes_and_loses_nothing(batch, monkeypatch, name, to_all, code):
    process = batch.start()
    batch.workers()
    assert len(batch.left()) == 2  # both ffmpegs are at work
    (os.killpg if to_all else os.kill)(process.pid, getattr(signal, name))
    text, errors = process.communicate()
    assert process.returncode == code and "Traceback" not in errors, (text, errors)
    until(lambda: not batch.processes(), True)
    assert batch.left() == []
    before = batch.videos()
    assert len(before) == 2
    batch.finish(before, monkeypatch)


def test_the_clip_of_a_killed_worker_is_made_once(batch):
    process = batch.start()
    first, _ = batch.workers()
    before = batch.videos()
    os.kill(first, signal.SIGKILL)
    (batch.marks / "go").touch()
    text, errors = process.communicate()
    assert process.returncode == 0 and "5 made, 0 there before, 0 failed" in text and "Traceback" not in errors, errors
    batch.check(before)
