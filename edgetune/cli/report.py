"""Implements `edgetune report`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from edgetune.cli.options import json_option, print_json
from edgetune.reports.text import one_line


@click.command("report")
@click.option("--open", "opens", is_flag=True, help="Open the report even where the output is not a terminal.")
@click.option("--path", "path_only", is_flag=True, help="Print the report's path alone, and open nothing.")
@json_option
def report_command(opens: bool, path_only: bool, as_json: bool) -> None:
    """Say in one sentence what the latest run learned, and open its report."""
    from edgetune.library.kept_adapters import is_in_use
    from edgetune.reports.desktop import open_file
    from edgetune.reports.latest import latest_report
    from edgetune.runtime.errors import UsageError

    if opens and (path_only or as_json):
        raise click.UsageError("--open opens the report, --path and --json only name it; leave one of them out.")
    latest = latest_report()
    if latest is None:
        raise UsageError("There is no report yet. Type `edgetune train notes/`: every run writes one.")
    used = None if latest.adapter is None else is_in_use(Path(latest.adapter))
    if as_json:
        print_json({**dataclasses.asdict(latest), "in_use": used})
        return
    if path_only:
        click.echo(latest.path)
        return
    click.echo(latest.sentence or f"The run {one_line(latest.run)} is not finished, or its events cannot be read.")
    if latest.promoted and used is False:
        click.echo("Since then another adapter was made current, or none: `edgetune adapters list` marks those in use.")
    opened = (opens or sys.stdout.isatty()) and open_file(Path(latest.path))
    click.echo(f"Report{' (opened)' if opened else ''}: {one_line(latest.path)}")
