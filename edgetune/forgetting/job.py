"""Remembers a forgetting that is under way, so that the same command goes on with it after a crash.

ledger/forgetting     names of adapters and runs, and keyed digests of the notes
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from edgetune.library.ledger import UNDER_WAY, ledger_folder
from edgetune.runtime.errors import UsageError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.json_file import read_object_if_there
from edgetune.runtime.untrusted_file import FileKind

_JOB = FileKind(64 << 20, UsageError, "delete it, and type the command again")


@dataclass
class BaseJob:
    """The part of a job that concerns the adapters of one base model. Adapters and runs go by their names."""

    base: str
    """Digest of the base."""
    affected: list[str]
    """Adapters that are deleted."""
    runs: list[str]
    """Runs that are still to be looked at, in the order in which they ended."""
    recorded: dict[str, list[Any]]
    """For each of them its parent, the adapter that it was compared with, and if it was promoted: repeating replaces these."""
    clean: str | None
    """The adapter that is current until the runs are repeated; None: the bare base."""
    used: str | None
    """The adapter that was current when the user asked to forget."""
    was: str | None = None
    """The adapter that was current, by the decisions on record, when the next of `runs` ended."""
    current: str | None = None
    """The one that would have been current then without the notes."""
    tried: str | None = None
    """What the last repeated night tried without success: a digest of its notes and of the adapter that it started from."""
    repeated: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Affected runs that cannot be repeated."""
    why: str = ""
    """The reason for that, as a sentence."""

    @property
    def follows(self) -> bool:
        """Return True if the user used whatever the decisions made current, so that repeated decisions count for them too."""
        return self.used is not None and self.used in self.affected


@dataclass
class ForgetJob:
    """A forgetting: what is to be deleted, and which runs are to be repeated."""

    words: list[str]
    files: list[str]
    """Keyed digests of the words and of the files."""
    bases: list[BaseJob]
    erased: bool = False

    def save(self) -> None:
        """Write the job, readable by its owner alone. Raises ResourceError when the disk is full."""
        atomic_write(ledger_folder() / UNDER_WAY, json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def load(cls) -> ForgetJob | None:
        """Return the job that is under way, or None. Raises UsageError for a damaged file."""
        path = ledger_folder() / UNDER_WAY
        values: dict[str, Any] = read_object_if_there(path, _JOB)
        try:
            return cls(**{**values, "bases": [BaseJob(**base) for base in values["bases"]]}) if values else None
        except (KeyError, TypeError) as error:
            raise UsageError(f"{path} is damaged; {_JOB.advice}.") from error

    def end(self) -> None:
        """Delete the job."""
        (ledger_folder() / UNDER_WAY).unlink(missing_ok=True)
