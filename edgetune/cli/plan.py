"""edgetune plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.options import json_option, print_json
from edgetune.cli.train import config_of, training_options
from edgetune.reports.text import human_bytes, human_time

if TYPE_CHECKING:
    from edgetune.machine.forecast import Forecast

_PARTS = {
    "process": "Python, torch and edgetune",
    "weights": "weights of the layers",
    "embeddings": "{}",
    "adapter": "adapter",
    "gradients": "its gradients",
    "optimizer": "optimizer states",
    "activations": "kept for the backward",
    "logits": "logits and their gradients",
    "scratch": "a block's own work",
}
_VOCABULARY = {
    "neither": "embedding, head in {}",
    "embedding": "head in {}",
    "both": "embedding, head in their file",
}
"""What of the embedding and the head takes memory, by what stays in its file."""


@click.command("plan")
@training_options
@json_option
def plan_command(as_json: bool, **flags: Any) -> None:
    """Say what `edgetune train` with the same options would take: memory by part, tokens a second, time. Trains nothing.

    --model also takes the name of a shape (llama-7b, llama-13b, llama-33b, llama-65b, llama-3.2-3b, tinyllama-1.1b) without
    weights, and --device cuda --memory 48GB describes a machine that is not this one.
    """
    from edgetune.machine.forecast import forecast

    result = forecast(config_of(flags))
    if as_json:
        print_json(result.as_dict())
    else:
        _show(result)


def _show(result: Forecast) -> None:
    may = f"{human_bytes(result.memory_bytes)} may be used on {result.device}"
    click.echo(f"{result.model}: {'fits' if result.fits else 'does not fit'}; {may}.")
    vocabulary = _VOCABULARY[result.setting["in_file"]].format(result.head)
    for name, label in _PARTS.items():
        click.echo(f"  {label.format(vocabulary):<30}{human_bytes(result.parts[name]):>10}")
    click.echo(f"  {'peak' if result.fits else 'at the least':<30}{human_bytes(result.peak_memory_bytes):>10}")
    if result.fits:
        click.echo(f"The least that would do is {human_bytes(result.least_memory_bytes)}.")
        click.echo(f"Settings: {described(result.setting)}.")
    if result.tokens_per_second is not None:
        took = f"; {result.steps} steps in {human_time(result.seconds)}" if result.seconds is not None else ""
        click.echo(f"About {result.tokens_per_second:,.0f} tokens/s{took}, measured on two layers with random weights.")
    elif result.fits:
        click.echo("How fast that is cannot be measured here.")
    if result.advice is not None:
        click.echo(f"To make it fit, {result.advice}.")


_IN_FILE = {"neither": [], "embedding": ["embedding in its file"], "both": ["embedding and head in their file"]}


def described(setting: dict[str, Any]) -> str:
    """A setting in words."""
    told = [f"rows of {setting['row_tokens']} tokens", f"recompute {setting['recompute']}"]
    if setting["layer_memory"] is not None:
        told.append(f"{human_bytes(setting['layer_memory'])} of layers in memory, the others streamed")
    told += ["optimizer states in a file"] * setting["paged_optimizer"] + ["activations in a file"] * setting["offload"]
    told += ["8-bit optimizer states"] * (setting["optimizer_bits"] == 8)
    told += _IN_FILE[setting["in_file"]]
    return ", ".join(told + ["large tensors given back at once"] * setting["compact"])
