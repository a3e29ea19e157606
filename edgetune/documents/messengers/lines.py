"""Reads the lines of a text export, however long the text or one of its lines is."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from edgetune.documents.encoding import Encoding
from edgetune.documents.limits import MAX_MESSAGE_CHARS


def texts(blocks: Iterable[bytes], encoding: Encoding) -> Iterator[str]:
    """Yield the text of a file's blocks."""
    decoder = codecs.getincrementaldecoder(encoding.codec)(encoding.errors)
    for block in blocks:
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def lines(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text without their ends; a line over MAX_MESSAGE_CHARS in parts."""
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        for line in whole:
            yield line.removesuffix("\r")
        while len(rest) > MAX_MESSAGE_CHARS:
            yield rest[:MAX_MESSAGE_CHARS]
            rest = rest[MAX_MESSAGE_CHARS:]
    if rest:
        yield rest.removesuffix("\r")


class LongText:
    """Collects the lines of one message up to MAX_MESSAGE_CHARS."""

    def __init__(self, first: str = "") -> None:
        self._lines = [first]
        self._size = len(first)

    def add(self, line: str) -> None:
        """Add a line, or only its length once the message is too long."""
        self._size += len(line) + 1
        if self._size <= MAX_MESSAGE_CHARS:
            self._lines.append(line)

    @property
    def is_too_long(self) -> bool:
        """Return True for a message over MAX_MESSAGE_CHARS, which nobody typed."""
        return self._size > MAX_MESSAGE_CHARS

    @property
    def text(self) -> str:
        """Return the lines as one text."""
        return "\n".join(self._lines)
