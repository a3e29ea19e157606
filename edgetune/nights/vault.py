"""Looks at the notes before a night: are they all there, what is new, and what must be left for another night?

Nothing but names, sizes and times is looked at. What is remembered until the next night are keyed digests of these.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from edgetune.config import DataConfig
from edgetune.documents.copies import original_path
from edgetune.documents.document import Skipped
from edgetune.documents.not_notes import placeholder_of
from edgetune.documents.reasons import Reason
from edgetune.documents.walk import FoundFile, walk
from edgetune.home import expand, keyed_digest
from edgetune.nights.job import nights_folder
from edgetune.runtime.errors import DataError, UsageError
from edgetune.runtime.files import atomic_write, move_file
from edgetune.runtime.json_file import read_object
from edgetune.runtime.untrusted_file import NIGHT_RECORD

LEARNT, TRIED, PENDING = "notes.json", "notes-tried.json", "notes-tonight.json"
"""Files with the notes that the current adapter has learnt, with those of a later night whose adapter was set aside, and
with those of the night that is under way."""
MOST_LOST = 0.3
"""Share of last night's notes (0 to 1) that may be gone; where more are, the folder is taken for broken."""
SETTLED_SECONDS = 60.0
"""A note that was written less than this many seconds ago is left for the next night; chosen by hand."""
_MARK = re.compile(r"conflict|\(\d\)", re.IGNORECASE)
"""Marks, of those that copies.py knows, of a copy that a program made; people do call notes `plan 2.md`."""
_DIGITS = 16
"""Hexadecimal digits that are kept of each digest: two of a million notes share them once in 37 million cases."""


class NotesMissing(DataError):
    """Raised where the notes are not all there, so that a night must not learn from the rest."""


@dataclass(frozen=True)
class Known:
    """The notes of one night: digests of their paths, each with a digest of its size and time."""

    folders: str
    """Digest of the named folders and files: other ones have notes of their own."""
    notes: dict[str, str]
    adapter: str = ""
    """Name of the adapter that was trained on them; empty while the night is under way."""

    def save(self, name: str) -> None:
        """Write the notes to a file. Raises ResourceError when the disk is full."""
        atomic_write(nights_folder() / name, json.dumps(dataclasses.asdict(self)) + "\n")


@dataclass(frozen=True)
class Looked:
    """The notes that there are tonight, and those that are new. Paths are absolute."""

    known: Known
    """What to remember of tonight: the state of each note, for one that is being written that of the last night."""
    notes: int
    """Notes that tonight may read."""
    new: int
    """Notes that are new to the current adapter."""
    changed: int
    untried: int
    """Those of the new and changed notes that no later night has tried to learn either."""
    gone: int
    """Notes of the last night, whatever came of it, that are gone."""
    deferred: tuple[str, ...]
    """Notes that are being written."""
    conflicts: tuple[str, ...]
    """Copies that a sync program made of a note that is there itself."""
    not_downloaded: int


def load_known(name: str = LEARNT) -> Known | None:
    """Return the notes in a file, or None if there is none or it is damaged."""
    path = nights_folder() / name
    try:
        record = read_object(path, NIGHT_RECORD) if path.exists() else {}
        folders, notes, adapter = record["folders"], record["notes"], record["adapter"]
    except (KeyError, UsageError):
        return None
    values = [folders, adapter, *(notes.values() if isinstance(notes, dict) else [None])]
    return Known(folders, notes, adapter) if all(isinstance(value, str) for value in values) else None


def remember_tonight(adapter: str, is_current: bool) -> None:
    """Remember the notes of the night that is under way, which trained this adapter: as learnt if it is the current one now,
    else as tried. Those that were only tried stay new, so that the next night with newer ones learns them together."""
    pending = load_known(PENDING)
    if pending is not None:
        dataclasses.replace(pending, adapter=adapter).save(LEARNT if is_current else TRIED)
    if is_current:
        (nights_folder() / TRIED).unlink(missing_ok=True)
    (nights_folder() / PENDING).unlink(missing_ok=True)


def learnt_and_tried(current: Callable[[], str | None]) -> tuple[Known | None, Known | None]:
    """Return the notes that the current adapter has learnt, and those that a later night only tried to learn.

    current: returns the name of the current adapter. Where the user has promoted that night's adapter, they are learnt.
    """
    tried = load_known(TRIED)
    if tried is not None and tried.adapter == current():
        move_file(nights_folder() / TRIED, nights_folder() / LEARNT)
        tried = None
    return load_known(), tried


def look(
    notes: Sequence[str],
    data: DataConfig,
    learnt: Known | None,
    tried: Known | None = None,
    accept_fewer: bool = False,
    check: Callable[[], None] = lambda: None,
    now: float | None = None,
) -> Looked:
    """Look at the notes, and compare them with those of `learnt_and_tried`.

    data: says which files are notes. accept_fewer: go on although many notes are gone. check: called for each folder; may raise
    to end the walk. now: the wall clock's time in seconds since 1970. Raises NotesMissing.
    """
    roots = [os.path.abspath(expand(path)) for path in notes]
    for root in roots:
        if not os.path.exists(root):
            raise NotesMissing(f"{root} is not there: perhaps a disk is not connected. The notes were left for another night.")
    digest = _Digest()
    folders = digest.of("\n".join(sorted(roots)))
    before, last = (known.notes if known is not None and known.folders == folders else {} for known in (learnt, tried))
    last = last or before
    found = walk(notes, data.exclude, check, data.code)
    conflicts = _conflicts(found.found.values())
    deferred: dict[str, str] = {}
    settled: dict[str, str] = {}
    for file in found.found.values():
        if file.path not in conflicts:
            state = _state(file, time.time() if now is None else now)
            if state is None:
                deferred[digest.of(file.path)] = str(file.file)
            else:
                settled[digest.of(file.path)] = digest.of(state)
    here = settled.keys() | deferred.keys() | {digest.of(_name_of(skip)) for skip in found.skipped}
    here |= {digest.of(path) for path in conflicts}
    new, changed, _ = _differences(settled, here, before)
    *untried, gone = _differences(settled, here, last)
    if not accept_fewer:
        _refuse_losses(gone, len(last), roots)
    return Looked(
        known=Known(folders, settled | {path: before[path] for path in deferred if path in before}),
        notes=len(settled),
        new=new,
        changed=changed,
        untried=sum(untried),
        gone=gone,
        deferred=tuple(deferred.values()),
        conflicts=tuple(str(file.file) for file in found.found.values() if file.path in conflicts),
        not_downloaded=sum(skip.reason is Reason.NOT_DOWNLOADED for skip in found.skipped),
    )


class _Digest:
    """Keyed digests of short texts, with one key for all of them."""

    def __init__(self) -> None:
        self._key = bytes.fromhex(keyed_digest("the notes of nights"))

    def of(self, text: str) -> str:
        return hmac.digest(self._key, text.encode("utf-8", "surrogatepass"), "sha256").hex()[:_DIGITS]


def _differences(settled: Mapping[str, str], here: Set[str], before: Mapping[str, str]) -> tuple[int, int, int]:
    """Return how many notes are new since `before`, how many have changed, and how many are gone.

    here: digests of all paths that are there, unsettled ones too. A note that was renamed has the size and the time that it
    had: it is neither gone nor new.
    """
    added = Counter(state for path, state in settled.items() if path not in before)
    lost = Counter(state for path, state in before.items() if path not in here)
    changed = sum(path in before and before[path] != state for path, state in settled.items())
    return (added - lost).total(), changed, (lost - added).total()


def _state(file: FoundFile, now: float) -> str | None:
    """Return what changes whenever a note is written, or None for a note that is being written just now."""
    try:
        about = os.stat(file.file)
    except OSError:  # a sync program has just replaced or moved it
        return None
    # A time in the future is that of a wrong clock, and says nothing about the last minute.
    if about.st_size != file.size or 0 <= now - about.st_mtime < SETTLED_SECONDS:
        return None
    return f"{about.st_size} {about.st_mtime_ns}"


def _conflicts(files: Iterable[FoundFile]) -> set[str]:
    """Return the report paths of the copies whose original is there too."""
    originals = {file.path: original_path(file.path) for file in files}
    return {
        path
        for path, original in originals.items()
        if original != path and original in originals and len(_MARK.findall(path)) > len(_MARK.findall(original))
    }


def _name_of(skip: Skipped) -> str:
    """Return the report path of the note that a skipped file is, or that iCloud's placeholder stands for."""
    folder, slash, name = skip.path.rpartition("/")
    return folder + slash + (placeholder_of(name) or name)


def _refuse_losses(gone: int, before: int, roots: Sequence[str]) -> None:
    """Raise NotesMissing where too many of last night's notes are gone."""
    if gone > MOST_LOST * before:
        where = Path(roots[0]) if len(roots) == 1 else f"{len(roots)} folders"
        raise NotesMissing(
            f"Of the {before} notes of the last night, {gone} are gone from {where}: perhaps a disk is not connected. If you "
            "deleted them, type: edgetune nightly run --fewer-notes"
        )
