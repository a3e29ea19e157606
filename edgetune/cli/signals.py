"""The signals that end a command in an orderly way: Ctrl-C, SIGTERM, and SIGHUP where the terminal closes."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
"""SIGHUP, which Windows does not have."""


_interrupts: list[int] = []
"""A number for each Ctrl-C since `exit_on_signals`: some libraries swallow the KeyboardInterrupt while they are imported."""


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit, as Ctrl-C raises KeyboardInterrupt, so that no half-written file is left."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        _interrupts.append(number)
        raise KeyboardInterrupt

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    for number in _ending_signals():
        signal.signal(number, leave)


def stop_on_signals(stop: threading.Event, caught: list[int]) -> dict[signal.Signals, Any]:
    """Make Ctrl-C, SIGTERM and SIGHUP set `stop`, so that a run saves and ends; a second Ctrl-C or SIGTERM ends it at once.

    Return the previous handlers. The signal's number is appended to `caught`. A Ctrl-C before this call that had no effect has
    it at once.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        # A terminal that closes may send SIGHUP more than once: from the kernel and from the shell.
        if caught and number != HANGUP:
            raise KeyboardInterrupt
        caught.append(number)
        stop.set()

    if _interrupts:
        caught.append(_interrupts[-1])
        stop.set()
    return {number: signal.signal(number, handle) for number in (signal.SIGINT, *_ending_signals())}


def _ending_signals() -> list[signal.Signals]:
    """Return SIGTERM, and SIGHUP unless it is ignored, as it is under nohup."""
    if HANGUP is None or signal.getsignal(HANGUP) is signal.SIG_IGN:
        return [signal.SIGTERM]
    return [signal.SIGTERM, HANGUP]
