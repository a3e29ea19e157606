"""Implements `edgetune train`, with the options of a training run, which `edgetune plan` takes too."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import click

from edgetune.cli.options import Decorator, json_option, print_json, progress_shown, say
from edgetune.cli.signals import stop_on_signals
from edgetune.config import COMPUTE, EPOCHS, RECIPES, RECOMPUTE, REFERENCE_LEARNING_RATE, TrainConfig, train_config
from edgetune.events import Event, Interrupted, Started
from edgetune.progress import Stages
from edgetune.reports.streams import work_goes_on
from edgetune.reports.terminal import renderer
from edgetune.reports.text import human_bytes, one_line
from edgetune.runtime.device import DEVICES

SKIPPED_SHOWN = 20
"""Skipped files that --dry-run names; chosen by hand. --json names all."""
_DEFAULTS = TrainConfig()

_OPTIONS: tuple[Decorator, ...] = (
    click.argument("notes", nargs=-1),
    click.option(
        "--model",
        metavar="M",
        help="Base model: a folder, a Hugging Face id in the local cache, or demo. Default: the best found here.",
    ),
    click.option("--device", type=click.Choice(DEVICES), help=f"Device to run on. Default: {_DEFAULTS.device}."),
    click.option("--out", metavar="DIR", help="Folder for the trained adapter. Default: one in edgetune's own data folder."),
    click.option(
        "--steps", type=int, metavar="N", help="Number of steps. Each updates the adapter once, from one batch of notes."
    ),
    click.option(
        "--epochs",
        type=float,
        metavar="E",
        help=f"Number of passes over the notes. Default: {EPOCHS:g}, or more if there are few notes.",
    ),
    click.option("--minutes", type=float, metavar="N", help="Stop after this many minutes, at the end of a step."),
    click.option("--until", metavar="HH:MM", help="Stop at this time of day, at the end of a step."),
    click.option(
        "--memory", metavar="2GB", help="Limit on peak memory; settings are chosen to fit. Default: most of what is free."
    ),
    click.option("--rank", type=int, metavar="R", help=f"Rank (size) of the adapter. Default: {_DEFAULTS.rank}."),
    click.option(
        "--alpha", type=float, metavar="A", help=f"The adapter is scaled by alpha/rank. Default: {_DEFAULTS.alpha:g}."
    ),
    click.option("--dropout", type=float, metavar="P", help=f"LoRA dropout. Default: {_DEFAULTS.dropout:g}."),
    click.option(
        "--targets",
        metavar="LIST",
        help=f"Linear layers to adapt, separated by commas. Default: {','.join(_DEFAULTS.targets)}.",
    ),
    click.option("--rslora", is_flag=True, default=None, help="Scale the adapter by alpha/sqrt(rank) instead of alpha/rank."),
    click.option(
        "--lr",
        type=float,
        metavar="X",
        help=f"Peak learning rate. Default: {REFERENCE_LEARNING_RATE:g}, or more for small models.",
    ),
    click.option(
        "--seq-len",
        type=int,
        metavar="T",
        help=f"Longest sequence in tokens; longer notes are split. Default: {_DEFAULTS.data.seq_len}.",
    ),
    click.option("--batch-tokens", type=int, metavar="N", help=f"Tokens per step. Default: {_DEFAULTS.data.batch_tokens}."),
    click.option("--seed", type=int, metavar="S", help=f"Seed of all randomness. Default: {_DEFAULTS.data.seed}."),
    click.option(
        "--recipe", type=click.Choice(RECIPES), help=f"How notes become training text. Default: {_DEFAULTS.data.recipe}."
    ),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out files that match; may be repeated."),
    click.option("--from", "from_adapter", metavar="A", help="Start from this adapter instead of a new one."),
    click.option(
        "--recompute",
        type=click.Choice(RECOMPUTE),
        help=f"Activations to recompute: slower, but takes less memory. Default: {_DEFAULTS.recompute}, the fastest that fits.",
    ),
    click.option(
        "--compute",
        type=click.Choice(COMPUTE),
        help="Number format of matrix products. int8: 8-bit products with the base model's weights, on a CPU with AMX. "
        f"Default: {_DEFAULTS.compute}, the fastest on this machine.",
    ),
)


def training_options(command: Callable[..., None]) -> Callable[..., Any]:
    """Add the notes and every setting of a training run to a command, named as `train_config` expects them."""
    decorated: Callable[..., Any] = command
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def config_of(flags: dict[str, Any]) -> TrainConfig:
    """Return the settings that the flags of `training_options` stand for."""
    if flags["targets"] is not None:
        flags["targets"] = tuple(flags["targets"].split(","))
    return train_config(flags)


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

    NOTES are folders and files of Markdown, plain text, rst, org, or chats in JSON lines. They are never changed.

    Ctrl-C stops training and loses nothing: run the same command again to continue. The same goes for a crash or a deadline.
    """
    config = config_of(flags)
    if dry_run:
        _show_notes(config, as_json)
    else:
        _run(config, fresh, private_link, as_json)


def _run(config: TrainConfig, fresh: bool, private_link: bool, as_json: bool) -> None:
    """Train, show the events, and exit with 128 + the signal's number if a signal stopped the run."""
    from edgetune.library.base_models import DEMO, DEMO_NOTICE
    from edgetune.training.keep_awake import awake
    from edgetune.training.train import train

    stop = threading.Event()
    caught: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    event: Event | None = None  # stays None in torchrun's followers, which yield no events
    try:
        with awake(), work_goes_on(), renderer(as_json) as ui:
            for event in train(config, stop, fresh, private_link, ui.show):
                # Before a run has begun there is nothing to save, and a signal ends the program at once.
                if isinstance(event, Started):
                    previous = stop_on_signals(stop, caught)
                ui.show(event)
                if isinstance(event, Started) and config.model is None and event.model == DEMO:
                    say(DEMO_NOTICE)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if isinstance(event, Interrupted):
        sys.exit(128 + caught[0])


def _show_notes(config: TrainConfig, as_json: bool) -> None:
    """Print which notes a run would read, hold out and skip."""
    from edgetune.training.setup import read_and_split

    with progress_shown() as show:
        reading, split = read_and_split(config, Stages(show).of("reading"))
    if as_json:
        held_out = [document.path for document in split.held_out]
        print_json({**reading.as_dict(), "heldout_documents": len(held_out), "heldout_paths": held_out})
        return
    click.echo(
        f"{len(reading.documents)} documents, {human_bytes(reading.bytes)} of text. {len(split.held_out)} of them would be "
        "held out: not trained on, but used to measure whether training helps." + (" These are:" if split.held_out else "")
    )
    for document in split.held_out:
        click.echo(f"  {one_line(document.path)}")
    click.echo(
        "Skipped: " + (", ".join(f"{count} {reason}" for reason, count in reading.skipped_counts().items()) or "nothing")
    )
    for skip in reading.skipped[:SKIPPED_SHOWN]:
        click.echo(f"  {one_line(skip.path)}: {skip.reason.value}")
    if len(reading.skipped) > SKIPPED_SHOWN:
        click.echo(f"  and {len(reading.skipped) - SKIPPED_SHOWN} more; --json lists all")
    for pattern in reading.unused_excludes:
        click.echo(f"--exclude {one_line(pattern)} matched no file.")
