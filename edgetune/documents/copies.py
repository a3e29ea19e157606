"""Recognises the copies that sync programs and file managers make of a note, by their names."""

from __future__ import annotations

import re

_COPY = re.compile(
    r"""(?:
        [ ]\([^()]*\b(?:conflict|conflicted|case[ ]conflict)\b[^()]*\)   # Dropbox, Nextcloud, Obsidian Sync
      | [ ._-]conflict(?:ed)?[ ._-]?[\w-]*     # Remotely Save, Joplin
      | \.sync-conflict-[\w-]+                  # Syncthing
      | [ ]-[ ]Copy(?:[ ]\(\d+\))?              # Windows
      | [ ]copy(?:[ ]\d+)?                      # macOS
      | [ ]?\(\d\)                              # downloads
      | [ ]\d                                   # iCloud
    )(?=(?:\.\w+)?$)""",
    re.VERBOSE | re.IGNORECASE,
)


def original_path(path: str) -> str:
    """Return the path of the note that `path` would be a copy of, as in `bench (conflicted copy).md`; else `path` itself."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (_COPY.sub("", name) or name)
