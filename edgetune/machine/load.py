"""Times work on a machine that other programs use too, and estimates how long it would take if they did not.

Work that is short of processors takes longer by the clock, while the processor time that it uses stays the same. So both are
measured, beside what all programs together use.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

BUSY_SHARE = 0.1
"""Share of the processors (0 to 1) that other programs must use for the machine to count as busy; chosen by hand."""
WORKING_SHARE = 0.93
"""Share of its threads' time (0 to 1) in which training computes on a free machine; else they wait for each other. Measured
with two threads (LOG.md, "a shared machine")."""


class Load:
    """Times pieces of work one after another, and watches the other programs meanwhile.

    threads: how many threads the work may use.
    """

    def __init__(self, threads: int) -> None:
        self._threads, self._processors = threads, psutil.cpu_count() or 1
        self._wall = self._free = self._others = 0.0

    def seconds(self, work: Callable[[], object]) -> float:
        """Run the work and return the seconds that it would take on a free machine: those that it took, or fewer."""
        start, own, everyone = time.perf_counter(), time.process_time(), _used_by_all()
        work()
        wall, own, everyone = time.perf_counter() - start, time.process_time() - own, _used_by_all() - everyone
        return self.add(wall, own, everyone - own)

    def add(self, wall: float, own: float, others: float) -> float:
        """Count work that took `wall` seconds, and `own` and `others` seconds of processor time; return as `seconds` does."""
        self._wall += wall
        self._others += max(others, 0.0)
        free = wall
        if self.others >= BUSY_SHARE:
            within_reach = own / wall + self.others * self._processors
            free = min(wall, own / min(within_reach, WORKING_SHARE * self._threads))
        self._free += free
        return free

    @property
    def others(self) -> float:
        """The share of all processors (0 to 1) that other programs have used so far."""
        return min(self._others / (self._wall * self._processors), 1.0) if self._wall > 0 else 0.0

    @property
    def slowdown(self) -> float:
        """How many times as long all work together took as on a free machine, at least 1."""
        return self._wall / self._free if self._free > 0 else 1.0


def _used_by_all() -> float:
    """Return the processor seconds that all programs have used since the machine started, and what its host took."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # Linux counts them as user and nice as well
    return float(sum(times) - idle - guests)
