"""Keeps the text of notes out of memory while they are read: in memory up to a limit, then in a nameless private file."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from edgetune.home import home
from edgetune.runtime.files import Scratch, explain_full_disk, read_at, scratch_file, write_at

MEMORY_BYTES = 8 << 20
"""Bytes of text that stay in memory. Chosen by hand: most collections of notes are smaller."""


class Spool:
    """Texts, one after another. What was read is what is trained, even if a note changes in between."""

    def __init__(self, folder: Path | None) -> None:
        """Begin an empty spool. folder: of the file that takes what is more than MEMORY_BYTES; None keeps all in memory."""
        self._memory, self._folder = BytesIO(), folder
        self._file: Scratch | None = None
        self.end = 0
        """Number of bytes that the spool holds."""

    @classmethod
    def in_memory(cls) -> Spool:
        """Return a spool for a single short text."""
        return cls(None)

    @classmethod
    def on_disk(cls) -> Spool:
        """Return a spool for any amount of text. Its file has no name, so that nothing is left of it after a crash."""
        return cls(home())

    def append(self, data: bytes) -> int:
        """Add `data` and return the position where it begins. Raises ResourceError when the disk is full."""
        start = self.end
        if self._folder is None or start + len(data) <= MEMORY_BYTES:
            self._memory.seek(start)
            self._memory.write(data)
        else:
            with explain_full_disk(self._folder):
                if self._file is None:
                    self._file = scratch_file(self._folder)
                    write_at(self._file, self._memory.getbuffer(), 0)
                    self._memory = BytesIO()
                write_at(self._file, memoryview(data), start)
        self.end += len(data)
        return start

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end`."""
        if self._file is None:
            self._memory.seek(start)
            return self._memory.read(end - start)
        found = bytearray(end - start)
        read_at(self._file, memoryview(found), start)
        return bytes(found)
