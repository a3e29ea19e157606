"""Reads files of chats (JSON lines, or a JSON array) as Documents with turns; chat_forms.py knows the forms of a record.

Usually each line is one record. A file that holds an array, or objects printed over several lines, is read one value at a time.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from edgetune.documents.chat_forms import Unread, read_record
from edgetune.documents.document import Document, Reason, Skipped

CHAT_SUFFIXES_WHEN_NAMED = (".json", ".ndjson")
"""Suffixes of files that are read as chats if they are themselves named; in a folder, most .json files are something else."""
MAX_LINE_BYTES = 4 << 20
"""Longest line that is read, in bytes, and longest record of an array, in characters. Chosen by hand."""
_LINES_LISTED = 20
"""Largest number of line numbers that a skip lists. Chosen by hand."""
_MOST_BROKEN = 1000
"""Most broken values over several lines before the rest of a file is left unread. Chosen by hand."""
_BETWEEN_VALUES = re.compile(r"[\s,\[\]]*")
_MESSAGE = re.compile(r'\{\s*"(?:role|from|content|value)"\s*:')


def read_chats(file: BinaryIO, path: str) -> tuple[list[Document], list[Skipped]]:
    """Return the documents of a file of chats, and its unreadable records, counted by cause."""
    documents: list[Document] = []
    bad: dict[tuple[Reason, str], list[int]] = {}
    for found in records(as_utf8(file.read())):
        try:
            if isinstance(found.value, Unread):
                raise found.value
            documents.append(read_record(found.value, f"{path}#{found.number}"))
        except Unread as unread:
            bad.setdefault((unread.reason, unread.detail), []).append(found.number)
    skipped = [
        Skipped(path, reason, len(numbers), tuple(numbers[:_LINES_LISTED]), detail) for (reason, detail), numbers in bad.items()
    ]
    return documents, skipped


def as_utf8(data: bytes) -> bytes:
    """Return a file's bytes in UTF-8 without a byte order mark, if it is in UTF-16, as PowerShell writes it, or in UTF-8."""
    if data.startswith(codecs.BOM_UTF8):
        return data[len(codecs.BOM_UTF8) :]
    marks = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
    encoding = marks.get(data[:2])
    if encoding is None:  # JSON begins with an ASCII character, whose other byte is zero
        encoding = {b"\0": "utf-16-be"}.get(data[:1]) or ("utf-16-le" if data[1:2] == b"\0" else None)
    if encoding is None:
        return data
    return data.decode(encoding, "replace").removeprefix("\ufeff").encode()


@dataclass(frozen=True)
class Found:
    """A JSON value of a file, or the Unread that says why there is none, and its number: of its line, or among the values where
    lines are not records."""

    number: int
    value: Any


def records(data: bytes) -> Iterator[Found]:
    """Yield every record of a file in UTF-8."""
    text = _text_of_several_lines(data)
    if text is None:
        yield from line_records(data)
    else:
        yield from value_records(text)


def line_records(data: bytes) -> Iterator[Found]:
    """Yield the record in each line that is not blank, with the line's number, counted from 1."""
    number, at = 0, 0
    while at < len(data):
        end = data.find(b"\n", at)
        end = len(data) if end < 0 else end
        number += 1
        if end - at > MAX_LINE_BYTES:
            yield Found(number, Unread(Reason.LONG_LINE))
        elif line := data[at:end].strip():
            try:
                yield Found(number, parse_line(line.decode()))
            except UnicodeDecodeError:
                yield Found(number, Unread(Reason.NOT_UTF8))
            except (ValueError, RecursionError) as error:  # RecursionError: nested deeper than any chat
                yield Found(number, not_json(error))
        at = end + 1


def value_records(text: str) -> Iterator[Found]:
    """Yield the records of arrays and of objects over several lines, numbered from 1 in the order of the file.

    After a broken one, reading goes on where a line begins as that one did; after _MOST_BROKEN of them it ends.
    """
    number = broken = at = 0
    while (at := _next_value(text, at)) < len(text) and broken < _MOST_BROKEN:
        number += 1
        try:
            value, end = _DECODER.raw_decode(text, at)
            yield Found(number, value if end - at <= MAX_LINE_BYTES else Unread(Reason.LONG_LINE))
            at = end
        except (ValueError, RecursionError) as error:
            yield Found(number, not_json(error))
            broken += 1
            before = text[text.rfind("\n", 0, at) + 1 : at]
            indent = len(before) if not before.strip() else 0
            reached = max(error.pos, at + 1) if isinstance(error, json.JSONDecodeError) else at + 1
            following = re.compile(rf"\n[ \t]{{0,{indent}}}(?=[\[{{])").search(text, reached)
            at = following.end() if following else len(text)


def _next_value(text: str, at: int) -> int:
    """Return where the next record begins: what lies between them is passed, and the brackets of arrays of records."""
    match = _BETWEEN_VALUES.match(text, at)
    end = match.end() if match else at
    bracket = text.rfind("[", at, end)
    is_messages = bracket >= 0 and not text[bracket + 1 : end].strip() and _MESSAGE.match(text, end)
    return bracket if is_messages else end


def _text_of_several_lines(data: bytes) -> str | None:
    """Return the text of a file whose first value is an array or goes on after its first line; None if lines are records."""
    start = data[:MAX_LINE_BYTES].lstrip()
    if start[:1] not in (b"[", b"{"):
        return None
    try:
        if start.startswith(b"{"):
            parse_line(start.partition(b"\n")[0].decode())
            return None
    except (ValueError, RecursionError):
        pass
    try:
        text = data.decode()
        at = len(text) - len(text.lstrip())
        if text[at] == "{":
            _DECODER.raw_decode(text, at)
        return text
    except (ValueError, RecursionError):
        return None


def parse_line(line: str) -> Any:
    """Return the JSON value that a line holds. Raises ValueError for anything else, and for a name that is repeated."""
    value, end = _DECODER.raw_decode(line)
    if line[end:].strip():
        raise ValueError("more than one value")
    return value


def not_json(error: Exception) -> Unread:
    """Return why a line or record is no JSON, without anything of its text."""
    return Unread(Reason.BAD_LINE, _REPEATED if error.args == (_REPEATED,) else "")


_REPEATED = "a name is repeated"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(_REPEATED)
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
