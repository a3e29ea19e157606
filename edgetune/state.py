"""Where edgetune keeps a person's things: the platform's data directory, or EDGETUNE_HOME. Everything in it is private."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from edgetune.runtime.files import explain_full_disk

PRIVATE_FOLDER = 0o700


def home() -> Path:
    """The state folder, created 0700 on first use."""
    named = os.environ.get("EDGETUNE_HOME")
    path = Path(named).expanduser() if named else Path(platformdirs.user_data_dir("edgetune", appauthor=False))
    return private_folder(path)


def private_folder(path: Path) -> Path:
    """Create `path` and the parents it lacks, each readable by its owner alone; what exists is left as it is."""
    with explain_full_disk(path):
        for folder in reversed([path, *path.parents]):
            folder.mkdir(exist_ok=True, mode=PRIVATE_FOLDER)
    return path
