"""Keeps a ledger of the runs whose adapters are here, so that a note can be taken out of them again (edgetune/forgetting/).

    ledger/RUN.json      what the run read, how it was set up, what it started from and what was decided about its adapter
    ledger/RUN.notes     the texts that no earlier run had read, a JSON object a line; a note is named by a keyed digest
    ledger/forgetting    a forgetting that is under way (edgetune/forgetting/job.py)

Texts are kept, after masking, and not their tokens: which notes a run trains on, holds out and leaves out depends on all
others, and tokens are a function of the texts. Each text is kept once, however many runs read it. No checkpoint is kept: a run
begins with a fresh optimizer, so its parent's adapter, which is kept anyway, is all that it starts from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from edgetune.documents.document import Document
from edgetune.documents.forgotten import DIGITS, text_digests
from edgetune.documents.spool import Spool
from edgetune.home import home, keyed_digests, private_folder, unfinished_folder
from edgetune.library import adapter_registry as registry
from edgetune.runtime.errors import DataError
from edgetune.runtime.files import atomic_write, explain_full_disk, move_file, new_file
from edgetune.runtime.json_file import parse, read_object
from edgetune.runtime.untrusted_file import FileKind, open_untrusted

FOLDER = "ledger"
FORMAT = 1
"""Version of an entry. Entries of another version are not used."""
KEPT = 30
"""Runs of each base model that are kept; chosen by hand: a month of nights."""
MOST_BYTES = 1 << 30
"""Size of the ledger in bytes from which its oldest runs are dropped; chosen by hand: thirty nights over 500 MB of notes."""
RECORD, TEXTS, UNDER_WAY = ".json", ".notes", "forgetting"
UNFINISHED_RECORD = "ledger.json"
"""Name of a run's entry in the folder of the unfinished run."""
HALF_WRITTEN_SECONDS = 86_400.0
"""Age from which a temporary file is one that a killed process left, in seconds. Chosen by hand."""
_RECORD = FileKind(256 << 20, DataError, "delete it")
_TEXTS = FileKind(1 << 34, DataError, "delete it")


class Side(StrEnum):
    """The ways in which a run used a note."""

    TRAINED = "trained"
    HELD_OUT = "held out"
    CUT = "trained, its end held out"
    LEARNT = "learnt before"
    REPEAT = "repeats another note"


@dataclass(frozen=True)
class SeenNote:
    """A note that a run read: keyed digests of its content and of its words, its path in reports, its file, and its side."""

    id: str
    words: str
    path: str
    file: str
    side: Side


@dataclass(frozen=True)
class Cut:
    """The end of a run before its plan: steps done, and the batches of the scores that a deadline cut short (None: all)."""

    steps: int
    before: int | None = None
    last: int | None = None


@dataclass(frozen=True)
class Entry:
    """One run. parent, rival: names of the adapters that it started from and was compared with; None stands for none."""

    run: str
    base: str
    model: str
    config: dict[str, Any]
    """The TrainConfig, JSON-ready, its private fields included."""
    plan: dict[str, Any]
    torch: str
    processes: int
    parent: str | None
    notes: tuple[SeenNote, ...]
    rival: str | None = None
    adapter: str = ""
    """SHA-256 of the adapter's tensors."""
    cut: Cut | None = None
    promoted: bool = False
    seconds: float = 0.0
    ended: float = 0.0
    """Seconds since 1970."""
    format: int = FORMAT

    @property
    def is_night(self) -> bool:
        """Return True for a run that started from whatever adapter was current."""
        return bool(self.config.get("only_new"))

    @property
    def folder(self) -> Path:
        """Return the folder of the run's adapter."""
        return registry.adapters_folder(self.base) / self.run

    def save(self, path: Path | None = None) -> None:
        """Write the entry to the ledger, or to `path`. Raises ResourceError when the disk is full."""
        atomic_write(ledger_folder() / f"{self.run}{RECORD}" if path is None else path, json.dumps(self.as_dict()) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """Return the entry, JSON-ready, each note as a list."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        cut = None if self.cut is None else dataclasses.asdict(self.cut)
        return {**values, "cut": cut, "notes": [dataclasses.astuple(note) for note in self.notes]}

    @classmethod
    def load(cls, path: Path) -> Entry | None:
        """Return the entry in a file; None if it is damaged or of another version."""
        try:
            values = read_object(path, _RECORD)
            notes = tuple(SeenNote(name, words, path, file, Side(side)) for name, words, path, file, side in values["notes"])
            entry = cls(**{**values, "notes": notes, "cut": None if values["cut"] is None else Cut(**values["cut"])})
        except (DataError, KeyError, TypeError, ValueError, IndexError):
            return None
        return entry if entry.format == FORMAT and isinstance(entry.ended, float) else None


def ledger_folder() -> Path:
    """Return the ledger's folder, made if need be."""
    return private_folder(home() / FOLDER)


def entries(base: str | None = None) -> list[Entry]:
    """Return the runs in the ledger, those of one base or all, in the order in which they ended."""
    found = [Entry.load(path) for path in (home() / FOLDER).glob(f"[!.]*{RECORD}")]
    kept = [entry for entry in found if entry is not None and base in (None, entry.base)]
    return sorted(kept, key=lambda entry: (entry.ended, entry.run))


def ids_of(documents: Sequence[Document]) -> list[str]:
    """Return the keyed digest of each document's content, by which the ledger names it: its text and, in a chat, its turns."""
    contents = (
        f"chat {hashlib.sha256(document.content()).hexdigest()}" if document.is_chat else f"text {document.digest}"
        for document in documents
    )
    return [digest[:DIGITS] for digest in keyed_digests(contents)]


def words_of(documents: Sequence[Document]) -> list[str]:
    """Return the keyed digest of each document's words: equal for notes that differ in nothing but white space."""
    return text_digests(document.words for document in documents)


def known_ids() -> set[str]:
    """Return the names of all texts in the ledger."""
    return {note.id for entry in entries() for note in entry.notes}


def write_texts(file: BinaryIO, documents: Iterable[Document], ids: Iterable[str], known: Collection[str]) -> None:
    """Write the documents whose names are not `known` to a file of texts."""
    seen = set(known)
    for document, name in zip(documents, ids, strict=True):
        if name not in seen:
            seen.add(name)
            about = {"id": name, "digest": document.digest, "words": document.words, "size": document.size}
            line = json.dumps({**about, "chat": document.is_chat, "data": document.content().decode()}, ensure_ascii=False)
            file.write(line.encode() + b"\n")


def keep(entry: Entry, texts: Path) -> None:
    """Add a finished run to the ledger, with the file of its new texts if there are any, which moves into the ledger."""
    entry.save()
    place = ledger_folder() / f"{entry.run}{TEXTS}"
    if texts.exists() and texts.stat().st_size:
        if place.exists():  # the run had finished at a deadline, and has gone on since
            _rewrite([place, texts], place, lambda name: False)
        else:
            move_file(texts, place)
    tidy()


@dataclass
class Texts:
    """Texts of the ledger, in a spool: by name, the document without its path."""

    spool: Spool = field(default_factory=Spool.on_disk)
    found: dict[str, Document] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Collection[str], check: Callable[[], object] = lambda: None) -> Texts:
        """Read the texts of these names. Damaged lines are left out. check: called for each line, and may raise."""
        texts = cls()
        for path in sorted((home() / FOLDER).glob(f"[!.]*{TEXTS}")):
            for line in _lines(path):
                check()
                record = _record(line)
                if record is not None and record["id"] in names and record["id"] not in texts.found:
                    texts._add(record)
        return texts

    def _add(self, record: Mapping[str, Any]) -> None:
        data, size = record["data"].encode(), record["size"]
        document = Document(
            path="",
            digest=record["digest"],
            words=record["words"],
            size=size,
            is_chat=record["chat"],
            spool=self.spool,
            start=self.spool.append(data),
            chat_bytes=len(data) - size,
        )
        if document.part(0, size, "").digest == document.digest:  # nobody has changed it since
            self.found[record["id"]] = document

    def documents(self, notes: Iterable[SeenNote]) -> list[Document]:
        """Return the documents of these notes. Raises DataError if the ledger lacks one."""
        wanted = list(notes)
        if any(note.id not in self.found for note in wanted):
            raise DataError("The ledger lacks some of the texts that this run read.")
        return [dataclasses.replace(self.found[note.id], path=note.path) for note in wanted]


def tidy() -> None:
    """Drop the runs that are too old, too large together, or of no adapter here, and the texts that no run names any more.

    While a forgetting is under way nothing is dropped: it needs the runs whose adapters it has deleted.
    """
    folder = home() / FOLDER
    if not folder.is_dir() or (folder / UNDER_WAY).exists():
        return
    _delete_half_written(folder)
    found = entries()
    by_base = [[entry for entry in found if entry.base == base] for base in {entry.base for entry in found}]
    if dropped := [entry for own in by_base for entry in _without_adapter(own) + own[:-KEPT]]:
        for entry in dropped:
            drop(entry.run)
        drop_unnamed()
    while (left := entries()) and _size(folder) > MOST_BYTES:
        drop(left[0].run)
        drop_unnamed()


def drop(run: str) -> None:
    """Delete a run's record. Its texts stay until `drop_texts`, since other runs may name them."""
    (home() / FOLDER / f"{run}{RECORD}").unlink(missing_ok=True)


def drop_unnamed() -> None:
    """Delete the texts that no run names. A run that is not finished names those that were in the ledger when it began."""
    unfinished = [Entry.load(path) for path in unfinished_folder().glob(f"*/{UNFINISHED_RECORD}")]
    names = known_ids() | {note.id for entry in unfinished if entry is not None for note in entry.notes}
    drop_texts(lambda name: name not in names)


def drop_texts(is_dropped: Callable[[str], bool]) -> None:
    """Delete the texts with such names from the ledger's files. Raises ResourceError when the disk is full."""
    for path in sorted((home() / FOLDER).glob(f"[!.]*{TEXTS}")):
        names = [record["id"] for line in _lines(path) if (record := _record(line)) is not None]
        if all(is_dropped(name) for name in names):
            path.unlink(missing_ok=True)
        elif any(is_dropped(name) for name in names):
            _rewrite([path], path, is_dropped)


def _rewrite(sources: Sequence[Path], path: Path, is_dropped: Callable[[str], bool]) -> None:
    """Replace a file of texts by the texts of `sources` without those of such names, in one step."""
    with explain_full_disk(path):
        file, temporary = new_file(path)
        try:
            with file:
                for line in itertools.chain.from_iterable(map(_lines, sources)):
                    record = _record(line)
                    if record is not None and not is_dropped(record["id"]):
                        file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _delete_half_written(folder: Path) -> None:
    """Delete the temporary files that killed processes left: they may hold texts that no run names any more."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # its process has just renamed it
            if time.time() - path.lstat().st_mtime > HALF_WRITTEN_SECONDS:
                path.unlink()


def _without_adapter(own: Sequence[Entry]) -> list[Entry]:
    """Return the runs of one base whose adapter is gone, and from which no adapter here descends."""
    parents = {entry.run: entry.parent for entry in own}
    needed: set[str] = set()
    for entry in own:
        name: str | None = entry.run if registry.is_adapter(entry.folder) else None
        while name is not None and name not in needed:
            needed.add(name)
            name = parents.get(name)
    return [entry for entry in own if entry.run not in needed]


def _lines(path: Path) -> Iterator[bytes]:
    with BufferedReader(open_untrusted(path, _TEXTS)) as file:
        yield from file


def _record(line: bytes) -> dict[str, Any] | None:
    """Return a line of a file of texts, or None for one that is damaged."""
    try:
        record = parse(line)
        kinds = (("id", str), ("digest", str), ("words", str), ("size", int), ("chat", bool), ("data", str))
        return record if all(isinstance(record[name], kind) for name, kind in kinds) else None
    except (ValueError, KeyError, TypeError):
        return None


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.iterdir())
