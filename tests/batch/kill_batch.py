"""Kill a batch (-9) at random moments, and check that no video is lost, made twice or left half-written.

`python tests/batch/kill_batch.py --kills 30` is the long run; test_batch.py does three. The model is loaded once. Every
run is a fork of that process, because then a kill costs no second load.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

PROMPTS = [
    f"a large {colour} {shape} on a black background"
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "triangle")
]
CLIP = {"num_frames": 1, "num_steps": 1}
LONGEST = 2.5


def start(pipeline, folder: Path) -> int:
    """Start a process that makes the missing videos; return its id"""
    from turbo_nb.batch import runner

    if process := os.fork():
        return process
    status = 1
    try:
        warnings.simplefilter("ignore")
        runner.run(PROMPTS, pipeline, folder, **CLIP)
        status = 0
    finally:
        os._exit(status)


def videos(folder: Path) -> dict[str, tuple[int, str]]:
    """Return by final name when a video was written, in ns, and the hash of its bytes"""
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.glob("[!.]*.mp4")
    }


def check(folder: Path, before: dict) -> dict:
    """Return the folder's videos; assert that they are whole, that earlier ones stay, and what the manifest has"""
    from turbo_nb.batch.manifest import MANIFEST
    from turbo_nb.video import mp4

    manifest = folder / MANIFEST
    lines = manifest.read_text().splitlines() if manifest.exists() else []  # before the videos, which a run may add
    now = videos(folder)
    assert now.items() >= before.items(), "a finished video was lost or made again"
    for name in now:
        assert mp4.read_frames(folder / name, 128, 128).shape == (1, 128, 128, 3), f"{name} is not whole"
        assert name.startswith(mp4.read_metadata(folder / name)["job"])
    done = [record["id"] for record in map(json.loads, lines) if record["status"] == "done"]
    assert len(done) == len(set(done)), "the manifest has a video twice"
    assert {name[:12] for name in now} >= set(done), "the manifest has a video that is not there"
    return now


def kill_often(pipeline, folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill `kills` runs, then let the last one end. A batch that ends is followed by one in a new folder.

    Every kill comes within LONGEST seconds of the run's start, in which a few videos are made.
    """
    chance = random.Random(seed)
    begin, done, count = time.monotonic(), 0, {"kills": 0, "batches": 0, "videos": 0, "partial files": 0}
    while not done:
        place, seen = folder / str(count["batches"]), {}
        while True:
            process, born = start(pipeline, place), time.monotonic()
            last = count["kills"] == kills
            moment = float("inf") if last else born + chance.uniform(0, LONGEST)
            while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0) and time.monotonic() < moment:
                time.sleep(0.002)
            if ended == (0, 0):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                count["kills"] += 1
            else:
                assert ended[1] == 0, f"a run ended with status {ended[1]}"
            time.sleep(0.05)  # ffmpeg ends with its input
            count["partial files"] += len(list(place.glob(".*.mp4")))
            seen = check(place, seen)
            if ended != (0, 0):
                break
        assert len(seen) == len(PROMPTS) and not list(place.glob(".*.mp4"))
        count["batches"] += 1
        count["videos"] += len(seen)
        done = last
    return count | {"seconds": round(time.monotonic() - begin)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import torch

    import turbo_nb

    torch.set_num_threads(1)  # threads do not live through a fork
    with tempfile.TemporaryDirectory() as temporary:
        nano = turbo_nb.load_pipeline("nano", device="cpu")
        print(kill_often(nano, Path(temporary), arguments.kills, arguments.seed), file=sys.stderr)
