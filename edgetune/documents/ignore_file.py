"""Reads .edgetuneignore files, which keep files and folders out of training as .gitignore keeps them out of git.

A line is a pattern as --exclude takes it (patterns.py), for the folder of the file and everything below. "!" before a pattern
takes back what an earlier line excluded, "#" begins a comment. Files above the named folder count too, so that notes/* on the
command line cannot pass by notes/.edgetuneignore.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune.documents.limits import MAX_IGNORE_BYTES
from edgetune.documents.note_file import NotReadable, open_listed
from edgetune.documents.patterns import Exclude
from edgetune.documents.reasons import Reason

IGNORE_FILE = ".edgetuneignore"


@dataclass(frozen=True)
class IgnoreFile:
    """The patterns of one file, in its order, each with True if it excludes and False if it takes back."""

    folder: Path
    patterns: tuple[tuple[Exclude, bool], ...]

    def verdict(self, path: Path) -> bool | None:
        """Return True if the last pattern that matches `path` excludes it, False if it takes it back, None if none matches."""
        return next((excludes for pattern, excludes in reversed(self.patterns) if pattern.matches(self.folder, path)), None)


def is_ignored(path: Path, files: Sequence[IgnoreFile]) -> bool:
    """Return True if `path` is excluded by the files of the folders above it, given from the outermost to the innermost."""
    return next((verdict for file in reversed(files) if (verdict := file.verdict(path)) is not None), False)


def read_ignore_file(folder: Path) -> IgnoreFile:
    """Return the patterns of the file in `folder`.

    Raises NotReadable for a file that cannot be read: what it would keep out must not be trained on.
    """
    try:
        with open_listed(folder / IGNORE_FILE, None) as file:
            data = file.read(MAX_IGNORE_BYTES + 1) or b""
        lines = data.decode("utf-8-sig").splitlines()
    except (NotReadable, OSError, UnicodeDecodeError):
        raise NotReadable(Reason.IGNORE_UNREADABLE) from None
    if len(data) > MAX_IGNORE_BYTES:
        raise NotReadable(Reason.IGNORE_UNREADABLE)
    patterns = []
    for line in map(str.strip, lines):
        excludes = not line.startswith("!")
        pattern = line if excludes else line[1:]
        if pattern and not pattern.startswith("#"):
            patterns.append((Exclude(pattern.removeprefix("\\")), excludes))
    return IgnoreFile(folder, tuple(patterns))


def read_ignore_files_above(path: Path) -> tuple[IgnoreFile, ...]:
    """Return the files of all folders above `path`, the outermost first. Raises NotReadable."""
    return tuple(read_ignore_file(folder) for folder in reversed(path.parents) if os.path.lexists(folder / IGNORE_FILE))
