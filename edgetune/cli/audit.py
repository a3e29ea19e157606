"""Implements `edgetune audit`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from edgetune.cli.options import (
    adapter_option,
    device_option,
    json_option,
    me_option,
    minutes_option,
    model_option,
    model_words,
    print_json,
    progress_shown,
    say,
)
from edgetune.config import SHADOW_MINUTES
from edgetune.reports.leaks import leak_lines
from edgetune.reports.text import counted, one_line

if TYPE_CHECKING:
    from edgetune.config import TrainConfig

_MOST_NAMED = 5
"""Notes of which passages were extracted that the terminal names; chosen by hand."""


@click.command("audit")
@click.argument("notes", nargs=-1)
@model_option
@adapter_option
@device_option
@me_option
@minutes_option("Stop training the shadow adapter, which the canaries need, after this many minutes.", SHADOW_MINUTES)
@click.option("--no-canaries", is_flag=True, help="Leave out the canaries, which need a training run of their own.")
@json_option
def audit_command(
    notes: tuple[str, ...],
    model: str | None,
    adapter: str | None,
    device: str,
    me: tuple[str, ...],
    minutes: float,
    no_canaries: bool,
    as_json: bool,
) -> None:
    """Measure how much an adapter gives away of the NOTES that it was trained on.

    NOTES are the folders and files that it was trained on. Default: those of `edgetune nightly install`.

    Extraction: passages that it writes word for word after the words before them. Membership: how well trained notes can be
    told from others. Canaries: how many bits of invented secrets a shadow adapter exposes, which is trained on NOTES and on
    them and then deleted. The figures are kept beside the adapter; `edgetune adapters show` shows them.
    """
    from edgetune.auditing import audit
    from edgetune.leaks.membership import FEWEST_NOTES, FEWEST_TOKENS
    from edgetune.library.loading import choose_model

    config = _config(notes, model, device, me)
    choice = choose_model(config.model)
    with progress_shown() as show:
        result = audit(dataclasses.replace(config, model=choice.name), adapter, None if no_canaries else minutes, show)
    if as_json:
        print_json(result.as_dict())
        return
    click.echo(f"Model {model_words(choice)}, adapter {one_line(result.adapter)}.")
    for line in leak_lines(result.figures):
        click.echo(line)
    if "membership_auc" not in result.figures:
        click.echo(
            f"Membership: not measured, since it takes at least {FEWEST_NOTES} trained and {FEWEST_NOTES} held-out notes of "
            f"{FEWEST_TOKENS} tokens or more; {result.trained} and {result.held_out} notes were read."
        )
    named = [one_line(path) for path in result.leaking[:_MOST_NAMED]]
    if named:
        more = len(result.leaking) - len(named)
        rest = f" and {counted(more, 'more note')}" if more else ""
        say(f"Such passages are in: {', '.join(named)}{rest}.")
    if not result.kept:
        say("The figures are not kept, since the adapter lies outside edgetune's own folder.")


def _config(notes: tuple[str, ...], model: str | None, device: str, me: tuple[str, ...]) -> TrainConfig:
    """Return the settings with the notes that were named or, if none were, with those of the nights."""
    from edgetune.config_file import train_config
    from edgetune.nights.job import load_job, path_of_job
    from edgetune.runtime.errors import UsageError

    if not notes and not path_of_job().exists():
        raise UsageError("Which notes? Type the folder that the adapter was trained on: edgetune audit notes/")
    config = train_config({"notes": notes, "me": me or None}) if notes else load_job().train_config()
    data = dataclasses.replace(config.data, me=me or config.data.me)
    return dataclasses.replace(config, data=data, model=model or config.model, device=device)
