"""edgetune doctor."""

from __future__ import annotations

import click

from edgetune.cli.options import json_option, print_json
from edgetune.reports.text import human_bytes, one_line


@click.command("doctor")
@json_option
def doctor_command(as_json: bool) -> None:
    """Say what this installation can do on this machine, and what is amiss. An NVIDIA card or an Apple GPU is tried out,
    which takes seconds; the report can be sent on as it is.
    """
    from edgetune.machine.doctor import examine

    found = examine(lambda name: click.echo(f"trying {name}", err=True))  # the last one said is what ended the program, if any
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
    for tried in found["confirmations"]:
        click.echo(f"{'confirmed' if tried['ok'] else 'NOT SO':<18} {one_line(tried['name'])}: {one_line(tried['detail'])}")
    click.echo("\n".join(found["problems"]) or "All is well.")
