"""Remembers the privacy that every private run has spent: one file a run in edgetune's folder `privacy-ledger`.

A lineage is a run from the bare base with all runs that descend from it, those included whose adapters the gate turned down.
What a lineage has spent is what anybody learns who sees all of its adapters. Notes come and go between its runs, so it is
computed as if every document had been in all of them. An entry is written before the adapter is, and never deleted with it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from edgetune.home import home, private_folder
from edgetune.privacy.accounting import Mechanism
from edgetune.runtime.errors import DataError, UsageError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.json_file import read_object
from edgetune.runtime.untrusted_file import PRIVACY_LEDGER

FOLDER = "privacy-ledger"
FORMAT = 1
"""Version of the ledger's files."""


class BudgetSpent(DataError):
    """Raised where a lineage has no privacy left for another run."""


@dataclass(frozen=True)
class Entry:
    """A private run: the mechanism that it applied to `documents` documents, the first run of its lineage, and its base."""

    run: str
    lineage: str
    base: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    documents: int

    @property
    def mechanism(self) -> Mechanism:
        """Return what the run did, for the accountant."""
        return Mechanism(self.noise_multiplier, self.sample_rate, self.steps)


def record(entry: Entry) -> None:
    """Write a run's entry in place of an earlier one of the same run. Raises ResourceError."""
    path = private_folder(home() / FOLDER) / f"{entry.run}.json"
    atomic_write(path, json.dumps({"format": FORMAT, **dataclasses.asdict(entry)}, indent=2) + "\n")


def entries() -> list[Entry]:
    """Return all entries. Raises UsageError for a file that cannot be used: without it, too little would be counted."""
    return [_read(path) for path in sorted((home() / FOLDER).glob("[!.]*.json"))]


def lineage_of(run: str) -> str | None:
    """Return the first run of the lineage that this run is in; None for a run that the ledger does not know."""
    return next((entry.lineage for entry in entries() if entry.run == run), None)


def others_of(lineage: str, run: str) -> list[Mechanism]:
    """Return the mechanisms of a lineage's runs but for this one."""
    return [entry.mechanism for entry in entries() if entry.lineage == lineage and entry.run != run]


def steps_of(run: str, noise_multiplier: float, sample_rate: float) -> int:
    """Return the steps of this noise and sampling that the ledger has of a run; 0 for a run that it does not know."""
    found = (entry for entry in entries() if entry.run == run)
    same = (entry.steps for entry in found if (entry.noise_multiplier, entry.sample_rate) == (noise_multiplier, sample_rate))
    return max(same, default=0)


def _read(path: Path) -> Entry:
    values = read_object(path, PRIVACY_LEDGER)
    try:
        if values.pop("format") != FORMAT:
            raise ValueError
        entry = Entry(**values)
        texts = all(isinstance(text, str) for text in (entry.run, entry.lineage, entry.base))
        counts = all(type(count) is int and count >= 0 for count in (entry.steps, entry.documents))
        numbers = all(isinstance(number, int | float) for number in (entry.noise_multiplier, entry.sample_rate))
        if not (texts and counts and numbers and 0 < entry.noise_multiplier < math.inf and 0 < entry.sample_rate <= 1):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged or of another version; {PRIVACY_LEDGER.advice}.") from error
    return entry
