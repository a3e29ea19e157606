"""Turns the times of exports into seconds on a clock of their own: they only serve to measure gaps, so no time zone matters."""

from __future__ import annotations

import datetime
import math
from typing import Any

_EPOCH = datetime.datetime(1970, 1, 1)
_LONGEST = 64
"""Most characters of a time that are parsed. Chosen by hand."""


def seconds_of(value: Any) -> float | None:
    """Return the seconds that a number, its text, or a date and time of ISO 8601 stands for; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or len(str(value)[: _LONGEST + 1]) > _LONGEST:
        return None
    try:
        number = float(value)
        return number if math.isfinite(number) else None
    except (ValueError, OverflowError):
        pass
    try:
        moment = datetime.datetime.fromisoformat(str(value))
        return _seconds(moment)
    except (ValueError, OverflowError):
        return None


def _seconds(moment: datetime.datetime) -> float:
    if moment.tzinfo is not None:
        moment = moment.astimezone(datetime.UTC).replace(tzinfo=None)
    return (moment - _EPOCH).total_seconds()


def seconds_at(year: int, month: int, day: int, hour: int = 0, minute: int = 0, second: int = 0) -> float | None:
    """Return the seconds of a date and time, or None if there is no such date."""
    try:
        return _seconds(datetime.datetime(year, month, day, hour, minute, second))
    except (ValueError, OverflowError):
        return None
