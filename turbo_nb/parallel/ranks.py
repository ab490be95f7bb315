"""The ranks: processes that make one clip together, one for each GPU. The user's process is rank 0.

    rank 0 (a notebook's kernel, or a shell)             rank 1, 2, …  (`main`)
    ─────────────────────────────────────────            ─────────────────────────────────────────────
    start: begins the processes              ──────────► run `target`, which loads the model
    join: waits for all of them              ◄────────── "ready"
    tell: a command and its arguments        ──────────► commands(): run it, with exchanges in `Group`
    finish: a command that takes long        ◄────────── "ready" again
    a thread watches                         ◄────────── a sign of life every second, and errors
    close, or this process ends              ──────────► the lifeline closes, and a thread ends the process

A rank that dies, raises, runs out of memory or hangs ends all others. Rank 0 then leaves its exchange and raises one
TurboNbError. Under torchrun the processes exist already: those with another rank run `target` and exit with rank 0.
"""

import atexit
import os
import pickle
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener, Pipe, wait
from typing import IO, Any

from ..errors import InputError, TurboNbError, collect_warnings, first_line
from ..machine.signals import interrupt_deferred
from ..values import shown

HANGS = 20.0  # seconds without a new exchange, after which a rank that others wait for is hung
BEAT = 1.0  # seconds between two signs of life
SILENT = 120.0  # seconds without one, after which a rank is frozen
AWAKE = 2.0  # seconds, the most that counts between two looks, because this process was stopped for the rest
VERDICT = 3.0  # seconds in which the thread finds out why an exchange failed
CONNECTS = 25.0  # seconds until all ranks that have loaded are connected
LOADING = 1800.0  # seconds for loading a model
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
NCCL_BYTES = 1 << 30  # about what NCCL takes on each of four GPUs. It fails where less is free
FULL = "Is the memory of a GPU full (nvidia-smi)?"
LOST_MEMORY = "ran out of GPU memory. Take fewer frames, a smaller resolution, more GPUs or the int8 checkpoint."


class _Unchanged:
    """How long a value has been the same, without time in which this process was stopped, as by Ctrl-Z."""

    def __init__(self):
        self._value, self._seconds, self._last = None, 0.0, time.monotonic()

    def look(self, value: Any) -> float:
        """Return the seconds since the first of the looks that saw this value; 0 for None."""
        now = time.monotonic()
        same = value is not None and value == self._value
        self._seconds = self._seconds + min(now - self._last, AWAKE) if same else 0.0
        self._value, self._last = value, now
        return self._seconds


@dataclass
class _Other:
    """What rank 0 knows of another rank"""

    rank: int
    connection: Connection
    lifeline: Any  # this process's end, which the system closes with this process
    process: subprocess.Popen | None = None  # None under torchrun
    stderr: IO[bytes] | None = None
    ready: bool = False
    messages: int = 0  # that it has sent
    silent: _Unchanged = field(default_factory=_Unchanged)  # its messages
    exchanges: int = 0
    behind: _Unchanged = field(default_factory=_Unchanged)  # its exchanges, while rank 0 has begun more
    begins: float = 0.0  # seconds that it has been beginning an exchange for


class Team:
    """All ranks, as rank 0 sees them. `start` makes one.

    Attributes:
        size: number of ranks.
        group: their exchanges, after `join`.
        failure: why the ranks have ended. None while they work.
        clips: numbers of the clips that the VAE has begun and not ended (`strips.Strips`).
        drop_graphs: drops rank 0's CUDA graphs, because NCCL cannot end before them.
    """

    drop_graphs: Callable[[], Any] = staticmethod(lambda: None)

    def __init__(self, others: Sequence[_Other], size: int, device: str, store: Any):
        self.size, self.group, self.failure, self.clips = size, None, None, set()
        self._others, self._device, self._store = list(others), device, store
        self._failed, self._closing, self._lock = threading.Event(), False, threading.Lock()
        self._work = threading.RLock()  # held in `together`
        self._connecting, self._connects, self._begins = False, _Unchanged(), _Unchanged()
        self._thread = threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True, name="turbo_nb ranks")
        self._thread.start()
        atexit.register(_close, weakref.ref(self))

    def join(self) -> None:
        """Wait until the other ranks have loaded, then connect all ranks."""
        from .group import Group

        self._until_ready()
        with self.together():
            self._connecting = True
            self.tell("connect")
            self.group = Group(self._store, 0, self.size, self._device)
            self.group.connect()
            self._connecting = False

    def finish(self, command: str) -> None:
        """Send a command that takes long and ends in `Member.say_ready`, and wait for that; Ctrl-C interrupts."""
        with self.together():
            for other in self._others:
                other.ready = False
            self.tell(command)
        self._until_ready()

    def _until_ready(self) -> None:
        end = time.monotonic() + LOADING
        while not all(other.ready for other in self._others):
            if not self._failed.wait(0.05) and time.monotonic() > end:
                self.end(f"a rank was not ready in {LOADING / 60:.0f} minutes.")
            self.check()

    def tell(self, command: str, *arguments: Any) -> None:
        """Send a command to all other ranks."""
        message = pickle.dumps((command, arguments))
        self.check()
        for other in self._others:
            try:
                other.connection.send_bytes(message)
            except OSError:
                self._failed.wait(VERDICT)
                self.end(f"rank {other.rank} has ended")
                self.check()

    def check(self) -> None:
        """Raise TurboNbError where the ranks have ended."""
        if self.failure:
            self.drop_graphs()
            raise TurboNbError(f"{self.failure} All ranks have ended. Load the model again.")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work with the other ranks inside this context.

        Other threads wait, because all ranks exchange in one order. An error inside, here or on another rank, ends all
        other ranks. Ctrl-C is kept until the end of the context, because ranks that are left in an exchange could not
        go on.

        Raises:
            TurboNbError: a rank failed.
        """
        with self._work:
            self.check()
            finished = False
            try:
                with interrupt_deferred():
                    yield
                    finished = True
            except BaseException as error:
                if finished:  # the Ctrl-C that was kept
                    raise
                if not isinstance(error, Exception):
                    self.end("rank 0 was interrupted within a step.")
                    raise
                memory = _lacks_memory(error, self._device)
                if isinstance(error, RuntimeError | OSError) and not memory:
                    self._failed.wait(VERDICT)  # because the other side of an exchange may have failed first
                self.end(f"rank 0 {LOST_MEMORY}" if memory else f"rank 0 failed: {first_line(error)}.")
                self.drop_graphs()
                raise TurboNbError(f"{self.failure} All ranks have ended. Load the model again.") from error
            self.check()

    def end(self, failure: str) -> None:
        """End the other ranks because of a failure, and let this process leave an exchange with them."""
        with self._lock:
            if self._closing:
                return
            self._closing, self.failure = True, failure
        self._kill()
        if self.group:
            self.group.abort()
        self._failed.set()

    def close(self) -> None:
        """End the other ranks, because the model is not needed any more."""
        with self._lock:
            if self._closing:
                return
            self._closing, self.failure = True, "the model was closed."
        if threading.current_thread() is not self._thread:
            self._thread.join(2)  # because it reads the same connections
        serving = [other for other in self._others if other.ready]  # one that loads or compiles reads no command
        for other in serving:
            with suppress(OSError):
                other.connection.send_bytes(pickle.dumps(("end", ())))
        end = time.monotonic() + 5
        for other in serving:
            with suppress(OSError, EOFError):  # until the rank's end of the connection closes
                while other.connection.poll(max(0.1, end - time.monotonic())):
                    other.connection.recv_bytes()
        self._kill()
        if threading.current_thread() is not self._thread:
            self.drop_graphs()
        if self.group:
            self.group.close()
        self._failed.set()

    def _kill(self) -> None:
        """Kill the other ranks, wait for their end, and close what connects this process with them"""
        for other in self._others:
            if other.process and other.process.poll() is None:
                other.process.kill()
        for other in self._others:
            if other.process:
                with suppress(subprocess.TimeoutExpired):
                    other.process.wait(5)
            with suppress(OSError):
                other.lifeline.close()
            with suppress(OSError):
                other.connection.close()
            if other.stderr:
                other.stderr.close()

    # The thread

    def _look(self) -> bool:
        """Take what the other ranks sent, and end all where one has failed. Return whether to go on"""
        open_ones = {other.connection: other for other in self._others}
        try:
            for connection in wait(list(open_ones), timeout=0.2):
                if not self._closing:
                    self._take(open_ones[connection])
        except (OSError, ValueError):  # closed meanwhile
            pass
        if self._closing:
            return False
        own, connecting = self.group.exchanges if self.group else 0, self._connecting
        if self._connects.look(connecting or None) > CONNECTS:
            self.end(f"the ranks did not connect within {CONNECTS:.0f} s. {FULL}")
        if self._begins.look(self.group and self.group.begins) > HANGS and not connecting:
            self.end(_stuck(0))
        for other in self._others:
            if other.process and other.process.poll() is not None and not self._closing:
                with suppress(OSError, EOFError):
                    while other.connection.poll():
                        self._take(other)
                if not self._closing:
                    self.end(_how_it_ended(other))
            elif other.begins > HANGS and not connecting:
                self.end(_stuck(other.rank))
            elif other.behind.look((own, other.exchanges) if own > other.exchanges else None) > HANGS:
                self.end(f"rank {other.rank} hangs: rank 0 has waited for it for {HANGS:.0f} s.")
            elif other.silent.look(other.messages) > SILENT:
                self.end(f"rank {other.rank} hangs: it has given no sign of life for {SILENT:.0f} s.")
        return not self._closing

    def _take(self, other: _Other) -> None:
        """Take one message of another rank"""
        try:
            kind, *values = pickle.loads(other.connection.recv_bytes())
        except (EOFError, OSError):
            if other.process:
                with suppress(subprocess.TimeoutExpired):
                    other.process.wait(2)
            self.end(_how_it_ended(other))
            return
        other.messages += 1
        if kind == "failed":
            self.end(f"rank {other.rank} {values[0]}")
        elif kind == "ready":
            other.ready = True
        else:
            other.exchanges, other.begins = values


def _stuck(rank: int) -> str:
    return f"rank {rank} hangs: it could not begin an exchange for {HANGS:.0f} s. {FULL}"


def _watch(team: "weakref.ref[Team]") -> None:
    while (alive := team()) is not None and alive._look():
        del alive


def _close(team: "weakref.ref[Team]") -> None:
    if alive := team():
        alive.close()


def _how_it_ended(other: _Other) -> str:
    code = other.process.poll() if other.process else None
    how = f"with exit code {code}" if code is not None and code >= 0 else "without an answer"
    if code is not None and code < 0:
        how = f"by {signal.Signals(-code).name}" if -code in list(signal.Signals) else f"by signal {-code}"
    if code == -signal.SIGKILL:
        how += ", which the system sends where main memory runs out"
    last = ""
    if other.stderr and code != -signal.SIGKILL:  # of which a process cannot write anything
        other.stderr.seek(0, os.SEEK_END)
        other.stderr.seek(max(0, other.stderr.tell() - 2000))
        lines = [line.strip() for line in other.stderr.read().decode(errors="replace").splitlines() if line.strip()]
        last = f" Its last line: {lines[-1]}." if lines else ""
    return f"rank {other.rank} ended {how}.{last}"


def start(size: int, device: Callable[[int], str], target: Callable, *arguments: Any) -> Team | None:
    """Begin the other ranks, which load while this process loads.

    Args:
        size: number of ranks.
        device: returns the device of a rank.
        target: a function of a module, called as target(member, *arguments) on each other rank.
        arguments: what pickle takes.

    Returns:
        The team. Under torchrun the other ranks do not return; they exit when rank 0 ends.
    """
    from torch import distributed as dist

    task = pickle.dumps((target, arguments))
    if under_torchrun():
        if (world := _number_of("LOCAL_WORLD_SIZE")) < size:
            raise InputError(
                f"gpus is {size}. Expected at most {world}, because torchrun began so many processes on this machine. "
                "Start without torchrun, which load_pipeline does not need."
            )
        return _start_under_torchrun(size, device, task)
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    others = []
    try:
        for rank in range(1, size):
            others.append(_begin(rank, size, device(rank), store.port))
            others[-1].connection.send_bytes(task)
    except BaseException:
        for other in others:
            other.process.kill()
            other.process.wait()
        raise
    return Team(others, size, device(0), store)


def _begin(rank: int, size: int, device: str, port: int) -> _Other:
    """Begin the process of a rank"""
    here, there = Pipe()
    life_there, life_here = os.pipe()
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 because it is closed with the rank
    code = f"from {__name__} import main; main({rank}, {size}, {device!r}, {port}, {there.fileno()}, {life_there})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=(there.fileno(), life_there),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,  # because Ctrl-C is rank 0's to answer
        )
    finally:
        there.close()
        os.close(life_there)
    return _Other(rank, here, os.fdopen(life_here, "wb", buffering=0), process, stderr)


# The other ranks


class Member:
    """Another rank, as it sees itself.

    Attributes:
        rank, size, device: as in `Group`.
        group: the exchanges, after `ready`.
    """

    def __init__(self, rank: int, size: int, device: str, port: int, connection: Connection, lifeline: Any):
        self.rank, self.size, self.device, self.group = rank, size, device, None
        self._port, self._connection, self._lock = port, connection, threading.Lock()
        threading.Thread(target=self._live, args=(lifeline,), daemon=True, name="turbo_nb lifeline").start()

    def task(self) -> tuple[Callable, tuple]:
        """Return what rank 0 wants this rank to run: a function, and its arguments."""
        return pickle.loads(self._connection.recv_bytes())

    def ready(self) -> None:
        """Tell rank 0 that the model is loaded, and connect all ranks."""
        from torch import distributed as dist

        from .group import Group

        self.say_ready()
        command, _ = pickle.loads(self._connection.recv_bytes())
        if command == "connect":
            store = dist.TCPStore("127.0.0.1", self._port, self.size, is_master=False)
            self.group = Group(store, self.rank, self.size, self.device)
            self.group.connect()

    def say_ready(self) -> None:
        """Tell rank 0 that this rank has loaded, or has compiled."""
        self._send("ready")

    def commands(self) -> Iterator[tuple[str, tuple]]:
        """Yield the commands of rank 0, until it ends this rank."""
        while self.group:
            command, arguments = pickle.loads(self._connection.recv_bytes())
            if command == "end":
                return
            yield command, arguments

    def failed(self, message: str) -> None:
        """Tell rank 0 why this rank ends."""
        with suppress(OSError):
            self._send("failed", message)

    def _send(self, *message: Any) -> None:
        with self._lock:
            self._connection.send_bytes(pickle.dumps(message))

    def _live(self, lifeline: Any) -> None:
        """Send signs of life, and end this process when rank 0's has ended"""
        parent, begins = os.getppid(), _Unchanged()
        while not wait([lifeline], timeout=BEAT) and os.getppid() == parent:
            try:
                exchanges = self.group.exchanges if self.group else 0
                self._send("beat", exchanges, begins.look(self.group and self.group.begins))
            except OSError:
                break
        os._exit(1)


def main(rank: int, size: int, device: str, port: int, connection: int, lifeline: int) -> None:
    """Run a rank that `start` began. The arguments are those of `_begin`."""
    _run(Member(rank, size, device, port, Connection(connection), lifeline))


def _run(member: Member) -> None:
    """Run what rank 0 sent, then exit without the interpreter's clean-up, which may wait for a broken exchange"""
    code = 0
    try:
        if member.device != "cpu":
            import torch

            torch.cuda.set_device(member.device)  # so that nothing is allocated on rank 0's GPU
        target, arguments = member.task()
        with collect_warnings():  # because rank 0 warns of the same
            target(member, *arguments)
    except EOFError:
        pass
    except BaseException as error:
        import traceback

        traceback.print_exc()
        member.failed(_as_failure(error, member.device))
        code = 1
    sys.stderr.flush()
    os._exit(code)


def _as_failure(error: BaseException, device: str) -> str:
    if _lacks_memory(error, device):
        return LOST_MEMORY
    if isinstance(error, TurboNbError):
        return f"failed: {error}"
    return f"failed: {type(error).__name__}: {first_line(error)}."


def _lacks_memory(error: BaseException, device: str) -> bool:
    """Return whether a rank's error is a lack of GPU memory, which NCCL reports as any error of CUDA"""
    import torch
    from torch import distributed as dist

    if isinstance(error, dist.DistBackendError):
        with suppress(RuntimeError):  # where CUDA itself has failed
            return torch.cuda.mem_get_info(device)[0] < NCCL_BYTES
    return isinstance(error, torch.OutOfMemoryError)


# torchrun


def under_torchrun() -> bool:
    """Return whether torchrun began this process, and others beside it."""
    return all(name in os.environ for name in TORCHRUN) and _number_of("WORLD_SIZE") > 1


def _number_of(name: str) -> int:
    """Return the number in a variable of torchrun. Raises InputError for any other value"""
    if not re.fullmatch("[0-9]{1,9}", os.environ[name]):
        raise InputError(
            f"{name} is {shown(os.environ[name])}, beside TORCHELASTIC_RUN_ID. Expected a whole number, as torchrun "
            "sets it. Unset TORCHELASTIC_RUN_ID to start without torchrun."
        )
    return int(os.environ[name])


def _start_under_torchrun(size: int, device: Callable[[int], str], task: bytes) -> Team | None:
    """Use the processes that torchrun began"""
    from torch import distributed as dist

    try:
        shared, rank, _ = next(dist.rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the variables of torchrun give no connection ({first_line(error)}). Expected a running torchrun. Unset "
            "TORCHELASTIC_RUN_ID to start without torchrun."
        ) from error
    name = "turbo_nb"
    if rank == 0:
        if shared.add("turbo_nb/starts", 1) > 1:
            raise InputError(
                f"gpus is {size} for a second model. Expected 1, because the other ranks of torchrun ended with the "
                "first model. Start without torchrun, which load_pipeline does not need."
            )
        key = secrets.token_bytes(32)
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        with Listener(("127.0.0.1", 0), authkey=key, backlog=2 * size) as listener:
            shared.set(name, pickle.dumps((store.port, listener.address, key)))
            accepted = [listener.accept() for _ in range(2 * (size - 1))]
        found: dict[tuple[int, str], Connection] = {}
        for connection in accepted:
            found[connection.recv()] = connection
        others = [_Other(one, found[one, "commands"], found[one, "life"]) for one in range(1, size)]
        for other in others:
            other.connection.send_bytes(task)
        return Team(others, size, device(0), store)
    if rank >= size:  # a rank that the model's heads leave over
        os._exit(0)
    port, address, key = pickle.loads(shared.get(name))
    connection, lifeline = Client(address, authkey=key), Client(address, authkey=key)
    connection.send((rank, "commands"))
    lifeline.send((rank, "life"))
    _run(Member(rank, size, device(rank), port, connection, lifeline))
    return None
