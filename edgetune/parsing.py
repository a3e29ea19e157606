"""Parses settings that are written as text: encodings, countries, sizes and times of day."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from edgetune.runtime.errors import SettingError
from edgetune.settings import shown

SIZE = "a size such as 2GB or 900MB, at least 1 byte"
"""Words for the sizes that are taken, as they follow "expected" in an error."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
"""Bytes of a unit of size, by its name in lower case without the B."""


def check_encoding(name: str) -> None:
    """Raise SettingError unless Python knows an encoding of texts by this name."""
    try:
        "".encode(name)
    except (LookupError, ValueError) as error:  # ValueError: a name with a NUL
        raise SettingError(f"no encoding is known here by the name {name!r}") from error


def parse_regions(text: str) -> tuple[str, ...]:
    """Return the country codes in a text such as "US,DE". Raises SettingError."""
    codes = tuple(part.strip().upper() for part in text.split(","))
    if not all(re.fullmatch("[A-Z]{2}", code) for code in codes):
        raise SettingError(f"--phone-regions is {shown(text)}; expected country codes such as US,DE.")
    return codes


def parse_bytes(text: str) -> int:
    """Return the bytes that a size such as "2GB" (2,000,000,000), "1.5GiB" or "4096" stands for. Raises SettingError."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kmgt]?i?)b?\s*", text.lower())
    size = 0 if match is None or match[2] not in _UNITS else int(float(match[1]) * _UNITS[match[2]])
    if not 0 < size < 2**63:
        raise SettingError(f"--memory is {shown(text)}; expected {SIZE}.")
    return size


def seconds_until(clock: str, now: datetime | None = None) -> float:
    """Return the seconds from `now` until the local clock next shows HH:MM, however it is changed until then.

    now: local time, the present by default. A time that a change of the clock leaves out is taken as if the clock had not
    changed; of one that the clock shows twice, the next is meant. Raises SettingError.
    """
    match = re.fullmatch(r"([0-9]{1,2}):([0-9]{2})", clock)
    if match is None or int(match[1]) > 23 or int(match[2]) > 59:
        raise SettingError(f"--until is {clock!r}; expected a time of day such as 06:30.")
    now = now or datetime.now()
    start = now.timestamp()
    today = now.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
    days = (today, today + timedelta(days=1))
    return min(moment for day in days for moment in moments(day) if moment > start) - start


def moments(local: datetime) -> list[float]:
    """Return the times, in seconds since 1970, at which the local clock shows `local`: one, or two where it is set back."""
    moments = [local.replace(fold=fold).timestamp() for fold in (0, 1)]
    return [moment for moment in moments if datetime.fromtimestamp(moment) == local.replace(fold=0)] or moments[:1]


PRIVACY = "an epsilon from 0.01 to 100 such as 8, or epsilon=8,delta=1e-6,runs=30"
"""Words for the goals of private training that are taken, as they follow "expected" in an error."""


@dataclass(frozen=True)
class PrivacyGoal:
    """The privacy that an adapter and all that it was trained from may spend together.

    delta: None for the default. runs: number of runs that share it; None for the default.
    """

    epsilon: float
    delta: float | None = None
    runs: int | None = None


def parse_privacy(text: str) -> PrivacyGoal:
    """Return the goal that a text such as "8" or "epsilon=8,delta=1e-6,runs=30" stands for. Raises SettingError."""
    number = r"(?:[0-9]{0,9}\.)?[0-9]{1,9}(?:e-?[0-9]{1,2})?"
    match = re.fullmatch(rf"\s*(?:epsilon=)?({number})(?:,\s*delta=({number}))?(?:,\s*runs=([0-9]{{1,5}}))?\s*", text.lower())
    if match is not None:
        delta, runs = (None if match[2] is None else float(match[2])), (None if match[3] is None else int(match[3]))
        goal = PrivacyGoal(float(match[1]), delta, runs)
        if 0.01 <= goal.epsilon <= 100 and (delta is None or 0 < delta < 1) and (runs is None or runs > 0):
            return goal
    raise SettingError(f"--private is {shown(text)}; expected {PRIVACY}.")
