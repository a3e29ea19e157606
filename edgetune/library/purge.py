"""Deletes everything that edgetune keeps on this machine, and names what it cannot reach.

Only entries that edgetune makes are deleted: those of its folder by their names, and in each of them what looks like edgetune's
own. Anything else is left and named, so that an EDGETUNE_HOME which is somebody's folder of documents loses nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgetune.encrypting import discard_key
from edgetune.events import Finished, read_events
from edgetune.home import CONTENTS, SECRET_BYTES, home
from edgetune.library.exports_made import exports_made
from edgetune.lock import Lock
from edgetune.runtime.encrypted_file import HEADER_BYTES, TAG_BYTES
from edgetune.runtime.errors import DataError, LockedError, UsageError

_STAMP = r"\d{4}-\d\d-\d\d-\d{6}(-\d+)?"
_OWN = {
    "nights": r"(night-[\d-]+(-trial)?|notes(-tried|-tonight)?|tonight|trial)\.json|nights\.lock|last\.log|task\.xml",
    "parsed": r"[0-9a-f]{64}",
    "adapters": r"[0-9a-f]{12}",
    "models": r"(\.deleted-|\.)?[\w-]+-[0-9a-f]{12}(\..+)?",
    "runs": _STAMP,
    "privacy-ledger": rf"{_STAMP}\.json",
    "ledger": rf"{_STAMP}\.(json|notes)|forgetting",
    "unfinished": r"([0-9a-f]{16}(-\d+)?|out-[0-9a-f]{16}|conversion|encryption|log|forget)(\.lock)?",
    "scratch": r"[0-9a-f]{16}(\.lock)?",
}
"""Patterns of the names that edgetune gives to what is in the folders of its own folder."""
UNREACHABLE = (
    "copies that you gave to another program (`ollama list` and `ollama rm NAME` for Ollama; LM Studio lists its own)",
    "backups and snapshots of this disk (Time Machine, restic, btrfs, ZFS, a cloud drive)",
    "what a disk keeps of deleted files until it writes over them: only an encrypted disk protects from that",
)
"""Copies of what was learned that edgetune cannot find or delete, as sentences for the user."""


@dataclass(frozen=True)
class Purged:
    """The outcome of a purge, or what it would be: paths deleted, bytes freed, and what is left.

    left: entries of edgetune's folder that are not edgetune's own. links: links in it, whose targets are left. outside: exports
    and adapters that were written elsewhere and are still there.
    """

    home: str
    deleted: tuple[str, ...]
    bytes: int
    left: tuple[str, ...]
    links: tuple[str, ...]
    outside: tuple[str, ...]
    notices: tuple[str, ...] = ()
    """Sentences about what could not be found out or deleted, since the keychain has no key."""


def planned_purge() -> Purged:
    """Return what a purge would delete and leave. Deletes nothing."""
    folder = home()
    own, left = _sorted_out(folder)
    links = tuple(str(path) for path in own if path.is_symlink())
    size, notices, outside = sum(_size(path) for path in own), list[str](), list[str]()
    try:
        outside = _outside(folder)
    except LockedError:
        notices.append("exports and adapters written elsewhere, which only files name that cannot be decrypted")
    return Purged(str(folder), tuple(map(str, own)), size, tuple(map(str, left)), links, tuple(outside), notices=tuple(notices))


def purge(first: Callable[[], object] = lambda: None) -> Purged:
    """Delete what `planned_purge` says. Raises BusyError, and deletes nothing, while another process uses any of it.

    first: called before anything is deleted, once it is certain that nothing is in use.
    """
    folder = home()
    _refuse_while_used(folder)
    first()
    planned = planned_purge()
    # The key first: without it, nobody can read what was encrypted, not even in a backup.
    try:
        discard_key(folder)
    except (LockedError, UsageError):
        kept = "the entry edgetune in the system's keychain, which did not answer: delete it there"
        planned = dataclasses.replace(planned, notices=(*planned.notices, kept))
    for path in map(Path, planned.deleted):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for empty in [*(folder / name for name in _OWN), folder]:
        with contextlib.suppress(OSError):  # it holds something that is not edgetune's, or is a link
            empty.rmdir()
    return planned


def _sorted_out(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the entries of edgetune's folder that are its own, and those that are not."""
    own: list[Path] = []
    left: list[Path] = []
    if not _is_edgetunes(folder):
        return [], sorted(folder.iterdir())
    for path in sorted(folder.iterdir()):
        is_folder = path.name in _OWN and path.is_dir() and not path.is_symlink()
        if is_folder:
            for inner in sorted(path.iterdir()):
                (own if re.fullmatch(_OWN[path.name], inner.name) or _is_temporary(inner) else left).append(inner)
        else:
            (own if _is_own_file(path) else left).append(path)
    return own, left


def _is_edgetunes(folder: Path) -> bool:
    """Return True if edgetune has worked in a folder: its key is there, or one of its folders holds what it makes."""
    key = folder / "secret"
    if key.is_file() and key.stat().st_size in (SECRET_BYTES, SECRET_BYTES + HEADER_BYTES + TAG_BYTES):
        return True
    inner = [path for name in _OWN for path in (folder / name).glob("*")]
    return any(re.fullmatch(_OWN[path.parent.name], path.name) for path in inner)


def _is_own_file(path: Path) -> bool:
    """Return True for a file of edgetune's own, a link in its place, or a temporary file that a crash left."""
    if path.name in CONTENTS:
        return path.is_symlink() or (path.name not in _OWN and path.is_file())
    return _is_temporary(path) and any(path.name.startswith(f".{name}.") for name in CONTENTS)


def _is_temporary(path: Path) -> bool:
    """Return True for what an interrupted atomic write leaves."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def _refuse_while_used(folder: Path) -> None:
    """Raise BusyError if another process holds one of edgetune's locks: a run, a night, an export or a conversion is going."""
    for name in ("unfinished", "scratch", "nights"):
        for path in sorted((folder / name).glob("*.lock")):
            with Lock(path, "edgetune's folder"):
                pass


def _size(path: Path) -> int:
    """Return the bytes of the files at and below a path, without following links."""
    if path.is_symlink():
        return 0
    files = [Path(place, name) for place, _, names in os.walk(path) for name in names] or [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())


def _outside(folder: Path) -> list[str]:
    """Return the exports and adapters that were written outside edgetune's folder and are there still."""
    made = [*exports_made(), *_trained_elsewhere(folder)]
    real = folder.resolve()
    return sorted({path for path in made if os.path.lexists(path) and not Path(path).resolve().is_relative_to(real)})


def _trained_elsewhere(folder: Path) -> list[str]:
    """Return the paths of all adapters that runs have written, by their logs."""
    found = []
    for log in sorted((folder / "runs").glob("*/events.jsonl")):
        with contextlib.suppress(DataError, OSError):
            found += [event.adapter for event in read_events(log) if isinstance(event, Finished)]
    return found
