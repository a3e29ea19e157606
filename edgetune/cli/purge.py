"""Implements `edgetune purge`."""

from __future__ import annotations

import dataclasses

import click

from edgetune.cli.options import confirmed, json_option, print_json
from edgetune.reports.text import human_bytes, one_line


@click.command("purge")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@json_option
def purge_command(yes: bool, as_json: bool) -> None:
    """Delete everything that edgetune keeps: adapters, runs and reports, converted models, settings, installed nights.

    Your notes are not touched. What it cannot reach is named.
    """
    from edgetune.library.purge import UNREACHABLE, planned_purge, purge

    kept: list[str] = []
    planned = planned_purge()
    if as_json:
        if not yes:
            raise click.UsageError("--json asks nothing, and purge deletes everything for good; type --yes as well.")
        done = purge(lambda: kept.extend(_uninstall_nights()))
        print_json({**dataclasses.asdict(done), "unreachable": [*kept, *done.notices, *UNREACHABLE]})
        return
    if planned.deleted and not yes:
        click.echo(f"This deletes {len(planned.deleted):,} entries in {one_line(planned.home)}, {human_bytes(planned.bytes)}:")
        for path in planned.deleted:
            click.echo(f"  {one_line(path)}")
        unanswered = "Nothing was deleted, since nobody answered; to delete without a question, type --yes."
        if not confirmed("Delete all of it for good?", unanswered):
            click.echo("Nothing was deleted.")
            raise click.exceptions.Exit(1)
    done = purge(lambda: kept.extend(_uninstall_nights()))
    click.echo(f"Deleted {len(done.deleted):,} entries, {human_bytes(done.bytes)}." if done.deleted else "Nothing to delete.")
    _list("Links that were removed, and whose targets were left", done.links)
    _list("Left, since edgetune did not make it", done.left)
    _list("Not deleted, since it lies outside edgetune's own folder; delete it yourself", done.outside)
    _list("Out of reach", (*kept, *done.notices, *UNREACHABLE))


def _uninstall_nights() -> list[str]:
    """Remove the nights from the system's scheduler, if any are installed; return a sentence where that fails."""
    from edgetune.nights.install import uninstall
    from edgetune.nights.job import load_job, path_of_job
    from edgetune.runtime.errors import LockedError, UsageError

    if not path_of_job().exists():
        return []
    try:
        uninstall(load_job())
    except (LockedError, UsageError) as error:
        return [f"the nights that this system's scheduler still starts, which will find nothing to do ({error})"]
    return []


def _list(title: str, lines: tuple[str, ...]) -> None:
    """Print a title and the lines below it, if there are any."""
    if lines:
        click.echo(f"{title}:")
    for line in lines:
        click.echo(f"  {one_line(line)}")
