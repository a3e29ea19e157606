"""Reads a file, or the files of a folder, as the export of a chat app if it is one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from io import FileIO

from edgetune.documents.document import Skipped
from edgetune.documents.limits import BLOCK_BYTES, MAX_ARCHIVE_BYTES, MAX_EXPORT_BYTES
from edgetune.documents.messengers.archive import NotAnArchive, read_archive
from edgetune.documents.messengers.exports import HEAD_BYTES, SUFFIXES, Keep, read_export, recognise
from edgetune.documents.reasons import Reason

ARCHIVE_SUFFIX = ".zip"
LISTED_SUFFIXES = (".json", ".html", ".htm", ARCHIVE_SUFFIX)
"""Suffixes of files that a walk lists although they are no notes: a look at their beginning tells if they are exports."""

Told = Callable[[int], None]
"""Takes the number of bytes of a file that are done, and may raise to end the work."""


def read_file(file: FileIO, path: str, me: Sequence[str], keep: Keep, told: Told) -> list[Skipped] | None:
    """Pass each conversation of an open file to `keep` and return what was left out; None for a file that is no export.

    path: the file's name in reports, by which its kind is known. me: the user's names. Raises OSError.
    """
    name, size = path.rpartition("/")[2].lower(), os.fstat(file.fileno()).st_size
    if name.endswith(ARCHIVE_SUFFIX):
        return _read_archive(file, size, path, me, keep, told)
    app = recognise(name, head(file)) if name.endswith(SUFFIXES) else None
    if app is None:
        return None
    if size > MAX_EXPORT_BYTES:
        return [Skipped(path, Reason.LARGE_EXPORT)]
    return read_export(app, lambda: blocks(file, told), path, me, keep)


def _read_archive(file: FileIO, size: int, path: str, me: Sequence[str], keep: Keep, told: Told) -> list[Skipped] | None:
    if size > MAX_ARCHIVE_BYTES:
        return [Skipped(path, Reason.LARGE_ARCHIVE)]
    try:
        return read_archive(file, path, me, keep, lambda: told(min(file.tell(), size)))
    except NotAnArchive as problem:
        return [Skipped(path, problem.reason)]


def head(file: FileIO) -> bytes:
    """Return the first HEAD_BYTES of a file."""
    file.seek(0)
    return file.read(HEAD_BYTES) or b""


def blocks(file: FileIO, told: Told) -> Iterator[bytes]:
    """Yield the bytes of a file from its beginning, up to the limit of exports."""
    file.seek(0)
    done = 0
    while done < MAX_EXPORT_BYTES and (block := file.read(min(BLOCK_BYTES, MAX_EXPORT_BYTES - done))):
        done += len(block)
        told(done)
        yield block
