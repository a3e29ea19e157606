"""A private folder for files that must not outlive their command, such as notes as tokens: not even if it is killed."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from edgetune.home import home, private_folder
from edgetune.lock import Lock
from edgetune.runtime.errors import BusyError


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new folder inside edgetune's own, deleted at the end; after a kill, the next command deletes it."""
    delete_leftovers()
    folder = _parent() / secrets.token_hex(8)
    try:
        with Lock(_lock_of(folder), "a scratch folder"):
            try:
                yield private_folder(folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        _lock_of(folder).unlink(missing_ok=True)


def delete_leftovers() -> None:
    """Delete the scratch folders of commands that are no longer running."""
    for folder in [entry for entry in _parent().iterdir() if entry.is_dir()]:
        with contextlib.suppress(BusyError, OSError):
            with Lock(_lock_of(folder), ""):
                shutil.rmtree(folder)
            _lock_of(folder).unlink()


def _parent() -> Path:
    return private_folder(home() / "scratch")


def _lock_of(folder: Path) -> Path:
    return folder.with_suffix(".lock")
