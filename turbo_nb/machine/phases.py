"""The phases of a command, in seconds from the start of its process; `--timing` prints them."""

import os
import time
from collections import deque
from pathlib import Path

_marks: deque[tuple[str, float]] = deque(maxlen=256)  # a phase, and when it ended


def mark(name: str) -> None:
    """Note that a phase ends now. The next phase begins."""
    _marks.append((name, time.time()))


def seconds(begin: float | None = None) -> dict[str, float]:
    """Return the seconds of each phase, in order. Phases of the same name are added up.

    Args:
        begin: when the first phase began, as in `time.time`. None: when this process was started.
    """
    begin = _process_start() if begin is None else begin
    found: dict[str, float] = {}
    for name, end in _marks:
        found[name] = found.get(name, 0) + end - begin
        begin = end
    return found


def _process_start() -> float:
    """Return when this process was started, as in `time.time`"""
    try:  # because psutil is up to a second wrong on Linux, whose time of boot has whole seconds
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        import psutil

        return psutil.Process().create_time()
    return time.time() - age
