"""Implements `edgetune eval`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from edgetune.cli.options import (
    adapter_option,
    device_option,
    json_option,
    model_option,
    model_words,
    print_json,
    progress_shown,
    reading_options,
    say,
    weights_option,
)
from edgetune.reports.text import counted, human_bytes, one_line


@click.command("eval")
@click.argument("texts", nargs=-1, required=True)
@model_option
@adapter_option
@device_option
@weights_option
@reading_options
@json_option
def eval_command(
    texts: tuple[str, ...],
    model: str | None,
    adapter: str | None,
    device: str,
    weights: str,
    as_json: bool,
    **reading: Any,
) -> None:
    """Measure how well the model predicts TEXTS (files and folders of notes), in bits per byte: lower is better.

    TEXTS are read as `edgetune train` reads them, with the same options and the same lines of config.toml.
    """
    from edgetune.config_file import train_config
    from edgetune.library.loading import choose_model
    from edgetune.training.evaluation import evaluate

    data, choice = train_config(reading).data, choose_model(model)
    with progress_shown() as show:
        result = evaluate(texts, choice.name, adapter, device, show, weights, data)
    for notice in result.notices:
        say(one_line(notice))
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    click.echo(f"Model {model_words(choice)}, adapter {one_line(result.adapter)}, weights in {result.weights}.")
    click.echo(
        f"{result.bits_per_byte:.4f} bits/byte (lower is better), perplexity {result.perplexity:.2f} per token, "
        f"over {counted(result.documents, 'document')}, {result.tokens:,} tokens, {human_bytes(result.bytes)}."
    )
