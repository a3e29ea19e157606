"""Implements `edgetune adapters`: list, show, import, promote, rollback, delete and log."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.options import json_option, model_option, print_json, progress_shown, say
from edgetune.reports.leaks import leak_lines
from edgetune.reports.text import counted, human_bytes, one_line
from edgetune.reports.verdicts import judgement

if TYPE_CHECKING:
    from edgetune.library.kept_adapters import KeptAdapter
    from edgetune.runtime.checkpoint import Checkpoint


@click.group("adapters")
def adapters_command() -> None:
    """List, show, import, promote and delete adapters, and go back to the one before.

    An adapter is what training makes: a small file that is used together with its base model.
    """


@adapters_command.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List the adapters of every base model, oldest first. * marks the current one of its base."""
    from edgetune.library.kept_adapters import list_adapters

    found = list_adapters()
    if as_json:
        print_json({"adapters": [dataclasses.asdict(adapter) for adapter in found]})
        return
    for adapter in found:
        click.echo(_line(adapter))
    if not found:
        click.echo("No adapters yet. Make one: edgetune train notes/")


@adapters_command.command("show")
@click.argument("name")
@model_option
@json_option
def show_command(name: str, model: str | None, as_json: bool) -> None:
    """Show the adapter NAME, and how it was judged.

    Its base model and the adapters that it was trained from are shown too.
    """
    from edgetune.library.kept_adapters import ancestors, describe

    adapter = describe(_kept(name, model)[0])
    chain = ancestors(adapter)
    if as_json:
        print_json({**dataclasses.asdict(adapter), "ancestors": [dataclasses.asdict(each) for each in chain]})
        return
    click.echo(_line(adapter))
    if adapter.verdict is not None and adapter.reason is not None:
        click.echo(f"  judged: {one_line(judgement(adapter.verdict))}. {one_line(adapter.reason)}")
    for line in leak_lines(adapter.audit or adapter.leaks):
        click.echo(f"  {one_line(line)}")
    click.echo(f"  targets: {', '.join(adapter.targets)}" + (f"; layers {list(adapter.layers)}" if adapter.layers else ""))
    if adapter.private is not None:
        click.echo(f"  {adapter.private}")
    if adapter.data is not None and adapter.configuration is not None:
        click.echo(f"  notes {one_line(adapter.data[:12])}, settings {one_line(adapter.configuration[:12])} (digests)")
    click.echo(f"  folder: {one_line(adapter.path)}")
    for parent in chain:
        click.echo(f"  trained from {_line(parent).strip()}")
    last = chain[-1].parent if chain else adapter.parent
    if last is not None:
        click.echo(f"  trained from {one_line(last)}, which is not among the adapters here")


@adapters_command.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="Name of the copy. Default: the name of its folder or file.")
@model_option
@json_option
def import_command(source: Path, name: str | None, model: str | None, as_json: bool) -> None:
    """Copy the adapter at SOURCE to edgetune's own.

    SOURCE is a PEFT folder, an mlx-lm folder or a GGUF LoRA.
    """
    from edgetune.home import expand
    from edgetune.library import adapter_registry as registry
    from edgetune.library.loading import open_base
    from edgetune.library.own_tokenizer import RECORD, difference_notice
    from edgetune.runtime import peft_folder

    with progress_shown() as show:
        choice, base = open_base(model, show)
    folder = registry.import_adapter(expand(str(source)), base, choice.public_name, name)
    notices = difference_notice(peft_folder.load_config(folder).about.get(RECORD, []))
    if as_json:
        print_json({"adapter": str(folder), "name": folder.name, "model": choice.name, "notices": list(notices)})
        return
    for notice in notices:
        say(notice)
    click.echo(f"Imported as {folder.name}. To use it: edgetune adapters promote {folder.name}, or --adapter {folder.name}")


@adapters_command.command("promote")
@click.argument("name")
@model_option
@json_option
def promote_command(name: str, model: str | None, as_json: bool) -> None:
    """Make NAME the current adapter of its base model.

    It is the one that chat, ask, generate, eval and export use unless told otherwise.
    """
    from edgetune.library import adapter_registry as registry
    from edgetune.library.promotion import promote

    folder, choice, base = _kept(name, model)
    registry.load_for(folder, base)
    promote(folder, choice, base.digest)
    if as_json:
        print_json({"adapter": str(folder), "name": name, "model": choice})
        return
    click.echo(f"{name} is now the current adapter; its base model is {one_line(choice)}.")


@adapters_command.command("rollback")
@model_option
@json_option
def rollback_command(model: str | None, as_json: bool) -> None:
    """Go back to the adapter that was current before, at once. The one in use until now is kept.

    Without an earlier adapter, the bare base model is used.
    """
    from edgetune.library import adapter_registry as registry
    from edgetune.library.promotion import rollback

    base = registry.default_base() if model is None else None
    if base is None:
        from edgetune.library.loading import open_base

        with progress_shown() as show:
            base = open_base(model, show)[1].digest
    left, current = rollback(base)
    name = None if current is None else current.adapter.name
    if as_json:
        path = None if current is None else str(current.adapter)
        print_json({"adapter": path, "name": name, "model": left.model, "was": left.adapter.name})
        return
    found = "The bare base model is used again" if name is None else f"{one_line(name)} is the current adapter again"
    click.echo(f"{found}; base model {one_line(left.model)}. The adapter {one_line(left.adapter.name)} is kept.")


@adapters_command.command("delete")
@click.argument("name")
@model_option
@json_option
def delete_command(name: str, model: str | None, as_json: bool) -> None:
    """Delete the adapter NAME for good. The current one is refused: go back to another first."""
    from edgetune.library.kept_adapters import delete

    delete(_kept(name, model)[0])
    if as_json:
        print_json({"deleted": name})
    else:
        click.echo(f"Deleted {name}.")


@adapters_command.command("log")
@json_option
def log_command(as_json: bool) -> None:
    """Show what was trained, promoted and forgotten, and when, and check that nobody has changed this log.

    Each line holds the hash of the one before. The log tells nobody which notes they were.
    """
    from edgetune.library import training_log

    log = training_log.read()
    if as_json:
        print_json({"lines": list(log.lines), "faults": list(log.faults), "torn": log.is_torn, "last_hash": log.last_hash})
    else:
        for line in log.lines:
            click.echo(one_line(_log_line(line)))
        for fault in log.faults:
            click.echo(fault)
        state = "broken" if log.faults else "whole"
        torn = " The last line is half written: a crash." if log.is_torn else ""
        if log.lines or log.faults or log.is_torn:
            click.echo(f"{counted(len(log.lines), 'line')}, the chain is {state}; last hash {log.last_hash}.{torn}")
        else:
            click.echo("Nothing is logged yet: the first `edgetune train` or night writes the first line.")
    if log.faults:
        raise click.exceptions.Exit(1)


def _log_line(line: dict[str, Any]) -> str:
    """Return a line of the log in words. Whoever can write the log may have put in one that lacks something."""
    event, start = line["event"], f"{line['time']}  {line['event']}"
    try:
        if event == "trained":
            notes = ", ".join(f"{count} {side}" for side, count in line["notes"].items())
            return f"{start} {line['run']} on {notes or 'notes of which no record is kept'}{', again' * line['repeated']}"
        if event == "forgot":
            return f"{start} {counted(line['notes'], 'text')}; deleted {', '.join(line['adapters']) or 'no adapter'}"
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"{start} (not as edgetune writes it)"
    return f"{start} {line.get('adapter') or line.get('why') or 'to the bare base model'}"


def _kept(name: str, model: str | None) -> tuple[Path, str, Checkpoint]:
    """Return the folder of the adapter NAME, and the name and checkpoint of its base. Raises AdapterError if there is none."""
    from edgetune.library import adapter_registry as registry
    from edgetune.library.kept_adapters import list_adapters
    from edgetune.library.loading import open_base
    from edgetune.runtime.errors import AdapterError

    with progress_shown() as show:
        choice, base = open_base(model, show)
    folder = registry.kept_folder(name, base.digest)
    if folder is None:
        others = [one_line(each.base_name or each.base) for each in list_adapters() if each.name == name]
        where = (
            f"an adapter of that name belongs to {others[0]}: name that model with --model" if others else "type another name"
        )
        raise AdapterError(f"{choice.name} has no adapter {name!r}; {where}. `edgetune adapters list` shows all adapters.")
    return folder, choice.name, base


def _line(adapter: KeptAdapter) -> str:
    before, after = adapter.heldout_bits_per_byte_before, adapter.heldout_bits_per_byte_after
    learned = "" if before is None or after is None else f", held-out {before:.3f} to {after:.3f} bits/byte"
    base = f"{one_line(adapter.base_name)} ({adapter.base})" if adapter.base_name else adapter.base
    mark = "*" if adapter.current else " "
    return (
        f"{mark} {one_line(adapter.name)}: {adapter.created}, base {base}, rank {adapter.rank}, alpha "
        f"{adapter.alpha:g}, {human_bytes(adapter.bytes)}{learned}"
    )
