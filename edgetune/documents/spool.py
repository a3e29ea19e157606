"""Keeps the text of notes out of memory while they are read: in memory up to a limit, then in a nameless private file."""

from __future__ import annotations

import tempfile
from io import BytesIO
from pathlib import Path
from typing import IO

from edgetune.home import home
from edgetune.runtime.files import explain_full_disk

MEMORY_BYTES = 8 << 20
"""Bytes of text that stay in memory. Chosen by hand: most collections of notes are smaller."""


class Spool:
    """Texts, one after another. What was read is what is trained, even if a note changes in between."""

    def __init__(self, file: IO[bytes], folder: Path) -> None:
        self._file, self._folder = file, folder
        self.end = 0
        """Number of bytes that the spool holds."""

    @classmethod
    def in_memory(cls) -> Spool:
        """Return a spool for a single short text."""
        return cls(BytesIO(), Path())

    @classmethod
    def on_disk(cls) -> Spool:
        """Return a spool for any amount of text. Its file has no name, so that nothing is left of it after a crash."""
        folder = home()
        return cls(tempfile.SpooledTemporaryFile(MEMORY_BYTES, dir=str(folder)), folder)

    def append(self, data: bytes) -> int:
        """Add `data` and return the position where it begins. Raises ResourceError when the disk is full."""
        start = self.end
        with explain_full_disk(self._folder):
            self._file.seek(start)
            self._file.write(data)
        self.end += len(data)
        return start

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end`."""
        self._file.seek(start)
        return self._file.read(end - start)
