"""Repeats the runs that saw a forgotten note, one after another, as they would have been without it.

The order, the cuts and the settings are those on record; what each run starts from and is compared with is what would have been
there. The registry is changed only where the user used what the decisions had made current.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from edgetune.config import TrainConfig
from edgetune.documents.document import Reading
from edgetune.documents.lineage import NothingNew
from edgetune.documents.repeats import without_repeats
from edgetune.events import Event, Finished, Interrupted
from edgetune.forgetting.job import BaseJob, ForgetJob
from edgetune.library import adapter_registry as registry
from edgetune.library import ledger
from edgetune.library.ledger import Entry, Texts
from edgetune.library.loading import Base, open_base
from edgetune.library.promotion import promote
from edgetune.progress import Progress, Show
from edgetune.runtime.budget import WeightForm
from edgetune.runtime.errors import BusyError, DataError, EdgetuneError, ResourceError
from edgetune.training.plan import setting_from_dict
from edgetune.training.recorded import OUTSIDE, Recorded, config_from_dict
from edgetune.training.train import repeat


class CannotRepeat(DataError):
    """Raised where a run cannot be repeated, with the reason."""


def replay(job: ForgetJob, stop: threading.Event, show: Show) -> Iterator[tuple[str, Event]]:
    """Repeat what the job lists, and yield each run's name with its events. The job is saved after each run.

    Once `stop` is set, the last event is Interrupted, and the next call goes on from there.
    """
    for base in job.bases:
        while base.runs:
            run = base.runs[0]
            entry = next((entry for entry in ledger.entries(base.base) if entry.run == run), None)
            stopped = False
            if entry is None:
                _lose(base, run, "its record is damaged")
            else:
                for event in _looked_at(job, base, entry, stop, show):
                    stopped = stopped or isinstance(event, Interrupted)
                    yield run, event
            if stopped:
                return
            base.runs.remove(run)
            job.save()
        _restore_current(base)


def _looked_at(job: ForgetJob, base: BaseJob, entry: Entry, stop: threading.Event, show: Show) -> Iterator[Event]:
    """Repeat a run if the notes could have made a difference to it, and follow what became current."""
    recorded = base.recorded[entry.run]
    entry = dataclasses.replace(entry, parent=recorded[0], rival=recorded[1], promoted=recorded[2])
    rival = _rival(base, entry)
    parent = rival if entry.is_night and entry.parent == entry.rival else entry.parent
    promoted, changed = entry.promoted, parent != entry.parent or parent in base.repeated
    if entry.run in base.affected or changed:
        if base.lost:
            _lose(base, entry.run, base.why)
        else:
            promoted = yield from _repeated(job, base, entry, parent, rival, stop, show)
    base.was, base.current = entry.run if entry.promoted else entry.rival, entry.run if promoted else rival


def _rival(base: BaseJob, entry: Entry) -> str | None:
    """Return the adapter that would have been current at a run's end: the recorded one where the user had chosen another."""
    return base.current if entry.rival == base.was else entry.rival


def _repeated(
    job: ForgetJob, base: BaseJob, entry: Entry, parent: str | None, rival: str | None, stop: threading.Event, show: Show
) -> Generator[Event, None, bool]:
    """Repeat one run; return True if its adapter would have become current."""
    promoted, tries = False, _tried(entry, parent)
    try:
        if tries == base.tried:
            raise NothingNew("A night does not try again what the one before has tried without success.")
        config, found, recorded = _prepared(job, entry, parent, rival)
        for event in repeat(config, found, recorded, stop, show):
            if isinstance(event, Finished):
                promoted = event.promoted
            yield event
            if isinstance(event, Interrupted):
                return False
        base.repeated.append(entry.run)
        base.tried = tries if not promoted else None
        if promoted and base.follows and _is_untouched(base):
            promote(_folder(base, entry.run), entry.model, base.base)
    except NothingNew:  # without the notes there would have been no such run: its record goes when the job is done
        pass
    except (BusyError, ResourceError):
        raise
    except EdgetuneError as error:
        _lose(base, entry.run, str(error))
    return promoted


def _tried(entry: Entry, parent: str | None) -> str:
    """Return a digest of a night's notes and the adapter that it starts from. Any other run has a digest of its own."""
    ids = sorted(note.id for note in entry.notes) if entry.is_night else [entry.run]
    return hashlib.sha256(f"{parent} {ids}".encode()).hexdigest()


def _prepared(job: ForgetJob, entry: Entry, parent: str | None, rival: str | None) -> tuple[TrainConfig, Base, Recorded]:
    """Return the settings, the base and the record with which `repeat` repeats a run. Raises CannotRepeat."""
    if entry.processes > 1:
        raise CannotRepeat("It was trained by several processes together.")
    config = config_from_dict(entry.config)
    start = config.from_adapter
    if parent != OUTSIDE:
        start = start if parent is None and start == registry.NONE else None
        if parent is not None:
            start = str(_existing(entry, parent))
    config = dataclasses.replace(config, model=entry.model, from_adapter=start)
    found = open_base(entry.model)
    if found[1].digest != entry.base:
        raise CannotRepeat("Its base model is not the one on this machine.")
    plan = entry.plan
    recorded = Recorded(
        run=entry.run,
        read=_reader(entry),
        setting=setting_from_dict(plan["setting"]),
        weights=WeightForm(plan["weights"]),
        threads=int(plan["threads"]),
        published_scores=int(plan["published_scores"]),
        asked=(plan["anchor"] or {}).get("asked"),
        cut=entry.cut,
        rival=None if rival is None else _existing(entry, rival),
        ended=entry.ended,
        key=hashlib.sha256(f"repeat {entry.base} {entry.run} {sorted(job.words)}".encode()).hexdigest()[:16],
    )
    return config, found, recorded


def _existing(entry: Entry, name: str) -> Path:
    """Return the folder of an adapter that a run started from or was compared with. Raises CannotRepeat if it is gone."""
    folder = registry.adapters_folder(entry.base) / name
    if not registry.is_adapter(folder):
        raise CannotRepeat("An adapter that it was trained from or compared with is not here any more.")
    return folder


def _reader(entry: Entry) -> Callable[[Progress], Reading]:
    """Return a function that reads a run's notes from the ledger. Raises DataError where the ledger lacks some."""

    def read(progress: Progress) -> Reading:
        texts = Texts.of({note.id for note in entry.notes}, lambda: progress(0, 0))
        everything = texts.documents(entry.notes)
        if not everything:
            raise NothingNew("Without the forgotten notes, this run has none.")
        documents, skipped, near = without_repeats(everything, lambda: progress(0, 0))
        return Reading(
            documents=documents,
            skipped=skipped,
            files=len({note.file for note in entry.notes}),
            encodings={},
            near_duplicates=near.pairs,
            compared=near.compared,
            sources={note.path: (note.path,) for note in entry.notes},
            everything=everything,
            places={note.path: note.file for note in entry.notes},
        )

    return read


def _lose(base: BaseJob, run: str, why: str) -> None:
    """Note that a run cannot be repeated. Those that follow from it cannot be either."""
    base.lost.append(run)
    base.why = why
    ledger.drop(run)


def _is_untouched(base: BaseJob) -> bool:
    """Return False once the user has made an adapter current that neither was there before nor came of a repeated run."""
    current = registry.get_current(base.base)
    return (None if current is None else current.adapter.name) in {base.clean, *base.repeated}


def _restore_current(base: BaseJob) -> None:
    """Make current what came of the adapter that the user used, where they had gone back to an earlier one than the last."""
    if base.used in base.repeated and base.used != base.current and _is_untouched(base):
        name = base.used
        model = next((entry.model for entry in ledger.entries(base.base) if entry.run == name), None)
        if model is not None:
            promote(_folder(base, name), model, base.base)


def _folder(base: BaseJob, name: str) -> Path:
    return registry.adapters_folder(base.base) / name
