"""Keeps the list of forgotten notes, which no later run reads again: keyed digests of their texts and of their places.

forgotten.json    {"texts": [...], "files": [...]}, in the data folder
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgetune.documents.document import Document, Skipped
from edgetune.documents.reasons import Reason
from edgetune.documents.walk import FoundFile
from edgetune.home import home, keyed_digests
from edgetune.runtime.errors import UsageError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.json_file import read_object_if_there
from edgetune.runtime.untrusted_file import FileKind

FILE = "forgotten.json"
DIGITS = 32
"""Hexadecimal digits that are kept of each digest; 128 bits do not collide."""
_LIST = FileKind(64 << 20, UsageError, "delete it, and forget again what must not be read")
"""The list: about 70 bytes for each note that was forgotten."""


def text_digests(words: Iterable[str]) -> list[str]:
    """Return the keyed digest of each note's words. words: as in Document.words."""
    return [digest[:DIGITS] for digest in keyed_digests(f"words {each}" for each in words)]


def file_digests(files: Iterable[str]) -> list[str]:
    """Return the keyed digest of each absolute path."""
    digests = keyed_digests(f"file {path.encode('utf-8', 'surrogateescape').hex()}" for path in files)
    return [digest[:DIGITS] for digest in digests]


@dataclass(frozen=True)
class Forgotten:
    """The list of forgotten notes: a note is left out by its words, wherever it lies, and by its place, whatever it says."""

    texts: frozenset[str] = frozenset()
    places: frozenset[str] = frozenset()

    @classmethod
    def load(cls) -> Forgotten:
        """Return the list on disk; an empty one if there is none. Raises UsageError for a damaged file."""
        path = home() / FILE
        record = read_object_if_there(path, _LIST)
        texts, files = record.get("texts", []), record.get("files", [])
        if not all(isinstance(found, list) and all(isinstance(each, str) for each in found) for found in (texts, files)):
            raise UsageError(f"{path} is not a list of forgotten notes; {_LIST.advice}.")
        return cls(frozenset(texts), frozenset(files))

    def save(self) -> None:
        """Replace the list on disk, readable by its owner alone. Raises ResourceError when the disk is full."""
        if self.texts or self.places:
            atomic_write(home() / FILE, json.dumps({"texts": sorted(self.texts), "files": sorted(self.places)}) + "\n")
        else:
            (home() / FILE).unlink(missing_ok=True)

    def with_notes(self, texts: Iterable[str], places: Iterable[str]) -> Forgotten:
        """Return the list with more notes, given as keyed digests."""
        return Forgotten(self.texts | frozenset(texts), self.places | frozenset(places))

    def without(self, texts: Iterable[str], places: Iterable[str]) -> Forgotten:
        """Return the list without these notes, given as keyed digests."""
        return Forgotten(self.texts - frozenset(texts), self.places - frozenset(places))

    def files(self, files: Sequence[FoundFile]) -> tuple[list[FoundFile], list[Skipped]]:
        """Return the files that may be opened, and those of forgotten notes as skips."""
        if not self.places:
            return list(files), []
        digests = file_digests(str(found.file) for found in files)
        kept = [found for found, digest in zip(files, digests, strict=True) if digest not in self.places]
        gone = [found for found, digest in zip(files, digests, strict=True) if digest in self.places]
        return kept, [Skipped(found.path, Reason.FORGOTTEN) for found in gone]

    def documents(self, documents: Sequence[Document]) -> tuple[list[Document], list[Skipped]]:
        """Return the documents that may be used, and those with a forgotten text as skips."""
        if not self.texts:
            return list(documents), []
        digests = text_digests(document.words for document in documents)
        kept = [document for document, digest in zip(documents, digests, strict=True) if digest not in self.texts]
        gone = [document for document, digest in zip(documents, digests, strict=True) if digest in self.texts]
        return kept, [Skipped(document.path, Reason.FORGOTTEN) for document in gone]
