"""Finds the notes in folders: the walk follows no link, enters nothing hidden, and always lists files in the same order."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from edgetune.documents import not_notes
from edgetune.documents.document import Skipped
from edgetune.documents.ignore_file import IGNORE_FILE, IgnoreFile, is_ignored, read_ignore_file, read_ignore_files_above
from edgetune.documents.messengers.files import LISTED_SUFFIXES
from edgetune.documents.note_file import Identity, NotReadable, identity, open_folder
from edgetune.documents.patterns import Exclude
from edgetune.documents.readers import CODE_SUFFIXES, READERS, format_of
from edgetune.documents.reasons import Reason
from edgetune.home import expand, home
from edgetune.reports.text import NAME_SHOWN
from edgetune.runtime.errors import DataError, UsageError

NOTE_SUFFIXES = (".md", ".markdown", ".txt", *READERS)
CHAT_SUFFIXES = (".jsonl",)
KINDS = f"notes ({', '.join(NOTE_SUFFIXES)}) or chats ({', '.join(CHAT_SUFFIXES)}, or a chat app's export)"


@dataclass(frozen=True)
class FoundFile:
    """A file to read: `path` is its name in every report, `listed` says which file it was, `size` counts its bytes."""

    file: Path
    path: str
    listed: Identity | None
    size: int
    named: bool = False
    """True for a file that the user named, which is read whatever its suffix is."""


@dataclass
class Walk:
    """The state and result of a walk. A folder that is named twice, or lies inside another named folder, is walked once."""

    base: Path
    excludes: list[Exclude]
    found: dict[Path, FoundFile] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    folders: set[Identity] = field(default_factory=set)
    code: bool = False
    own: Identity | None = None
    """edgetune's own data folder, which may lie among the notes."""
    left_out: Mapping[str, Reason] = field(default_factory=dict)
    """Files to skip, by their absolute paths."""

    @property
    def bytes(self) -> int:
        """Return the size of all files to read."""
        return sum(file.size for file in self.found.values())

    @property
    def entries(self) -> int:
        """Return the number of files to read and of things that are skipped; a folder that is skipped counts as one."""
        return len(self.found) + len(self.skipped)

    def report_path(self, path: Path) -> str:
        """Return the path as reports show it: relative to the named folder, if it lies in there."""
        return shown(os.path.relpath(path, self.base) if path.is_relative_to(self.base) else path.as_posix())

    def skip(self, path: Path, reason: Reason) -> None:
        """Count `path` as skipped."""
        self.skipped.append(Skipped(self.report_path(path), reason))

    def add(self, path: Path, about: os.stat_result) -> None:
        """Add `path` to the files to read."""
        self.found[path] = FoundFile(path, self.report_path(path), identity(about), about.st_size)

    def excluded(self, root: Path, path: Path) -> bool:
        """Return True if an --exclude pattern matches `path`, which lies under `root`."""
        # Every pattern is tried even after a match, because each remembers whether it was ever used.
        matched = [exclude.matches(root, path) for exclude in self.excludes]
        return any(matched)


def walk(
    paths: Sequence[str | os.PathLike[str]],
    exclude: Sequence[str] = (),
    before_each: Callable[[], None] = lambda: None,
    code: bool = False,
    left_out: Mapping[str, Reason] = MappingProxyType({}),
) -> Walk:
    """Find every note and chat under `paths` (folders or single files), sorted by path.

    A file that is itself named is read even if it is hidden or has another suffix: naming it was a decision. `before_each` is
    called before each folder and may raise to end the walk. code: find source code too. left_out: files to skip, by
    their absolute paths, and why. Raises DataError for a path that does not exist.
    """
    roots = [Path(os.path.abspath(expand(os.fspath(path)))) for path in paths]
    if not roots:
        raise DataError(f"No notes were named: give a folder or files of {KINDS}, for example notes/.")
    for given, root in zip(paths, roots, strict=True):
        if not os.path.exists(root):  # False also for a name that no file can have, where Path.exists raises
            name = os.fspath(given)[:NAME_SHOWN]
            raise DataError(f"There is no file or folder {name}: expected {KINDS}; check the path, and type it again.")
    excludes = [Exclude(pattern) for pattern in exclude]
    state = Walk(common_folder(roots), excludes, code=code, own=own_folder(), left_out=left_out)
    for root in sorted(roots):
        try:
            above = read_ignore_files_above(root)
        except NotReadable as problem:
            state.skip(root, problem.reason)
            continue
        if is_ignored_with_parents(root, above):
            state.skip(root, Reason.IGNORED)
        elif root.is_dir():
            walk_folder(root, state, before_each, above)
        elif state.excluded(root, root):
            state.skip(root, Reason.EXCLUDED)
        elif not root.is_file():
            state.skip(root, Reason.NOT_A_FILE)
        elif (reason := left_out.get(str(root.resolve()))) is not None:
            state.skip(root, reason)
        else:
            # The file that a link leads to is read: naming the link was a decision.
            real = root.resolve()
            state.found[root] = FoundFile(real, state.report_path(root), identity(real.stat()), real.stat().st_size, True)
    state.found = dict(sorted(state.found.items(), key=lambda item: order_key(item[1].path)))
    named = {found.path for found in state.found.values() if found.named}  # which may be hidden in a folder that was walked
    state.skipped = [skip for skip in state.skipped if skip.path not in named]
    state.skipped.sort(key=lambda skip: order_key(skip.path))
    return state


def own_folder() -> Identity | None:
    """Return the identity of edgetune's own data folder, or None if there is none."""
    try:
        return identity(os.stat(home()))
    except (OSError, UsageError):
        return None


def common_folder(roots: list[Path]) -> Path:
    """Return the folder that reported paths are relative to: the named folder, or the innermost one that holds all of them."""
    folders = [root if root.is_dir() else root.parent for root in roots]
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # two drives of Windows have no folder in common
        return folders[0]


def is_ignored_with_parents(root: Path, above: tuple[IgnoreFile, ...]) -> bool:
    """Return True if a named path, or a folder above it, is excluded by the .edgetuneignore files of the folders above."""
    return any(
        is_ignored(path, [file for file in above if path.is_relative_to(file.folder) and path != file.folder])
        for path in [root, *root.parents]
    )


def walk_folder(root: Path, state: Walk, before_each: Callable[[], None], above: tuple[IgnoreFile, ...] = ()) -> None:
    """Add everything under `root` to `state`, depth first and without recursion. above: .edgetuneignore files above `root`."""
    real_root = root.resolve()
    pending: list[tuple[Path, Identity | None, tuple[IgnoreFile, ...]]] = [(root, None, above)]
    while pending:
        before_each()
        folder, listed, ignores = pending.pop()
        try:
            with open_folder(folder, listed) as (found, entries):
                if found in state.folders:
                    continue
                if found is not None:
                    state.folders.add(found)
                if folder != root and (reason := no_folder_of_notes(found, entries, state)):
                    state.skip(folder, reason)
                    continue
                if any(entry.name == IGNORE_FILE for entry in entries):
                    ignores = (*ignores, read_ignore_file(folder))
                names = {entry.name for entry in entries}
                for entry in entries:
                    about = look_at(entry, folder / entry.name, root, real_root, state, ignores, names)
                    if about is not None:
                        pending.append((folder / entry.name, identity(about), ignores))
        except OSError:
            state.skip(folder, Reason.UNREADABLE)
        except NotReadable as problem:
            state.skip(folder, problem.reason)


def no_folder_of_notes(folder: Identity | None, entries: list[os.DirEntry[str]], state: Walk) -> Reason | None:
    """Return the reason for skipping a folder whose entries say that it holds no notes."""
    if folder is not None and folder == state.own:
        return Reason.OWN_FILE
    return Reason.MODEL_FOLDER if not_notes.is_model_folder({entry.name for entry in entries}) else None


def look_at(
    entry: os.DirEntry[str],
    path: Path,
    root: Path,
    real_root: Path,
    state: Walk,
    ignores: tuple[IgnoreFile, ...],
    names: Set[str],
) -> os.stat_result | None:
    """Add or skip one directory entry, at `path` and among `names`; return its status if it is a folder to descend into."""
    try:
        about = entry.stat(follow_symlinks=False)
    except OSError:  # deleted since it was listed: its neighbours are still read
        state.skip(path, Reason.UNREADABLE)
        return None
    is_folder, excluded = stat.S_ISDIR(about.st_mode), state.excluded(root, path)
    placeholder_of = not_notes.placeholder_of(entry.name)
    if is_folder and (reason := not_notes.app_folder(path)):
        state.skip(path, reason)
    elif is_folder and not_notes.is_folder_of_page(entry.name, names):
        state.skip(path, Reason.PAGE_FOLDER)
    elif placeholder_of is not None:
        state.skip(path, Reason.NOT_DOWNLOADED if is_note_name(placeholder_of) else Reason.UNKNOWN_KIND)
    elif not_notes.is_hidden(entry.name, about):
        state.skip(path, Reason.HIDDEN)
    elif excluded:
        state.skip(path, Reason.EXCLUDED)
    elif is_ignored(path, ignores):
        state.skip(path, Reason.IGNORED)
    elif entry.is_symlink() or getattr(entry, "is_junction", bool)():
        state.skip(path, judge_link(path, real_root))
    elif is_folder:
        return about
    elif not stat.S_ISREG(about.st_mode):
        state.skip(path, Reason.NOT_A_FILE)
    elif (reason := other_kind(entry.name, state.code)) is not None:
        state.skip(path, reason)
    elif not_notes.is_in_cloud(about):
        state.skip(path, Reason.NOT_DOWNLOADED)
    elif (reason := state.left_out.get(str(path))) is not None:
        state.skip(path, reason)
    else:
        state.add(path, about)
    return None


def is_note_name(name: str) -> bool:
    """Return True if a file of this name is read as a note or as chats."""
    return os.path.splitext(name)[1].lower() in NOTE_SUFFIXES + CHAT_SUFFIXES or format_of(name) is not None


def other_kind(name: str, code: bool) -> Reason | None:
    """Return the reason for skipping a file of this name, or None for one that is read. code: source code is read."""
    if not_notes.is_drawing_name(name):
        return Reason.DRAWING
    if is_note_name(name) or name.lower().endswith(LISTED_SUFFIXES):
        return None
    suffix = os.path.splitext(name)[1].lower()
    if suffix in CODE_SUFFIXES:
        return None if code else Reason.CODE
    return Reason.CANVAS if suffix == ".canvas" else Reason.UNKNOWN_KIND


def judge_link(path: Path, real_root: Path) -> Reason:
    """Return the reason for skipping the link `path`.

    No link is ever followed, so no loop can catch the walk; a target inside the folder is read at its own place.
    """
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop, before Python 3.13
        return Reason.LINK_BROKEN
    return Reason.LINK_INSIDE if target.is_relative_to(real_root) else Reason.LINK_OUTSIDE


def order_key(path: str) -> tuple[str, str]:
    """Return a sort key under which é sorts alike as one code point (Linux) and as two (macOS)."""
    return unicodedata.normalize("NFC", path), path


def shown(path: str) -> str:
    """Return a path as text: forward slashes, and U+FFFD for bytes that are no text. Sanitize it before a terminal sees it."""
    return path.replace(os.sep, "/").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
