"""Implements `edgetune bench`."""

from __future__ import annotations

import click

from edgetune.cli.options import json_option, print_json, progress_shown
from edgetune.machine.shapes import MEASURED
from edgetune.reports.text import human_bytes


@click.command("bench")
@click.option(
    "--shape",
    type=click.Choice(MEASURED),
    default="tinyllama-1.1b",
    show_default=True,
    help="Shape of the model to measure; its weights are random.",
)
@click.option(
    "--tokens",
    type=click.IntRange(16, 8192),
    default=512,
    show_default=True,
    help="Length of the training batch and of the prompt, in tokens.",
)
@click.option(
    "--repeats", type=click.IntRange(1, 100), default=5, show_default=True, help="Number of runs; their median is reported."
)
@json_option
def bench_command(shape: str, tokens: int, repeats: int, as_json: bool) -> None:
    """Measure the speed of this machine, and of training and generating on it."""
    from edgetune.machine.bench import bench

    with progress_shown() as show:
        result = bench(shape, tokens, repeats, show)
    if as_json:
        print_json(result.as_dict())
        return
    click.echo(
        f"{result.machine}, {result.threads} threads; {shape}, {result.parameters / 1e9:.2f}B parameters, {result.dtype}"
    )
    for name, gflops in result.gemm_gflops_by_dtype.items():
        click.echo(f"  matrix product {name:<9} {gflops:10,.0f} GFLOP/s")
    click.echo(f"  memory read              {result.read_gb_per_second:10.1f} GB/s")
    if result.train_int8:
        click.echo("  large products of training are computed in 8 bits, except where it says bf16")
    for name, speed in result.train.items():
        click.echo(
            f"  train, recompute {name:<11}{speed.tokens_per_second:9,.1f} tokens/s, {speed.gemm_share:4.0%} of the peak, "
            f"{human_bytes(speed.peak_memory_bytes)}"
        )
    click.echo(f"  prefill (read a prompt)  {result.prefill_tokens_per_second:10,.1f} tokens/s")
    share = f"{result.decode_bandwidth_share:.0%} of the memory's speed"
    click.echo(f"  decode (write)           {result.decode_tokens_per_second:10,.1f} tokens/s, {share}")
