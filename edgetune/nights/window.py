"""Says when a night begins and ends: local times of the wall clock, also where that clock is changed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from edgetune.nights.conditions import System
from edgetune.parsing import moments, seconds_until


@dataclass(frozen=True)
class Window:
    """One night's time: it begins at `start` and must have ended by `end`, both in seconds since 1970.

    `night` is the date on which it begins, such as 2026-11-28, and the name of the night's record.
    """

    night: str
    start: float
    end: float


def last_window(now: float, at: str, until: str) -> Window:
    """Return the window that began last, which may have ended.

    now: seconds since 1970. at, until: local times, HH:MM. Where the clock shows `at` twice, the first time counts; where it
    leaves `at` out, the window begins when it would have begun without the change.
    """
    local = datetime.fromtimestamp(now)
    for days in (0, 1, 2):
        date = local - timedelta(days=days)
        start = moments(date.replace(hour=int(at[:-3]), minute=int(at[-2:]), second=0, microsecond=0, fold=0))[0]
        if start <= now:
            end = start + seconds_until(until, datetime.fromtimestamp(start))
            return Window(f"{date:%Y-%m-%d}", start, end)
    raise AssertionError("the local clock showed every time of day within the last two days")


def next_start(now: float, at: str) -> float:
    """Return the time, in seconds since 1970, at which the next night begins."""
    return now + seconds_until(at, datetime.fromtimestamp(now))


class Deadline:
    """The end of a night by the wall clock, and by the time that has truly passed since the night began.

    The wall clock can be set back, and must not make a night endless; the other clock cannot be set.
    """

    def __init__(self, system: System, end: float) -> None:
        self.system, self.end = system, end
        self._began = elapsed(system)
        self._allowed = end - system.now()

    def seconds_left(self) -> float:
        """Return the seconds until the night must have ended; 0 or less once it must."""
        return min(self.end - self.system.now(), self._allowed - (elapsed(self.system) - self._began))


def elapsed(system: System) -> float:
    """Return the seconds on a clock that cannot be set and that counts sleep, as far as the system tells how long it slept."""
    return system.monotonic() + (system.suspended_seconds() or 0.0)
