"""One bar over all stages, and the speed of a download, on a clock of the test's own."""

from itertools import pairwise

import pytest

from turbo_nb.runtime.progress import STAGES, Progress, Rate

EXPECTED = {"load": 2.0, "text": 1.0, "denoise": 8.0, "decode": 4.0, "write": 1.0}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_the_bar_follows_the_expected_times(clock):
    progress = Progress(EXPECTED, clock)
    assert (progress.fraction, progress.remaining) == (0, 16)
    clock.now += 1
    assert progress.fraction == pytest.approx(1 / 16) and progress.remaining == pytest.approx(15)
    progress.at("denoise", 1, 4)
    assert progress.fraction == pytest.approx(5 / 16) and progress.remaining == pytest.approx(11)
    clock.now += 1
    assert progress.fraction == pytest.approx(6 / 16) and progress.remaining == pytest.approx(10)
    progress.at("write")
    assert progress.remaining == pytest.approx(1)


@pytest.mark.parametrize("expected", [EXPECTED, {}], ids=["known", "unknown"])
@pytest.mark.parametrize("total", [0, 4], ids=["one", "steps"])
def test_the_bar_moves_every_second_and_never_back(clock, expected, total):
    progress, seen = Progress(expected, clock), []
    for stage in STAGES:
        for done in range(total or 1):
            progress.at(stage, done, total)
            for _ in range(7):  # longer than expected
                clock.now += 1
                seen.append(progress.fraction)
    assert seen == sorted(seen) and seen[-1] <= 1
    moved = [b > a for a, b in pairwise(seen)]
    assert sum(moved) > 0.9 * len(moved)


def test_a_step_that_is_late_has_no_time_left(clock):
    progress = Progress(EXPECTED, clock)
    progress.at("denoise", 0, 4)
    clock.now += 60
    assert progress.remaining is None
    progress.at("denoise", 1, 4)
    assert progress.remaining == pytest.approx(11)
    assert Progress({}, clock).remaining is None


def test_a_stage_that_takes_no_time_is_passed(clock):
    progress = Progress({"denoise": 4.0}, clock)
    clock.now += 3
    assert progress.fraction == 0 and progress.remaining == pytest.approx(4)
    progress.at("switch")
    assert progress.stage == "load"


def test_the_speed_is_that_of_the_last_seconds(clock):
    rate = Rate(clock)
    assert (rate.speed, rate.left(100)) == (None, None)
    for done in (0, 1000, 2000, 3000):
        rate.at(done)
        clock.now += 1
    assert rate.speed == 1000 and rate.left(5000) == 2
    for done in range(3000, 3200, 10):
        rate.at(done)
        clock.now += 1
    assert rate.speed == 10
