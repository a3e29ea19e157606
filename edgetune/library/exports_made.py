"""Remembers where exports were written, so that `edgetune purge` and `edgetune forget` can name what they do not reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgetune.home import home
from edgetune.runtime.files import atomic_write, read_own
from edgetune.runtime.json_file import parse

FILE = "exports.json"
"""File of edgetune's own folder that lists the exports, the last one at the end."""
MOST_KEPT = 1000
"""Exports that are remembered. Chosen by hand."""


def remember_export(folder: Path, adapter: str = "") -> None:
    """Add an export's folder to the list. adapter: first digits of the base's digest, a slash, and the adapter's name.

    Raises ResourceError when the disk is full.
    """
    place = str(folder.absolute())
    listed = [*(path for path in exports_made() if path != place), place][-MOST_KEPT:]
    adapters = {path: name for path, name in {**adapters_exported(), place: adapter}.items() if path in listed and name}
    atomic_write(home() / FILE, json.dumps({"exports": listed, "adapters": adapters}, indent=2) + "\n")


def exports_made() -> list[str]:
    """Return the paths of the exports that are remembered, whether they are there still or not."""
    listed = _record().get("exports")
    return [path for path in listed if isinstance(path, str)] if isinstance(listed, list) else []


def adapters_exported() -> dict[str, str]:
    """Return the adapter of each export that is remembered, by its path, named as in `remember_export`."""
    listed = _record().get("adapters")
    return {path: name for path, name in listed.items() if isinstance(name, str)} if isinstance(listed, dict) else {}


def _record() -> dict[str, Any]:
    """Return the list on disk; empty where it is missing or damaged."""
    try:
        record = parse(read_own(home() / FILE))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
