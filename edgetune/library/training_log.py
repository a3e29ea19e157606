"""Keeps a log of what was trained, promoted, taken back and forgotten, and when: each line holds the hash of the one before.

    training-log.jsonl     {"number": 1, "time": ..., "event": "trained", ..., "previous": ..., "hash": ...}

Lines are only added. A line that was changed, removed or put in breaks the chain, and `read` says where; a line that a crash
left half written stays, and the next one says so. The log names adapters, counts notes, and has one keyed digest for all notes
of a run, so that it tells nobody which notes they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgetune.home import home, unfinished_folder
from edgetune.library.ledger import Entry, Side
from edgetune.lock import Lock
from edgetune.runtime.errors import BusyError, DataError
from edgetune.runtime.files import atomic_write, mend
from edgetune.runtime.json_file import parse
from edgetune.runtime.untrusted_file import FileKind, read_untrusted

FILE = "training-log.jsonl"
START = "0" * 64
"""The hash before the first line."""
MENDED = "mended"
"""The event of a line that follows a half-written one."""
_LOG = FileKind(1 << 30, DataError, "move it elsewhere")
_WAIT_SECONDS, _WAIT_STEPS = 0.02, 250
"""Pause between two attempts to lock the log, in seconds, and their number; chosen by hand: five seconds in all."""


@dataclass(frozen=True)
class Log:
    """The log as it was read: its intact lines, and a sentence for each place where the chain is broken."""

    lines: tuple[dict[str, Any], ...]
    faults: tuple[str, ...]
    is_torn: bool
    """True if the last line is half written."""

    @property
    def last_hash(self) -> str:
        """Return the hash of the last line."""
        return str(self.lines[-1]["hash"]) if self.lines else START


def path_of_log() -> Path:
    """Return the path of the log, which may not exist."""
    return home() / FILE


def read() -> Log:
    """Read and check the log. Raises DataError for a file that cannot be read."""
    path = path_of_log()
    pieces = read_untrusted(path, _LOG).split(b"\n") if os.path.lexists(path) else [b""]
    lines: list[dict[str, Any]] = []
    faults: list[str] = []
    previous, after_torn = START, 0
    for number, piece in enumerate(pieces[:-1], 1):
        record = _record(piece)
        if record is None:
            faults += [_unmended(after_torn)] if after_torn else []
            after_torn = number
            continue
        if after_torn and record["event"] != MENDED:
            faults.append(_unmended(after_torn))
        after_torn = 0
        if record["previous"] != previous or record["number"] != len(lines) + 1:
            faults.append(f"Line {number} does not follow the line before it: lines were removed, put in or changed.")
        previous = record["hash"]
        lines.append(record)
    faults += [_unmended(after_torn)] if after_torn else []
    return Log(tuple(lines), tuple(faults), bool(pieces[-1]))


def append(event: str, **about: Any) -> None:
    """Add a line, and wait until it is on the disk. Raises ResourceError when the disk is full."""
    with _locked():
        mend(path_of_log())
        log = read()
        number, previous = (log.lines[-1]["number"], log.last_hash) if log.lines else (0, START)
        data = b""
        if log.is_torn:
            torn = _line(number + 1, MENDED, previous, {"why": "the line before was left half written by a crash"})
            number, previous, data = number + 1, torn["hash"], b"\n" + _encoded(torn)
        data += _encoded(_line(number + 1, event, previous, about))
        path = path_of_log()
        atomic_write(path, (read_untrusted(path, _LOG) if os.path.lexists(path) else b"") + data)


def trained(run: str, base: str, entry: Entry | None, promoted: bool, repeated: bool) -> None:
    """Log a finished run. entry: its record in the ledger, None for a run with --out; repeated: it repeats an earlier run."""
    notes = () if entry is None else entry.notes
    sides = {str(side): sum(note.side is side for note in notes) for side in Side}
    about = {"run": run, "base": base[:12], "promoted": promoted, "repeated": repeated}
    digests = {"notes": {side: count for side, count in sides.items() if count}, "root": root(note.id for note in notes)}
    append("trained", **about, **digests, adapter=None if entry is None else entry.adapter)


def root(ids: Iterable[str]) -> str:
    """Return one digest for a set of notes: the SHA-256 of their sorted keyed digests, a line each."""
    return hashlib.sha256("\n".join(sorted(set(ids))).encode()).hexdigest()


def _line(number: int, event: str, previous: str, about: dict[str, Any]) -> dict[str, Any]:
    """Return a line of the log, with its hash: the SHA-256 of the line without it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = {"number": number, "time": now, "event": event, **about, "previous": previous}
    return {**line, "hash": _hash(line)}


def _hash(line: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _record(piece: bytes) -> dict[str, Any] | None:
    """Return a line whose hash is right; None for any other."""
    try:
        record = parse(piece)
        unsigned = {name: value for name, value in record.items() if name != "hash"}
        kinds = (("number", int), ("time", str), ("event", str), ("previous", str))
        right = all(isinstance(record[name], kind) for name, kind in kinds) and record["hash"] == _hash(unsigned)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return record if right else None


def _unmended(number: int) -> str:
    return f"Line {number} was changed: its hash is not that of what it says."


class _locked:
    """Holds the log's lock for a `with` block; waits for another process that is adding a line."""

    def __enter__(self) -> None:
        for attempt in range(_WAIT_STEPS):
            self._lock = Lock(unfinished_folder() / "log.lock", "the training log")
            try:
                self._lock.__enter__()
                return
            except BusyError:
                if attempt == _WAIT_STEPS - 1:
                    raise
                time.sleep(_WAIT_SECONDS)

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(None, None, None)
