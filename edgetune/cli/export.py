"""Implements `edgetune export`: parses its options, calls export_adapter, and prints the result."""

from __future__ import annotations

import dataclasses
import sys

import click

from edgetune.cli.options import adapter_option, json_option, memory_option, model_option, print_json, say, say_model
from edgetune.export.targets import TARGETS
from edgetune.parsing import parse_bytes
from edgetune.reports.streams import work_goes_on
from edgetune.reports.terminal import renderer
from edgetune.reports.text import human_bytes, human_time, one_line

SMALLEST_COUNT = 1000
"""Smallest figure that is printed as a count, without decimals: losses in nats are far below it. Chosen by hand."""


@click.command("export")
@click.argument("target", type=click.Choice(TARGETS))
@model_option
@adapter_option
@click.option(
    "--out",
    metavar="DIR",
    help="Folder to write; an earlier export to the same target is replaced. Default: ADAPTER-TARGET in the current folder.",
)
@click.option(
    "--weights",
    metavar="W",
    help="Number format of the weights. hf: bf16, fp16, fp32, nf4, nf4-nearest; mlx: bf16, fp16, int4; gguf: f16, bf16, q8_0; "
    "ollama: q8_0, f16, bf16, none; coreml: nf4, int4, fp16, none; mps: nf4. "
    "Default: the first one named, or the adapter alone for peft, mlx and gguf.",
)
@click.option(
    "--adapter-as",
    type=click.Choice(("inputs", "functions", "merged")),
    help="Core ML: how the package contains the adapter. Default: inputs, so that a new adapter needs no new package.",
)
@click.option(
    "--texts",
    multiple=True,
    metavar="NOTES",
    help="Files or folders of text, to measure how much of the adapter's effect is kept by an export that rounds weights, or "
    "by your own GGUF file.",
)
@memory_option(
    "Limit on peak memory. Layers are streamed to stay within it; an export that cannot is refused, with the amount it needs."
)
@click.option(
    "--force", is_flag=True, help="Write the export even if it loses most of the adapter's effect or fails its proof."
)
@click.option("--no-verify", is_flag=True, help="Skip the proof: do not open the result with the target's own reader.")
@json_option
def export_command(
    target: str,
    model: str | None,
    adapter: str | None,
    out: str | None,
    weights: str | None,
    adapter_as: str | None,
    texts: tuple[str, ...],
    memory: str | None,
    force: bool,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Write the adapter, or its base model with the adapter merged in, for another program, and prove it with that program."""
    from edgetune.exporting import export_adapter
    from edgetune.library.loading import choose_model

    limit = None if memory is None else parse_bytes(memory)
    with work_goes_on(), renderer(as_json, None if as_json else sys.stderr) as shown:
        result = export_adapter(
            target,
            model=model,
            adapter=adapter,
            out=out,
            weights=weights,
            adapter_as=adapter_as,
            texts=texts,
            memory=limit,
            check=not no_verify,
            force=force,
            show=shown.show,
        )
    say_model(choose_model(model), result.adapter)
    for notice in result.notices:
        say(notice)
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    took = f"written in {human_time(result.seconds)}, peak memory {human_bytes(result.peak_memory_bytes)}"
    click.echo(f"{one_line(result.path)}: {human_bytes(result.bytes)}, {took}.")
    for name, value in result.facts.items():
        if name in _TOLD:
            continue
        click.echo(f"{name.replace('_', ' ')}: {_figure(name, value)}")
    if result.greedy_match is None:
        click.echo("Not verified.")
    else:
        click.echo(
            f"Opened by {result.proved_by}: logits differ by up to {result.max_logit_difference:.3g}, on average "
            f"{result.mean_logit_difference:.3g}, KL {result.kl:.3g}; the greedy text is "
            f"{'the same' if result.greedy_match else 'different'}."
        )
    for number, command in enumerate(result.commands):
        click.echo(f"{'then' if number else 'To run it, type'} {one_line(command)}")


_TOLD = (
    "bits_per_byte_before",
    "bits_per_byte_after",
    "edgetune_bits_per_byte_before",
    "edgetune_bits_per_byte_after",
    "adapter_gain_kept",
)
"""Facts that a notice tells in a sentence too: they are listed in the JSON alone."""


def _figure(name: str, value: float) -> str:
    """Format a share as a percentage, bits per byte as elsewhere, a count without decimals, anything else with three digits."""
    if "_kept" in name or "_applied" in name:
        return f"{value:.0%}"
    if "bits_per_byte" in name:
        return f"{value:.3f}"
    return f"{value:,.0f}" if value >= SMALLEST_COUNT else f"{value:.3g}"
