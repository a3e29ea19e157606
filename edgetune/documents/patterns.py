"""Matches paths with the patterns of --exclude and of .edgetuneignore: the one place that knows what a pattern means."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path


class Exclude:
    """One --exclude pattern.

    A pattern without a slash is matched against the name of each file and folder; one with a slash against the end of the
    path, which starts with the named folder's own name (`drafts/*`, `notes/drafts/`, `**/private/**`); an absolute one against
    the whole path. A folder that matches is skipped with everything in it. Upper and lower case differ on every system.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.used = False
        self.absolute = os.path.isabs(pattern) or pattern.startswith("/")
        slashed = pattern.replace(os.sep, "/")
        self.folders_only = slashed.endswith("/")
        self.parts = tuple(part for part in slashed.split("/") if part not in ("", "."))

    def matches(self, root: Path, path: Path) -> bool:
        """Return True if the pattern matches `path`, which lies under `root`; remember that it was used."""
        matched = self._matches(root, path)
        self.used |= matched
        return matched

    def _matches(self, root: Path, path: Path) -> bool:
        if not self.parts or (self.folders_only and not path.is_dir()):
            return False
        if self.absolute:
            whole = tuple(part for part in path.as_posix().split("/") if part)
            if match_parts(whole, self.parts):
                return True
        below = (root.name, *path.relative_to(root).parts)
        if self.absolute:  # as in .gitignore, a leading slash also means: from the given folder
            return match_parts(below[1:], self.parts)
        return any(match_parts(below[start:], self.parts) for start in range(len(below)))


def match_parts(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return True if a split path matches a split pattern. `**` stands for any number of folders; at the end, for everything
    in them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        least = 1 if len(pattern) == 1 else 0
        return any(match_parts(parts[start:], pattern[1:]) for start in range(least, len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and match_parts(parts[1:], pattern[1:])
