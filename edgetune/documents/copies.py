"""Recognises the copies that sync programs and file managers make of a note, by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol, TypeVar


class _Listed(Protocol):
    @property
    def path(self) -> str: ...

    @property
    def digest(self) -> str: ...


AnyDocument = TypeVar("AnyDocument", bound=_Listed)
"""A document, as it was read or as a token store lists it."""
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


def groups_of_copies(documents: Sequence[AnyDocument]) -> list[list[AnyDocument]]:
    """Return each document with its copies, in the order of the originals' digests and paths.

    Copies share most of their text with the original, so they stay on its side, which the original's digest decides. Documents
    with the same text are groups of their own unless their paths make them copies.
    """
    groups: dict[tuple[str, str], list[AnyDocument]] = {}
    by_path = {document.path: document for document in documents}
    for document in documents:
        original = document
        while (found := by_path.get(original_path(original.path), original)).path != original.path:  # a copy of a copy
            original = found
        group = groups.setdefault((original.digest, original.path), [original])
        if document is not original:
            group.append(document)
    return [groups[place] for place in sorted(groups)]  # hex strings of equal length sort as the numbers do
