"""--until is a time on the wall clock: on the nights of a clock change, after a sleep, and when the clock is set."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from edgetune.config import TrainConfig
from edgetune.parsing import seconds_until
from edgetune.training.deadline import LONGEST_SET_BACK, Deadline

HOUR = 3600.0


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not hasattr(time, "tzset"):
        pytest.skip("Windows has no tzset")
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0/2,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("now", "clock", "hours"),
    [
        ("2026-03-29 01:30", "06:30", 4),  # 02:00 becomes 03:00
        ("2026-10-25 01:30", "06:30", 6),  # 03:00 becomes 02:00
        ("2026-06-01 01:30", "06:30", 5),
        ("2026-03-28 22:00", "06:30", 7.5),
        ("2026-10-24 22:00", "06:30", 9.5),
        ("2026-03-29 07:00", "06:30", 23.5),  # the next morning
        ("2026-03-28 07:00", "06:30", 22.5),
        ("2026-10-24 07:00", "06:30", 24.5),
        ("2026-03-29 01:30", "02:30", 1),  # left out: the clock shows 03:30 then
        ("2026-10-25 01:30", "02:30", 1),  # shown twice: the first time
        ("2026-10-25 02:45", "02:30", 0.75),  # the second time, 02:45 being the first
    ],
)
def test_until_is_what_the_local_clock_will_show(berlin: None, now: str, clock: str, hours: float) -> None:
    assert seconds_until(clock, datetime.fromisoformat(now)) == hours * HOUR


def test_a_time_that_is_shown_twice_is_not_over_after_the_first(berlin: None) -> None:
    second = datetime.fromisoformat("2026-10-25 02:15").replace(fold=1)
    assert seconds_until("02:30", second) == 0.25 * HOUR
    assert seconds_until("02:00", second) == 23.75 * HOUR


class Clocks:
    """A wall clock and a monotonic one, which tests set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.working = 1_780_000_000.0, 500.0
        monkeypatch.setattr("edgetune.training.deadline.time.time", lambda: self.wall)
        monkeypatch.setattr("edgetune.training.deadline.time.monotonic", lambda: self.working)

    def work(self, seconds: float) -> None:
        self.wall += seconds
        self.working += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    monkeypatch.setattr("edgetune.training.deadline.seconds_until", lambda clock: 5 * HOUR)
    return Clocks(monkeypatch)


def test_without_a_deadline_none_passes(clocks: Clocks) -> None:
    deadline = Deadline.of(TrainConfig())
    clocks.work(1e9)
    assert not deadline.has_passed()


def test_a_sleep_does_not_move_until(clocks: Clocks) -> None:
    deadline = Deadline.of(TrainConfig(until="06:30"))
    clocks.work(HOUR)
    assert deadline.seconds_left() == 4 * HOUR
    clocks.wall += 4 * HOUR  # the machine sleeps: the monotonic clock of Linux and macOS stands still
    assert deadline.has_passed()


def test_a_sleep_is_no_work_that_minutes_count(clocks: Clocks) -> None:
    deadline = Deadline.of(TrainConfig(minutes=60))
    clocks.wall += 9 * HOUR
    clocks.work(HOUR - 1)
    assert not deadline.has_passed()
    clocks.work(1)
    assert deadline.has_passed()


def test_of_minutes_and_until_the_earlier_counts(clocks: Clocks) -> None:
    deadline = Deadline.of(TrainConfig(minutes=600, until="06:30"))
    assert deadline.seconds_left() == 5 * HOUR
    assert Deadline.of(TrainConfig(minutes=6, until="06:30")).seconds_left() == 360


def test_a_clock_that_is_set_back_far_does_not_make_the_run_endless(clocks: Clocks) -> None:
    deadline = Deadline.of(TrainConfig(until="06:30"))
    clocks.wall -= 600  # corrected by ten minutes: the run ends when the clock shows 06:30
    clocks.work(5 * HOUR)
    assert not deadline.has_passed()
    clocks.work(600)
    assert deadline.has_passed()
    clocks.wall = 0.0  # 1970
    assert not Deadline(deadline.wall, clocks.working + 1).has_passed()
    clocks.work(LONGEST_SET_BACK)
    assert deadline.has_passed()
