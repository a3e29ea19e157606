"""Defines what reading notes returns: Documents, and an account of everything that was skipped."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

_CAUSES_SHOWN = 8
"""Most causes for unread chats that a run names before it begins. Chosen by hand."""
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
    NOT_UTF8 = "lines that are not UTF-8"
    NOT_A_CHAT = "records that are neither a text nor a chat"
    UNKNOWN_ROLE = "chats with an unknown role"
    BAD_MESSAGE = "chats with a message without text"
    NOT_TEXT = "chats with images or other parts that are not text"
    OLD_TOOLS = "chats with function calls in an old form"
    NO_ANSWER = "chats without an answer"
    NOT_TRAINED = "chats whose answers are all marked as not to be trained"


EXPECTED = {
    Reason.BAD_LINE: "one JSON object a line, or a JSON array of objects",
    Reason.LONG_LINE: "one chat a line",
    Reason.NOT_UTF8: "a file saved as UTF-8",
    Reason.NOT_A_CHAT: (
        "messages or conversations (lists of role and content, or from and value), instruction and output, "
        "prompt and completion or response, or text"
    ),
    Reason.UNKNOWN_ROLE: "system, developer, user, human, assistant, gpt, ai, model or tool",
    Reason.BAD_MESSAGE: "a role and a text in every message",
    Reason.NOT_TEXT: "text alone",
    Reason.OLD_TOOLS: "a list of tools, tool_calls in the assistant's message, and the role tool for their results",
    Reason.NO_ANSWER: "a message of the assistant after one of the user",
    Reason.NOT_TRAINED: "an answer without weight 0 or train false",
}
"""What is expected instead, for each reason why a record of a file of chats is not read."""


@dataclass(frozen=True)
class Turn:
    """One message of a chat; `role` is "system", "user", "assistant" or "tool"."""

    role: str
    text: str
    trained: bool = True
    """False for an answer that its file marks as not to be learnt. It is context, as the questions are."""
    extras: dict[str, Any] = field(default_factory=dict, repr=False)
    """What else a chat template may read of a message: reasoning_content, thinking, tool_calls, tool_call_id and name."""

    def message(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        return {"role": self.role, "content": self.text, **self.extras}


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
    tools: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    """The tools that a chat may call, described as chat templates take them."""

    @classmethod
    def of(
        cls, path: str, text: str, turns: tuple[Turn, ...] | None = None, tools: tuple[dict[str, Any], ...] = ()
    ) -> Document:
        """Make a document, and compute its digest from `text`."""
        return cls(path, text_digest(text), text, turns, tools)

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
    """Something that was not read. In a file of chats, `count` records share the reason; `lines` numbers the first of them, by
    line or, in a JSON array, by their place in it; `detail` names what was found."""

    path: str
    reason: Reason
    count: int = 1
    lines: tuple[int, ...] = ()
    detail: str = ""

    @property
    def explanation(self) -> str:
        """Return why this was not read and, for records of a file of chats, which they are and what was expected."""
        if not self.lines:
            return self.reason.value
        more = f" and {self.count - len(self.lines):,} more" if self.count > len(self.lines) else ""
        found = f" ({self.detail})" if self.detail else ""
        expected = f"; expected {EXPECTED[self.reason]}" if self.reason in EXPECTED else ""
        return f"{self.count:,} {self.reason.value}{found}, no. {', '.join(map(str, self.lines))}{more}{expected}"


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

    def unread_chats(self) -> tuple[str, ...]:
        """Return a sentence for each cause for which records of a file of chats were not read; the first ones, if many."""
        sentences = [f"{skip.path}: {skip.explanation}." for skip in self.skipped if skip.lines]
        more = len(sentences) - _CAUSES_SHOWN
        left = [f"Chats were not read for {more:,} more causes; --dry-run lists them."] if more > 0 else []
        return (*sentences[:_CAUSES_SHOWN], *left)

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
                {
                    "path": skip.path,
                    "reason": skip.reason.value,
                    "count": skip.count,
                    "lines": list(skip.lines),
                    "detail": skip.detail,
                }
                for skip in self.skipped
            ]
        return result
