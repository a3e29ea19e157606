"""`edgetune`: finds the command, and turns an expected failure into one sentence and an exit code."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click

import edgetune
from edgetune.home import home
from edgetune.reports.text import sanitize
from edgetune.runtime.errors import EdgetuneError
from edgetune.runtime.files import explain_full_disk

COMMANDS = {
    "train": "edgetune.cli.train",
    "generate": "edgetune.cli.generate",
    "ask": "edgetune.cli.generate",
    "chat": "edgetune.cli.chat",
    "eval": "edgetune.cli.evaluate",
    "models": "edgetune.cli.models",
    "quantize": "edgetune.cli.models",
    "export": "edgetune.cli.export",
    "adapters": "edgetune.cli.adapters",
    "plan": "edgetune.cli.plan",
    "bench": "edgetune.cli.bench",
    "doctor": "edgetune.cli.doctor",
}
INTERRUPTED = 130


class Commands(click.Group):
    """Imports a command's module when it is called, so that `--help` does not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[name]), f"{name}_command")
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(edgetune.__version__, prog_name="edgetune")
def cli() -> None:
    """Fine-tune a small LLaMA on your own notes, on your own machine. Nothing leaves it.

    Start with: edgetune train notes/ then: edgetune chat
    """


@contextmanager
def plain_failures() -> Iterator[None]:
    """Expected failures become a sentence on standard error and exit 1; Ctrl-C exits 130; a closed pipe is no failure."""
    try:
        with explain_full_disk(home()):
            yield
    except EdgetuneError as error:
        click.echo(f"edgetune: {sanitize(str(error))}", err=True)
        sys.exit(1)
    except RuntimeError as error:
        if "out of memory" not in str(error):  # torch has a class for it on NVIDIA cards only
            raise
        click.echo("edgetune: The device has no memory left; end other programs that use it, or type --device cpu.", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("edgetune: interrupted.", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or error.filename is None:
            raise
        told = f"{error.filename} is not yours to use ({error.strerror}); see whose it is, or name another place."
        click.echo(f"edgetune: {sanitize(told)}", err=True)
        sys.exit(1)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def main() -> None:
    """Entry point of the `edgetune` command. SIGTERM ends it as Ctrl-C does, so that nothing half written is left."""
    signal.signal(signal.SIGTERM, _end)
    logging.basicConfig(format="edgetune: %(message)s", level=logging.WARNING)
    with plain_failures():
        try:
            code = cli.main(standalone_mode=False)
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except click.Abort as error:  # what click makes of Ctrl-C
            raise KeyboardInterrupt from error
        sys.exit(code if isinstance(code, int) else 0)
