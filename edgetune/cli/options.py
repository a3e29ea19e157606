"""Options that several commands share, and how they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from edgetune.runtime.device import DEVICES

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

model_option: Decorator = click.option(
    "--model",
    metavar="M",
    help="A folder, a Hugging Face id in the local cache, or demo. Default: the best found here.",
)
adapter_option: Decorator = click.option(
    "--adapter", metavar="A", help="An adapter's folder or name; none for the bare base. Default: the current one."
)
device_option: Decorator = click.option(
    "--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where to run."
)
json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print machine-readable JSON alone on standard output."
)
max_tokens_option: Decorator = click.option(
    "--max-tokens", type=click.IntRange(1), default=256, show_default=True, metavar="N", help="Tokens to write at most."
)
temperature_option: Decorator = click.option(
    "--temperature",
    type=click.FloatRange(0.0, 10.0),
    default=0.7,
    show_default=True,
    metavar="X",
    help="0 takes the likeliest word.",
)
seed_option: Decorator = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), metavar="S", help="The same seed gives the same words."
)


def print_json(value: dict[str, Any]) -> None:
    """One object, one line, on standard output."""
    click.echo(json.dumps(value))


def say(text: str) -> None:
    """A line for the person, on standard error, where it is in nobody's pipe."""
    click.echo(text, err=True)
