"""The bytes of a note become its text: encoding, line ends, front matter. No note can make this slow or large."""

from __future__ import annotations

import codecs
import re

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
    """The bytes are not a text that can be learned; `reason` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def decode(data: bytes) -> tuple[str, str]:
    """Text of `data` with line ends as "\\n", and the encoding's name. Raises NotText.

    A byte-order mark decides; then strict UTF-8; then UTF-8 with damage, if most of what is beyond ASCII is good UTF-8;
    then Windows-1252 if the text looks Western. What remains (Cyrillic or Japanese code pages, say) is refused rather
    than guessed: a model would learn the wrong letters, silently.
    """
    text, encoding = _decode(data)
    if "\0" in text:
        raise NotText(Reason.BINARY)
    return clean_lines(text), encoding


def _decode(data: bytes) -> tuple[str, str]:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data.decode("utf-8-sig" if encoding == "utf-8" else encoding), f"{encoding} with BOM"
            except UnicodeDecodeError:
                raise NotText(Reason.UNKNOWN_ENCODING) from None
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
    # In other encodings few bytes beyond ASCII happen to form UTF-8's sequences of two and more.
    if high - bad >= 2 * bad:
        return damaged, "utf-8 (damaged)"
    letters = len(data.translate(None, _NOT_LETTERS))
    if 10 * high > 4 * letters:  # in Western languages most letters are ASCII
        raise NotText(Reason.UNKNOWN_ENCODING)
    try:
        return data.decode("cp1252"), "windows-1252"
    except UnicodeDecodeError:  # 0x81, 0x8d, 0x8f, 0x90, 0x9d: control characters in Latin-1, nothing in Windows-1252
        raise NotText(Reason.UNKNOWN_ENCODING) from None


def clean_lines(text: str) -> str:
    """Line ends of Windows and of old Macs become a newline."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


# Front matter. Its title and tags say what a note is about, so they stay, as a heading and a line; every other key
# (dates, ids, layouts) is bookkeeping that a model would only learn to invent, so it goes.

_FRONT_CHARS = 1 << 16
_LINE_CHARS = 400
_SCALAR_MARKS = {"", "|", ">", "|-", ">-", "|+", ">+"}
_YAML_LINE = re.compile(r"\s|#|- |-$|[^\s:#'\"\[\]{}|>*&!%@`,-][^:\n]{0,99}:(\s|$)|$")
_TOML_LINE = re.compile(r"\s|#|\[|\]|[A-Za-z0-9_\-.\"']{1,100}\s*=|$")
_KEY = {"---": re.compile(r"(title|tags)\s*:\s*(.*)", re.I), "+++": re.compile(r"(title|tags)\s*=\s*(.*)", re.I)}
_CLOSING = {"---": ("---", "..."), "+++": ("+++",)}
_ITEM = re.compile(r"\s*(?:-\s+)?(.*?),?\s*$")


def without_front_matter(text: str) -> str:
    """`text` with its YAML (`---`) or TOML (`+++`) front matter reduced to title and tags.

    A line reader, not a parser: a block that is not closed within 64 KiB, or holds a line that is no setting (a ruler
    above prose), is left as it is.
    """
    fence = text[:3]
    if fence not in _CLOSING or text[3:4] not in ("\n", " ", "\t"):
        return text
    lines = text[:_FRONT_CHARS].split("\n")
    close = next((at for at, line in enumerate(lines) if at and line.rstrip() in _CLOSING[fence]), None)
    shape = _YAML_LINE if fence == "---" else _TOML_LINE
    if lines[0].strip() != fence or close is None or not all(shape.match(line) for line in lines[1:close]):
        return text
    body = text[sum(len(line) + 1 for line in lines[: close + 1]) :].lstrip("\n")
    title, tags = title_and_tags([line[:_LINE_CHARS] for line in lines[1:close]], fence)
    head = ""
    if title and body.split("\n", 1)[0].strip("# \t").casefold() != title.casefold():
        head += f"# {title}\n\n"
    if tags:
        head += f"Tags: {', '.join(tags)}\n\n"
    return head + body


def title_and_tags(lines: list[str], fence: str) -> tuple[str, list[str]]:
    """The top-level `title` and `tags` of front matter, each cut to a sensible length."""
    title, tags = "", []
    for at, line in enumerate(lines):
        if fence == "+++" and re.match(r"\[[\w.\[\]\- ]+\]\s*$", line):
            break  # a TOML table: what follows belongs to it
        found = _KEY[fence].match(line)
        if not found:
            continue
        value = found[2].strip()
        if found[1].lower() == "title":
            title = "" if value in _SCALAR_MARKS else unquoted(value)[:300]
        else:
            tags = read_list(value, lines[at + 1 :])
    return title, tags


def read_list(value: str, following: list[str]) -> list[str]:
    """A list on one line (`[a, b]` or `a, b`), or one item a line below its key."""
    if value in ("", "["):
        items = []
        for line in following:
            if not re.match(r"\s*-\s|\s+[^-\s]", line):
                break
            items.append(_ITEM.sub(r"\1", line))
    else:
        items = value.strip("[]").split(",")
    return [item for item in (unquoted(item.strip())[:100].lstrip("#") for item in items[:50]) if item]


def unquoted(value: str) -> str:
    """`value` without its quotation marks, or without its comment."""
    if value[:1] in ("'", '"'):
        end = value.rfind(value[0])
        return value[1:end] if end > 0 else value[1:]
    return re.sub(r"\s+#.*", "", value)
