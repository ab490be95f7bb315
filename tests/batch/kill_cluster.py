"""Kill actors, nodes and drivers of batches on a Ray cluster of three nodes; no clip may be lost or made twice.

`python tests/batch/kill_cluster.py --kills 30` is the long run; test_ray.py does three. A batch that ends is followed
by one in a new folder. A killed node comes back, and a killed driver starts again. Only the actors of the head node
load the model, because its import takes 5 s. The others make grey clips, and finish none before the first real clip.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import stand_in
from kill_batch import CLIP, PROMPTS, check

KINDS = ("actor", "node", "driver")
PATIENCE = 300  # seconds without a new clip, after which the batch is taken for stuck


def real_clip() -> Path:
    """Return the file that is there once the first real clip is finished"""
    return Path(os.environ["STAND_IN"]) / "real"


def real() -> None:
    """Make real clips in this process, and mark them"""
    from turbo_nb import generation

    def marked(*arguments, generate=generation.generate, **options):
        video = generate(*arguments, **options)
        real_clip().touch()
        return video

    generation.generate = marked


def grey() -> None:
    """Make grey clips in this process, each with ffmpeg at work for a while"""
    stand_in.setup()

    def slow(*arguments, **options):
        video = stand_in.generate(*arguments, **options)
        while not real_clip().exists():
            time.sleep(0.02)
        time.sleep(0.3)
        return video

    stand_in.generation.generate = slow


class Batches:
    """Batches on a cluster whose processes carry a mark in their environment."""

    def __init__(self, folder: Path):
        sys.path.insert(0, str(Path(__file__).parents[1] / "quick"))
        from ray.cluster_utils import Cluster

        self.folder, self.mark = folder, f"STAND_IN={folder}"
        os.environ.update(stand_in.environment(STAND_IN=str(folder), **stand_in.hook("kill_cluster.real")))
        self.options = {"num_cpus": 1, "object_store_memory": 100 << 20}
        (Path(tempfile.gettempdir()) / "ray").mkdir(exist_ok=True)  # where Cluster writes its address in any case
        self.cluster = Cluster(initialize_head=True, head_node_args={**self.options, "temp_dir": str(folder / "ray")})
        self.options["env_vars"] = stand_in.hook("kill_cluster.grey")
        self.nodes = [self.cluster.add_node(**self.options) for _ in range(2)]

    def drive(self, place: Path) -> subprocess.Popen:
        """Start a driver that makes the missing videos of a folder"""
        command = [sys.executable, __file__, "--drive", self.cluster.address, "--folder", place]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def actors(self) -> list[int]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                ours = self.mark.encode() in (process / "environ").read_bytes().split(b"\0")
                if ours and b"ray::TurboNbActor" in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
            except OSError:  # it has ended
                continue
        return found

    def kill(self, kind: str, driver: subprocess.Popen, chance: random.Random) -> bool:
        """Kill one of a kind, if there is one; return whether there was"""
        if kind == "driver":
            driver.kill()
            driver.communicate()
        elif kind == "actor":
            if not (actors := self.actors()):
                return False
            os.kill(chance.choice(actors), signal.SIGKILL)
        else:
            node = self.nodes.pop(chance.randrange(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self.cluster.add_node(wait=False, **self.options))
        return True


def kill_often(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill, a random number of clips after the last kill, then let the last batch end"""
    chance, begin = random.Random(seed), time.monotonic()
    count = dict.fromkeys((*KINDS, "batches", "videos"), 0)
    batches = Batches(folder)
    order = [kind for n in range(kills) for kind in [KINDS[n % 3]]]
    chance.shuffle(order)
    try:
        while order or not count["batches"]:
            place, seen = folder / str(count["batches"]), {}
            driver, before, wanted, since = batches.drive(place), 0, chance.randint(1, 3), time.monotonic()
            while driver.poll() is None:
                time.sleep(0.02)
                now = len([*place.glob("[!.]*.mp4")])
                assert time.monotonic() - since < PATIENCE, f"no clip after {count}"
                if order and now >= min(before + wanted, len(PROMPTS) - 1) and batches.kill(order[0], driver, chance):
                    count[kind := order.pop(0)] += 1
                    seen, before, wanted, since = check(place, seen), now, chance.randint(1, 3), time.monotonic()
                    if kind == "driver":
                        driver = batches.drive(place)
            errors = driver.communicate()[1]
            assert driver.returncode == 0, errors
            seen = check(place, seen)
            assert len(seen) == len(PROMPTS) and not list(place.glob(".*.mp4"))
            count["batches"] += 1
            count["videos"] += len(seen)
    finally:
        batches.cluster.shutdown()
    return count | {"seconds": round(time.monotonic() - begin)}


def drive(address: str, folder: Path) -> None:
    """Make the videos of a batch on the cluster"""
    from turbo_nb.batch import runner

    load = {"model": "nano", "device": "cpu"}
    for _ in range(3):  # a job that was killed twice by chance has failed, and a second run makes it
        summary = runner.run(PROMPTS, load, folder, ray_address=address, workers=3, **CLIP)
        if not summary.failures:
            return
    raise SystemExit(f"failed: {summary.failed}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", help="the address of a cluster, for a driver alone")
    parser.add_argument("--folder", type=Path, help="of the driver")
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments.drive, arguments.folder)
    else:
        with tempfile.TemporaryDirectory(prefix="kill-", dir="/tmp") as temporary:
            print(kill_often(Path(temporary), arguments.kills, arguments.seed), file=sys.stderr)
