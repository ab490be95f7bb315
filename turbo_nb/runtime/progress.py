"""One progress over all stages of a clip, from the times that the stages are expected to take. Pure data."""

import time
from collections import deque
from collections.abc import Callable, Mapping

STAGES = ("load", "text", "denoise", "decode", "write")
# Shares of a clip where no time is known. They only shape the bar: no seconds are shown then.
SHARES = {"load": 0.2, "text": 0.05, "denoise": 0.6, "decode": 0.14, "write": 0.01}
UNKNOWN = 10.0  # seconds that a stage of unknown length is taken to need, for the bar alone
LATE = 5.0  # seconds by which a step may be late before its stage counts as unknown
RATE_OVER = 10.0  # seconds over which the speed of a download is taken


class Progress:
    """Where a clip is.

    Args:
        expected: seconds by stage. Empty: not known.
        clock: returns the time in seconds.
    """

    def __init__(self, expected: Mapping[str, float] = {}, clock: Callable[[], float] = time.monotonic):
        self._clock, self._known = clock, bool(expected)
        self._expected = {stage: expected.get(stage, 0.0) for stage in STAGES} if expected else dict(SHARES)
        self.stage, self.done, self.total = STAGES[0], 0, 0
        self._moved = self.began = clock()
        self._fraction = 0.0

    def at(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Note a stage, and how much of it is done: steps, frames or bytes. total 0: not known."""
        if stage not in STAGES:
            return
        if (stage, done) != (self.stage, self.done):
            self._moved = self._clock()
        self.stage, self.done, self.total = stage, done, total

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self.began

    @property
    def fraction(self) -> float:
        """How much of the clip is done, from 0 to 1. It never goes back, and moves between two steps, too."""
        every = sum(self._expected.values()) or 1.0
        before = sum(self._expected[stage] for stage in STAGES[: STAGES.index(self.stage)])
        self._fraction = max(self._fraction, min(1.0, (before + self._expected[self.stage] * self._share()) / every))
        return self._fraction

    @property
    def remaining(self) -> float | None:
        """Seconds that are left. None: not known."""
        if not self._known or self._is_late():
            return None
        at = STAGES.index(self.stage)
        here = self._expected[self.stage] * (1 - self._share())
        return here + sum(self._expected[stage] for stage in STAGES[at + 1 :])

    @property
    def _unit(self) -> float:
        """Seconds that one step, or a stage without steps, is expected to take"""
        return self._expected[self.stage] / (self.total or 1) if self._known else UNKNOWN / (self.total or 1)

    @property
    def _since(self) -> float:
        """Seconds since the latest step ended"""
        return self._clock() - self._moved

    def _is_late(self) -> bool:
        """Return whether a step takes over twice what was expected, so that the expectation is worth nothing"""
        return self._since > max(LATE, 2 * self._unit)

    def _share(self) -> float:
        """Return how much of the stage is done, from 0 to 1: steps that ended, and a part of the running one"""
        passed = self._since / self._unit if self._unit else 0.0
        # from 0.8 on it comes ever nearer to 1, because the step may take longer than expected
        part = passed if passed < 0.8 else 1 - 0.2 / (1 + 5 * (passed - 0.8))
        return min(1.0, (self.done + part) / self.total) if self.total else part


class Rate:
    """The speed of a download, over its last seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._seen = clock, deque()

    def at(self, done: float) -> None:
        """Note how many bytes have come so far."""
        now = self._clock()
        self._seen.append((now, done))
        while self._seen and now - self._seen[0][0] > RATE_OVER:
            self._seen.popleft()

    @property
    def speed(self) -> float | None:
        """Bytes a second. None: not known yet."""
        if len(self._seen) < 2:
            return None
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        return (after - before) / (last - first) if last - first > 0.5 else None

    def left(self, total: float) -> float | None:
        """Return the seconds until all bytes have come. None: not known."""
        speed = self.speed
        return (total - self._seen[-1][1]) / speed if speed else None
