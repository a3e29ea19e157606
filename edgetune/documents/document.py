"""Defines what reading notes returns: Documents, and an account of everything that was skipped."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

_DIGEST_CHARS = 1 << 20
"""Characters that are hashed at a time. Chosen by hand."""


class Reason(StrEnum):
    """A reason why something was not read. Its value is what --dry-run shows, and a key in its JSON."""

    HIDDEN = "hidden"
    EXCLUDED = "excluded by --exclude"
    UNKNOWN_KIND = "not a note (by its suffix)"
    LINK_OUTSIDE = "link that leaves the folder"
    LINK_INSIDE = "link to something read where it lies"
    LINK_BROKEN = "broken or looping link"
    NOT_A_FILE = "neither file nor folder"
    UNREADABLE = "unreadable"
    TOO_LARGE = "over 256 MiB"
    BINARY = "binary"
    UNKNOWN_ENCODING = "encoding not recognised (save it as UTF-8)"
    EMPTY = "empty"
    DUPLICATE = "same text as another note"
    BAD_LINE = "lines that are not JSON"
    LONG_LINE = "lines over 4 MiB"
    NOT_A_CHAT = "lines that are neither a text nor a chat"


@dataclass(frozen=True)
class Turn:
    """One message of a chat; `role` is "system", "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True)
class Document:
    """One note or one chat.

    `path` is relative to the folder that was named, with forward slashes; a chat's path ends with its line number, as in
    `chats.jsonl#12`. `digest` is the SHA-256 of `text` in UTF-8. A chat has `turns`, and its `text` is the conversation in
    Guanaco's form.
    """

    path: str
    digest: str
    text: str = field(repr=False)  # kept out of repr, so that no note enters a log or a traceback
    turns: tuple[Turn, ...] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, path: str, text: str, turns: tuple[Turn, ...] | None = None) -> Document:
        """Make a document, and compute its digest from `text`."""
        return cls(path, text_digest(text), text, turns)

    @property
    def size(self) -> int:
        """Return the size of the text in UTF-8, in bytes."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())


def text_digest(text: str) -> str:
    """Return the SHA-256 of `text` in UTF-8, in hex. The text is hashed in pieces, so that a long note is not copied whole."""
    digest = hashlib.sha256()
    for start in range(0, len(text), _DIGEST_CHARS):
        digest.update(text[start : start + _DIGEST_CHARS].encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Skipped:
    """Something that was not read. In a chat file, `count` lines share the reason; `lines` numbers the first of them."""

    path: str
    reason: Reason
    count: int = 1
    lines: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reading:
    """Everything found under the named paths: training uses it, and --dry-run shows it.

    `documents` are sorted by path, then by line, whatever the file system's own order is. `unused_excludes` are the --exclude
    patterns that matched nothing; they deserve a warning, because somebody meant to keep something out.
    """

    documents: list[Document]
    skipped: list[Skipped]
    files: int
    encodings: dict[str, int]
    unused_excludes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Return the size of all documents' text in UTF-8, in bytes."""
        return sum(document.size for document in self.documents)

    @property
    def chats(self) -> int:
        """Return the number of documents that are chats."""
        return sum(document.turns is not None for document in self.documents)

    def skipped_counts(self) -> dict[str, int]:
        """Return the number of skipped things by reason, the most frequent reason first."""
        counts: Counter[str] = Counter()
        for skip in self.skipped:
            counts[skip.reason.value] += skip.count
        return dict(counts.most_common())

    def as_dict(self, list_paths: bool = True) -> dict[str, Any]:
        """Return the reading for --json: counts and, with `list_paths`, the paths read and skipped; never any text."""
        result: dict[str, Any] = {
            "files": self.files,
            "documents": len(self.documents),
            "chats": self.chats,
            "bytes": self.bytes,
            "encodings": self.encodings,
            "skipped": self.skipped_counts(),
            "unused_excludes": list(self.unused_excludes),
        }
        if list_paths:
            result["read_paths"] = [document.path for document in self.documents]
            result["skipped_paths"] = [
                {"path": skip.path, "reason": skip.reason.value, "count": skip.count, "lines": list(skip.lines)}
                for skip in self.skipped
            ]
        return result
