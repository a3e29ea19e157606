"""The interface of all schedulers: what is written for one, which commands apply it, and how its own tool is run."""

from __future__ import annotations

import abc
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune.reports.text import one_line
from edgetune.runtime.errors import UsageError

NAME = "edgetune-nightly"
"""Name of the nights in every scheduler."""
TOOL_SECONDS = 30.0
"""Longest time that a scheduler's own tool may take, in seconds; chosen by hand."""
_LONGEST_ANSWER = 300
"""Characters of a tool's complaint that are shown; chosen by hand."""


@dataclass(frozen=True)
class Plan:
    """The task of a scheduler: to run `command` every day at `at`, a local time HH:MM.

    hours: most hours that a night may take, catching up by day included. wake: let the machine wake from sleep for it.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    folder: str
    """Folder in which the command runs."""
    log: str
    """File that takes what the command prints, where the scheduler keeps no log of its own."""
    at: str
    hours: int = 24
    wake: bool = False

    def __post_init__(self) -> None:
        for text in (*self.command, *self.environment.values(), self.folder, self.log):
            if any(ord(character) < 32 for character in text):
                raise UsageError(
                    f"{one_line(text)!r} holds a line break or another control character, which no scheduler takes. Rename "
                    "that folder."
                )

    @property
    def hour(self) -> int:
        """Return the hour at which the command runs."""
        return int(self.at[:-3])

    @property
    def minute(self) -> int:
        """Return the minute of that hour."""
        return int(self.at[-2:])


@dataclass(frozen=True)
class Written:
    """One thing that is written for a scheduler: a file, or for cron the user's crontab."""

    place: str
    text: str


class Scheduler(abc.ABC):
    """A program that starts the nights."""

    name: str

    @abc.abstractmethod
    def lacking(self) -> str | None:
        """Return a sentence that says why this scheduler cannot be used here, or None if it can."""

    @abc.abstractmethod
    def written(self, plan: Plan) -> list[Written]:
        """Return what `install` writes, without writing it."""

    @abc.abstractmethod
    def commands(self) -> list[list[str]]:
        """Return the commands that `install` runs after that, without running them."""

    @abc.abstractmethod
    def install(self, plan: Plan) -> None:
        """Write and apply, also over an earlier installation. Raises UsageError where the scheduler's tool complains."""

    @abc.abstractmethod
    def uninstall(self) -> None:
        """Take back what `install` did; nothing happens where it did nothing."""

    @abc.abstractmethod
    def is_installed(self) -> bool:
        """Return True if the scheduler knows of the nights."""

    @abc.abstractmethod
    def start(self, plan: Plan) -> None:
        """Let the scheduler run the command now, or as soon as it can, and do not wait for its end."""

    def after_trial(self, plan: Plan) -> None:
        """Take back what `start` changed."""
        return

    def notices(self) -> list[str]:
        """Return sentences about what this scheduler does not do here."""
        return []


def ask(command: Sequence[str], given: bytes | None = None) -> subprocess.CompletedProcess[bytes] | None:
    """Run a scheduler's tool, without a shell, and return what came of it; None where it is missing or takes too long."""
    found = shutil.which(command[0])
    if found is None:
        return None
    # Neither Ctrl-C nor the terminal reaches it: it must not be left half done.
    try:
        return subprocess.run([found, *command[1:]], input=given or b"", capture_output=True, timeout=TOOL_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None


def apply(command: Sequence[str], given: bytes | None = None) -> bytes:
    """Run a scheduler's tool and return what it prints. Raises UsageError, with its own words, where it fails."""
    done = ask(command, given)
    if done is None or done.returncode:
        answer = "it cannot be run" if done is None else one_line((done.stderr or done.stdout).decode(errors="replace").strip())
        raise UsageError(f"`{shlex.join(command)}` failed: {answer[:_LONGEST_ANSWER] or 'it does not say why'}")
    return done.stdout


def remove(path: Path) -> None:
    """Delete a file of ours, if it is there."""
    path.unlink(missing_ok=True)
