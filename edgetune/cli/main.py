"""The `edgetune` command: runs the subcommand, and turns an expected failure into one sentence and an exit code."""

from __future__ import annotations

import difflib
import errno
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

import edgetune
from edgetune.cli.signals import exit_on_signals
from edgetune.home import home, is_in_home
from edgetune.privacy.network_guard import forbid_network
from edgetune.reports.streams import standard_streams
from edgetune.reports.text import NAME_SHOWN, sanitize
from edgetune.runtime.errors import EdgetuneError, SettingError, out_of_memory
from edgetune.runtime.files import explain_full_disk

COMMANDS = {
    "train": "edgetune.cli.train",
    "nightly": "edgetune.cli.nightly",
    "generate": "edgetune.cli.generate",
    "ask": "edgetune.cli.generate",
    "chat": "edgetune.cli.chat",
    "eval": "edgetune.cli.evaluate",
    "models": "edgetune.cli.models",
    "quantize": "edgetune.cli.models",
    "export": "edgetune.cli.export",
    "adapters": "edgetune.cli.adapters",
    "audit": "edgetune.cli.audit",
    "report": "edgetune.cli.report",
    "forget": "edgetune.cli.forget",
    "encrypt": "edgetune.cli.encrypt",
    "decrypt": "edgetune.cli.encrypt",
    "purge": "edgetune.cli.purge",
    "plan": "edgetune.cli.plan",
    "bench": "edgetune.cli.bench",
    "doctor": "edgetune.cli.doctor",
}
"""The module that defines each command, as a function named NAME_command."""
TOOLS_OF_THE_SYSTEM = ("report", "purge", "nightly")
"""Commands that start tools of the system which would break if the kernel refused them the network: a browser that shows the
report, and crontab, which needs its set-group-ID bit. `nightly run`, which trains, is not among them."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells expect."""
WRONG_USAGE = 2
"""Exit code where what was typed could work on no machine: an unknown flag, a missing argument, a value out of range."""


class Commands(click.Group):
    """A group that imports a command's module only when the command is called, so that `--help` does not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order in which the help shows them."""
        return list(COMMANDS)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command as click does, and suggest one that is like an unknown name."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if near := difflib.get_close_matches(args[0], COMMANDS, n=1):
                raise click.UsageError(f"{error.message} Did you mean '{near[0]}'?", ctx) from error
            raise

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import and return a command, or None for an unknown name."""
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[name]), f"{name}_command")
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(edgetune.__version__, prog_name="edgetune")
def cli() -> None:
    """Fine-tune a small LLaMA model on your own notes, on your own machine. Nothing leaves it.

    Start with: edgetune train notes/ and then: edgetune chat
    """


@contextmanager
def plain_failures() -> Iterator[None]:
    """Turn expected failures into a sentence on standard error and exit code 1, and Ctrl-C into 130; ignore a closed pipe."""
    try:
        with explain_full_disk(home()):
            yield
    except EdgetuneError as error:
        click.echo(f"edgetune: {sanitize(str(error))}", err=True)
        sys.exit(WRONG_USAGE if isinstance(error, SettingError) else 1)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(WRONG_USAGE)
    except click.UsageError as error:
        more = "" if error.ctx is None else f" Type: {error.ctx.command_path} --help"
        click.echo(f"edgetune: {sanitize(' '.join(error.format_message().split()))}{more}", err=True)
        sys.exit(WRONG_USAGE)
    except (MemoryError, RuntimeError) as error:
        sentence = out_of_memory(error)
        if sentence is None:
            raise
        click.echo(f"edgetune: {sentence}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("edgetune: interrupted.", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Python would complain when it flushes standard output at exit, so give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        message = out_of_memory(error) or _place_sentence(error)
        if message is None:
            raise
        click.echo(f"edgetune: {sanitize(message)}", err=True)
        sys.exit(1)


def _place_sentence(error: OSError) -> str | None:
    """Return a sentence for a place that cannot be used, or None for another failure of the system."""
    if error.filename is None:
        return None
    place = os.fsdecode(error.filename)[:NAME_SHOWN]
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        if is_in_home(Path(place)):
            return f"No permission to use {place} ({error.strerror}). Set EDGETUNE_HOME to a folder that you can write."
        return f"No permission to use {place} ({error.strerror}). Check who owns it, or name another place."
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL):
        return f"{place} cannot be used ({error.strerror}). Name another place."
    return None


def give_up_network(words: Sequence[str]) -> None:
    """Forbid this process the network, before torch and its threads are there, as far as the command that is typed allows it.

    torchrun's processes keep it: they talk to each other. Nothing else here has any business with it.
    """
    command = [word for word in words if not word.startswith("-")][:2]
    if command[:1] == ["train"] and "TORCHELASTIC_RUN_ID" in os.environ:
        from edgetune.training.distributed import is_launched

        if is_launched():
            return
    forbid_network(kernel=command == ["nightly", "run"] or not {*command[:1]} & {*TOOLS_OF_THE_SYSTEM})


def main() -> None:
    """Run the `edgetune` command and exit with its code."""
    exit_on_signals()
    give_up_network(sys.argv[1:])
    with standard_streams(), plain_failures():
        logging.basicConfig(format="edgetune: %(message)s", level=logging.WARNING)
        try:
            code = cli.main(prog_name="edgetune", standalone_mode=False)
        except click.Abort as error:  # click's form of Ctrl-C
            raise KeyboardInterrupt from error
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
