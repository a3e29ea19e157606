"""The time at which a run must stop: --minutes counts the time it works, --until is a time on the wall clock."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from edgetune.config import TrainConfig
from edgetune.parsing import seconds_until

LONGEST_SET_BACK = 3600.0
"""Seconds by which setting back the wall clock may prolong a run with --until. Chosen by hand; the change between summer and
winter time does not set this clock back."""


@dataclass(frozen=True)
class Deadline:
    """Two limits, of which the earlier counts; both are infinite where nobody asked for a deadline.

    The monotonic clock of most systems stands still while the machine sleeps, so it cannot tell when it is 06:30. The wall
    clock can be set, so it cannot tell how long a run has worked.
    """

    wall: float = math.inf
    """Seconds since 1970."""
    working: float = math.inf
    """Seconds on the clock of time.monotonic."""

    @classmethod
    def of(cls, config: TrainConfig) -> Deadline:
        """Return the deadline of a run that begins now."""
        minutes = math.inf if config.minutes is None else config.minutes * 60
        until = math.inf if config.until is None else seconds_until(config.until)
        return cls(time.time() + until, time.monotonic() + min(minutes, until + LONGEST_SET_BACK))

    def seconds_left(self) -> float:
        """Return the seconds until the deadline; 0 or less once it has passed."""
        return min(self.wall - time.time(), self.working - time.monotonic())

    def has_passed(self) -> bool:
        """Return True if the run must stop."""
        return self.seconds_left() <= 0
