"""Where edgetune keeps a person's things: the platform's data directory, or EDGETUNE_HOME. Everything in it is private."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from edgetune.runtime.errors import UsageError
from edgetune.runtime.files import explain_full_disk

PRIVATE_FOLDER = 0o700


def home() -> Path:
    """The state folder, created 0700 on first use. Raises UsageError where it cannot be."""
    named = os.environ.get("EDGETUNE_HOME")
    path = expand(named) if named else Path(platformdirs.user_data_dir("edgetune", appauthor=False))
    try:
        return private_folder(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be made ({error.strerror}); set EDGETUNE_HOME to a folder of yours.") from error


def private_folder(path: Path) -> Path:
    """Create `path` and the parents it lacks, each readable by its owner alone; what exists is left as it is."""
    with explain_full_disk(path):
        for folder in reversed([path, *path.parents]):
            folder.mkdir(exist_ok=True, mode=PRIVATE_FOLDER)
    return path


def expand(path: str) -> Path:
    """A path a user typed. Raises UsageError for the home folder of a user that is not there."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path} names the home folder of a user that this machine has not; type the path in full.") from error
