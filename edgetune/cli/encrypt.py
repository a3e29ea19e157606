"""Implements `edgetune encrypt` and `edgetune decrypt`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from edgetune.cli.options import json_option, print_json, progress_shown, told_to_continue
from edgetune.progress import Progress, Stages
from edgetune.reports.text import counted, human_bytes, one_line

if TYPE_CHECKING:
    from edgetune.encrypting import Converted


@click.command("encrypt")
@json_option
def encrypt_command(as_json: bool) -> None:
    """Encrypt what edgetune keeps about you on this disk, now and from now on.

    Adapters, checkpoints, notes as tokens, parsed files, reports, logs and records of nights. The key is in the system's
    keychain. If this is interrupted, type it again.
    """
    from edgetune.encrypting import PLAIN, encrypt

    done = _shown("encrypting", encrypt)
    if as_json:
        print_json({**dataclasses.asdict(done), "plain": PLAIN})
        return
    click.echo(f"Encryption at rest is on. {_counts(done, 'encrypted')}")
    click.echo("The key is in the system's keychain: if that is lost, so is what it encrypted.")
    click.echo("Not encrypted:")
    for line in PLAIN:
        click.echo(f"  {line}")


@click.command("decrypt")
@json_option
def decrypt_command(as_json: bool) -> None:
    """Decrypt what `edgetune encrypt` encrypted, and delete the key. If this is interrupted, type it again."""
    from edgetune.encrypting import decrypt
    from edgetune.runtime.errors import DataError

    done = _shown("decrypting", decrypt)
    if done.damaged:
        raise DataError(
            f"{counted(len(done.damaged), 'file')} could not be decrypted, since they were damaged or changed, so the key is "
            f"kept. Restore them from a backup, or delete them, and type it again: {', '.join(done.damaged)}"
        )
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    click.echo(f"Encryption at rest is off. {_counts(done, 'decrypted')}")


def _shown(stage: str, convert: Callable[[Progress], Converted]) -> Converted:
    """Convert the data folder while showing how far that is."""
    with told_to_continue(), progress_shown() as show:
        return convert(Stages(show).of(stage))


def _counts(done: Converted, what: str) -> str:
    """Return a sentence about what was converted."""
    already = f"; {done.already:,} were so already" if done.already else ""
    size = human_bytes(done.bytes)
    return f"{counted(done.files, 'file')} in {one_line(done.home)} {what} ({size}){already}."
