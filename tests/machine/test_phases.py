"""The seconds of a command's phases."""

import subprocess
import sys
import time
from collections import deque

import pytest

from turbo_nb.machine import phases


@pytest.fixture(autouse=True)
def no_marks(monkeypatch):
    monkeypatch.setattr(phases, "_marks", deque(maxlen=256))


def test_phases_follow_each_other_and_equal_names_are_added(monkeypatch):
    assert phases.seconds(0.0) == {}
    for name, at in (("import", 3.0), ("load", 5.0), ("import", 6.0)):
        monkeypatch.setattr(time, "time", lambda at=at: at)
        phases.mark(name)
    assert phases.seconds(1.0) == {"import": 3.0, "load": 2.0}


def test_the_first_phase_begins_with_the_process():
    code = (
        "import time; time.sleep(0.5); from turbo_nb.machine import phases; phases.mark('python'); "
        "time.sleep(0.2); phases.mark('rest'); print(*phases.seconds().values())"
    )
    begin = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    first, rest = map(float, out.split())
    assert first >= 0.48 and rest == pytest.approx(0.2, abs=0.15) and first + rest <= time.perf_counter() - begin + 0.1
