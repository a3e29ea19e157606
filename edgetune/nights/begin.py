"""Begins a night: decides whether one is due, closes what a crash has left open, and holds the lock of the nights."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from datetime import datetime

from edgetune.config import MANUAL_MINUTES
from edgetune.lock import Lock
from edgetune.nights.conditions import Rules
from edgetune.nights.job import Job, nights_folder
from edgetune.nights.night import Means, Night
from edgetune.nights.record import Kind, NightRecord, Stage, all_records, record_of
from edgetune.nights.tonight import forget_tonight, load_tonight
from edgetune.nights.trainer import Trainer
from edgetune.nights.window import last_window, next_start
from edgetune.runtime.errors import EdgetuneError, UsageError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.json_file import read_object
from edgetune.runtime.untrusted_file import NIGHT_RECORD

TRIAL_MINUTES = 10.0
"""Longest time of an installation's trial, in minutes; chosen by hand."""
_TRIAL_FILE = "trial.json"
LOCKED_FILE = "locked.log"
"""File with the time at which the scheduler's call last found the keychain locked. It is plain, as .log files are: without the
key, nothing else could be written."""


@dataclass(frozen=True)
class Due:
    """A night that is to be begun: its name, what makes it begin, and when it must have ended (seconds since 1970)."""

    night: str
    kind: Kind
    ends_by: float


def due_night(job: Job, now: float) -> Due | None:
    """Return the night that a scheduler's call at this time is to begin; None if there is none.

    A call within the window begins or continues the window's night. A later one makes up for it by day, unless it has ended.
    now: seconds since 1970.
    """
    if (name := asked_for_trial(now)) is not None:
        return Due(name, Kind.TRIAL, now + TRIAL_MINUTES * 60)
    window = last_window(now, job.times.at, job.times.until)
    record = record_of(window.night)
    if window.end <= job.installed or (record is not None and record.stage is Stage.ENDED):
        return None
    if now < window.end:
        return Due(window.night, Kind.NIGHT, window.end)
    return Due(window.night, Kind.CATCH_UP, next_start(now, job.times.at))


def manual_night(now: float, minutes: float = MANUAL_MINUTES) -> Due:
    """Return a night that the user begins now and that ends after so many minutes."""
    return Due(f"{datetime.fromtimestamp(now):%Y-%m-%d-%H%M%S}", Kind.MANUAL, now + minutes * 60)


def rules_of(job: Job, kind: Kind) -> Rules:
    """Return the conditions of a night of this kind."""
    return Rules(
        battery=job.times.battery,
        heeds_user=kind in (Kind.NIGHT, Kind.CATCH_UP),
        heeds_machine=kind is not Kind.TRIAL,
        mains_only=kind is Kind.CATCH_UP,
    )


def run_due(job: Job, due: Due, means: Means, accept_fewer: bool = False) -> NightRecord:
    """Run a night while holding the lock of the nights, and return its record. Raises BusyError where another is running."""
    with Lock(nights_folder() / "nights.lock", "the nights of this user"):
        now = means.system.now()
        close_earlier(job, due.night, means.trainer, now)
        record = record_of(due.night)
        if record is None:
            record = NightRecord(due.night, due.kind, began=now, ends_by=due.ends_by)
        elif record.stage is Stage.ENDED:  # another process ran it since
            return record
        else:
            record.kind, record.ends_by, record.outcome, record.ended = due.kind, due.ends_by, None, None
            record.resumed += 1
        if due.kind is Kind.TRIAL:
            trial_begins()
        return Night(job, record, rules_of(job, due.kind), means, accept_fewer).run()


def close_earlier(job: Job, night: str, trainer: Trainer, now: float) -> None:
    """Record the end of earlier nights whose process was ended from outside, and delete what they left unfinished."""
    for record in all_records():
        if record.night != night and record.stage is not Stage.ENDED:
            if record.outcome is None:
                record.crashed(now)
            record.stage = Stage.ENDED
            record.save()
    left = load_tonight()
    if left is not None and left.night != night:
        if left.begun:
            with contextlib.suppress(EdgetuneError):
                trainer.discard(left.config(job))
        forget_tonight()


def ask_for_trial(now: float) -> str:
    """Ask the next call by the scheduler for a trial night; return the trial's name. now: seconds since 1970."""
    name = f"{datetime.fromtimestamp(now):%Y-%m-%d-%H%M%S}-trial"
    atomic_write(nights_folder() / _TRIAL_FILE, json.dumps({"night": name, "asked": now}) + "\n")
    return name


def asked_for_trial(now: float) -> str | None:
    """Return the name of the trial that was asked for within the last minutes and has not begun."""
    path = nights_folder() / _TRIAL_FILE
    try:
        found = read_object(path, NIGHT_RECORD) if path.exists() else {}
    except UsageError:
        return None
    name, asked = found.get("night"), found.get("asked")
    is_recent = isinstance(asked, float) and 0 <= now - asked <= TRIAL_MINUTES * 60
    return name if is_recent and isinstance(name, str) and re.fullmatch(r"[0-9-]{17}-trial", name) else None


def trial_begins() -> None:
    """Forget that a trial was asked for, since it begins or was given up."""
    (nights_folder() / _TRIAL_FILE).unlink(missing_ok=True)


def found_locked(now: float) -> None:
    """Remember that the scheduler's call found the keychain locked, and so began no night. now: seconds since 1970."""
    atomic_write(nights_folder() / LOCKED_FILE, json.dumps({"at": now}) + "\n")


def kept_from_by_lock(job: Job) -> float | None:
    """Return when the locked keychain kept a due night from beginning, in seconds since 1970.

    None where it did not, where that night has ended, and where a later one has begun.
    """
    path = nights_folder() / LOCKED_FILE
    try:
        moment = read_object(path, NIGHT_RECORD).get("at") if path.exists() else None
    except UsageError:
        return None
    if not isinstance(moment, float) or due_night(job, moment) is None:
        return None
    return None if any(record.began > moment for record in all_records()) else moment
