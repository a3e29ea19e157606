"""Decodes the bytes of a note, or refuses them: better no text than one with the wrong letters."""

from __future__ import annotations

import codecs

from edgetune.documents.document import Reason

# UTF-32's little-endian mark begins with UTF-16's, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NOT_CONTROLS = bytes(code for code in range(256) if code >= 32 or code in b"\b\t\n\v\f\r\x1b")
_NOT_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())
_ASCII = bytes(range(128))


class NotText(Exception):
    """Raised for bytes that are no text to learn from; `reason` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def decode(data: bytes) -> tuple[str, str]:
    """Return the text of `data` with every line end as "\\n", and the name of its encoding. Raises NotText.

    A byte-order mark decides. Without one, strict UTF-8 is tried, then UTF-8 with damage, if most of the bytes beyond ASCII
    are good UTF-8, then Windows-1252, if the text looks Western. Anything else (Cyrillic or Japanese code pages, for example)
    is refused rather than guessed: a model would silently learn the wrong letters.
    """
    text, encoding = _decode(data)
    if "\0" in text:
        raise NotText(Reason.BINARY)
    return unify_line_ends(text), encoding


def unify_line_ends(text: str) -> str:
    """Return `text` with the line ends of Windows and of old Macs replaced by newlines."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _decode(data: bytes) -> tuple[str, str]:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data.decode("utf-8-sig" if encoding == "utf-8" else encoding), f"{encoding} with BOM"
            except UnicodeDecodeError:
                raise NotText(Reason.UNKNOWN_ENCODING) from None
    # A text holds no NUL, and hardly any other control character: more than one byte in a hundred means a binary file.
    if b"\0" in data or len(data.translate(None, _NOT_CONTROLS)) > len(data) // 100:
        raise NotText(Reason.BINARY)
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        return _decode_without_utf8(data)


def _decode_without_utf8(data: bytes) -> tuple[str, str]:
    high = len(data.translate(None, _ASCII))
    damaged = data.decode("utf-8", "replace")
    bad = damaged.count("\ufffd")
    # In any other encoding, bytes beyond ASCII rarely happen to form UTF-8's sequences of two and more.
    if high - bad >= 2 * bad:
        return damaged, "utf-8 (damaged)"
    letters = len(data.translate(None, _NOT_LETTERS))
    if 10 * high > 4 * letters:  # in Western languages most letters are ASCII
        raise NotText(Reason.UNKNOWN_ENCODING)
    try:
        return data.decode("cp1252"), "windows-1252"
    except UnicodeDecodeError:  # 0x81, 0x8d, 0x8f, 0x90, 0x9d: control characters in Latin-1, undefined in Windows-1252
        raise NotText(Reason.UNKNOWN_ENCODING) from None
