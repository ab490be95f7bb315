"""The engine of several GPUs: Ray's actors (`actor.py`), of this machine or of a cluster.

This process, the driver, hands every actor one task at a time and replaces actors that die. It writes the mp4's bytes
of an actor that does not see the output folder.
"""

import hashlib
import logging
import os
import re
import signal
import socket
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, TurboNbError, first_line, warn
from ..files.fingerprint import fingerprint
from ..files.resolve import ResolvedModel
from ..machine import atomic, environment, signals
from ..settings import PICTURES, LoadOptions
from ..values import shown
from .actor import Order, Reply, Sent, TurboNbActor, find_here
from .engines import FoundModel, Work, has_lost_gpu
from .jobs import Task
from .manifest import JobRecord, as_output_error, wait_for_workers

log = logging.getLogger("turbo_nb")
MAX_TRIES = 2  # actors that one job may kill
MAX_LOADS = 5  # actors that may die one after the other while they load, if there are few
LOST_NODES = 3  # lost nodes that count as one killed actor, because most jobs on a lost node are innocent
NODE_DIED = "its node has died"  # Ray's words for an actor whose node it could not know before
POLL = 2  # seconds after which the driver looks for new GPUs
ANSWERS = 5  # seconds within which a cluster's port answers
OBJECTS = 100 << 20  # bytes of the object store on this machine, where clips go through the folder
KEPT = 8  # images that stay in the object store between two jobs


@contextmanager
def connected(address: str | None, **options: Any) -> Iterator[Any]:
    """Connect to a cluster, or start Ray on this machine (None), for the time of a block. Gives the module `ray`.

    A connection that this process already has is used, and stays. Raises TurboNbError where Ray cannot start, or no
    cluster answers.
    """
    if address is None:
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # it copies the project to workers under `uv run`
        os.environ.setdefault("RAY_worker_niceness", "0")  # because Ray's 15 lets any other program go before a clip
    import ray

    if ray.is_initialized():
        yield ray
        return
    with ExitStack() as stack:
        if address is not None:
            _require_answer(address)
        else:
            short = "/tmp" if os.access("/tmp", os.W_OK) else None  # because the path of a socket has 107 bytes
            folder = tempfile.TemporaryDirectory(prefix="ray-", dir=short, ignore_cleanup_errors=True)
            options |= {"_temp_dir": stack.enter_context(folder), "object_store_memory": OBJECTS}
        stack.callback(ray.shutdown)
        try:
            # Ray's own handler of SIGTERM would end this process with exit code 15
            with signals.terminal_blocked(), signals.handlers_kept(SIGTERM=signal.getsignal(signal.SIGTERM)):
                context = ray.init(address or "local", log_to_driver=False, logging_level="error", **options)
        except Exception as error:  # ConnectionError, RuntimeError, ValueError and others
            if address is None:
                raise TurboNbError(f"Ray cannot start here ({first_line(error)}). Take one worker.") from error
            raise _no_cluster(address, error) from error
        if context.dashboard_url:
            log.info("Ray's dashboard: http://%s", context.dashboard_url)
        yield ray


def _require_answer(address: str) -> None:
    """Raise InputError where nothing listens at an address, because Ray itself tries for minutes"""
    place = re.fullmatch(r"(?:ray://)?\[?([^\[\]/@]+?)\]?:([0-9]+)", address)
    try:
        if place:
            socket.create_connection((place[1], int(place[2])), timeout=ANSWERS).close()
        elif address not in ("auto", "local"):
            raise ValueError("it is not HOST:PORT")
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> InputError:
    return InputError(
        f"ray is {shown(address)}, where no cluster answers ({first_line(error)}). Expected the address of a running "
        "cluster, such as 10.0.0.5:6379, or auto. Start it with: ray start --head"
    )


def find_model(options: LoadOptions, address: str) -> FoundModel | None:
    """Resolve a model on a GPU of the cluster. None where this process or no node has a GPU, or the CPU is asked for.

    Raises TurboNbError where the node cannot resolve it, such as a path that only this machine has.
    """
    import torch

    if torch.cuda.device_count() or options.device == "cpu":
        return None
    with connected(address) as ray:
        if options.device == "auto" and not ray.cluster_resources().get("GPU"):
            return None
        found = ray.get(ray.remote(num_gpus=1, num_cpus=0)(find_here).remote(replace(options, device="cuda")))
    if isinstance(found, TurboNbError):
        raise found
    return found


@dataclass
class _Member:
    """An actor; its node is known when it has loaded the model"""

    actor: Any
    node: str | None = None
    task: Task | None = None


@dataclass
class Actors:
    """Hands tasks to Ray's actors. A job that killed `MAX_TRIES` actors has failed; jobs of a lost node are made again.

    Args:
        workers: number of actors. None: one for each GPU that the cluster has or gets; one a node without GPUs.
        address: of a cluster. None: Ray runs on this machine for the time of `make`.
    """

    model: ResolvedModel | FoundModel
    folder: Path
    workers: int | None
    address: str | None = None
    on_progress: Callable | None = None
    on_running: Callable[[int], None] = lambda count: None
    machines: int = 1
    actors: int = 1
    _sent: dict[str, Sent] = field(default_factory=dict)
    _deaths: Counter = field(default_factory=Counter)  # by the id of a task, None for actors that loaded
    _again: deque[Task] = field(default_factory=deque)  # tasks whose actors died
    _warned: set[str] = field(default_factory=set)

    @property
    def _uses_gpu(self) -> bool:
        return self.model.device != "cpu"

    def make(self, work: Work) -> Iterator[JobRecord]:
        """Make videos; raises TurboNbError where the model cannot be loaded."""
        if not work.count:
            return
        on_cpu = self.address is None and not self._uses_gpu
        cores = {"num_cpus": max(self.workers or 1, os.cpu_count() or 1)} if on_cpu else {}
        if self.address is None:
            self.model.fetch(self.on_progress)  # here, where its progress can be shown
        crew: dict[Any, _Member] = {}
        stack = ExitStack()
        try:
            ray = stack.enter_context(connected(self.address, **cores))
            with as_output_error(self.folder):
                mark = stack.enter_context(atomic.temporary(self.folder.absolute() / "mark"))
                mark.write_text(mark.name)
            stack.callback(_kill, crew.values())
            yield from self._hand_out(ray, crew, work, self._order(ray, work, mark))
        finally:
            with signals.handlers_kept(SIGINT=signal.SIG_IGN):  # because a second Ctrl-C would leave processes
                stack.close()
                wait_for_workers(self.folder)

    def _order(self, ray: Any, work: Work, mark: Path) -> Order:
        """Count machines and actors, and return what the actors receive"""
        import torch

        nodes = [one["Resources"] for one in ray.nodes() if one["Alive"]]
        self.machines = max(1, sum(bool(one.get("GPU" if self._uses_gpu else "CPU")) for one in nodes))
        self.actors = max(1, min(work.count, self.workers or self._room(ray)))
        cores = sum(one.get("CPU", 0) for one in nodes) if self.address else torch.get_num_threads()
        return Order(
            options=replace(self.model.pinned, device="cuda" if self._uses_gpu else "cpu"),
            identity=self.model.identity,
            clip=work.size,
            prompts=work.prompts,
            mark=mark,
            threads=max(1, int(cores // self.actors)),
            decoder="tiny" if self.model.tiny_decoder else "full",
            loras=tuple(self._sent_lora(ray, Path(one.file)) for one in self.model.pinned.loras),
        )

    def _sent_lora(self, ray: Any, file: Path) -> Sent | None:
        """Return the file of a LoRA for nodes of a cluster that do not have it"""
        if self.address and environment.is_file(file):
            return fingerprint(file), ray.put(file.read_bytes())
        return None

    def _room(self, ray: Any) -> int:
        """Return how many actors the cluster has room for now"""
        if self._uses_gpu:
            return int(ray.cluster_resources().get("GPU", 0))
        return sum(one["Alive"] and one["Resources"].get("CPU", 0) >= 1 for one in ray.nodes())

    def _hand_out(self, ray: Any, crew: dict[Any, _Member], work: Work, order: Order) -> Iterator[JobRecord]:
        """Yield the records of all tasks; `crew` has the actors at work, by the call that each one answers next"""
        hired = ray.remote(TurboNbActor).options(
            num_gpus=int(self._uses_gpu),
            num_cpus=int(not self._uses_gpu),
            scheduling_strategy="DEFAULT" if self._uses_gpu else "SPREAD",
            max_restarts=0,  # a new actor takes the place of a dead one, because calls to one that restarts fail
            max_task_retries=0,
        )
        left = work.count
        while left:
            # one more actor waits for a GPU, so that a cluster that can grow does
            room = min(left, self.workers or self._room(ray) + self._uses_gpu)
            while len(crew) < room:
                actor = hired.remote(order)
                crew[actor.load.remote()] = _Member(actor)
            records = []
            for call in ray.wait([*crew], timeout=POLL)[0]:
                member = crew.pop(call)
                try:
                    reply = ray.get(call)
                except ray.exceptions.RayTaskError as error:
                    raise TurboNbError(f"an actor raised {_reason(error)}") from error
                except ray.exceptions.RayError as error:
                    _kill([member])
                    records += self._bury(ray, member, error)
                    continue
                record = self._take(member, reply)
                records += [record] if record else []
                lost_gpu = record and has_lost_gpu(record)
                member.task = None if lost_gpu else self._again.popleft() if self._again else next(work.tasks, None)
                if member.task is None:
                    _kill([member])  # its GPU is free for others
                else:
                    crew[member.actor.make.remote(member.task, self._images(ray, member.task))] = member
            self.on_running(sum(one.task is not None for one in crew.values()))
            left -= len(records)
            yield from records

    def _take(self, member: _Member, reply: Reply) -> JobRecord | None:
        """Return the record of an actor's task, None after loading. Warns as the actor did; raises its error"""
        for message in reply.warnings:
            if message not in self._warned:
                self._warned.add(message)
                warn(message)
        if isinstance(reply.value, TurboNbError):
            raise reply.value
        if member.task is None:
            member.node, self._deaths[None] = reply.value, 0
            return None
        if reply.data is not None:
            with as_output_error(member.task.path):
                atomic.write(member.task.path, reply.data, durable=True)
        return reply.value

    def _bury(self, ray: Any, member: _Member, error: Exception) -> list[JobRecord]:
        """Count an actor that died. Its task is made again, or fails: return the record, as a list of none or one.

        Raises TurboNbError where too many died while they loaded.
        """
        alive = any(one["NodeID"] == member.node and one["Alive"] for one in ray.nodes())
        name = member.task and member.task.id
        self._deaths[name] += 1 if NODE_DIED in str(error) or (member.node and not alive) else LOST_NODES
        if member.task is None:
            if self._deaths[name] >= LOST_NODES * max(MAX_LOADS, MAX_TRIES * self.actors):
                raise TurboNbError(
                    f"an actor ended while it loaded the model ({_reason(error)}). Take fewer workers or a smaller "
                    "memory plan."
                ) from error
            return []
        if self._deaths[name] < MAX_TRIES * LOST_NODES:
            self._again.append(member.task)
            return []
        words = f"the actor ended over it, {MAX_TRIES} times ({_reason(error)})"
        return [member.task.record("failed", error=words)]

    def _images(self, ray: Any, task: Task) -> dict[str, Sent]:
        """Return the files of a task's images by path, for nodes that do not have them"""
        sent = {}
        for image in (getattr(task.settings, name) for name in PICTURES):
            if self.address and isinstance(image, str | Path):
                with suppress(OSError):  # the job fails where it is opened
                    if str(image) not in self._sent:
                        data = Path(image).read_bytes()
                        self._sent[str(image)] = hashlib.sha256(data).hexdigest(), ray.put(data)
                    sent[str(image)] = self._sent[str(image)]
        while len(self._sent) > KEPT:
            del self._sent[next(iter(self._sent))]
        return sent


def _kill(members: Iterable[_Member]) -> None:
    import ray

    for one in members:
        with suppress(Exception):  # an actor that cannot be reached may still live, or be dead
            ray.kill(one.actor)


def _reason(error: Exception) -> str:
    """Return the line of an error of Ray that names the cause"""
    causes = [line for line in str(error).splitlines() if re.match(r"\s*[\w.]+(Error|Exception)\b", line)]
    return (causes[-1].strip() if causes else first_line(error))[:300]
