"""Reads files of chats (JSON lines, or a JSON array) as Documents with turns; chat_forms.py knows the forms of a record.

Usually each line is one record. A file that holds an array, or objects printed over several lines, is read one value at a time.
Either way a window of a few megabytes moves through the file, so that a long one takes little memory.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from edgetune.documents.chat_forms import Unread, read_record
from edgetune.documents.document import Document, Skipped
from edgetune.documents.encoding import Encoding, marked_encoding
from edgetune.documents.limits import MAX_BROKEN_VALUES, MAX_RECORD_CHARS
from edgetune.documents.reasons import Reason

CHAT_SUFFIXES_WHEN_NAMED = (".json", ".ndjson")
"""Suffixes of files that are read as chats if they are themselves named; in a folder, most .json files are something else."""
_LINES_LISTED = 20
"""Largest number of line numbers that a skip lists. Chosen by hand."""
_KEPT = 1024
"""Characters before a place that stay in the window: the indentation of a value. Chosen by hand."""
_LONGEST_WORD = 64
"""A value that ends with the window fails within this many characters of its end. Chosen by hand."""
_BETWEEN_VALUES = re.compile(r"[\s,\[\]]*")
_MESSAGE = re.compile(r'\{\s*"(?:role|from|content|value)"\s*:')


def encoding_of_chats(first: bytes) -> Encoding:
    """Return the encoding of a file of chats that begins with `first`: UTF-8, or UTF-16 or UTF-32, as PowerShell writes them.

    Bytes that are no UTF-8 become surrogates, by which the records that hold them are known.
    """
    marked = marked_encoding(first)
    if marked is not None:
        return Encoding(marked.name, marked.codec, "surrogateescape" if marked.codec.startswith("utf-8") else "replace")
    # JSON begins with an ASCII character, whose other byte is zero in UTF-16.
    for zero, name in ((0, "utf-16-be"), (1, "utf-16-le")):
        if first[zero : zero + 1] == b"\0":
            return Encoding(name, name, "replace")
    return Encoding("utf-8", "utf-8", "surrogateescape")


def read_chats(blocks: Iterable[bytes], encoding: Encoding, path: str, keep: Callable[[Document], None]) -> list[Skipped]:
    """Pass each document of a file of chats to `keep`, and return its unreadable records, counted by cause."""
    bad: dict[tuple[Reason, str], list[int]] = {}
    for found in records(Window(_texts(blocks, encoding))):
        try:
            if isinstance(found.value, Unread):
                raise found.value
            keep(read_record(found.value, f"{path}#{found.number}"))
        except Unread as unread:
            bad.setdefault((unread.reason, unread.detail), []).append(found.number)
        except RecursionError:  # nested deeper than any chat
            bad.setdefault((Reason.BAD_LINE, ""), []).append(found.number)
    return [
        Skipped(path, reason, len(numbers), tuple(numbers[:_LINES_LISTED]), detail) for (reason, detail), numbers in bad.items()
    ]


def _texts(blocks: Iterable[bytes], encoding: Encoding) -> Iterator[str]:
    """Yield the text of a file's blocks."""
    decoder = codecs.getincrementaldecoder(encoding.codec)(encoding.errors)
    for block in blocks:
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


class Window:
    """The part of a long text that is being read. It only moves forward."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self.text = ""
        self.at_end = False
        """True once the text's end is in the window."""

    def move(self, at: int) -> int:
        """Read on until more than MAX_RECORD_CHARS follow position `at`, or the end is reached; return where `at` is now."""
        if self.at_end or len(self.text) - at > MAX_RECORD_CHARS:
            return at
        dropped = max(at - _KEPT, 0)
        waiting, size = [self.text[dropped:]], len(self.text) - at
        while size <= 2 * MAX_RECORD_CHARS and not self.at_end:
            piece = next(self._pieces, None)
            self.at_end = piece is None
            waiting.append(piece or "")
            size += len(waiting[-1])
        self.text = "".join(waiting)
        return at - dropped

    def search(self, pattern: re.Pattern[str], at: int) -> int:
        """Return the end of the first match after `at`, or the end of the text. A match may be _KEPT characters long."""
        while (match := pattern.search(self.text, at)) is None and not self.at_end:
            at = self.move(max(len(self.text) - _KEPT, at))
        return len(self.text) if match is None else match.end()


@dataclass(frozen=True)
class Found:
    """A JSON value of a file, or the Unread that says why there is none, and its number: of its line, or among the values where
    lines are not records."""

    number: int
    value: Any


def records(window: Window) -> Iterator[Found]:
    """Yield every record of a file."""
    window.move(0)
    return line_records(window) if _lines_are_records(window) else value_records(window)


def line_records(window: Window) -> Iterator[Found]:
    """Yield the record in each line that is not blank, with the line's number, counted from 1."""
    number = at = 0
    while (at := window.move(at)) < len(window.text):
        number += 1
        end = window.text.find("\n", at, at + MAX_RECORD_CHARS + 1)
        if end < 0 and len(window.text) - at > MAX_RECORD_CHARS:
            yield Found(number, Unread(Reason.LONG_LINE))
            at = window.search(_NEWLINE, at + MAX_RECORD_CHARS)
            continue
        end = len(window.text) if end < 0 else end
        if line := window.text[at:end].strip():
            try:
                yield Found(number, parse_line(line) if _is_unicode(line) else Unread(Reason.NOT_UTF8))
            except (ValueError, RecursionError) as error:  # RecursionError: nested deeper than any chat
                yield Found(number, not_json(error))
        at = min(end + 1, len(window.text))


def value_records(window: Window) -> Iterator[Found]:
    """Yield the records of arrays and of objects over several lines, numbered from 1 in the order of the file.

    After a broken one, reading goes on where a line begins as that one did; after MAX_BROKEN_VALUES of them it ends.
    """
    number = broken = at = 0
    while (at := _next_value(window, at)) < len(window.text) and broken < MAX_BROKEN_VALUES:
        number += 1
        text = window.text
        try:
            value, end = _DECODER.raw_decode(text, at)
            if end - at > MAX_RECORD_CHARS:
                value = Unread(Reason.LONG_LINE)
            elif not _is_unicode(text[at:end]):
                value = Unread(Reason.NOT_UTF8)
            yield Found(number, value)
            at = end
        except (ValueError, RecursionError) as error:
            yield Found(number, Unread(Reason.LONG_LINE) if _goes_on(error, window) else not_json(error))
            broken += 1
            before = text[text.rfind("\n", 0, at) + 1 : at]
            indent = len(before) if not before.strip() else 0
            reached = max(error.pos, at + 1) if isinstance(error, json.JSONDecodeError) else at + 1
            at = window.search(re.compile(rf"\n[ \t]{{0,{indent}}}(?=[\[{{])"), min(reached, len(text)))


def _next_value(window: Window, at: int) -> int:
    """Return where the next record begins: what lies between them is passed, and the brackets of arrays of records."""
    while True:
        at = window.move(at)
        match = _BETWEEN_VALUES.match(window.text, at)
        end = match.end() if match else at
        if end < len(window.text) or window.at_end:
            break
        at = max(at, end - _KEPT)
    bracket = window.text.rfind("[", at, end)
    is_messages = bracket >= 0 and not window.text[bracket + 1 : end].strip() and _MESSAGE.match(window.text, end)
    return window.move(bracket if is_messages else end)


def _lines_are_records(window: Window) -> bool:
    """Return False if the first value is an array, or goes on after its first line."""
    text = window.text
    at = len(text) - len(text.lstrip())
    if text[at : at + 1] == "[":
        return False
    if text[at : at + 1] != "{":
        return True
    try:
        parse_line(text[at:].partition("\n")[0])
        return True
    except (ValueError, RecursionError):
        pass
    try:
        _DECODER.raw_decode(text, at)
        return False
    except (ValueError, RecursionError) as error:
        return not _goes_on(error, window)


def _goes_on(error: Exception, window: Window) -> bool:
    """Return True if parsing failed because the value is longer than the window."""
    if window.at_end or not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(window.text) - _LONGEST_WORD


def _is_unicode(text: str) -> bool:
    """Return False for a text with bytes that could not be decoded."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def parse_line(line: str) -> Any:
    """Return the JSON value that a line holds. Raises ValueError for anything else, and for a name that is repeated."""
    value, end = _DECODER.raw_decode(line)
    if line[end:].strip():
        raise ValueError("more than one value")
    return value


def not_json(error: Exception) -> Unread:
    """Return why a line or record is no JSON, without anything of its text."""
    return Unread(Reason.BAD_LINE, _REPEATED if error.args == (_REPEATED,) else "")


_NEWLINE = re.compile("\n")
_REPEATED = "a name is repeated"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(_REPEATED)
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
