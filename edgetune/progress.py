"""Tells how far a long piece of work is: what takes seconds reports parts done, and this makes events of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from edgetune.events import Event, Working

Progress = Callable[[int, int], None]
"""A callback that receives (parts done, all parts)."""
Show = Callable[[Event], object]

QUIET_SECONDS = 2.0
"""Seconds that a stage may take without a word; chosen by hand."""
EVENT_SECONDS = 0.5
"""Shortest time between two events of a stage, in seconds; chosen by hand."""
ALIVE_SECONDS = 5.0
"""Seconds after which another event shows that a stage is alive, though no further percent is done; chosen by hand."""


def ignore(done: int, total: int) -> None:
    """Take progress that nobody wants to see."""


class Stages:
    """Makes Working events of the progress of one stage after another, and passes them to `show`.

    The first event of a stage comes after `quiet` seconds. From then on one comes with a new whole percent, at most every
    `pause` seconds, one after ALIVE_SECONDS without any, and one with the end. `check` is called at each report and may raise
    to end the work.
    """

    def __init__(
        self,
        show: Show,
        check: Callable[[], None] = lambda: None,
        quiet: float = QUIET_SECONDS,
        pause: float = EVENT_SECONDS,
    ) -> None:
        self._show, self._check, self._quiet, self._pause = show, check, quiet, pause
        self._stage, self._start, self._told, self._percent = "", 0.0, float("-inf"), -1

    def of(self, stage: str) -> Progress:
        """Begin a stage, and return the callback that takes its progress."""
        self._begin(stage)
        return lambda done, total: self(stage, done, total)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` parts of a stage are done."""
        self._check()
        if stage != self._stage or (done == 0 and self._percent > 0):
            self._begin(stage)
        now, percent = time.monotonic(), done * 100 // max(total, 1)
        pause = ALIVE_SECONDS if percent == self._percent else 0.0 if done >= total else self._pause
        if now - self._start < self._quiet or now - self._told < pause:
            return
        self._percent, self._told = percent, now
        self._show(Working(stage, done, total, now - self._start))

    def _begin(self, stage: str) -> None:
        self._stage, self._start, self._told, self._percent = stage, time.monotonic(), float("-inf"), -1


SILENT = Stages(lambda event: None)
"""Stages of which nothing is told."""
