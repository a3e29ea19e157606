"""Implements `edgetune nightly`: install, status, run, pause, resume and uninstall."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.options import json_option, print_json, progress_shown, say, setting_option
from edgetune.cli.signals import stop_on_signals
from edgetune.config import MANUAL_MINUTES, NightlyConfig
from edgetune.home import home
from edgetune.nights.job import FOR_EVER, Job, load_job, training_settings
from edgetune.progress import Stages
from edgetune.reports import desktop
from edgetune.reports.text import one_line
from edgetune.runtime.errors import BusyError, EdgetuneError, LockedError, SettingError
from edgetune.settings import Number, Whole, settings_of

if TYPE_CHECKING:
    from edgetune.nights.record import NightRecord
    from edgetune.nights.schedulers.scheduler import Scheduler

SILENT_OUTCOMES = ("nothing new", "paused", "stopped", "works")
"""Outcomes of nights for which --notify shows nothing: they need nobody's attention, or the user is there."""
FAILED_OUTCOMES = ("failed", "notes missing", "no privacy left")
"""Outcomes of nights with which `edgetune nightly run` exits with 1: every night ends so until somebody does something."""
MOST_DAYS, MOST_MINUTES = 3650, 1440
"""Longest pause in days, and longest night that the user begins in minutes; chosen by hand."""


@click.group("nightly")
def nightly_command() -> None:
    """Learn from new notes every night.

    Install it once; each morning, `edgetune nightly status` says in one sentence what happened.
    """


def install_options(command: Callable[..., None]) -> Callable[..., Any]:
    """Add the settings of nights, and those settings of training that a night does not decide itself."""
    decorated: Callable[..., Any] = command
    for declared in reversed(training_settings()):
        decorated = setting_option(declared)(decorated)
    for declared in reversed(list(settings_of(NightlyConfig))):
        decorated = setting_option(declared, declared.default)(decorated)
    return click.argument("notes", nargs=-1, required=True)(decorated)


@nightly_command.command("install")
@install_options
@click.option("--print", "only_print", is_flag=True, help="Show what would be installed, and install nothing.")
@click.option("--no-trial", is_flag=True, help="Do not let the scheduler run a tiny night at once to show that nights work.")
@json_option
def install_command(
    notes: tuple[str, ...],
    at: str,
    until: str,
    battery: int | None,
    wake: bool | None,
    notify: bool | None,
    scheduler: str,
    only_print: bool,
    no_trial: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Learn from NOTES every night between --at and --until.

    The system's own scheduler starts the nights. What is written for it is shown first.
    """
    from edgetune.library.loading import choose_model
    from edgetune.nights import install as installing
    from edgetune.privacy.accounting import check_installed

    times = NightlyConfig(at, until, battery, bool(wake), bool(notify), scheduler)
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    found = installing.shown_scheduler(scheduler) if only_print else installing.pick_scheduler(scheduler)
    given["model"] = choose_model(given.get("model")).name
    job = Job(installing.absolute(notes), times, found.name, time.time(), given)
    count = _count_notes(job)
    if only_print:
        _print_plan(job, found, as_json)
        return
    say(f"{count:,} notes and chats can be read. For {found.name}, edgetune writes:")
    _say_plan(job, found)
    if job.train_config().private is not None:
        check_installed()
    installing.install(job, found)
    trial = None if no_trial else _trial(job, found)
    notices = [*found.notices(), *_trial_notices(trial, found.name, no_trial)]
    if as_json:
        next_night = installing.status_of(job, time.time()).next_night
        record = None if trial is None else _shown(trial)
        print_json({"scheduler": found.name, "notes": count, "next_night": next_night, "trial": record, "notices": notices})
        return
    for notice in notices:
        say(notice)
    click.echo(f"Installed. The next night begins at {installing.status_of(job, time.time()).next_night}.")


@nightly_command.command("status")
@json_option
def status_command(as_json: bool) -> None:
    """Show when the next night begins, and what the last one came to."""
    from edgetune.nights import install as installing

    job = load_job()
    status = installing.status_of(job, time.time())
    if as_json:
        last = None if status.last is None else _shown(status.last)
        print_json({**dataclasses.asdict(status), "last": last})
        return
    known = "started by" if status.is_installed else "installed, but unknown to"
    click.echo(f"Nights from {status.at} to {status.until}, {known} {status.scheduler}: {one_line(', '.join(status.notes))}")
    if not status.is_installed:
        click.echo("  To install them again, type: edgetune nightly install, with your folder of notes.")
    power = "on mains power only" if status.battery is None else f"on mains power, or above {status.battery}% of battery"
    click.echo(f"  Works {power}.")
    if status.paused_until is not None:
        click.echo(f"  {_paused(status.paused_until)}")
    if status.next_night is not None:
        click.echo(f"  Next night: {status.next_night}" + (" (one is under way now)" if status.is_running else ""))
    if status.encryption != "off":
        click.echo("  What nights keep is encrypted; the keychain gives the key while you are logged in.")
    click.echo("  " + ("There has been no night yet." if status.last is None else one_line(status.last.sentence)))
    for notice in status.notices:
        click.echo(f"  {notice}")


@nightly_command.command("run")
@click.option("--minutes", type=float, metavar="N", help=f"Stop after this many minutes. Default: {MANUAL_MINUTES:g}.")
@click.option("--fewer-notes", is_flag=True, help="Go on although many of the last night's notes are gone.")
@click.option("--scheduled", is_flag=True, hidden=True)
@click.option("--set", "variables", multiple=True, hidden=True)
@json_option
def run_command(minutes: float | None, fewer_notes: bool, scheduled: bool, variables: tuple[str, ...], as_json: bool) -> None:
    """Run a night now, and show its progress.

    It waits for mains power, as every night does. Ctrl-C ends it; your current adapter stays as it was.
    """
    _set_variables(variables)
    from edgetune.nights.begin import due_night, found_locked, manual_night, run_due
    from edgetune.nights.record import Kind

    allowed = Number(0, MOST_MINUTES, above=True)
    try:
        minutes = MANUAL_MINUTES if minutes is None else allowed.checked(minutes)
    except ValueError as error:
        raise SettingError(f"--minutes is {minutes:g}; expected {allowed.expected}.") from error
    try:
        job = load_job()
    except LockedError:
        if scheduled:
            found_locked(time.time())
        raise
    due = due_night(job, time.time()) if scheduled else manual_night(time.time(), minutes)
    if due is None:
        _print_nothing("No night is due.", as_json)
        return
    try:
        record, caught = _run(lambda means: run_due(job, due, means, fewer_notes), due.kind in (Kind.MANUAL, Kind.TRIAL))
    except BusyError:
        if not scheduled:
            raise
        _print_nothing("A night is under way already.", as_json)
        return
    if job.times.notify and record.outcome not in SILENT_OUTCOMES:
        desktop.notify("edgetune", one_line(record.sentence))
    if as_json:
        print_json(_shown(record))
    else:
        click.echo(one_line(record.sentence))
    if caught:
        sys.exit(128 + caught[0])
    sys.exit(1 if record.outcome in FAILED_OUTCOMES else 0)


@nightly_command.command("pause")
@click.option("--days", type=int, metavar="N", help="Pause for this many days. Default: until `edgetune nightly resume`.")
@json_option
def pause_command(days: int | None, as_json: bool) -> None:
    """Pause the nights; one that is under way ends."""
    from edgetune.nights.install import local

    allowed, job = Whole(1, MOST_DAYS), load_job()
    try:
        until = FOR_EVER if days is None else time.time() + 86400 * allowed.checked(days)
    except ValueError as error:
        raise SettingError(f"--days is {days}; expected {allowed.expected}.") from error
    dataclasses.replace(job, paused_until=until).save()
    shown = local(until) if isinstance(until, float) else until
    if as_json:
        print_json({"paused_until": shown})
    else:
        click.echo(_paused(shown))


@nightly_command.command("resume")
@json_option
def resume_command(as_json: bool) -> None:
    """Let paused nights go on."""
    from edgetune.nights.install import status_of

    job = dataclasses.replace(load_job(), paused_until=None)
    job.save()
    next_night = status_of(job, time.time()).next_night
    if as_json:
        print_json({"next_night": next_night})
    else:
        click.echo(f"The next night begins at {next_night}.")


@nightly_command.command("uninstall")
@json_option
def uninstall_command(as_json: bool) -> None:
    """Remove the nights from the system's scheduler. Adapters, reports and your notes stay."""
    from edgetune.nights.install import uninstall

    job = load_job()
    uninstall(job)
    if as_json:
        print_json({"uninstalled": job.scheduler})
    else:
        click.echo(f"Uninstalled: {job.scheduler} starts no more nights. Your adapters are where they were.")


def _run(play: Callable[..., NightRecord], is_waited_for: bool) -> tuple[NightRecord, list[int]]:
    """Play a night, with the lowest priority unless somebody waits for its end; return its record and the numbers of the
    signals that stopped it."""
    from edgetune.nights.night import Means
    from edgetune.nights.this_system import ThisSystem, lowest_priority
    from edgetune.nights.trainer import EdgetuneTrainer
    from edgetune.training.keep_awake import awake

    if not is_waited_for:
        lowest_priority()
    stop, caught = threading.Event(), list[int]()
    previous = stop_on_signals(stop, caught)
    try:
        with awake(), progress_shown() as show:
            return play(Means(ThisSystem(), EdgetuneTrainer(), stop, show, tell=say)), caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _set_variables(variables: tuple[str, ...]) -> None:
    """Set variables of the environment that a scheduler could not set itself."""
    from edgetune.nights.install import KEPT_VARIABLES

    for variable in variables:
        name, equals, value = variable.partition("=")
        if not equals or name not in KEPT_VARIABLES:
            raise SettingError(f"--set is {variable!r}; expected one of {', '.join(KEPT_VARIABLES)}, = and a value.")
        os.environ[name] = value


def _count_notes(job: Job) -> int:
    """Return the number of notes that tonight could read. Raises DataError where there are none."""
    from edgetune.documents.walk import KINDS, walk
    from edgetune.runtime.errors import DataError

    data = job.train_config().data
    found = walk(job.notes, data.exclude, code=data.code).found
    if not found:
        raise DataError(f"There is nothing to read in {one_line(', '.join(job.notes))}; expected {KINDS}. Name another folder.")
    return len(found)


def _print_plan(job: Job, scheduler: Scheduler, as_json: bool) -> None:
    """Print what `install` would write and run."""
    from edgetune.nights.install import plan_of

    if as_json:
        files = [dataclasses.asdict(written) for written in scheduler.written(plan_of(job))]
        print_json({"scheduler": scheduler.name, "files": files, "commands": scheduler.commands()})
        return
    for written in scheduler.written(plan_of(job)):
        click.echo(f"# {written.place}\n{written.text}")
    for command in scheduler.commands():
        click.echo(f"# runs: {shlex.join(command)}")


def _say_plan(job: Job, scheduler: Scheduler) -> None:
    """Show on standard error what is about to be written and run."""
    from edgetune.nights.install import plan_of

    for written in scheduler.written(plan_of(job)):
        say(f"# {one_line(written.place)}")
        for line in written.text.splitlines():
            say(f"  {one_line(line)}")
    for command in scheduler.commands():
        say(f"# runs: {one_line(shlex.join(command))}")


def _trial(job: Job, scheduler: Scheduler) -> NightRecord | None:
    """Let the scheduler run a tiny night, and show that it is waited for."""
    from edgetune.nights.install import run_trial

    say(f"{scheduler.name} runs a tiny night now, to show that it may read your notes. Ctrl-C skips this.")
    try:
        with progress_shown() as show:
            return run_trial(job, scheduler, time.time, time.sleep, Stages(show).of("trial night"))
    except KeyboardInterrupt:
        return None
    except EdgetuneError as error:
        say(str(error))
        return None


def _trial_notices(trial: NightRecord | None, scheduler: str, skipped: bool) -> list[str]:
    """Return sentences about how the trial ended."""
    if skipped:
        return []
    if trial is None:
        log = home() / "nights" / "last.log"
        return [f"The trial night did not run, so it is not known whether nights work. Look at {scheduler}'s log, or at {log}."]
    return [trial.sentence]


def _shown(record: NightRecord) -> dict[str, Any]:
    return {"sentence": record.sentence, **record.as_dict()}


def _paused(until: str) -> str:
    """Return the sentence about a pause that ends at a local time, or never."""
    if until == FOR_EVER:
        return "Paused until you type: edgetune nightly resume"
    return f"Paused until {until}. To go on sooner, type: edgetune nightly resume"


def _print_nothing(sentence: str, as_json: bool) -> None:
    if as_json:
        print_json({"sentence": sentence})
    else:
        click.echo(sentence)
