"""Reads the exports in a .zip: only the members that are text of an export are unpacked, within limits, and never to disk."""

from __future__ import annotations

import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import IO, BinaryIO

from edgetune.documents.document import Skipped
from edgetune.documents.limits import (
    BLOCK_BYTES,
    MAX_ARCHIVE_DIRECTORY_BYTES,
    MAX_ARCHIVE_MEMBERS,
    MAX_EXPORT_BYTES,
    MAX_UNPACKED_EXPORT_BYTES,
)
from edgetune.documents.messengers import slack
from edgetune.documents.messengers.exports import HEAD_BYTES, SUFFIXES, App, Keep, read_export, read_slack, recognise
from edgetune.documents.reasons import Reason

_BROKEN = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error,
    KeyError, IndexError, UnicodeError, OverflowError,
)  # fmt: skip
"""Exceptions of zipfile for members that are damaged, encrypted, or packed in a way that Python does not know."""
_END, _END_BYTES, _LONGEST_COMMENT = b"PK\x05\x06", 22, 1 << 16
_END_64 = b"PK\x06\x07"


class NotAnArchive(Exception):
    """Raised for a .zip that is not read; `reason` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def check_directory(file: BinaryIO) -> None:
    """Check the size of an archive's list of members before zipfile reads it into memory. Raises NotAnArchive."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - _LONGEST_COMMENT - _END_BYTES, 0))
    tail = file.read(_LONGEST_COMMENT + _END_BYTES)
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < _END_BYTES:
        raise NotAnArchive(Reason.BAD_ARCHIVE)
    members, listed = struct.unpack("<HL", tail[at + 10 : at + 16])
    # zip64 has a second, larger record, which only archives of over 4 GiB or 65,535 members need.
    if tail[max(at - 20, 0) : at].startswith(_END_64) or members > MAX_ARCHIVE_MEMBERS or listed > MAX_ARCHIVE_DIRECTORY_BYTES:
        raise NotAnArchive(Reason.LARGE_ARCHIVE)


class Archive:
    """The members of an archive that may be exports."""

    def __init__(self, file: BinaryIO, told: Callable[[], None]) -> None:
        check_directory(file)
        try:
            self._zip = zipfile.ZipFile(file)
        except _BROKEN as error:
            raise NotAnArchive(Reason.BAD_ARCHIVE) from error
        self._told = told
        self._left = MAX_UNPACKED_EXPORT_BYTES
        self.members = {
            info.filename: info
            for info in sorted(self._zip.infolist(), key=lambda info: info.filename)
            if info.filename.lower().endswith(SUFFIXES) and not info.filename.startswith("__MACOSX/")
        }

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a member. Raises NotAnArchive for a damaged one, and beyond the limits."""
        if self.members[name].file_size > MAX_EXPORT_BYTES:
            raise NotAnArchive(Reason.LARGE_EXPORT)
        try:
            with self._opened(name) as member:
                while block := member.read(BLOCK_BYTES):
                    self._told()
                    self._left -= len(block)
                    if self._left < 0:
                        raise NotAnArchive(Reason.LARGE_ARCHIVE)
                    yield block
        except _BROKEN as error:
            raise NotAnArchive(Reason.BAD_ARCHIVE) from error

    def _opened(self, name: str) -> IO[bytes]:
        return self._zip.open(self.members[name])

    def first(self, name: str) -> bytes:
        """Return the beginning of a member, or b"" if it cannot be read."""
        self._told()
        try:
            with self._opened(name) as member:
                return member.read(HEAD_BYTES)
        except _BROKEN:
            return b""


def read_archive(file: BinaryIO, path: str, me: Sequence[str], keep: Keep, told: Callable[[], None]) -> list[Skipped] | None:
    """Pass the conversations of every export in an archive to `keep`, and return what was left out; None if it holds none.

    A document's path is that of the archive and of the member: `chat.zip/_chat.txt#3`. `told` is called for every block and may
    raise to end the work. Raises NotAnArchive for a file that is no archive.
    """
    archive = Archive(file, told)
    found: list[tuple[str, Callable[[], list[Skipped]]]] = []
    rest = dict.fromkeys(archive.members)
    for root, names in slack.exports(archive.members).items():
        files = {name.removeprefix(root): partial(archive.blocks, name) for name in names}
        found.append((f"{path}/{root}".rstrip("/"), partial(read_slack, files, f"{path}/{root}".rstrip("/"), me, keep)))
        for name in names:
            rest.pop(name, None)
    for name in rest:
        app: App | None = recognise(name.rpartition("/")[2], archive.first(name))
        if app is not None:
            found.append(
                (f"{path}/{name}", partial(read_export, app, partial(archive.blocks, name), f"{path}/{name}", me, keep))
            )
    skipped: list[Skipped] = []
    for name, read in found:
        try:
            skipped += read()
        except NotAnArchive as problem:
            skipped.append(Skipped(name, problem.reason))
    return skipped if found else None
