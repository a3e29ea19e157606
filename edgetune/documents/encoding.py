"""Decodes the bytes of a note, or refuses them: better no text than one with the wrong letters."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from edgetune.documents.code_page import looks_western
from edgetune.documents.reasons import Reason

# UTF-32's little-endian mark begins with UTF-16's, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8", "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32", "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "utf-16"),
)
_NOT_CONTROLS = bytes(code for code in range(256) if code >= 32 or code in b"\b\t\n\v\f\r\x1b")
_NOT_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())
_ASCII = bytes(range(128))
_SAMPLE_BYTES = 4 << 20
"""Bytes of a note in an old code page that are judged. Chosen by hand."""

_GOOD_FOR_EACH_BAD, _GOOD_DESPITE_NAME = 2, 8
"""Bytes of good UTF-8 for each bad one that make a note damaged UTF-8, without and with another encoding named by the user or
by a byte-order mark. Chosen by hand."""


class NotText(Exception):
    """Raised for bytes that are no text to learn from; `reason` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True)
class Encoding:
    """The encoding of a file: its name in reports, Python's codec, and how that codec treats errors."""

    name: str
    codec: str
    errors: str = "strict"


Blocks = Callable[[], Iterable[bytes]]
"""Reads a file from its beginning, block by block."""


def decode(data: bytes, named: str | None = None) -> tuple[str, str]:
    """Return the text of `data` with every line end as "\\n", and the name of its encoding. Raises NotText."""
    encoding = find_encoding(lambda: [data], named)
    return "".join(decoded([data], encoding)), encoding.name


def marked_encoding(first: bytes) -> Encoding | None:
    """Return the encoding that the byte-order mark of a file says, or None if it begins with none."""
    found = ((name, codec) for mark, name, codec in _MARKS if first.startswith(mark))
    return next((Encoding(f"{name} with BOM", codec) for name, codec in found), None)


def find_encoding(blocks: Blocks, named: str | None = None) -> Encoding:
    """Return the encoding of a file, which is read once, or twice if it is not UTF-8. Raises NotText.

    A byte-order mark decides, unless hardly any of the text is good. Without one, strict UTF-8 is tried, then UTF-8 with
    damage, if most of the bytes beyond ASCII are good UTF-8, then the encoding that the user has named or else Windows-1252,
    if the text looks Western. Anything else (Polish, Cyrillic or Japanese code pages, for example) is refused rather than
    guessed: a model would silently learn the wrong letters.
    """
    marked = marked_encoding(next(iter(blocks()), b""))
    if marked is not None:
        return _despite_damage(marked, blocks)
    if named is not None and codecs.lookup(named).name.startswith(("utf-16", "utf-32")):
        return _checked(Encoding(named, named), blocks, Reason.OTHER_ENCODING)
    size = controls = 0
    strict = codecs.getincrementaldecoder("utf-8")()
    is_utf8 = True
    for block in blocks():
        # A text holds no NUL, and hardly any other control character: more than one byte in a hundred means a binary file.
        if b"\0" in block:
            raise NotText(Reason.BINARY)
        size, controls = size + len(block), controls + len(block.translate(None, _NOT_CONTROLS))
        if is_utf8:
            try:
                strict.decode(block)
            except UnicodeDecodeError:
                is_utf8 = False
        if named is not None and b"\x1b" in block:  # ISO 2022, which is ASCII with escape sequences
            is_utf8 = False
    if controls > size // 100:
        raise NotText(Reason.BINARY)
    if is_utf8 and not strict.getstate()[0]:
        return Encoding("utf-8", "utf-8")
    return _without_utf8(blocks, named)


def decoded(blocks: Iterable[bytes], encoding: Encoding) -> Iterator[str]:
    """Yield the text of `blocks` with every line end as "\\n". Raises NotText."""
    decoder = codecs.getincrementaldecoder(encoding.codec)(encoding.errors)
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    try:
        for block in blocks:
            yield _clean(lines.decode(block), encoding)
        yield _clean(lines.decode(b"", final=True), encoding)
    except UnicodeError:  # the sample did not show it
        raise NotText(Reason.UNKNOWN_ENCODING) from None


def unify_line_ends(text: str) -> str:
    """Return `text` with the line ends of Windows and of old Macs replaced by newlines."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _clean(text: str, encoding: Encoding) -> str:
    if "\0" in text:
        raise NotText(Reason.BINARY)
    if encoding.errors == "surrogatepass":
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    return text


def _checked(encoding: Encoding, blocks: Blocks, reason: Reason) -> Encoding:
    """Return `encoding` if it decodes the whole file. Raises NotText for `reason` if not."""
    try:
        for _ in decoded(blocks(), encoding):
            pass
    except NotText as problem:
        raise NotText(reason if problem.reason is Reason.UNKNOWN_ENCODING else problem.reason) from None
    return encoding


def _despite_damage(marked: Encoding, blocks: Blocks) -> Encoding:
    """Return the encoding that a byte-order mark says, if most of the text is good. Raises NotText."""
    try:
        return _checked(marked, blocks, Reason.UNKNOWN_ENCODING)
    except NotText as problem:
        if problem.reason is not Reason.UNKNOWN_ENCODING:
            raise
    damaged = Encoding(f"{marked.name} (damaged)", marked.codec, "replace")
    size = bad = 0
    for text in decoded(blocks(), damaged):
        size, bad = size + len(text), bad + text.count("\ufffd")
    if size - bad < _GOOD_DESPITE_NAME * bad:
        raise NotText(Reason.UNKNOWN_ENCODING)
    return damaged


def _without_utf8(blocks: Blocks, named: str | None) -> Encoding:
    """Return the encoding of a file that is not strict UTF-8. Raises NotText."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    high = bad = letters = 0
    sample = b""
    for block in blocks():
        text = decoder.decode(block)
        bad += text.count("\ufffd") - block.count("\ufffd".encode())
        high += len(block.translate(None, _ASCII))
        letters += len(block.translate(None, _NOT_LETTERS))
        sample += block[: _SAMPLE_BYTES - len(sample)]
    bad += len(decoder.decode(b"", final=True))
    if bad and (surrogates := _with_surrogates(sample)) is not None:
        return surrogates
    # In any other encoding, bytes beyond ASCII rarely happen to form UTF-8's sequences of two and more.
    if high - bad >= (_GOOD_FOR_EACH_BAD if named is None else _GOOD_DESPITE_NAME) * bad > 0:
        return Encoding("utf-8 (damaged)", "utf-8", "replace")
    if named is not None:
        return _checked(Encoding(named, named), blocks, Reason.OTHER_ENCODING)
    try:
        # In Western languages most letters are ASCII.
        western = 10 * high <= 4 * letters and looks_western(sample.decode("cp1252"))
    except UnicodeDecodeError:  # 0x81, 0x8d, 0x8f, 0x90, 0x9d: control characters in Latin-1, undefined in Windows-1252
        western = False
    if not western:
        raise NotText(Reason.UNKNOWN_ENCODING)
    return Encoding("windows-1252", "cp1252")


def _with_surrogates(data: bytes) -> Encoding | None:
    """Return the encoding of UTF-8 in which an old program wrote an emoji as a pair of surrogates (CESU-8), or half of one."""
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeError:
        return None
    try:
        text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeError:
        return Encoding("utf-8 (damaged)", "utf-8", "replace")
    return Encoding("utf-8 (CESU-8)", "utf-8", "surrogatepass")
