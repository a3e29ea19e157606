"""Finds the private folder of a user's data: EDGETUNE_HOME, or the platform's data directory."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from edgetune.runtime.errors import UsageError
from edgetune.runtime.files import explain_full_disk

PRIVATE_FOLDER = 0o700
"""Mode of every folder below `home()`: its owner alone can read it."""


def home() -> Path:
    """Return edgetune's data folder, created with mode 0700 on first use. Raises UsageError where it cannot be created."""
    named = os.environ.get("EDGETUNE_HOME")
    path = expand(named) if named else Path(platformdirs.user_data_dir("edgetune", appauthor=False))
    try:
        return private_folder(path)
    except OSError as error:
        raise UsageError(
            f"The data folder {path} cannot be created ({error.strerror}). Set EDGETUNE_HOME to a folder that you can write."
        ) from error


def unfinished_folder() -> Path:
    """Return the folder that holds interrupted runs and the locks of runs and output folders."""
    return private_folder(home() / "unfinished")


def private_folder(path: Path) -> Path:
    """Create `path` and its missing parents, readable by their owner alone; leave existing folders as they are."""
    with explain_full_disk(path):
        for folder in reversed([path, *path.parents]):
            folder.mkdir(exist_ok=True, mode=PRIVATE_FOLDER)
    return path


def expand(path: str) -> Path:
    """Expand `~` in a path that a user typed. Raises UsageError for the home folder of an unknown user.

    A file that exists under the very name, such as `~draft.md`, is that file.
    """
    if path[:1] == "~" and path[1:2] not in ("", "/", os.sep) and os.path.lexists(path):
        return Path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path} names the home folder of a user that does not exist here. Type the path in full.") from error
