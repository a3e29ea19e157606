"""Defines what reading notes returns: Documents, and an account of everything that was skipped or left out."""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from edgetune.documents.limits import BLOCK_BYTES, MAX_FILE_BYTES, MAX_RECORD_CHARS
from edgetune.documents.spool import Spool

_CAUSES_SHOWN = 8
"""Most causes for unread chats that a run names before it begins. Chosen by hand."""


class Reason(StrEnum):
    """A reason why something was not read. Its value is what --dry-run shows, and a key in its JSON."""

    HIDDEN = "hidden"
    EXCLUDED = "excluded by --exclude"
    UNKNOWN_KIND = "not a note (by its suffix)"
    NOT_DOWNLOADED = "not downloaded (in iCloud or another cloud)"
    APP_SETTINGS = "settings of an app"
    OLD_VERSION = "old version kept by an app"
    TRASH = "in the trash"
    OWN_FILE = "written by edgetune"
    MODEL_FOLDER = "folder of a model, adapter or export"
    DRAWING = "drawing (Excalidraw or tldraw)"
    LINK_OUTSIDE = "link that leaves the folder"
    LINK_INSIDE = "link to something read where it lies"
    LINK_BROKEN = "broken or looping link"
    NOT_A_FILE = "neither file nor folder"
    UNREADABLE = "unreadable"
    CHANGED = "replaced by another file while notes were read"
    TOO_LARGE = f"over {MAX_FILE_BYTES >> 20} MiB"
    BINARY = "binary"
    UNKNOWN_ENCODING = "encoding not recognised (save it as UTF-8, or name it with --encoding)"
    OTHER_ENCODING = "not in the encoding that --encoding names"
    IGNORED = "excluded by .edgetuneignore"
    IGNORE_UNREADABLE = "beside or below a .edgetuneignore that cannot be read"
    PRIVATE = "marked private (edgetune: false, or the tag #private)"
    EMPTY = "empty"
    DUPLICATE = "same text as another note"
    BAD_LINE = "lines that are not JSON"
    LONG_LINE = f"lines over {MAX_RECORD_CHARS >> 20} MiB"
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
"""The form that is expected, for each reason why a record of a file of chats is not read."""


@dataclass(frozen=True)
class Turn:
    """One message of a chat; `role` is "system", "user", "assistant" or "tool"."""

    role: str
    text: str
    trained: bool = True
    """False for an answer that its file marks as not to be learnt. It is context, as the questions are."""
    extras: dict[str, Any] = field(default_factory=dict, repr=False)
    """The other fields of a message that a chat template may read: its reasoning, tool_calls, tool_call_id and name."""

    def message(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        return {"role": self.role, "content": self.text, **self.extras}


@dataclass(frozen=True)
class Document:
    """One note, one part of a long note, or one chat. Its text lies in a spool, so that many documents take little memory.

    `path` is relative to the folder that was named, with forward slashes; a chat's path ends with its line number, as in
    `chats.jsonl#12`, and the held-out end of a long note with `#end`. `digest` is the SHA-256 of the text in UTF-8, `size` the
    number of its bytes. `words` is the SHA-256 of its words alone: two notes share it if they differ in nothing but white
    space, byte-order marks and Unicode's normal form (for a part of a note it is the digest). A chat has `turns`, and its
    `text` is the conversation in Guanaco's form.
    """

    path: str
    digest: str
    words: str
    size: int
    is_chat: bool
    # Neither shown nor compared: no note enters a log or a traceback.
    spool: Spool = field(repr=False, compare=False)
    start: int = field(repr=False, compare=False)
    chat_bytes: int = field(default=0, repr=False, compare=False)

    @classmethod
    def of(
        cls, path: str, text: str, turns: tuple[Turn, ...] | None = None, tools: tuple[dict[str, Any], ...] = ()
    ) -> Document:
        """Make a document in memory."""
        draft = Draft(Spool.in_memory())
        draft.add(text)
        return draft.finish(path, turns, tools)

    @property
    def text(self) -> str:
        """Return the whole text. Prefer `blocks` for notes, which may be long."""
        return self.spool.read(self.start, self.start + self.size).decode()

    @property
    def turns(self) -> tuple[Turn, ...] | None:
        """Return a chat's messages, or None for a note."""
        return tuple(Turn(**turn) for turn in self._chat()["turns"]) if self.is_chat else None

    @property
    def tools(self) -> tuple[dict[str, Any], ...]:
        """Return the tools that a chat may call, described as chat templates take them."""
        return tuple(self._chat()["tools"]) if self.is_chat else ()

    def _chat(self) -> dict[str, Any]:
        begin = self.start + self.size
        chat: dict[str, Any] = json.loads(self.spool.read(begin, begin + self.chat_bytes))
        return chat

    def blocks(self) -> Iterator[str]:
        """Yield the text in blocks of at most BLOCK_BYTES."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        end = self.start + self.size
        for start in range(self.start, end, BLOCK_BYTES):
            yield decoder.decode(self.spool.read(start, min(start + BLOCK_BYTES, end)))

    def kept_in(self, spool: Spool) -> Document:
        """Return the same document with its text at the end of `spool`."""
        data = self.spool.read(self.start, self.start + self.size + self.chat_bytes)
        return dataclasses.replace(self, spool=spool, start=spool.append(data))

    def part(self, start: int, end: int, path: str) -> Document:
        """Return the bytes `start` to `end` of a note, which must not cut a letter, as a document of its own."""
        digest = hashlib.sha256()
        for at in range(self.start + start, self.start + end, BLOCK_BYTES):
            digest.update(self.spool.read(at, min(at + BLOCK_BYTES, self.start + end)))
        name = digest.hexdigest()
        return dataclasses.replace(self, path=path, digest=name, words=name, start=self.start + start, size=end - start)


class Draft:
    """Collects the text of a document block by block: in the spool, as digests, and as the number of its damaged letters."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._start = spool.end
        self._size = 0
        self._digest, self._words = hashlib.sha256(), hashlib.sha256()
        self.damaged = 0
        """Letters that could not be decoded, which are U+FFFD in the text."""
        self.empty = True
        self._gap = False

    def add(self, block: str) -> None:
        """Add some text; a block should end between two words."""
        for start in range(0, len(block), BLOCK_BYTES):  # in pieces, so that a long text is not copied whole
            self._add(block[start : start + BLOCK_BYTES])

    def _add(self, piece: str) -> None:
        data = piece.encode()
        self._spool.append(data)
        self._size += len(data)
        self._digest.update(data)
        self.damaged += piece.count("\ufffd")
        words = " ".join(normal_words(piece))
        # A piece may begin within a word that the last one began.
        if not self.empty and words and (self._gap or piece[0].isspace()):
            words = f" {words}"
        self._words.update(words.encode())
        self._gap = piece[-1].isspace() or (not words and self._gap)
        self.empty = self.empty and not words

    def finish(self, path: str, turns: tuple[Turn, ...] | None = None, tools: tuple[dict[str, Any], ...] = ()) -> Document:
        """Return the document."""
        data = b""
        if turns is not None:
            data = json.dumps({"turns": [dataclasses.asdict(turn) for turn in turns], "tools": tools}).encode()
        self._spool.append(data)
        return Document(
            path=path,
            digest=self._digest.hexdigest(),
            words=self._words.hexdigest(),
            size=self._size,
            is_chat=turns is not None,
            spool=self._spool,
            start=self._start,
            chat_bytes=len(data),
        )


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
    patterns that matched nothing; they deserve a warning, because somebody meant to keep something out. `damaged` holds the
    number of letters that could not be decoded, `embedded` the bytes of pictures and other files inside notes that were left
    out; both by path. `masked` counts, by kind, what placeholders replaced.
    """

    documents: list[Document]
    skipped: list[Skipped]
    files: int
    encodings: dict[str, int]
    unused_excludes: tuple[str, ...] = ()
    damaged: dict[str, int] = field(default_factory=dict)
    embedded: dict[str, int] = field(default_factory=dict)
    masked: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Return the size of all documents' text in UTF-8, in bytes."""
        return sum(document.size for document in self.documents)

    @property
    def chats(self) -> int:
        """Return the number of documents that are chats."""
        return sum(document.is_chat for document in self.documents)

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
        left = [f"Chats were not read for {more:,} more causes; edgetune train --dry-run lists them."] if more > 0 else []
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
            "damaged_letters": sum(self.damaged.values()),
            "embedded_bytes": sum(self.embedded.values()),
            "masked": self.masked,
        }
        if list_paths:
            result["read_paths"] = [document.path for document in self.documents]
            result["damaged_paths"] = self.damaged
            result["embedded_paths"] = self.embedded
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


def normal_words(text: str) -> list[str]:
    """Return the words of `text` in Unicode's normal form C, without byte-order marks."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.replace("\ufeff", ""))
    return text.split()
