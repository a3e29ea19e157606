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
from edgetune.reports.text import counted, human_bytes, one_line


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
@click.option(
    "--dry-run",
    is_flag=True,
    help="List every file that would be read or skipped, and why, with tokens and language; train nothing.",
)
@json_option
def train_command(dry_run: bool, fresh: bool, private_link: bool, as_json: bool, **flags: Any) -> None:
    """Train an adapter (a small addition to a base model) on NOTES.

    NOTES are folders and files of notes (Markdown, text, Org, rst, HTML, PDF, Word, EPUB, ODT, Evernote, mail, Jupyter), chats
    in JSON, or exports of chat apps. They are never changed.

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
    """Print the manifest: every file that a run would read, hold out or skip."""
    from edgetune.documents.manifest import rows, table
    from edgetune.documents.summary import sentences, skipped_in_words
    from edgetune.training.run_notes import read_and_split

    with progress_shown() as show:
        stages = Stages(show)
        reading, split = read_and_split(config, stages.of("reading"))
        count, tokenizer = _token_counter(config)
        manifest = rows(reading, split, count, stages.of("counting tokens"))
    held_out_bytes = sum(document.size for document in split.held_out)
    if as_json:
        counts = {
            "heldout_documents": len(split.held_out),
            "heldout_bytes": held_out_bytes,
            "heldout_paths": [document.path for document in split.held_out],
        }
        listed = {"tokenizer": tokenizer if count else None, "manifest": [row.as_dict() for row in manifest]}
        print_json({**reading.as_dict(), **counts, **listed})
        return
    held_out = (
        f"{len(split.held_out)} of them ({human_bytes(held_out_bytes)}) would be held out: not trained on, but used to measure "
        "whether training helps."
    )
    nothing = "Too few to hold any out, so nothing would measure whether training helps."
    documents = counted(len(reading.documents), "document")
    click.echo(f"{documents}, {human_bytes(reading.bytes)} of text. {held_out if split.held_out else nothing}")
    click.echo(f"Read: {reading.files_read:,} of {counted(reading.files, 'file')}.")
    click.echo(f"Skipped: {skipped_in_words(reading) or 'nothing'}")
    for skip in reading.skipped:
        if skip.people:
            click.echo(one_line(f"{skip.path}: {_explanation(skip)}"))
    for sentence in sentences(dataclasses.replace(reading, skipped=[])):
        click.echo(one_line(sentence))
    click.echo(one_line(f"Tokens are counted with the tokenizer of {tokenizer}." if count else tokenizer))
    for line in table(manifest):
        click.echo(line)


def _explanation(skip: Skipped) -> str:
    """Return why something is skipped; for chats in which nobody is known to be the user, with the names to choose from."""
    return f"{skip.explanation} ({', '.join(skip.people)})" if skip.people else skip.explanation


def _token_counter(config: TrainConfig) -> tuple[Callable[[str], int] | None, str]:
    """Return a function that counts a text's tokens, and the model's name; or None, and a sentence that says why."""
    from edgetune.library.conversions import conversion_of
    from edgetune.library.loading import choose_model
    from edgetune.runtime.errors import EdgetuneError
    from edgetune.runtime.tokenizer import Tokenizer

    try:
        choice = choose_model(config.model)
        made = conversion_of(choice.path) if choice.gguf else None
        if choice.gguf and made is None:
            return None, f"Tokens are not counted, since {choice.name} is converted with its first run."
        tokenizer = Tokenizer.load(made.folder if made else choice.path)
    except EdgetuneError as error:
        return None, f"Tokens are not counted: {error}"
    return lambda text: len(tokenizer.encode(text)), choice.name
