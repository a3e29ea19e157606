"""Watches the machine while a night works, and stops the training when it must pause or end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from enum import StrEnum

from edgetune.events import Event, Started
from edgetune.nights.conditions import Obstacle, Rules, System
from edgetune.nights.window import Deadline
from edgetune.progress import Show

LOOKED_EVERY = 5.0
"""Seconds between two looks at the machine; chosen by hand."""
LONG_SLEEP = 60.0
"""Seconds of sleep after which a night plans its time anew; chosen by hand."""


class End(StrEnum):
    """A reason why the training of a night stops for good, or begins again with another plan."""

    DEADLINE = "deadline"
    STOPPED = "stopped"
    PAUSED = "paused"
    REPLAN = "replan"
    TRIED = "tried"


class BeforeStart(Exception):
    """Raised to end what has no result to keep yet: reading notes, converting and loading a model."""


class Watch:
    """Looks at the machine again and again. Once `why` is set, so is `stop`, on which training ends at the next safe place.

    asked_to_stop: set by Ctrl-C and SIGTERM. is_paused: True once the user has paused nights.
    """

    def __init__(
        self, system: System, rules: Rules, deadline: Deadline, asked_to_stop: threading.Event, is_paused: Callable[[], bool]
    ) -> None:
        self.system, self.rules, self.deadline = system, rules, deadline
        self.asked_to_stop, self.is_paused = asked_to_stop, is_paused
        self.stop = threading.Event()
        self.why: End | Obstacle | None = None
        self._slept = system.suspended_seconds() or 0.0
        self._started = False
        self._ended = threading.Event()

    def look(self) -> None:
        """Set `why` and `stop` if the night must end or pause."""
        if self.why is None:
            self.why = self._reason()
        if self.why is not None:
            self.stop.set()

    def end(self, why: End) -> None:
        """Stop the training for this reason, unless there is another already."""
        self.why = self.why or why
        self.stop.set()

    def check(self) -> None:
        """Look at the machine, and raise BeforeStart if the night must end or pause."""
        self.look()
        if self.stop.is_set():
            raise BeforeStart

    def shown(self, show: Show) -> Show:
        """Return a function that shows an event and, until a run has started, raises BeforeStart where it must stop."""

        def watched(event: Event) -> None:
            self._started = self._started or isinstance(event, Started)
            show(event)
            self.look() if self._started else self.check()

        return watched

    @contextlib.contextmanager
    def alongside(self, every: float | None) -> Iterator[None]:
        """Look at the machine every so many seconds while the block runs; None: only where the block itself asks for it."""
        if every is None:
            yield
            return
        thread = threading.Thread(target=self._keep_looking, args=(every,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _keep_looking(self, every: float) -> None:
        next_look = self.system.monotonic()
        while not self._ended.is_set():
            if self.asked_to_stop.is_set() or self.system.monotonic() >= next_look:
                self.look()
                next_look = self.system.monotonic() + every
            self._ended.wait(0.2)

    def _reason(self) -> End | Obstacle | None:
        if self.asked_to_stop.is_set():
            return End.STOPPED
        if self.deadline.seconds_left() <= 0:
            return End.DEADLINE
        if self.is_paused():
            return End.PAUSED
        if (self.system.suspended_seconds() or 0.0) - self._slept > LONG_SLEEP:
            return Obstacle.SLEEP
        return self.rules.during_work(self.system)
