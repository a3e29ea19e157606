"""Defines what reading notes returns: Documents, and an account of everything that was skipped or left out."""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune.documents.limits import (
    BLOCK_BYTES,
)
from edgetune.documents.reasons import EXPECTED, OF_RECORDS, Reason
from edgetune.documents.spool import Spool


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
        return dataclasses.replace(self, spool=spool, start=spool.append(self.content()))

    def content(self) -> bytes:
        """Return the text in UTF-8, and after it a chat's turns and tools as JSON."""
        return self.spool.read(self.start, self.start + self.size + self.chat_bytes)

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
    line or, in a JSON array, by their place in it; `detail` names what was found, or the note that this one repeats. `people`
    are the writers of an export in which nobody is known to be the user: only a person at a terminal is shown them."""

    path: str
    reason: Reason
    count: int = 1
    lines: tuple[int, ...] = ()
    detail: str = ""
    people: tuple[str, ...] = field(default=(), repr=False)

    @property
    def has_sentence(self) -> bool:
        """Return True if `summary.unread_chats` explains this in a sentence of its own."""
        return bool(self.lines) or self.reason is Reason.WHO_IS_ME

    @property
    def explanation(self) -> str:
        """Return why this was not read and, for records of a file of chats, which they are and what was expected."""
        if self.reason is Reason.WHO_IS_ME:
            return self.detail
        if not self.lines:
            reason = self.reason.counted(self.count) if self.count > 1 or self.reason in OF_RECORDS else self.reason.value
            return f"{reason} ({self.detail})" if self.detail else reason
        more = f" and {self.count - len(self.lines):,} more" if self.count > len(self.lines) else ""
        found = f" ({self.detail})" if self.detail else ""
        expected = f"; expected {EXPECTED[self.reason]}" if self.reason in EXPECTED else ""
        return f"{self.reason.counted(self.count)}{found}, no. {', '.join(map(str, self.lines))}{more}{expected}"


@dataclass(frozen=True)
class Reading:
    """Everything found under the named paths: training uses it, and --dry-run shows it.

    `documents` are sorted by path, then by line, whatever the file system's own order is. `files` counts all that was found.
    `unused_excludes` are the --exclude patterns that matched nothing; they deserve a warning, because somebody meant to keep
    something out. `damaged` holds the number of letters that could not be decoded, `embedded` the bytes of pictures and other
    files inside notes that were left out; both by path. `masked` counts, by kind, what placeholders replaced.
    """

    documents: list[Document]
    skipped: list[Skipped]
    files: int
    encodings: dict[str, int]
    unused_excludes: tuple[str, ...] = ()
    damaged: dict[str, int] = field(default_factory=dict)
    embedded: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    """Content of parsed files beside text, such as attachments: by path, a number for each kind."""
    near_duplicates: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Notes that are read though another one is much alike: by path, the other's path and their similarity (0 to 1)."""
    compared: bool = True
    """False where notes were not compared, since the package for it is not installed."""
    lacking: dict[str, int] = field(default_factory=dict)
    """Files that were not read because packages of the extra `documents` lack, by the name of their format."""
    as_plain: dict[str, int] = field(default_factory=dict)
    """Files that were read as plain text for that reason, by the name of their format."""
    unlimited: tuple[str, ...] = ()
    """Limits on the process that parses documents which this system does not enforce, if it was needed."""
    masked: dict[str, int] = field(default_factory=dict)
    sources: dict[str, Sequence[str]] = field(default_factory=dict)
    """The files that each document comes from, by its path."""
    everything: list[Document] = field(default_factory=list)
    """The documents before any was left out because another one has the same text, or nearly the same."""
    places: dict[str, str] = field(default_factory=dict)
    """The absolute path of each file in `sources`, by its path."""

    @property
    def files_read(self) -> int:
        """Return the number of files that gave a document."""
        return len({path for document in self.documents for path in self.sources.get(document.path, ())})

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
        counts: Counter[Reason] = Counter()
        for skip in self.skipped:
            counts[skip.reason] += skip.count
        return {str(reason): count for reason, count in counts.most_common()}

    def left_out_counts(self) -> Counter[str]:
        """Return the number of things beside text in parsed files, by kind."""
        return sum(map(Counter[str], self.left_out.values()), Counter[str]())

    def as_dict(self, list_paths: bool = True) -> dict[str, Any]:
        """Return the reading for --json: counts and, with `list_paths`, the paths read and skipped; never any text."""
        result: dict[str, Any] = {
            "files": self.files,
            "files_read": self.files_read,
            "documents": len(self.documents),
            "chats": self.chats,
            "bytes": self.bytes,
            "encodings": self.encodings,
            "skipped": self.skipped_counts(),
            "unused_excludes": list(self.unused_excludes),
            "damaged_letters": sum(self.damaged.values()),
            "embedded_bytes": sum(self.embedded.values()),
            "left_out": dict(self.left_out_counts()),
            "lacking": self.lacking,
            "read_as_plain_text": self.as_plain,
            "masked": self.masked,
            "compared": self.compared,
        }
        if list_paths:
            result["read_paths"] = [document.path for document in self.documents]
            result["damaged_paths"] = self.damaged
            result["embedded_paths"] = self.embedded
            result["left_out_paths"] = self.left_out
            result["near_duplicates"] = {path: list(pair) for path, pair in self.near_duplicates.items()}
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
