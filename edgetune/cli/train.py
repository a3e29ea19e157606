"""Implements `edgetune train`, with the options of a training run, which `edgetune plan` takes too."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import click

from edgetune.cli.options import configuration_options, json_option, print_json, progress_shown, say_model
from edgetune.cli.signals import stop_on_signals
from edgetune.config import DataConfig, TrainConfig
from edgetune.config_file import train_config
from edgetune.documents.document import Skipped
from edgetune.events import Event, Interrupted, Started
from edgetune.progress import Stages
from edgetune.reports.streams import work_goes_on
from edgetune.reports.terminal import renderer
from edgetune.reports.text import human_bytes, one_line

SHOWN = 20
"""Files of a kind that --dry-run names; chosen by hand. --json names all."""


def training_options(command: Callable[..., None]) -> Callable[..., Any]:
    """Add the notes and every setting of a training run to a command, named as `train_config` expects them."""
    decorated: Callable[..., Any] = command
    for option in reversed([*configuration_options(TrainConfig), *configuration_options(DataConfig)]):
        decorated = option(decorated)
    return click.argument("notes", nargs=-1)(decorated)


@click.command("train")
@training_options
@click.option("--fresh", is_flag=True, help="Start over instead of resuming an interrupted run of the same command.")
@click.option(
    "--private-link",
    is_flag=True,
    help="For torchrun on several machines: confirm that the link between them is private (WireGuard, SSH). "
    "Gradients travel unencrypted and reveal what was trained on.",
)
@click.option("--dry-run", is_flag=True, help="Show which notes would be read, which would be skipped and why; train nothing.")
@json_option
def train_command(dry_run: bool, fresh: bool, private_link: bool, as_json: bool, **flags: Any) -> None:
    """Train an adapter (a small addition to a base model) on NOTES.

    NOTES are folders and files of Markdown, plain text, rst, org, chats in JSON, or exports of chat apps. They are never
    changed.

    Ctrl-C stops training and loses nothing: run the same command again to continue. The same goes for a crash or a deadline.
    """
    config = train_config(flags)
    if dry_run:
        _show_notes(config, as_json)
    else:
        _run(config, fresh, private_link, as_json)


def _run(config: TrainConfig, fresh: bool, private_link: bool, as_json: bool) -> None:
    """Train, show the events, and exit with 128 + the signal's number if a signal stopped the run."""
    from edgetune.library.loading import choose_model
    from edgetune.training.keep_awake import awake
    from edgetune.training.train import train

    choice, spoken = choose_model(config.model), False

    def show(event: Event) -> None:
        nonlocal spoken
        if not spoken:
            say_model(choice)
            spoken = True
        ui.show(event)

    config = dataclasses.replace(config, model=choice.name)
    stop = threading.Event()
    caught: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    event: Event | None = None  # stays None in torchrun's followers, which yield no events
    try:
        with awake(), work_goes_on(), renderer(as_json) as ui:
            for event in train(config, stop, fresh, private_link, show):
                # Before a run has begun there is nothing to save, and a signal ends the program at once.
                if isinstance(event, Started):
                    previous = stop_on_signals(stop, caught)
                show(event)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if isinstance(event, Interrupted):
        sys.exit(128 + caught[0])


def _show_notes(config: TrainConfig, as_json: bool) -> None:
    """Print which notes a run would read, hold out and skip."""
    from edgetune.documents.heldout import END
    from edgetune.documents.summary import sentences
    from edgetune.training.run_notes import read_and_split

    with progress_shown() as show:
        reading, split = read_and_split(config, Stages(show).of("reading"))
    held_out_bytes = sum(document.size for document in split.held_out)
    if as_json:
        held_out = {
            "heldout_documents": len(split.held_out),
            "heldout_bytes": held_out_bytes,
            "heldout_paths": [document.path for document in split.held_out],
        }
        print_json({**reading.as_dict(), **held_out})
        return
    share = f" ({human_bytes(held_out_bytes)})" if split.held_out else ""
    click.echo(
        f"{len(reading.documents)} documents, {human_bytes(reading.bytes)} of text. {len(split.held_out)} of them{share} would "
        "be held out: not trained on, but used to measure whether training helps." + (" These are:" if split.held_out else "")
    )
    for document in split.held_out:
        end = " (the end of a long note; the rest is trained on)" if document.path.endswith(END) else ""
        click.echo(f"  {one_line(document.path)}{end}")
    click.echo(
        "Skipped: " + (", ".join(f"{count} {reason}" for reason, count in reading.skipped_counts().items()) or "nothing")
    )
    _list([f"{one_line(skip.path)}: {one_line(_explanation(skip))}" for skip in reading.skipped])
    for sentence in sentences(dataclasses.replace(reading, skipped=[])):
        click.echo(one_line(sentence))
    _list([f"{one_line(path)}: {count} damaged" for path, count in reading.damaged.items()])
    _list([f"{one_line(path)}: {human_bytes(count)} left out" for path, count in reading.embedded.items()])


def _explanation(skip: Skipped) -> str:
    """Return why something is skipped; for chats in which nobody is known to be the user, with the names to choose from."""
    return f"{skip.explanation} ({', '.join(skip.people)})" if skip.people else skip.explanation


def _list(lines: list[str]) -> None:
    """Print the first of `lines`, and how many more there are."""
    for text in lines[:SHOWN]:
        click.echo(f"  {text}")
    if len(lines) > SHOWN:
        click.echo(f"  and {len(lines) - SHOWN} more; --json lists all")
