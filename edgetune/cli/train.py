"""edgetune train."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import click

from edgetune.cli.options import Decorator, json_option, print_json, say
from edgetune.config import COMPUTE, RECIPES, RECOMPUTE, TrainConfig, train_config
from edgetune.events import Event, Interrupted, Started
from edgetune.reports.terminal import renderer
from edgetune.reports.text import human_bytes, one_line
from edgetune.runtime.config import LINEARS
from edgetune.runtime.device import DEVICES

_SHOWN = 20


_OPTIONS: tuple[Decorator, ...] = (
    click.argument("notes", nargs=-1),
    click.option(
        "--model",
        metavar="M",
        help="A folder, a Hugging Face id in the local cache, or demo. Default: the best found here.",
    ),
    click.option("--device", type=click.Choice(DEVICES), help="Where to run. Default: auto."),
    click.option("--out", metavar="DIR", help="Where to write the adapter. Default: among edgetune's own."),
    click.option("--steps", type=int, metavar="N", help="Optimizer steps."),
    click.option("--epochs", type=float, metavar="E", help="Passes over the notes. Default: 3, more for few notes."),
    click.option("--minutes", type=float, metavar="N", help="Stop after this long, at a step."),
    click.option("--until", metavar="HH:MM", help="Stop at this time of day, at a step."),
    click.option("--memory", metavar="2GB", help="Choose settings that stay within this. Default: most of what is free."),
    click.option("--rank", type=int, metavar="R", help="Rank of the adapter. Default: 16."),
    click.option("--alpha", type=float, metavar="A", help="Scale of the adapter is alpha/rank. Default: 16."),
    click.option("--dropout", type=float, metavar="P", help="LoRA dropout. Default: 0.05."),
    click.option("--targets", metavar="LIST", help=f"Linears to adapt, by commas. Default: {','.join(LINEARS)}."),
    click.option("--rslora", is_flag=True, default=None, help="Scale by alpha/sqrt(rank)."),
    click.option("--lr", type=float, metavar="X", help="Peak learning rate. Default: 2e-4, more for small models."),
    click.option("--seq-len", type=int, metavar="T", help="Tokens a sequence; longer notes are split. Default: 512."),
    click.option("--batch-tokens", type=int, metavar="N", help="Tokens a step. Default: 2048."),
    click.option("--seed", type=int, metavar="S", help="Seed of everything random. Default: 0."),
    click.option("--recipe", type=click.Choice(RECIPES), help="How notes are read. Default: notes."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these out; may be repeated."),
    click.option("--from", "from_adapter", metavar="A", help="Continue from this adapter."),
    click.option("--recompute", type=click.Choice(RECOMPUTE), help="Trade speed for memory. Default: the fastest that fits."),
    click.option(
        "--compute",
        type=click.Choice(COMPUTE),
        help="Number format of the products. int8: the base's products while training, on a CPU with AMX. Default: auto.",
    ),
)


def training_options(command: Callable[..., None]) -> Callable[..., Any]:
    """Notes and every setting of a training run, as `train_config` takes them."""
    decorated: Callable[..., Any] = command
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def config_of(flags: dict[str, Any]) -> TrainConfig:
    """The settings that `training_options` gave."""
    if flags["targets"] is not None:
        flags["targets"] = tuple(flags["targets"].split(","))
    return train_config(flags)


@click.command("train")
@training_options
@click.option("--fresh", is_flag=True, help="Start over, where an unfinished run of the same command would be gone on with.")
@click.option(
    "--private-link",
    is_flag=True,
    help="Under torchrun on several machines: the link between them is private (WireGuard, SSH). Gradients travel unencrypted.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be read and what skipped, and why; train nothing.")
@json_option
def train_command(dry_run: bool, fresh: bool, private_link: bool, as_json: bool, **flags: Any) -> None:
    """Train an adapter on NOTES: folders and files of Markdown, text, rst, org, or chats in JSON lines.

    Ctrl-C stops and keeps everything: the same command goes on from there, and so it does after a crash or a deadline.
    """
    config = config_of(flags)
    if dry_run:
        _show_reading(config, as_json)
    else:
        _run(config, fresh, private_link, as_json)


def _run(config: TrainConfig, fresh: bool, private_link: bool, as_json: bool) -> None:
    from edgetune.library.base_models import DEMO, DEMO_NOTICE
    from edgetune.training.keep_awake import awake
    from edgetune.training.train import train

    stop = threading.Event()
    caught: list[int] = []
    previous = _stop_on_signals(stop, caught)
    event: Event | None = None  # torchrun's followers have none
    try:
        with awake(), renderer(as_json) as ui:
            for event in train(config, stop, fresh, private_link):
                ui.show(event)
                if isinstance(event, Started) and config.model is None and event.model == DEMO:
                    say(DEMO_NOTICE)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if isinstance(event, Interrupted):
        sys.exit(128 + caught[0])


def _stop_on_signals(stop: threading.Event, caught: list[int]) -> dict[signal.Signals, Any]:
    """Ctrl-C and SIGTERM have the run write a checkpoint and leave; a second one ends it at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        stop.set()

    return {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}


def _show_reading(config: TrainConfig, as_json: bool) -> None:
    from edgetune.training.setup import read

    reading, parted = read(config)
    if as_json:
        held_out = [document.path for document in parted.held_out]
        print_json({**reading.as_dict(), "heldout_documents": len(held_out), "heldout_paths": held_out})
        return
    click.echo(
        f"{len(reading.documents)} documents, {human_bytes(reading.bytes)} of text; {len(parted.held_out)} would be held out:"
    )
    for document in parted.held_out:
        click.echo(f"  {one_line(document.path)}")
    click.echo(
        "Skipped: " + (", ".join(f"{count} {reason}" for reason, count in reading.skipped_counts().items()) or "nothing")
    )
    for skip in reading.skipped[:_SHOWN]:
        click.echo(f"  {one_line(skip.path)}: {skip.reason.value}")
    if len(reading.skipped) > _SHOWN:
        click.echo(f"  and {len(reading.skipped) - _SHOWN} more; --json names all")
    for pattern in reading.unused_excludes:
        click.echo(f"--exclude {one_line(pattern)} matched nothing.")
