"""Installs the nights with the scheduler of this system, tries one, and says how things stand."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import edgetune
from edgetune.encryption import standing
from edgetune.home import expand, home
from edgetune.lock import Lock
from edgetune.nights.begin import TRIAL_MINUTES, ask_for_trial, kept_from_by_lock, trial_begins
from edgetune.nights.job import Job, nights_folder, path_of_job
from edgetune.nights.record import NightRecord, Stage, all_records, record_of
from edgetune.nights.schedulers.cron import Cron
from edgetune.nights.schedulers.launchd import Launchd
from edgetune.nights.schedulers.scheduler import Plan, Scheduler
from edgetune.nights.schedulers.systemd import Systemd
from edgetune.nights.schedulers.task_scheduler import TaskScheduler
from edgetune.nights.window import next_start
from edgetune.progress import Progress, ignore
from edgetune.runtime.errors import BusyError, UsageError

ALL: dict[str, Callable[[], Scheduler]] = {
    "launchd": Launchd,
    "systemd": Systemd,
    "cron": Cron,
    "task-scheduler": TaskScheduler,
}
"""The schedulers by the names that --scheduler takes."""
KEPT_VARIABLES = ("EDGETUNE_HOME", "PYTHONPATH", "HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS", "XDG_DATA_HOME")
"""Variables of the environment that a night needs to find what `install` found: schedulers pass on none of them."""
BEGINS_WITHIN = 180.0
"""Seconds within which a trial must have begun: cron begins it within two minutes. Chosen by hand."""
MOST_HOURS = 36
"""Hours after which a scheduler may end a night: one that waits for an idle hour by day has given up long before.
Chosen by hand."""


def pick_scheduler(name: str) -> Scheduler:
    """Return the scheduler of this name, or for auto the one that this system has. Raises UsageError where it is missing."""
    if name != "auto":
        scheduler = ALL[name]()
        if (lacking := scheduler.lacking()) is not None:
            raise UsageError(f"--scheduler {name} cannot be used: {lacking}")
        return scheduler
    names = {"darwin": ("launchd",), "win32": ("task-scheduler",)}.get(sys.platform, ("systemd", "cron"))
    found = [ALL[candidate]() for candidate in names]
    reasons = [lacking for scheduler in found if (lacking := scheduler.lacking()) is not None]
    if len(reasons) == len(found):
        raise UsageError(
            f"Nothing here can start nights: {' '.join(reasons)} Install cron, or let a scheduler of your own run this every "
            "night: edgetune train NOTES --until 07:00"
        )
    return next(scheduler for scheduler in found if scheduler.lacking() is None)


def shown_scheduler(name: str) -> Scheduler:
    """Return the scheduler of this name for --print, whether it can be used here or not."""
    return pick_scheduler(name) if name == "auto" else ALL[name]()


def plan_of(job: Job) -> Plan:
    """Return what a scheduler is to do for a job."""
    variables = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    variables["EDGETUNE_HOME"] = str(home())
    if (package := _folder_of_package()) is not None:
        variables["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([package, *variables.get("PYTHONPATH", "").split(os.pathsep)]))
        variables["PYTHONPATH"] = variables["PYTHONPATH"].rstrip(os.pathsep)
    # -P: a folder called edgetune, where the command happens to run, is not taken for this one.
    command = (_python(), "-P", "-m", "edgetune", "nightly", "run", "--scheduled")
    log = str(nights_folder() / "last.log")
    return Plan(command, variables, str(Path.home()), log, job.times.at, MOST_HOURS, job.times.wake)


def install(job: Job, scheduler: Scheduler) -> None:
    """Write the job and let the scheduler start its nights. Where the scheduler refuses, an earlier job is what it was."""
    path = path_of_job()
    earlier = path.exists()
    if not earlier:
        job.save()  # a night may begin at once
    try:
        scheduler.install(plan_of(job))
    except UsageError:
        if not earlier:
            with contextlib.suppress(UsageError):  # it may refuse that too
                scheduler.uninstall()
            path.unlink(missing_ok=True)
        raise
    job.save()


def uninstall(job: Job) -> None:
    """Take the nights from the scheduler and delete the job. Adapters, reports and records stay."""
    if job.scheduler in ALL:
        ALL[job.scheduler]().uninstall()
    path_of_job().unlink(missing_ok=True)


def run_trial(
    job: Job, scheduler: Scheduler, now: Callable[[], float], wait: Callable[[float], object], progress: Progress = ignore
) -> NightRecord | None:
    """Let the scheduler itself run a tiny night, and return its record once it has ended; None if it never began.

    A terminal's permission to read a folder does not extend to what a scheduler starts, so only this shows that nights work.
    now: returns seconds since 1970. wait: waits for so many seconds. progress: receives seconds waited and most seconds.
    """
    began, name = now(), ask_for_trial(now())
    most = TRIAL_MINUTES * 60 + BEGINS_WITHIN
    try:
        scheduler.start(plan_of(job))
        while (passed := now() - began) < most:
            record = record_of(name)
            if record is not None and record.stage is Stage.ENDED:
                return record
            if record is None and passed > BEGINS_WITHIN:
                return None
            progress(int(passed), int(most))
            wait(0.5)
        return record_of(name)
    finally:
        trial_begins()
        scheduler.after_trial(plan_of(job))


@dataclasses.dataclass(frozen=True)
class Status:
    """The state of the nights, for `edgetune nightly status`."""

    scheduler: str
    is_installed: bool
    """True if the scheduler knows of the nights."""
    notes: tuple[str, ...]
    at: str
    until: str
    battery: int | None
    next_night: str | None
    """Local time at which the next night begins; None while nights are paused without an end."""
    paused_until: str | None
    """Local time, or "for ever"."""
    is_running: bool
    last: NightRecord | None
    encryption: str
    """How encryption at rest stands (edgetune/encryption.py)."""
    notices: tuple[str, ...]


def status_of(job: Job, now: float) -> Status:
    """Return how the nights of a job stand at a time in seconds since 1970."""
    scheduler = ALL[job.scheduler]() if job.scheduler in ALL else None
    paused = job.paused_until if job.is_paused(now) else None
    after = max(now, paused) if isinstance(paused, float) else now
    records, running = all_records(), is_running()
    if records and records[-1].outcome is None and not running:
        records[-1].crashed(now)
    notices = [] if scheduler is None else scheduler.notices()
    if (locked := kept_from_by_lock(job)) is not None:
        notices = [f"A night could not begin at {local(locked)}, since the keychain was locked: stay logged in.", *notices]
    return Status(
        scheduler=job.scheduler,
        is_installed=scheduler is not None and scheduler.is_installed(),
        notes=job.notes,
        at=job.times.at,
        until=job.times.until,
        battery=job.times.battery,
        next_night=None if isinstance(paused, str) else local(next_start(after, job.times.at)),
        paused_until=local(paused) if isinstance(paused, float) else paused,
        is_running=running,
        last=records[-1] if records else None,
        encryption=standing(home()).state,
        notices=tuple(notices),
    )


def is_running() -> bool:
    """Return True while a night is under way, waiting included."""
    try:
        with Lock(nights_folder() / "nights.lock", ""):
            return False
    except BusyError:
        return True


def local(moment: float) -> str:
    """Return a time, in seconds since 1970, as the local clock shows it."""
    return f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M}"


def absolute(notes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the paths of notes in full, since a scheduler runs elsewhere."""
    return tuple(os.path.abspath(expand(path)) for path in notes)


def _python() -> str:
    """Return the Python that runs this; on Windows the one that opens no window."""
    windowless = Path(sys.executable).with_name("pythonw.exe")
    return str(windowless) if sys.platform == "win32" and windowless.exists() else sys.executable


def _folder_of_package() -> str | None:
    """Return the folder that edgetune is imported from if Python would not find it there by itself, as in a clone."""
    folder = Path(edgetune.__file__).resolve().parent.parent
    return None if folder in _site_folders() else str(folder)


def _site_folders() -> Iterator[Path]:
    for name in {*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()}:
        yield Path(name).resolve()
