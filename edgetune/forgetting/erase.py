"""Deletes what holds a note that is to be forgotten: adapters, reports and samples, interrupted runs, caches, texts."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Collection, Mapping, Set
from pathlib import Path

from edgetune.dataset.token_store import TokenStore
from edgetune.documents.forgotten import Forgotten
from edgetune.documents.heldout import END
from edgetune.documents.parsed_cache import FOLDER as PARSED
from edgetune.events import Sampled, Started, read_events
from edgetune.forgetting.job import BaseJob, ForgetJob
from edgetune.home import home, unfinished_folder
from edgetune.library import adapter_registry as registry
from edgetune.library import ledger, training_log
from edgetune.library.ledger import Entry, SeenNote, Texts
from edgetune.lock import Lock
from edgetune.reports.latest import LOG_FILE
from edgetune.runtime.errors import DataError, UsageError
from edgetune.training.plan import HELD_OUT, TOKENS
from edgetune.training.unfinished_run import UnfinishedRun

OWN_LOCKS = ("forget.lock", "log.lock")
"""Locks that a forgetting takes itself."""


def refuse_while_used() -> None:
    """Raise BusyError while a run, an export or a conversion is going: it may use what is about to be deleted."""
    for name in ("unfinished", "scratch"):
        for path in sorted((home() / name).glob("*.lock")):
            if path.name not in OWN_LOCKS:
                with Lock(path, "edgetune's folder"):
                    pass


def erase(job: ForgetJob) -> None:
    """Do everything that a forgetting deletes. Doing it again, after a crash, does no harm.

    The clean adapter becomes current before any is deleted, so that the one in use is there at every moment. Raises UsageError
    where something cannot be deleted, and BusyError where an interrupted run goes on meanwhile: the job stays then.
    """
    found, words = ledger.entries(), frozenset(job.words)
    Forgotten.load().with_notes(words, job.files).save()
    notes = {note.id: note for entry in found for note in entry.notes if note.words in words}
    for base in job.bases:
        use_clean(base)
    _delete_reports(job, notes)
    for base in job.bases:
        for name in base.affected:
            _delete_folder(registry.adapters_folder(base.base) / name)
    _discard_unfinished(job, {note.path for note in notes.values()}, words)
    _delete_folder(home() / PARSED)
    for entry in found:
        left = tuple(note for note in entry.notes if note.words not in words)
        if len(left) < len(entry.notes):
            dataclasses.replace(entry, notes=left).save()
    ledger.drop_unnamed()
    for half_written in ledger.ledger_folder().glob(".*.tmp"):  # of a process that was killed
        half_written.unlink(missing_ok=True)
    adapters = [name for base in job.bases for name in base.affected]
    training_log.append("forgot", notes=len(words), root=training_log.root(words), adapters=adapters)
    job.erased = True
    job.save()


def use_clean(base: BaseJob) -> None:
    """Make the clean adapter of a base current, if the current one is to be deleted."""
    current = registry.get_current(base.base)
    if current is None or current.adapter.name not in base.affected:
        return
    folder = None if base.clean is None else registry.adapters_folder(base.base) / base.clean
    if folder is None or not registry.is_adapter(folder):
        registry.forget_current(base.base)
        training_log.append("rolled back", adapter=None, base=base.base[:12])
        return
    earlier = tuple(path for path in current.earlier if path.name not in base.affected and path != folder.resolve())
    registry.set_current(dataclasses.replace(current, adapter=folder.resolve(), earlier=earlier))
    training_log.append("rolled back", adapter=base.clean, base=base.base[:12])


def _delete_reports(job: ForgetJob, notes: Mapping[str, SeenNote]) -> None:
    """Delete the logs and reports of the affected runs, and of others that show a note: its path or its beginning."""
    texts = [document.text for document in Texts.of(notes.keys()).found.values()]
    paths = {note.path for note in notes.values()}
    affected = {name for base in job.bases for name in base.affected}
    for folder in (home() / "runs").glob("*"):
        if folder.name in affected or _shows(folder / LOG_FILE, texts, paths):
            _delete_folder(folder)


def _shows(log: Path, texts: Collection[str], paths: Set[str]) -> bool:
    """Return True if a run's log names a note as held out, or has its beginning as a prompt."""
    with contextlib.suppress(DataError, OSError):
        for event in read_events(log):
            if isinstance(event, Started) and not paths.isdisjoint(path.removesuffix(END) for path in event.heldout_paths):
                return True
            if isinstance(event, Sampled) and any(event.prompt and event.prompt in text for text in texts):
                return True
    return False


def _discard_unfinished(job: ForgetJob, paths: Collection[str], words: Collection[str]) -> None:
    """Delete the interrupted runs that read a note, or that started from an affected adapter."""
    affected = {(base.base, name) for base in job.bases for name in base.affected}
    for path in [path for path in unfinished_folder().iterdir() if path.is_dir()]:
        entry = Entry.load(path / ledger.UNFINISHED_RECORD)
        if entry is None:
            is_affected = _holds(path, paths)
        else:
            is_affected = any(note.words in words for note in entry.notes) or (entry.base, entry.parent) in affected
        if is_affected:
            with Lock(path.with_suffix(".lock"), "an interrupted run that read the note"):
                UnfinishedRun(path).discard()
                _delete_folder(path)


def _delete_folder(folder: Path) -> None:
    """Delete a folder, if it is there. Raises UsageError where that fails, since what it holds must not stay."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be deleted ({error.strerror}), so the note is not forgotten yet. Delete it, or end the program "
            "that uses it, and type the same command again."
        ) from error


def _holds(unfinished: Path, paths: Collection[str]) -> bool:
    """Return True if the tokens of an interrupted run without a record, one with --out, are of a note; also if damaged."""
    try:
        stores = [TokenStore.open(unfinished / side) for side in (TOKENS, HELD_OUT) if (unfinished / side).exists()]
    except DataError:
        return True
    return any(document.path.removesuffix(END) in paths for store in stores for document in store.documents)
