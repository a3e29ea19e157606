"""Decides when a night may work and when it must pause, from what the machine says about itself.

Everything that a night asks of the machine stands behind `System`: this_system.py asks the real one, and tests have a simulated
one. A value that the machine does not tell is None, and nothing is concluded from it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Protocol

IDLE_SECONDS = 600.0
"""Seconds without a key or the mouse after which nobody is using the machine; chosen by hand."""
RETURNED_SECONDS = 60.0
"""Seconds since the last key or move of the mouse below which the user has returned; chosen by hand."""
LEAST_FREE_DISK = 1 << 30
"""Free bytes of the disk below which no night begins: a checkpoint of a large adapter is about this large. Chosen by hand."""
BATTERY_MARGIN = 5.0
"""Percent of charge by which the battery must exceed the named level before a paused night goes on; chosen by hand."""


class Level(IntEnum):
    """Degree to which the machine is hot, or short of memory.

    At RAISED, a night that works goes on, and one that waits keeps waiting.
    """

    LOW = 0
    RAISED = 1
    HIGH = 2


class System(Protocol):
    """The machine as a night sees it."""

    def now(self) -> float:
        """Return the wall clock's time in seconds since 1970."""

    def monotonic(self) -> float:
        """Return seconds on a clock that nobody can set. It stands still while the machine sleeps."""

    def suspended_seconds(self) -> float | None:
        """Return the seconds that the machine has slept since it was started; None where `monotonic` counts them."""

    def on_mains(self) -> bool | None:
        """Return True if the machine is on mains power, as one without a battery always is."""

    def battery(self) -> float | None:
        """Return the battery's charge in percent (0 to 100)."""

    def heat(self) -> Level | None:
        """Return how hot the machine is; HIGH where it slows itself down."""

    def memory_pressure(self) -> Level | None:
        """Return how short of memory the machine is; HIGH where programs wait for it."""

    def idle_seconds(self) -> float | None:
        """Return the seconds since somebody last used the keyboard or the mouse."""

    def free_disk(self) -> int | None:
        """Return the free bytes of the disk that holds edgetune's data folder."""

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Return after this many seconds, or as soon as `stop` is set."""


class Obstacle(StrEnum):
    """A reason why a night waits. The value completes the sentence "It waited because ..."."""

    BATTERY = "the machine was on battery"
    HEAT = "the machine was hot"
    MEMORY = "other programs needed the memory"
    USER = "somebody was using the machine"
    DISK = "the disk was nearly full"
    SLEEP = "the machine slept"


@dataclass(frozen=True)
class Rules:
    """The conditions of one night.

    battery: charge in percent above which a night also works on battery; None: on mains alone. heeds_user: False for a night
    that the user began, since they are at the machine.
    """

    battery: int | None = None
    heeds_user: bool = True
    heeds_machine: bool = True
    """False for the short trial of an installation, which heeds the disk alone."""
    mains_only: bool = False
    """True for a missed night that is made up for by day: it works on mains alone, whatever `battery` says."""

    def before_work(self, system: System) -> Obstacle | None:
        """Return what keeps a night from beginning, or from going on after a pause; None if nothing does."""
        free = system.free_disk()
        if free is not None and free < LEAST_FREE_DISK:
            return Obstacle.DISK
        return self._obstacle(system, Level.RAISED, BATTERY_MARGIN, IDLE_SECONDS)

    def during_work(self, system: System) -> Obstacle | None:
        """Return the reason why a night at work must pause; None if there is none."""
        return self._obstacle(system, Level.HIGH, 0.0, RETURNED_SECONDS)

    def _obstacle(self, system: System, too_much: Level, battery_margin: float, least_idle: float) -> Obstacle | None:
        if not self.heeds_machine:
            return None
        if self._lacks_power(system, battery_margin):
            return Obstacle.BATTERY
        if (system.heat() or Level.LOW) >= too_much:
            return Obstacle.HEAT
        if (system.memory_pressure() or Level.LOW) >= too_much:
            return Obstacle.MEMORY
        idle = system.idle_seconds() if self.heeds_user else None
        return Obstacle.USER if idle is not None and idle < least_idle else None

    def _lacks_power(self, system: System, margin: float) -> bool:
        if system.on_mains() is not False:
            return False
        charge = system.battery()
        enough = self.battery is not None and charge is not None and charge >= min(self.battery + margin, 100.0)
        return self.mains_only or not enough
