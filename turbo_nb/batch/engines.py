"""Many prompts become videos, here or on every GPU of this machine; stopped at any moment, the next run goes on.

A job's id is the hash of what determines its video, and the video carries it. So what is done can be seen from the
folder alone: the manifest says it quickly, and a file that the manifest does not know yet says it itself.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING

from .. import generation, pipeline
from ..errors import InputError, OutputError, TurboNbError
from ..machine import environment
from ..video import mp4
from .jobs import _done, _found, _Task
from .manifest import _lock, _take

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
MAX_TRIES = 2  # worker processes that may die over one job


def _make_all(tasks: list[_Task], load, workers: int | None, folder: Path, lock: IO, on_progress) -> Iterator[dict]:
    """Records of the tasks as they are made"""
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; it is 1 or more")
    if not isinstance(load, dict):
        if workers is not None and workers > 1:
            raise InputError(f"workers is {workers}, and a loaded pipeline is one; give the model's name or arguments")
        yield from _make_here(tasks, load)
    elif tasks:
        gpus = _gpus(load.get("device", "auto"))
        if gpus and workers is not None and workers > gpus:
            raise InputError(f"workers is {workers}, and there is one a GPU, of which torch sees {gpus} here")
        workers = min(workers or max(1, gpus), len(tasks))
        largest = max((task.settings for task in tasks), key=lambda s: s.width * s.height * s.num_frames)
        load = {
            "clip": (largest.width, largest.height, largest.num_frames),
            "prompts": list(dict.fromkeys(task.prompt for task in tasks)),
        } | load
        if workers == 1:
            yield from _make_here(tasks, pipeline.load_pipeline(**{"on_progress": on_progress} | load))
        else:
            _take(lock, folder, shared=True)
            yield from _make_in_processes(tasks, load, folder, workers, bool(gpus))


def _gpus(device: str) -> int:
    """GPUs that workers may have"""
    import torch

    if device not in ("auto", "cuda"):
        return int(device != "cpu")  # one GPU by its number
    return torch.cuda.device_count()


def _make_here(tasks: list[_Task], loaded: "DiffusionPipeline") -> Iterator[dict]:
    for task in tasks:
        record = _make(loaded, task)
        yield record
        if _gpu_is_lost(record):
            raise TurboNbError(f"{record['error']}; the GPU needs a new process: start again, what is done is kept")


def _make(loaded: "DiffusionPipeline", task: _Task, workers: int = 1) -> dict:
    """Make a video, or say why not. Raises OutputError, which is no fault of the job's."""
    if found := _found(task):  # of a worker that died before it could tell
        return found
    try:
        with mp4.Encoder(task.path, loaded.spec.fps) as encoder:
            video = generation.generate(loaded, task.prompt, **task.arguments, on_frames=encoder.add)
            told = video.settings | {"job": task.id, "timings": video.timings, "steps": [*video.steps]}
            begin = time.perf_counter()
            replace(video, settings=told).save(encoder)
            done = _done(task, told, write=time.perf_counter() - begin)
        return done | {"cost": environment.cost(sum(done["timings"].values()) / workers)}
    except OutputError:
        raise
    except Exception as error:  # whatever it is, the other jobs go on
        words = str(error) if isinstance(error, TurboNbError) else f"{type(error).__name__}: {error}"
        return task.record("failed", error=words)


def _gpu_is_lost(record: dict) -> bool:
    """Whether a failure leaves this process without its GPU, as an illegal memory access does"""
    return "CUDA error" in (record["error"] or "")


def _make_in_processes(tasks: list[_Task], load: dict, folder: Path, workers: int, gpu: bool) -> Iterator[dict]:
    """Hand the tasks to worker processes; the task of one that dies goes to another, MAX_TRIES times in all."""
    context = multiprocessing.get_context("spawn")
    waiting, deaths, crew = deque(tasks), Counter(), {}

    def hire(place: int) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, load, folder, place, workers, gpu), daemon=True)
        process.start()
        theirs.close()
        crew[ours] = SimpleNamespace(process=process, place=place, ready=False, task=None)

    try:
        hire(0)  # the others follow when it is ready: then files that were to be fetched are here
        while waiting or any(hand.task for hand in crew.values()):
            for connection, hand in crew.items():
                if waiting and hand.ready and not hand.task:
                    hand.task = waiting.popleft()
                    with suppress(OSError):  # it is dead, which the next lines find out
                        connection.send(hand.task)
            for connection in wait(list(crew)):
                hand = crew[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    hand.process.join()
                    del crew[connection]
                    if hand.task:
                        deaths[hand.task.id] += 1
                        if deaths[hand.task.id] < MAX_TRIES:
                            waiting.appendleft(hand.task)
                        else:
                            words = f"the worker process {_ended(hand.process.exitcode)} over it, {MAX_TRIES} times"
                            yield hand.task.record("failed", error=words)
                    if hand.ready and waiting:
                        hire(hand.place)
                    elif waiting and not crew:
                        raise TurboNbError(
                            f"the worker process {_ended(hand.process.exitcode)} while it loaded the model; take "
                            "fewer workers or a smaller memory plan"
                        ) from None
                    continue
                if isinstance(message, TurboNbError):
                    raise message
                if message is not None:
                    hand.task = None
                    yield message
                elif not hand.ready:
                    hand.ready = True
                    if len(crew) == 1 and hand.place == 0:
                        for place in range(1, workers):
                            hire(place)
    finally:
        for hand in crew.values():
            hand.process.terminate()
        for hand in crew.values():
            hand.process.join(10)
            hand.process.kill()


def _ended(exit_code: int) -> str:
    if exit_code == -9:
        return "was killed, as happens when memory runs out,"
    return f"ended with exit code {exit_code}"


def _work(connection: Connection, load: dict, folder: Path, place: int, workers: int, gpu: bool) -> None:
    """A worker process: load the model on the GPU of its number, say None, then turn tasks into records."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place] if visible else str(place)
    else:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    try:
        with _lock(folder, shared=True):
            loaded = pipeline.load_pipeline(**load)
            connection.send(None)
            while True:
                record = _make(loaded, connection.recv(), workers)
                connection.send(record)
                if _gpu_is_lost(record):
                    return
    except TurboNbError as error:
        connection.send(error)
    except EOFError:  # the first process has ended
        return


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
