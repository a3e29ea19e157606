"""Implements `edgetune forget`."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.options import confirmed, json_option, print_json
from edgetune.cli.signals import stop_on_signals
from edgetune.events import Event, Finished, Interrupted, Started
from edgetune.reports.streams import work_goes_on
from edgetune.reports.terminal import renderer
from edgetune.reports.text import counted, one_line

if TYPE_CHECKING:
    from edgetune.forgetting.forget import Plan
    from edgetune.forgetting.job import ForgetJob

MOST_SHOWN = 20
"""Most notes that are listed; chosen by hand."""


@click.command("forget")
@click.argument("notes", nargs=-1, metavar="[NOTE]...")
@click.option("--gone", is_flag=True, help="Forget all notes that were learnt and that are deleted or excluded since.")
@click.option("--undo", is_flag=True, help="Let later runs read NOTE again. What was deleted does not come back.")
@click.option("--yes", is_flag=True, help="Forget without asking.")
@json_option
def forget_command(notes: tuple[str, ...], gone: bool, undo: bool, yes: bool, as_json: bool) -> None:
    """Make every adapter here forget NOTE, as if it had never been there.

    NOTE is a file or a folder of notes, also one that is deleted. The adapters that learnt it are deleted at once, with their
    reports and samples, and the runs since are repeated without it: this takes about as long as they took.

    Ctrl-C stops it: type the same command again to continue. Your notes themselves are not touched.
    """
    from edgetune.forgetting.job import ForgetJob

    if undo:
        _undo(notes, as_json)
        return
    job = ForgetJob.load()
    if job is None:
        if not (notes or gone):
            raise click.UsageError("Name the note to forget, or type --gone for all that are deleted or excluded.")
        job = _planned(notes, gone, yes, as_json)
    elif not as_json:
        click.echo("Going on with the forgetting that was interrupted.")
    _work(job, as_json)


def _planned(notes: tuple[str, ...], gone: bool, yes: bool, as_json: bool) -> ForgetJob:
    """Say what forgetting takes, ask, and return the job. Exits with 1 where the answer is no."""
    from edgetune.forgetting.forget import plan

    if as_json and not yes:
        raise click.UsageError("--json asks nothing, and forget deletes adapters for good; type --yes as well.")
    planned = plan(notes, gone)
    if as_json:
        values = dataclasses.asdict(planned)
        values.pop("job")
        print_json({"event": "planned", **values})
        return planned.job
    for line in _sentences(planned):
        click.echo(one_line(line))
    unanswered = "Nothing was changed, since nobody answered; to forget without a question, type --yes."
    if not yes and not confirmed("Forget?", unanswered):
        click.echo("Nothing was changed.")
        raise click.exceptions.Exit(1)
    return planned.job


def _sentences(plan: Plan) -> list[str]:
    """Return what a forgetting will do, a sentence a line."""
    shown = [f"  {path}" for path in plan.notes[:MOST_SHOWN]]
    more = [f"  and {len(plan.notes) - MOST_SHOWN} more"] if len(plan.notes) > MOST_SHOWN else []
    lines = [f"To forget {counted(len(plan.notes), 'note')}:", *shown, *more]
    if plan.held_out:
        lines.append("No adapter was trained on it: it was held out, and helped to decide which adapters to keep.")
    lines.append(f"Deleted at once: {counted(len(plan.adapters), 'adapter')} that saw it, with all reports and samples.")
    for current, clean in zip(plan.current, plan.clean, strict=True):
        instead = "the bare base model" if clean is None else f"the adapter {clean}"
        lines.append(f"{current} is in use: {instead} takes its place until it is trained again.")
    took = f"about {max(round(plan.seconds / 60), 1)} min, the time that training took"
    lines.append(f"Repeated then without it: {counted(plan.repeats, 'run')}, {took}." if plan.repeats else _NO_REPEAT)
    if plan.private:
        lines.append(_PRIVATE)
    lines += [f"Not in reach, and you may want to delete it: {path}" for path in plan.outside]
    return lines


_PRIVATE = "A private run draws new noise: its adapter will not be, byte for byte, that of a folder without the note."
"""Said where a run with --private is repeated."""
_NO_REPEAT = "The ledger does not know their runs, so they are not repeated: the next run learns the other notes again."
"""Said where nothing can be repeated."""


def _work(job: ForgetJob, as_json: bool) -> None:
    """Forget, show the events of the runs that are repeated, and exit with 128 + the signal's number if one stopped it."""
    from edgetune.forgetting.forget import forget

    stop, caught, event = threading.Event(), list[int](), None
    previous: dict[signal.Signals, Any] = {}
    last: Event | None = None
    try:
        with work_goes_on(), renderer(as_json) as ui, _nights_wait():
            for _, event in forget(job, stop, ui.show):
                # Outside a run there is nothing to save, and a signal ends the program at once.
                if isinstance(event, Started) and not previous:
                    previous = stop_on_signals(stop, caught)
                ui.show(event)
                last = event
                if isinstance(event, Finished):
                    _restore(previous)
    finally:
        _restore(previous)
    if isinstance(last, Interrupted):
        sys.exit(128 + caught[0])
    _tell_end(job, as_json)


def _restore(previous: dict[signal.Signals, Any]) -> None:
    """Give signals their handlers back, and forget these."""
    while previous:
        signal.signal(*previous.popitem())


def _tell_end(job: ForgetJob, as_json: bool) -> None:
    """Say what came of it."""
    lost = [run for base in job.bases for run in base.lost]
    if lost or any(not base.repeated for base in job.bases):
        _relearn()
    repeated = [run for base in job.bases for run in base.repeated]
    if as_json:
        print_json({"event": "forgotten", "repeated": repeated, "lost": lost})
        return
    click.echo(f"Forgotten. {counted(len(repeated), 'run')} repeated; later runs do not read the note.")
    for base in job.bases:
        if base.lost:
            names = ", ".join(base.lost)
            click.echo(one_line(f"Not repeated: {names}. {base.why} The next run learns their other notes again."))


def _relearn() -> None:
    """Let the next night take all notes as new: the adapters that had learnt them are gone."""
    from edgetune.nights.job import nights_folder
    from edgetune.nights.vault import LEARNT, PENDING, TRIED

    for name in (LEARNT, TRIED, PENDING):
        (nights_folder() / name).unlink(missing_ok=True)


def _nights_wait() -> Any:
    """Return the lock of the nights, so that none begins meanwhile."""
    from edgetune.lock import Lock
    from edgetune.nights.job import nights_folder

    return Lock(nights_folder() / "nights.lock", "the nights of this user")


def _undo(notes: tuple[str, ...], as_json: bool) -> None:
    """Take notes from the list of forgotten ones."""
    from edgetune.forgetting.search import undo
    from edgetune.runtime.errors import UsageError

    if not notes:
        raise click.UsageError("Name the note that later runs may read again.")
    count = undo(notes)
    if not count:
        raise UsageError("None of these notes is among the forgotten ones. Name the file by the path that it had.")
    if as_json:
        print_json({"event": "undone", "notes": list(notes)})
    else:
        click.echo("Later runs read it again. The adapters are as they were.")
