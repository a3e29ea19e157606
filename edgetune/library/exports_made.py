"""Remembers where exports were written, so that `edgetune purge` can name what it does not reach."""

from __future__ import annotations

import json
from pathlib import Path

from edgetune.home import home
from edgetune.runtime.files import atomic_write, read_own
from edgetune.runtime.json_file import parse

FILE = "exports.json"
"""File of edgetune's own folder that lists the exports, the last one at the end."""
MOST_KEPT = 1000
"""Exports that are remembered. Chosen by hand."""


def remember_export(folder: Path) -> None:
    """Add an export's folder to the list. Raises ResourceError when the disk is full."""
    place = str(folder.absolute())
    listed = [*(path for path in exports_made() if path != place), place][-MOST_KEPT:]
    atomic_write(home() / FILE, json.dumps({"exports": listed}, indent=2) + "\n")


def exports_made() -> list[str]:
    """Return the paths of the exports that are remembered, whether they are there still or not."""
    try:
        record = parse(read_own(home() / FILE))
    except (OSError, ValueError):
        return []
    listed = record.get("exports") if isinstance(record, dict) else None
    return [path for path in listed if isinstance(path, str)] if isinstance(listed, list) else []
