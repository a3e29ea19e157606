"""Implements `edgetune report`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from edgetune.cli.options import json_option, print_json
from edgetune.home import expand
from edgetune.reports.text import one_line


@click.command("report")
@click.option("--open", "opens", is_flag=True, help="Open the report even where the output is not a terminal.")
@click.option("--path", "path_only", is_flag=True, help="Print the report's path alone, and open nothing.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write a plain copy of the report to FILE.")
@json_option
def report_command(opens: bool, path_only: bool, out: Path | None, as_json: bool) -> None:
    """Say in one sentence what the latest run learned, and open its report.

    A report that is encrypted (edgetune encrypt) is not opened, since a browser needs a plain file: name one with --out.
    """
    from edgetune.library.kept_adapters import is_in_use
    from edgetune.nights.record import night_since
    from edgetune.reports.desktop import open_file
    from edgetune.reports.latest import latest_report
    from edgetune.runtime.encrypted_file import is_encrypted
    from edgetune.runtime.errors import UsageError
    from edgetune.runtime.files import atomic_write, check_place, read_own

    if opens and (path_only or as_json):
        raise click.UsageError("--open opens the report, --path and --json only name it; leave one of them out.")
    latest = latest_report()
    if latest is None:
        raise UsageError("There is no report yet. Type `edgetune train notes/`: every run writes one.")
    path = Path(latest.path)
    if out is not None:
        path = expand(str(out))
        check_place(path)
        atomic_write(path, read_own(latest.path))
    hidden = is_encrypted(path)
    used = None if latest.adapter is None else is_in_use(Path(latest.adapter))
    night = night_since(Path(latest.path).stat().st_mtime)
    if as_json:
        more = {"path": str(path), "encrypted": hidden, "in_use": used, "later_night": night}
        print_json({**dataclasses.asdict(latest), **more})
        return
    if path_only:
        click.echo(path)
        return
    click.echo(latest.sentence or f"The run {one_line(latest.run)} is not finished, or its events cannot be read.")
    if latest.promoted and used is False:
        click.echo("Since then another adapter was made current, or none: `edgetune adapters list` marks those in use.")
    if night is not None:
        click.echo(f"Since then: {one_line(night)}")
    if hidden:
        click.echo("The report is encrypted. To read it, type for example: edgetune report --out report.html")
        return
    opened = (opens or sys.stdout.isatty()) and open_file(path)
    click.echo(f"Report{' (opened)' if opened else ''}: {one_line(str(path))}")
