"""The ranks start and end together, whatever happens to one of them."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from unittest.mock import Mock

import psutil
import pytest
import targets
import torch
from conftest import DEVICE, MOST
from torch import distributed as dist

from turbo_nb.errors import InputError, TurboNbError
from turbo_nb.machine.signals import interrupt_deferred
from turbo_nb.parallel import group, ranks

ENDS = 10  # seconds in which the others have ended; the issue allows 30


def device_of(rank):
    return "cpu" if DEVICE == "cpu" else f"cuda:{rank}"


@contextmanager
def team_of(size, target=targets.exchange, join=True):
    """A team, whose processes and thread have ended afterwards"""
    team = ranks.start(size, device_of, target)
    pids = [other.process.pid for other in team._others]
    try:
        if join:
            team.join()
        yield team
    finally:
        team.close()
        team._thread.join(2)
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
        assert not [one for one in threading.enumerate() if one is team._thread]


def add(team, command="sum", *arguments):
    with team.together():
        team.tell(command, *arguments)
        return team.group.sum(torch.ones(1, device=team.group.device)).item()


def failure(team, command, *arguments):
    """What rank 0 raises, and how many seconds that takes"""
    begin = time.monotonic()
    with pytest.raises(TurboNbError) as caught:
        add(team, command, *arguments)
    assert all(other.process.poll() is not None for other in team._others)
    return str(caught.value), time.monotonic() - begin


def test_ranks_work_together_and_a_dead_one_ends_all(monkeypatch):
    monkeypatch.setattr(ranks, "HANGS", 1.5)
    with team_of(MOST) as team:
        assert add(team) == add(team) == MOST
        with team.together():
            team.tell("sum")
            time.sleep(2.5)  # the other ranks wait for this one, and do not hang
            team.group.sum(torch.ones(1, device=team.group.device))
        with pytest.raises(KeyboardInterrupt), team.together():  # at the end, so that no rank is left in an exchange
            team.tell("sum")
            signal.raise_signal(signal.SIGINT)
            team.group.sum(torch.ones(1, device=team.group.device))
        assert add(team) == MOST
        began = time.monotonic()
        team.finish("compiled")
        assert time.monotonic() - began > 2 and add(team) == MOST
        message, seconds = failure(team, "die", signal.SIGKILL)
        assert re.match("rank 1 ended by SIGKILL, which the system sends where main memory runs out", message)
        assert message.endswith("All ranks have ended. Load the model again.") and seconds < ENDS
        with pytest.raises(TurboNbError, match="rank 1 ended by SIGKILL"):  # and not a new error
            add(team)


def test_an_error_of_a_rank_is_rank_0s():
    with team_of(2) as team:
        message, seconds = failure(team, "fail")
        assert message.startswith("rank 1 failed: x is 1. Expected 2. Take 2. All ranks") and seconds < ENDS


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("x is 1. Expected 2."), "failed: x is 1. Expected 2."),
        (ValueError("two\nlines"), "failed: ValueError: two."),
        (torch.OutOfMemoryError("out"), "ran out of GPU memory. Take fewer frames"),
    ],
)
def test_a_rank_says_why_it_ends(error, words):
    assert ranks._as_failure(error, "cpu").startswith(words)


@pytest.mark.parametrize(("code", "quoted"), [(-signal.SIGKILL, False), (-signal.SIGABRT, True), (3, True)], ids=str)
def test_a_killed_rank_is_not_explained_by_what_it_wrote_before(code, quoted):
    process = Mock(poll=Mock(return_value=code))
    with tempfile.TemporaryFile() as stderr:
        stderr.write(b"a notice while loading\n")
        how = ranks._how_it_ended(ranks._Other(1, None, None, process, stderr))
    assert ("Its last line: a notice while loading." in how) == quoted


def test_a_rank_that_hangs_ends_all(monkeypatch):
    monkeypatch.setattr(ranks, "HANGS", 1.0)
    with team_of(2) as team:
        message, seconds = failure(team, "loop")
        assert message.startswith("rank 1 hangs: rank 0 has waited for it for 1 s.") and seconds < ENDS


def test_a_rank_that_cannot_begin_an_exchange_ends_all(monkeypatch):
    monkeypatch.setattr(ranks, "HANGS", 2.0)
    with team_of(2) as team:
        message, seconds = failure(team, "stick")
        assert message.startswith("rank 1 hangs: it could not begin an exchange for 2 s.") and seconds < ENDS
    with team_of(2) as team, pytest.raises(TurboNbError, match="rank 0 hangs: it could not begin"), team.together():
        team.tell("sum")
        ended = threading.Event()
        monkeypatch.setattr(team, "_kill", lambda kill=team._kill: (kill(), ended.set()))
        team.group._begin(ended.wait, 30)


def test_a_rank_that_cannot_load():
    failed = pytest.raises(TurboNbError, match="rank 1 failed: model is 'x'")
    with team_of(2, targets.fail_at_load, join=False) as team, failed:
        team.join()


def test_a_rank_that_freezes_while_it_loads_ends_all(monkeypatch):
    monkeypatch.setattr(ranks, "SILENT", 3.0)
    silent = pytest.raises(TurboNbError, match=r"rank 1 hangs: it has given no sign of life for 3 s\.")
    with team_of(2, targets.freeze, join=False) as team, silent:
        team.join()


def test_ranks_that_do_not_connect_end(monkeypatch):
    monkeypatch.setattr(ranks, "CONNECTS", 1.0)
    monkeypatch.setattr(group, "JOIN", timedelta(seconds=4))  # of gloo, which cannot be ended earlier
    with team_of(2, targets.never_connect, join=False) as team, pytest.raises(TurboNbError, match="did not connect"):
        team.join()


@pytest.mark.parametrize(("free", "words"), [(1 << 20, "ran out of GPU memory"), (1 << 34, "NCCL error")], ids=str)
def test_a_lack_of_memory_of_nccl_is_one_of_memory(monkeypatch, free, words):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 36))
    monkeypatch.setattr(ranks, "VERDICT", 0)
    error = dist.DistBackendError("NCCL error, unhandled cuda error")
    assert words in ranks._as_failure(error, "cuda:1")
    team = ranks.Team([], 2, "cuda:0", None)
    with pytest.raises(TurboNbError, match=f"rank 0 .*{words}"), team.together():
        raise error


def test_ctrl_c_interrupts_loading():
    class Slow:
        ready = property(lambda self: signal.raise_signal(signal.SIGINT))

    team = object.__new__(ranks.Team)
    team._others = [Slow()]
    with pytest.raises(KeyboardInterrupt):
        team.join()


def test_ranks_that_still_load_are_not_waited_for():
    begin = time.monotonic()
    with team_of(MOST, targets.load_slowly, join=False):
        pass  # as where Ctrl-C interrupts loading
    assert time.monotonic() - begin < 3  # and not 5


def test_only_a_second_ctrl_c_interrupts_at_once():
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupt_deferred():
        signal.raise_signal(signal.SIGINT)
        reached.append("after the first")
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second")
    assert reached == ["after the first"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(DEVICE == "cpu", reason="an error on a CPU leaves its exchange at once")
def test_an_error_of_rank_0_within_a_step_ends_the_others():
    with team_of(2) as team:
        with pytest.raises(TurboNbError, match="rank 0 ran out of GPU memory") as caught, team.together():
            team.tell("sum")
            raise torch.OutOfMemoryError("out")
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


PARENT = """
import time
import targets
from test_ranks import add, device_of
from turbo_nb.parallel import group, ranks
team = ranks.start(2, device_of, targets.exchange)
team.join()
print(add(team), team._others[0].process.pid, flush=True)
team.tell("sum")
time.sleep(60)
"""


STOPPED = """
import targets
from test_ranks import add, device_of
from turbo_nb.parallel import ranks
ranks.HANGS = 6.0
team = ranks.start(2, device_of, targets.exchange)
team.join()
print(team._others[0].process.pid, flush=True)
print(add(team, "rest", 2.0))
team.close()
"""


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}


def test_a_rank_in_an_exchange_ends_with_rank_0():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment()
    ) as parent:
        result, other = parent.stdout.readline().split()
        parent.kill()
        deadline = time.monotonic() + ENDS
        while psutil.pid_exists(int(other)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert result == "2.0" and not psutil.pid_exists(int(other))


def test_processes_that_were_all_stopped_go_on():
    """As by Ctrl-Z, or where a pod is paused"""
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True, env=environment()
    ) as parent:
        other = int(parent.stdout.readline())
        time.sleep(1)  # so that rank 0 waits in the exchange
        for pid in (parent.pid, other):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(7)
        os.kill(parent.pid, signal.SIGCONT)
        time.sleep(0.8)
        os.kill(other, signal.SIGCONT)
        assert parent.communicate(timeout=30)[0] == "2.0\n" and parent.returncode == 0


TORCHRUN = """
import os
import targets
from test_ranks import add, device_of
from turbo_nb.errors import InputError
from turbo_nb.parallel import group, ranks
team = ranks.start(2, device_of, targets.exchange)
team.join()
print("rank", os.environ["RANK"], "added", add(team), flush=True)
team.close()
try:
    ranks.start(2, device_of, targets.exchange)
except InputError as error:
    print(error)
"""


def test_torchruns_ranks_are_used(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.strip().splitlines()
    assert first == "rank 0 added 2.0" and second.startswith("gpus is 2 for a second model. Expected 1")


@pytest.mark.parametrize(
    ("size", "variables", "words"),
    [
        (3, {}, r"^gpus is 3. Expected at most 2, because torchrun"),
        (2, {"WORLD_SIZE": "x"}, r"^WORLD_SIZE is 'x', beside TORCHELASTIC_RUN_ID. Expected a whole number"),
        (2, {"LOCAL_WORLD_SIZE": ""}, r"^LOCAL_WORLD_SIZE is '', beside TORCHELASTIC_RUN_ID"),
        (2, {"MASTER_PORT": "x"}, r"^the variables of torchrun give no connection"),
        (2, {"RANK": "x"}, r"^the variables of torchrun give no connection"),
    ],
)
def test_torchrun_with_variables_that_do_not_suit(monkeypatch, size, variables, words):
    usual = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "1"}
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in (usual | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        ranks.start(size, device_of, targets.exchange)


def test_nccls_variables_are_set_while_a_group_begins_and_others_stay(monkeypatch):
    given, removed = next(iter(group.NO_WATCHDOG)), [*group.NO_WATCHDOG][1:]
    monkeypatch.setenv(given, "of the user")
    changed = []
    monkeypatch.setattr(os, "putenv", lambda name, _: changed.append(name), raising=False)
    monkeypatch.setattr(os, "unsetenv", lambda name: changed.append(name), raising=False)
    with group._without_watchdog():
        assert os.environ[given] == "of the user" and all(os.environ[name] == "0" for name in removed)
    assert not set(removed) & set(os.environ) and set(map(os.fsdecode, changed)) <= set(removed)


def test_cuda_graphs_are_dropped_before_the_exchanges_end(monkeypatch):
    done = []
    with team_of(2) as team:
        team.drop_graphs = lambda: done.append("graphs")
        monkeypatch.setattr(team.group, "close", lambda: done.append("group"))
    assert done == ["graphs", "group"]
    with pytest.raises(TurboNbError, match="closed"):
        team.check()
