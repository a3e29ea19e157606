"""Opens the files that the walk has listed: exactly those, even if one was replaced in the meantime.

Between listing and reading, somebody who can write in the folder could put a link to a private key in a note's place, or a
FIFO, which would block for ever.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from edgetune.documents.reasons import Reason

Identity = tuple[int, int]
"""Device and inode of a file: no two files on a machine share them at one time."""
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))


class NotReadable(Exception):
    """Raised where a listed file cannot be opened; `reason` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def identity(about: os.stat_result) -> Identity | None:
    """Return the identity of a file, or None where the system does not tell it (os.scandir on Windows)."""
    return (about.st_dev, about.st_ino) if about.st_ino else None


def open_listed(path: Path, listed: Identity | None) -> FileIO:
    """Open the regular file at `path` for reading if it is still the file that was listed. Raises NotReadable if not.

    No folder on the way needs to be checked: another file, wherever it was reached, has another identity. Where the system
    tells none, the path itself must not be a link.
    """
    if listed is None and path.is_symlink():
        raise NotReadable(Reason.CHANGED)
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | _FLAGS), "rb", buffering=0)
    except OSError:
        replaced = os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode)
        raise NotReadable(Reason.CHANGED if replaced else Reason.UNREADABLE) from None
    about = os.fstat(file.fileno())
    if not stat.S_ISREG(about.st_mode) or (listed is not None and identity(about) != listed):
        file.close()
        raise NotReadable(Reason.CHANGED)
    return file


@contextlib.contextmanager
def open_folder(path: Path, listed: Identity | None) -> Iterator[tuple[Identity | None, list[os.DirEntry[str]]]]:
    """Yield the identity and the entries of a folder if it is still the one that was listed. Raises OSError or NotReadable.

    listed: None for a folder that the user named, which may be a link.
    """
    if os.scandir not in os.supports_fd:  # Windows
        with os.scandir(path) as listing:
            yield identity(os.stat(path)), list(listing)
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | (_FLAGS if listed is not None else 0))
    try:
        found = identity(os.fstat(descriptor))
        if listed is not None and found != listed:
            raise NotReadable(Reason.CHANGED)
        with os.scandir(descriptor) as listing:
            yield found, list(listing)
    finally:
        os.close(descriptor)
