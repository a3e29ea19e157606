"""Finding the notes: a walk that follows no link, enters nothing hidden and has an order of its own."""

from __future__ import annotations

import fnmatch
import os
import stat
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgetune.documents.document import Reason, Skipped
from edgetune.runtime.errors import DataError

NOTE_SUFFIXES = (".md", ".markdown", ".txt", ".rst", ".org")
CHAT_SUFFIXES = (".jsonl",)
KINDS = f"notes ({', '.join(NOTE_SUFFIXES)}) or chats ({', '.join(CHAT_SUFFIXES)})"


@dataclass(frozen=True)
class Found:
    """A file to read: where it lies, and the path it is known by."""

    file: Path
    path: str


@dataclass
class Walk:
    """What a walk found. A folder named twice, or inside another one named, is walked once."""

    base: Path
    excludes: list[Exclude]
    found: dict[Path, Found] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    folders: set[tuple[int, int]] = field(default_factory=set)
    entries: int = 0

    def known_as(self, path: Path) -> str:
        return shown(os.path.relpath(path, self.base) if path.is_relative_to(self.base) else path.as_posix())

    def skip(self, path: Path, reason: Reason) -> None:
        self.skipped.append(Skipped(self.known_as(path), reason))

    def add(self, path: Path) -> None:
        self.found[path] = Found(path, self.known_as(path))

    def excluded(self, root: Path, path: Path) -> bool:
        matched = [exclude.matches(root, path) for exclude in self.excludes]  # no short cut: each notes if it is of use
        return any(matched)


def walk(paths: Sequence[str | os.PathLike[str]], exclude: Sequence[str] = ()) -> Walk:
    """Find every note and chat under `paths` (folders or single files), sorted by path.

    A file that is named itself is read whatever its suffix, and even if hidden: naming it was the decision. Raises
    DataError where a path does not exist.
    """
    roots = [Path(os.path.abspath(os.path.expanduser(path))) for path in paths]
    if not roots:
        raise DataError(f"No notes were named: give a folder or files of {KINDS}, for example notes/.")
    for given, root in zip(paths, roots, strict=True):
        if not root.exists():
            raise DataError(
                f"There is no file or folder {os.fspath(given)}: expected {KINDS}; check the path, and type it again."
            )
    state = Walk(common_folder(roots), [Exclude(pattern) for pattern in exclude])
    for root in sorted(roots):
        if root.is_dir():
            walk_folder(root, state)
        elif state.excluded(root, root):
            state.skip(root, Reason.EXCLUDED)
        elif not root.is_file():
            state.skip(root, Reason.NOT_A_FILE)
        else:
            state.entries += 1
            state.add(root)
    state.found = dict(sorted(state.found.items(), key=lambda item: order_key(item[1].path)))
    state.skipped.sort(key=lambda skip: order_key(skip.path))
    return state


def common_folder(roots: list[Path]) -> Path:
    """What paths are told relative to: the one folder given, or the closest that holds all that were given."""
    folders = [root if root.is_dir() else root.parent for root in roots]
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # two drives of Windows have no folder in common
        return folders[0]


def walk_folder(root: Path, state: Walk) -> None:
    """Add what lies under `root` to `state`, depth first and without recursion."""
    real_root = root.resolve()
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            about = os.stat(folder)
            identity = (about.st_dev, about.st_ino)
            if about.st_ino and identity in state.folders:
                continue
            state.folders.add(identity)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if look_at(entry, root, real_root, state):
                        pending.append(folder / entry.name)
        except OSError:
            state.skip(folder, Reason.UNREADABLE)


def look_at(entry: os.DirEntry[str], root: Path, real_root: Path, state: Walk) -> bool:
    """Judge one directory entry; true for a folder to descend into."""
    path = Path(entry.path)
    state.entries += 1
    try:
        about = entry.stat(follow_symlinks=False)
    except OSError:  # gone since it was listed: no reason to lose its neighbours
        state.skip(path, Reason.UNREADABLE)
        return False
    if entry.name.startswith(".") or getattr(about, "st_file_attributes", 0) & getattr(stat, "FILE_ATTRIBUTE_HIDDEN", 0):
        state.skip(path, Reason.HIDDEN)
    elif state.excluded(root, path):
        state.skip(path, Reason.EXCLUDED)
    elif entry.is_symlink() or getattr(entry, "is_junction", bool)():
        state.skip(path, judge_link(path, real_root))
    elif stat.S_ISDIR(about.st_mode):
        state.entries -= 1  # what counts is what is in it
        return True
    elif not stat.S_ISREG(about.st_mode):
        state.skip(path, Reason.NOT_A_FILE)
    elif path.suffix.lower() not in NOTE_SUFFIXES + CHAT_SUFFIXES:
        state.skip(path, Reason.UNKNOWN_KIND)
    else:
        state.add(path)
    return False


def judge_link(path: Path, real_root: Path) -> Reason:
    """Links are never followed, so no loop can catch the walk; what one names in the folder is read where it lies."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop, before Python 3.13
        return Reason.LINK_BROKEN
    return Reason.LINK_INSIDE if target.is_relative_to(real_root) else Reason.LINK_OUTSIDE


class Exclude:
    """One --exclude pattern.

    Without a slash it is matched against each file's and folder's name; with one, against the end of the path, counted
    from the given folder's own name (`drafts/*`, `notes/drafts/`, `**/private/**`); an absolute one, the whole.
    A folder that matches is left out with everything in it. Case counts, on every system alike.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.used = False
        self.absolute = os.path.isabs(pattern) or pattern.startswith("/")
        slashed = pattern.replace(os.sep, "/")
        self.folders_only = slashed.endswith("/")
        self.parts = tuple(part for part in slashed.split("/") if part not in ("", "."))

    def matches(self, root: Path, path: Path) -> bool:
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
    """Match a split path against a split pattern; `**` is any number of folders, at the end all that is in them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        least = 1 if len(pattern) == 1 else 0
        return any(match_parts(parts[start:], pattern[1:]) for start in range(least, len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and match_parts(parts[1:], pattern[1:])


def order_key(path: str) -> tuple[str, str]:
    """macOS may spell é as two code points where Linux has one: both sort alike."""
    return unicodedata.normalize("NFC", path), path


def shown(path: str) -> str:
    """A path fit for a terminal and for JSON: forward slashes, no control characters, no bytes that are not text."""
    text = path.replace(os.sep, "/").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join("\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char for char in text)
