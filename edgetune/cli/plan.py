"""Implements `edgetune plan`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.options import json_option, print_json, progress_shown, say_model
from edgetune.cli.train import training_options
from edgetune.config_file import train_config
from edgetune.machine.shapes import PLANNED
from edgetune.reports.text import human_bytes, human_time

if TYPE_CHECKING:
    from edgetune.machine.forecast import Forecast

_PARTS = {
    "process": "Python, torch and edgetune",
    "weights": "weights of the layers, {weights}",
    "embeddings": "{vocabulary}",
    "adapter": "adapter",
    "gradients": "gradients of the adapter",
    "optimizer": "optimizer states",
    "activations": "activations (backward pass)",
    "logits": "logits and their gradients",
    "scratch": "working memory of a block",
}
"""Labels of the parts of memory, in the order of `Parts`; {weights} is the form of the linears, {vocabulary} of _VOCABULARY."""
_VOCABULARY = {
    "neither": "embedding, head in {}",
    "embedding": "head in {}",
    "both": "embedding, head (in file)",
}
"""Labels for the memory of embedding and head, by which of them stays in its file; {} is the head's dtype."""


@click.command(
    "plan",
    epilog=f"--model also accepts the name of a shape without weights: {', '.join(PLANNED)}. "
    "--device cuda --memory 48GB describes another machine.",
)
@training_options
@json_option
def plan_command(as_json: bool, **flags: Any) -> None:
    """Predict what `edgetune train` would take with the same options: memory by part, speed, time. Trains nothing."""
    from edgetune.library.loading import choose_model
    from edgetune.machine.forecast import forecast

    config = train_config(flags)
    choice = choose_model() if config.model is None else None  # a name may be that of a shape without weights
    if choice is not None:
        say_model(choice)
    with progress_shown() as show:
        result = forecast(config if choice is None else dataclasses.replace(config, model=choice.name), show)
    if as_json:
        print_json(result.as_dict())
    else:
        _show(result)


def _show(result: Forecast) -> None:
    room = f"training may use {human_bytes(result.memory_bytes)} on {result.device}"
    click.echo(f"{result.model}: {'fits' if result.fits else 'does not fit'}; {room}.")
    vocabulary = _VOCABULARY[result.setting["in_file"]].format(result.head)
    for name, label in _PARTS.items():
        click.echo(f"  {label.format(weights=result.weights, vocabulary=vocabulary):<30}{human_bytes(result.parts[name]):>10}")
    click.echo(f"  {'peak' if result.fits else 'least possible peak':<30}{human_bytes(result.peak_memory_bytes):>10}")
    if result.fits:
        click.echo(f"The least memory that works is {human_bytes(result.least_memory_bytes)}.")
        click.echo(f"Settings: {described(result.setting)}.")
    if result.tokens_per_second is not None:
        steps = f"; {result.steps} steps in {human_time(result.seconds)}" if result.seconds is not None else ""
        click.echo(f"About {result.tokens_per_second:,.0f} tokens/s{steps}, measured on two layers with random weights.")
        _show_load(result)
    elif result.fits:
        click.echo("Speed cannot be measured on this machine.")
    if result.advice is not None:
        click.echo(f"To make it fit, {result.advice}.")


def _show_load(result: Forecast) -> None:
    """Say that the machine is busy, if it is: the speed above is that of a free one."""
    from edgetune.machine.load import BUSY_SHARE

    if (result.others_cpu_share or 0.0) < BUSY_SHARE:
        return
    busy = "" if result.seconds_if_busy is None else f"; like this it would take about {human_time(result.seconds_if_busy)}"
    click.echo(f"This is with the processors free. Other programs use {result.others_cpu_share:.0%} of them{busy}.")


_IN_FILE = {"neither": [], "embedding": ["embedding in its file"], "both": ["embedding and head in their file"]}


def described(setting: dict[str, Any]) -> str:
    """Return a setting in words."""
    words = [f"rows of {setting['row_tokens']} tokens", f"recompute {setting['recompute']}"]
    if setting["layer_memory"] is not None:
        words.append(f"{human_bytes(setting['layer_memory'])} of layers in memory, the others streamed")
    words += ["optimizer states in a file"] * setting["paged_optimizer"] + ["block inputs in a file"] * setting["offload"]
    words += ["8-bit optimizer states"] * (setting["optimizer_bits"] == 8)
    words += _IN_FILE[setting["in_file"]]
    return ", ".join(words + ["compact heap"] * setting["compact"])
