"""Implements `edgetune doctor`."""

from __future__ import annotations

import click

from edgetune.cli.options import json_option, print_json
from edgetune.reports.text import human_bytes, one_line


@click.command("doctor")
@json_option
def doctor_command(as_json: bool) -> None:
    """Report what this installation can do on this machine, and what is wrong.

    An NVIDIA card or an Apple GPU is tested, which takes seconds. The report holds no paths and no text of notes, so you can
    share it.
    """
    from edgetune.machine.doctor import examine

    # If a driver ends the whole program, the last name printed is the check that did it.
    found = examine(lambda name: click.echo(f"checking {name}", err=True))
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        if name in ("problems", "confirmations"):
            continue
        shown = human_bytes(value) if name.endswith("_bytes") else value
        if isinstance(value, list):
            shown = ", ".join(value) or "none"
        click.echo(f"{name.removesuffix('_bytes').replace('_', ' '):<18} {shown}")
    for check in found["confirmations"]:
        click.echo(f"{'passed' if check['ok'] else 'FAILED':<18} {one_line(check['name'])}: {one_line(check['detail'])}")
    click.echo("\n".join(found["problems"]) or "No problems found.")
