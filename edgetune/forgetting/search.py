"""Finds what is to be forgotten: the notes that are meant, also deleted ones, and the adapters that saw them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgetune.documents.document import Document
from edgetune.documents.forgotten import Forgotten, file_digests
from edgetune.documents.lineage import MARK_DIGITS, Lineage, marks_of
from edgetune.documents.reading import read_notes
from edgetune.home import expand, keyed_digests
from edgetune.library import ledger
from edgetune.library.kept_adapters import list_adapters
from edgetune.library.ledger import Entry, SeenNote, Side
from edgetune.runtime import peft_folder
from edgetune.runtime.errors import AdapterError, DataError

LONGEST_SHOWN = 200
"""Characters of a name that are shown."""


@dataclass
class Wanted:
    """The notes to forget."""

    notes: dict[str, SeenNote] = field(default_factory=dict)
    """Those in the ledger, by their content's keyed digest; every version of a file, and every copy with the same words."""
    words: set[str] = field(default_factory=set)
    """Keyed digests of the words of all of them, also of one that the ledger does not know."""
    files: set[str] = field(default_factory=set)
    """Absolute paths of the files that were named."""
    marks: set[str] = field(default_factory=set)
    """Their marks in the records of adapters (documents/lineage.py)."""

    @property
    def paths(self) -> list[str]:
        """Return the paths of the notes, as reports show them."""
        return sorted({note.path for note in self.notes.values()})


def find_notes(names: Sequence[str], found: Sequence[Entry]) -> Wanted:
    """Return the notes that `names` stand for: files and folders, there or not, or paths as a report shows them.

    found: all runs in the ledger. Raises UsageError where no name stands for a note that an adapter here may have learnt.
    """
    wanted = Wanted()
    every = [note for entry in found for note in entry.notes]
    for name in names:
        place = os.path.abspath(expand(name))
        own = [note for note in every if _is_named(note, name, place)]
        wanted.words |= {note.words for note in own}
        wanted.files |= {note.file for note in own if note.file and "#" not in Path(name).name} | _as_file(place)
        for document in _read(place):
            wanted.words.update(ledger.words_of([document]))
            wanted.marks.update(marks_of([document])[0])
        wanted.marks |= _path_marks([*(note.path for note in own), *_tails(name, place)])
    _add_copies(wanted, every)
    return wanted


def find_gone(found: Sequence[Entry]) -> Wanted:
    """Return the notes that a run in the ledger read and that later runs over the same folders no longer find.

    A note whose file is gone since the last run counts too, unless its folder is gone: perhaps a disk is not connected. A note
    that was renamed is not gone, and neither is one that was edited.
    """
    wanted, every = Wanted(), list[SeenNote]()
    latest: dict[tuple[str, ...], Entry] = {}
    for entry in found:
        latest[_folders(entry)] = entry
    for entry in found:
        every += entry.notes
        last = latest[_folders(entry)]
        if not all(os.path.exists(folder) for folder in _folders(entry)):
            continue
        here = [note for note in last.notes if not note.file or os.path.lexists(note.file)]
        words, files = {note.words for note in here}, {note.file for note in here}
        gone = [note for note in entry.notes if note.words not in words and note.file not in files]
        wanted.words |= {note.words for note in gone}
        wanted.marks |= _path_marks(note.path for note in gone)
    _add_copies(wanted, every)
    return wanted


def affected(wanted: Wanted, found: Sequence[Entry]) -> list[tuple[str, str]]:
    """Return all adapters that saw the notes, or descend from one that did, as (first 12 digits of the base, name).

    A run that left them out, since they repeat others, did not see them. An adapter that the ledger does not know is asked for
    the marks in its own record.
    """
    kept = list_adapters()
    known = {(entry.base[:12], entry.run) for entry in found}
    parents = {(adapter.base, adapter.name): adapter.parent for adapter in kept}
    parents |= {(entry.base[:12], entry.run): entry.parent for entry in found}
    used = {
        (entry.base[:12], entry.run): {note.words for note in entry.notes if note.side is not Side.REPEAT} for entry in found
    }
    seen = {run for run, words in used.items() if words & wanted.words}
    others = [adapter for adapter in kept if (adapter.base, adapter.name) not in known]
    seen |= {(adapter.base, adapter.name) for adapter in others if bears(Path(adapter.path), wanted)}
    while more := {each for each, parent in parents.items() if each not in seen and (each[0], parent) in seen}:
        seen |= more
    return sorted(seen)


def only_held_out(wanted: Wanted, found: Sequence[Entry]) -> bool:
    """Return True if no run in the ledger trained on any of the notes, though some held them out."""
    sides = {note.side for entry in found for note in entry.notes if note.words in wanted.words}
    return Side.HELD_OUT in sides and sides <= {Side.HELD_OUT, Side.REPEAT}


def undo(names: Sequence[str]) -> int:
    """Let runs read notes again that were forgotten; return how many entries of the list that were. Raises UsageError."""
    before, places = Forgotten.load(), [os.path.abspath(expand(name)) for name in names]
    words = ledger.words_of([document for place in places for document in _read(place)])
    after = before.without(words, file_digests(places))
    after.save()
    return len(before.texts) + len(before.places) - len(after.texts) - len(after.places)


def _is_named(note: SeenNote, name: str, place: str) -> bool:
    return (bool(note.file) and (note.file == place or note.file.startswith(place + os.sep))) or note.path == name


def _as_file(place: str) -> set[str]:
    """Return the file at a place, also one that is gone; nothing for a folder."""
    return set() if os.path.isdir(place) else {place}


def _read(place: str) -> list[Document]:
    """Return the documents in a file that is there; none for a folder, whose notes are known by their paths."""
    if not os.path.isfile(place):
        return []
    with contextlib.suppress(DataError):
        return read_notes([place], forgotten=Forgotten()).everything
    return []


def _tails(name: str, place: str) -> list[str]:
    """Return the paths under which reports may have shown a file: the ends of its absolute path."""
    parts = Path(place).parts[1:]
    return [name, *("/".join(parts[start:]) for start in range(len(parts)))]


def _path_marks(paths: Iterable[str]) -> set[str]:
    return {digest[:MARK_DIGITS] for digest in keyed_digests(f"path {path}" for path in set(paths))}


def _add_copies(wanted: Wanted, every: Iterable[SeenNote]) -> None:
    """Add the notes with the words that are wanted, and their marks."""
    for note in every:
        if note.words in wanted.words:
            wanted.notes[note.id] = note
            wanted.marks.add(note.id[:MARK_DIGITS])


def _folders(entry: Entry) -> tuple[str, ...]:
    return tuple(sorted(entry.config["data"]["notes"]))


def bears(adapter: Path, wanted: Wanted, parents: Collection[str] = ()) -> bool:
    """Return True if the record in an adapter's folder marks one of the notes, or names one of `parents` as its parent."""
    with contextlib.suppress(AdapterError):
        about = peft_folder.load_config(adapter).about
        lineage = Lineage.of_adapter(about)
        marked = not (lineage.trained | lineage.held_out | lineage.cut).isdisjoint(wanted.marks)
        return marked or about.get("parent") in parents
    return False
