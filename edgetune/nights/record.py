"""Keeps a record of each night: counts, scores and the decision, but no text of a note and no name of a file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from edgetune.nights.job import nights_folder
from edgetune.reports.text import counted
from edgetune.reports.verdicts import BECAUSE, LEARNED
from edgetune.runtime.errors import UsageError
from edgetune.runtime.files import atomic_write, mend
from edgetune.runtime.json_file import read_object
from edgetune.runtime.untrusted_file import NIGHT_RECORD

KEPT = 30
"""Nights whose records are kept; chosen by hand."""
_PREFIX, _SUFFIX = "night-", ".json"


class Stage(StrEnum):
    """The stages of a night, in their order."""

    WAITING = "waiting"
    READING = "reading"
    TRAINING = "training"
    REPORTING = "reporting"
    ENDED = "ended"


class Kind(StrEnum):
    """The causes for which a night begins."""

    NIGHT = "night"
    CATCH_UP = "catch-up"
    MANUAL = "manual"
    TRIAL = "trial"


class Outcome(StrEnum):
    """The outcomes of a night. All but BETTER and FIRST leave the current adapter as it was."""

    BETTER = "better"
    FIRST = "first"
    NOT_BETTER = "not better"
    TOO_FEW = "too few"
    WORKS = "works"
    NOTHING_NEW = "nothing new"
    NOT_STARTED = "not started"
    OUT_OF_TIME = "out of time"
    NOTES_MISSING = "notes missing"
    PRIVACY_SPENT = "no privacy left"
    PAUSED = "paused"
    STOPPED = "stopped"
    FAILED = "failed"
    CRASHED = "crashed"


@dataclass
class NightRecord:
    """One night. Times are seconds since 1970, durations seconds, scores held-out bits per byte (lower is better)."""

    night: str
    """Name of the night: the date on which it began, and for others than scheduled nights the time too."""
    kind: Kind
    began: float
    ends_by: float
    stage: Stage = Stage.WAITING
    outcome: Outcome | None = None
    verdict: str | None = None
    """Verdict of the gate (library/gate.py) on the adapter that the night trained; None where there is none."""
    reason: str = ""
    """One sentence for a stranger: the gate's reason or, where the outcome alone says too little, another."""
    ended: float | None = None
    parent: str | None = None
    """Name of the adapter that the night began with."""
    adapter: str | None = None
    """Name of the adapter that the night trained."""
    steps_planned: int | None = None
    """Steps that fit into the time allowed, where that was less than the whole plan."""
    steps: int = 0
    notes: int = 0
    new_notes: int = 0
    """Notes that are new to the current adapter: by name, size and time, and by their text once they are read."""
    changed_notes: int = 0
    gone_notes: int = 0
    deferred_notes: int = 0
    conflict_copies: int = 0
    not_downloaded: int = 0
    masked: dict[str, int] = field(default_factory=dict)
    """How many secrets and identifiers of each kind placeholders replaced in the notes."""
    before: float | None = None
    after: float | None = None
    working_seconds: float = 0.0
    pauses: dict[str, float] = field(default_factory=dict)
    """Seconds that the night waited, by the reason."""
    resumed: int = 0
    """Times that the night was begun again after its process had ended early."""
    unknown: list[str] = field(default_factory=list)
    """Conditions that this machine does not tell."""

    @property
    def path(self) -> Path:
        """Return the path of the record's file."""
        return nights_folder() / f"{_PREFIX}{self.night}{_SUFFIX}"

    def save(self) -> None:
        """Write the record, readable by its owner alone. Raises ResourceError when the disk is full."""
        atomic_write(self.path, json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """Return the record, JSON-ready."""
        return dataclasses.asdict(self)

    def crashed(self, now: float) -> None:
        """Say of a night without an outcome that its process ended before it. now: seconds since 1970."""
        self.outcome, self.ended = Outcome.CRASHED, now
        self.reason = f"Its process ended early, while it was {self.stage}: it was killed, or the machine was."

    @property
    def sentence(self) -> str:
        """Return what happened in one plain sentence, which begins with the night's name."""
        return f"{_NAMES[self.kind]} {self.night}: {self._happened()}"

    def _happened(self) -> str:
        if self.outcome is None:
            return f"under way ({self.stage})."
        changed = f" and {counted(self.changed_notes, 'changed note')}" if self.changed_notes else ""
        notes = f"{counted(self.new_notes, 'new note')}{changed}"
        if self.outcome in LEARNED:
            happened = f"learned from {notes}; {LEARNED[self.outcome]}."
        elif self.outcome is Outcome.NOT_BETTER:
            because = BECAUSE.get(self.verdict or "", BECAUSE["not better"])
            happened = f"tried {notes}, but nothing changed because {because}; they will be tried again with newer ones."
        elif self.outcome is Outcome.NOTHING_NEW:
            happened = "there was nothing new to learn; nothing changed."
        elif self.outcome is Outcome.WORKS:
            read = counted(self.notes + self.deferred_notes, "note")
            happened = f"it works: {read} can be read, and {self.steps} steps were trained; nothing changed."
        else:
            happened = f"{self.outcome}; nothing changed."
        advice = f" To use it, type: edgetune adapters promote {self.adapter}" if self.outcome is Outcome.TOO_FEW else ""
        return f"{happened} {self.reason}".rstrip() + advice + self._gone()

    def _gone(self) -> str:
        """Return the offer to forget notes that are gone since the last night; empty where there are none."""
        if not self.gone_notes or self.outcome is Outcome.NOTES_MISSING:
            return ""
        notes = f"{counted(self.gone_notes, 'note')} {'is' if self.gone_notes == 1 else 'are'} gone since the last night"
        return f" {notes}: to make the adapter forget what is gone, type: edgetune forget --gone"


_NAMES = {Kind.NIGHT: "Night", Kind.CATCH_UP: "Night", Kind.MANUAL: "Run", Kind.TRIAL: "Trial"}


def load_record(path: Path) -> NightRecord | None:
    """Return a night's record, or None for a file that is damaged or of another version."""
    try:
        found = read_object(path, NIGHT_RECORD)
        record = NightRecord(**found)
        record.kind, record.stage = Kind(record.kind), Stage(record.stage)
        record.outcome = None if record.outcome is None else Outcome(record.outcome)
        _check_types(record)
    except (UsageError, TypeError, ValueError):
        return None
    return record


_OPTIONAL = {
    "outcome": "", "verdict": "", "ended": 0.0, "parent": "", "adapter": "", "steps_planned": 0, "before": 0.0, "after": 0.0,
}  # fmt: skip
"""Values like those of the fields that may be None."""


def _check_types(record: NightRecord) -> None:
    """Raise TypeError for a record whose values have other types than those that `save` writes."""
    like = {**vars(NightRecord("", Kind.NIGHT, 0.0, 0.0)), **_OPTIONAL}
    for name, value in vars(record).items():
        numeric = isinstance(like[name], int | float) and isinstance(value, int | float)
        if not (numeric or isinstance(value, type(like[name])) or (value is None and name in _OPTIONAL)):
            raise TypeError(name)


def record_of(night: str) -> NightRecord | None:
    """Return the record of the night of this name, or None if there is none that can be read."""
    path = nights_folder() / f"{_PREFIX}{night}{_SUFFIX}"
    return load_record(path) if path.exists() else None


def all_records() -> list[NightRecord]:
    """Return the records that are kept, oldest first."""
    found = (load_record(path) for path in nights_folder().glob(f"{_PREFIX}*{_SUFFIX}"))
    return sorted((record for record in found if record is not None), key=lambda record: record.began)


def night_since(moment: float) -> str | None:
    """Return the sentence of the last night if it began after a time in seconds since 1970 and trained no adapter, or None."""
    ended = [record for record in all_records() if record.outcome is not None and record.kind is not Kind.TRIAL]
    return ended[-1].sentence if ended and ended[-1].began > moment and ended[-1].adapter is None else None


def tidy() -> None:
    """Delete the records of all but the last KEPT nights, and what a crash left of a record that was being written."""
    paths = sorted(nights_folder().glob(f"{_PREFIX}*{_SUFFIX}"), key=lambda path: path.stat().st_mtime)
    for path in paths[:-KEPT]:
        path.unlink(missing_ok=True)
    for path in paths[-KEPT:]:
        mend(path)
