"""A lock between processes that no crash leaves behind: the system holds it for an open file, and lets it go with it."""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from edgetune.runtime.errors import BusyError
from edgetune.runtime.files import PRIVATE_FILE, explain_full_disk

if sys.platform == "win32":
    import msvcrt

    _FAR = 1 << 30  # the byte that is locked: beyond the text, which others may then read

    def _take(file: BinaryIO) -> None:
        file.seek(_FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)

else:
    import fcntl

    def _take(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Lock:
    """Held from `with` to its end, or to the end of the process. The file stays; it says who holds it, and since when.

    Raises BusyError where another holds it; `what` is the middle of that sentence.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what

    def __enter__(self) -> Lock:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        with explain_full_disk(self.path):
            self._file = os.fdopen(os.open(self.path, flags, PRIVATE_FILE), "r+b", buffering=0)
        try:
            _take(self._file)
        except OSError as error:
            holder = self._file.read()
            self._file.close()
            raise BusyError(f"{_told(holder)} is at {self.what} already; wait until it ends, or end it.") from error
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


def _told(holder: bytes) -> str:
    """Who it is, as far as the file tells: its holder may be about to write it."""
    try:
        record = json.loads(holder)
        return f"Process {int(record['pid'])} (since {datetime.fromisoformat(record['since'])})"
    except (ValueError, KeyError, TypeError):
        return "Another process"
