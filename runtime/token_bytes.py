"""Turn pieces of a vocabulary into bytes, and the bytes of a stream of tokens into text."""

from __future__ import annotations

import codecs
import functools
import re
from typing import Any

SPACE = "▁"
"""The sign (U+2581) that sentencepiece and its relatives write in a piece for a space."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def piece_bytes(piece: str) -> bytes:
    """Return the bytes of a piece in sentencepiece's spelling: ▁ is a space, <0x0A> is one byte."""
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


@functools.cache
def _byte_level_table() -> dict[str, int]:
    """Return the byte of each sign in GPT-2's spelling: printable bytes are themselves, the others are U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a piece in GPT-2's spelling."""
    table = _byte_level_table()
    try:
        return bytes(table[sign] for sign in token)
    except KeyError:  # an added token is written as plain text, with signs that are not in the table
        return token.encode()


class StreamDecoder:
    """Decodes one token at a time, in constant time a token; returns whole characters only."""

    def __init__(self, bytes_of: Any, strip_space: bool) -> None:
        self._bytes_of, self._strip = bytes_of, strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Return the text that token `id` completes; "" as long as a character is not complete."""
        return self._stripped(self._utf8.decode(self._bytes_of(int(id))))

    def flush(self) -> str:
        """Return the rest at the end of the stream: "", or U+FFFD for an incomplete character."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        """Return `text`; the first text of the stream loses the space that encoding put before it."""
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
