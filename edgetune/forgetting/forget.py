"""Forgets notes: says what it will cost, makes a clean adapter current, deletes what holds the notes, repeats the runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune.documents.forgotten import file_digests
from edgetune.events import Event, Finished, read_events
from edgetune.forgetting.erase import erase, refuse_while_used
from edgetune.forgetting.job import BaseJob, ForgetJob
from edgetune.forgetting.replay import replay
from edgetune.forgetting.search import LONGEST_SHOWN, Wanted, affected, bears, find_gone, find_notes, only_held_out
from edgetune.home import home, unfinished_folder
from edgetune.library import adapter_registry as registry
from edgetune.library import ledger
from edgetune.library.exports_made import adapters_exported
from edgetune.library.ledger import Entry, Side
from edgetune.lock import Lock
from edgetune.progress import Show
from edgetune.reports.latest import LOG_FILE
from edgetune.runtime import peft_folder
from edgetune.runtime.errors import AdapterError, DataError, UsageError


@dataclass(frozen=True)
class Plan:
    """The notes that will be forgotten, and everything that follows from it.

    notes: paths as reports show them. near: notes that are nearly the same as one of them.
    """

    notes: tuple[str, ...]
    adapters: tuple[str, ...]
    """Adapters that learnt the notes, or descend from one that did: they are deleted."""
    current: tuple[str, ...]
    """Those of them that are in use."""
    clean: tuple[str | None, ...]
    """What is in use instead until the runs are repeated, in the same order; None: the bare base."""
    repeats: int
    """Runs that are repeated."""
    seconds: float
    """The time that they took."""
    held_out: bool
    """True if no run was trained on the notes, and some were judged by them."""
    outside: tuple[str, ...]
    """Copies outside edgetune's own folder that hold what was learnt: exports, and adapters of runs with --out."""
    private: bool
    """True if a run that is repeated was private: its noise is drawn anew, so that it gives other bytes each time."""
    job: ForgetJob


def plan(names: Sequence[str], gone: bool = False) -> Plan:
    """Return what it takes to forget the notes that `names` stand for, and with `gone` all notes that are gone.

    Raises UsageError where no adapter here has learnt them.
    """
    found = ledger.entries()
    wanted = find_gone(found) if gone else Wanted()
    named = find_notes(names, found) if names else Wanted()
    for each in ("words", "files", "marks"):
        getattr(wanted, each).update(getattr(named, each))
    wanted.notes |= named.notes
    seen = affected(wanted, found)
    if not seen:
        raise UsageError(_nothing_learnt(names, wanted, gone))
    by_base = {base: [name for each, name in seen if each == base] for base, _ in seen}
    jobs = [job for base, own in by_base.items() if (job := _base_job(base, own, found)) is not None]
    runs = {(job.base, run) for job in jobs for run in job.affected}
    repeated = [entry for entry in found if (entry.base, entry.run) in runs]
    replaced = [job for job in jobs if job.follows]
    return Plan(
        notes=tuple(wanted.paths or sorted(name[:LONGEST_SHOWN] for name in names)),
        adapters=tuple(name for job in jobs for name in job.affected),
        current=tuple(str(job.used) for job in replaced),
        clean=tuple(job.clean for job in replaced),
        repeats=len(repeated),
        seconds=sum(entry.seconds for entry in repeated),
        held_out=only_held_out(wanted, found),
        outside=tuple(_outside({name for _, name in seen}, wanted)),
        private=any(entry.config.get("private") is not None for entry in repeated),
        job=ForgetJob(sorted(wanted.words), file_digests(sorted(wanted.files)), jobs),
    )


def forget(job: ForgetJob, stop: threading.Event, show: Show = lambda event: None) -> Iterator[tuple[str, Event]]:
    """Do what a plan says, or go on with it after an interruption; yield each repeated run's name with its events.

    The adapters that learnt the notes are gone before the first event. Once `stop` is set, the last event is Interrupted, and
    `ForgetJob.load` returns the rest of the work. Raises BusyError while a run is going.
    """
    with Lock(unfinished_folder() / "forget.lock", "another forgetting"):
        if not job.erased:
            refuse_while_used()
            add_later_runs(job)
            job.save()
            erase(job)
        yield from replay(job, stop, show)
        if not any(base.runs for base in job.bases):
            job.end()
            ledger.tidy()


def add_later_runs(job: ForgetJob) -> None:
    """Add the runs that saw the notes, or started from an affected adapter, after the job was planned.

    They are there where the job was interrupted before it had deleted anything, and a night began before it was taken up again.
    """
    words = set(job.words)
    for base in job.bases:
        for entry in ledger.entries(base.base):
            read = any(note.words in words and note.side is not Side.REPEAT for note in entry.notes)
            if entry.run not in base.affected and (read or entry.parent in base.affected):
                base.affected.append(entry.run)
                if entry.run not in base.recorded:
                    base.runs.append(entry.run)
                    base.recorded[entry.run] = [entry.parent, entry.rival, entry.promoted]
        current = registry.get_current(base.base)
        if current is not None and current.adapter.name in base.affected:
            base.used = current.adapter.name


def _base_job(base: str, names: list[str], found: Sequence[Entry]) -> BaseJob | None:
    """Return the job for the adapters of the base whose digest begins with `base`; None without any trace of it."""
    own = [entry for entry in found if entry.base[:12] == base]
    current = registry.current_in(home() / "adapters" / base)
    digest = own[0].base if own else None if current is None else current.base
    if digest is None:
        digest = _recorded_base(base, names)
    if digest is None:
        return None
    first = next((number for number, entry in enumerate(own) if entry.run in names), len(own))
    clean = used = None
    if current is not None:
        used = current.adapter.name if current.adapter.parent.name == base else None
        earlier = (path.name for path in (current.adapter, *reversed(current.earlier)) if registry.is_adapter(path))
        clean = next((name for name in earlier if name not in names), None)
    start = own[first].rival if first < len(own) else None
    recorded = {entry.run: [entry.parent, entry.rival, entry.promoted] for entry in own[first:]}
    return BaseJob(digest, names, list(recorded), recorded, clean, used, was=start, current=start)


def _recorded_base(base: str, names: Sequence[str]) -> str | None:
    """Return the digest of a base as its adapters' own records have it."""
    for name in names:
        with contextlib.suppress(AdapterError):
            digest = peft_folder.load_config(home() / "adapters" / base / name).about.get("base")
            if isinstance(digest, str) and digest.startswith(base):
                return digest
    return None


def _outside(names: set[str], wanted: Wanted) -> list[str]:
    """Return what lies elsewhere and holds what was learnt: exports of these adapters, and adapters of runs with --out."""
    found = {path for path, adapter in adapters_exported().items() if adapter.rpartition("/")[2] in names}
    for log in (home() / "runs").glob(f"*/{LOG_FILE}"):
        with contextlib.suppress(DataError, OSError):
            made = [Path(event.adapter) for event in read_events(log) if isinstance(event, Finished)]
            found |= {str(path) for path in made if not path.is_relative_to(home()) and bears(path, wanted, names)}
    return sorted(path for path in found if Path(path).exists())


def _nothing_learnt(names: Sequence[str], wanted: Wanted, gone: bool) -> str:
    """Return the sentence for notes that no adapter here has learnt."""
    if gone and not names:
        return "No note that an adapter here has learnt is gone, so there is nothing to forget."
    shown = ", ".join(name[:LONGEST_SHOWN] for name in names)
    if wanted.notes and {note.side for note in wanted.notes.values()} == {Side.REPEAT}:
        return f"{shown} repeats another note and was left out of all training. Name the other note to forget it."
    return (
        f"No adapter here has learnt {shown}. Name the note by its path, also if it is deleted. To keep it out of later runs, "
        "add it to .edgetuneignore."
    )
