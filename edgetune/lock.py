"""Locks between processes. The operating system ties each lock to an open file, so a crash always releases it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from edgetune.home import unfinished_folder
from edgetune.runtime.errors import BusyError, UsageError
from edgetune.runtime.files import PRIVATE_FILE, explain_full_disk

if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 1 << 30
    """Offset of the byte that is locked: far behind the text, because Windows lets nobody else read a locked byte."""

    def _lock(file: BinaryIO) -> None:
        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)

else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_LONGEST_HOLDER = 1000
"""Bytes that are read of what a lock file says about its holder."""


class Lock:
    """An exclusive lock, held for a `with` block or until the process ends.

    The file stays on disk afterwards; it names the process that took the lock last, and when. Entering raises BusyError
    where another process holds the lock, and UsageError where its file cannot be opened or is a link; `what` names the locked
    thing in the error message.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what

    def __enter__(self) -> Lock:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        try:
            with explain_full_disk(self.path):
                self._file = os.fdopen(os.open(self.path, flags, PRIVATE_FILE), "r+b", buffering=0)
        except OSError as error:
            raise UsageError(f"The lock {self.path} cannot be opened ({error.strerror}). Delete it and try again.") from error
        try:
            _lock(self._file)
        except OSError as error:
            holder = self._file.read(_LONGEST_HOLDER)
            self._file.close()
            raise BusyError(f"{_describe(holder)} is already using {self.what}. Wait until it ends, or end it.") from error
        try:
            with explain_full_disk(self.path):
                self._file.truncate(0)
                self._file.write(json.dumps({"pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}).encode())
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def lock_output(folder: Path) -> Lock:
    """Return the lock of an output folder, for any command that writes it. Entering raises BusyError where it is taken."""
    folder = folder.resolve()
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Lock(unfinished_folder() / f"out-{name}.lock", f"the output folder {folder}")


def _describe(holder: bytes) -> str:
    """Return words for the process that a lock file names. The file may be empty: its holder writes it after locking."""
    try:
        record = json.loads(holder)
        return f"Process {int(record['pid'])} (since {datetime.fromisoformat(record['since'])})"
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "Another process"
