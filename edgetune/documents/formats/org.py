"""Reads Org: headings, text and blocks of code as Markdown-like text. Drawers and the times of the agenda are dropped."""

from __future__ import annotations

import re

from edgetune.documents.formats.parsed import Parsed

VERSION = 1
_DRAWER = re.compile(r"[ \t]*:(?:PROPERTIES|LOGBOOK):[ \t]*", re.IGNORECASE)
_DRAWER_END = re.compile(r"[ \t]*:END:[ \t]*", re.IGNORECASE)
_LONGEST_DRAWER = 2000
"""Most lines of a drawer. One that is not closed within them is text. Chosen by hand."""
_BLOCK = re.compile(r"[ \t]*#\+BEGIN_(SRC|EXAMPLE|QUOTE|\w+)(?:[ \t]+([\w+-]+))?.*", re.IGNORECASE)
_BLOCK_END = re.compile(r"[ \t]*#\+END_(\w+)[ \t]*", re.IGNORECASE)
_KEYWORD = re.compile(r"#\+([\w-]+):[ \t]*(.*)")
_COMMENT = re.compile(r"[ \t]*#(?: .*)?")
_LINK = re.compile(r"\[\[([^\[\]\n]+)\](?:\[([^\[\]\n]+)\])?\]")
_PICTURE = re.compile(r"\.(?:png|jpe?g|gif|svg|webp|heic|pdf|mp[34])$", re.IGNORECASE)
_TARGET = re.compile(r"^(?:file:|id:|\*|#)")
_CODE = ("src", "example")


def read(data: bytes) -> Parsed:
    """Return the text of an Org file in UTF-8."""
    import orgparse

    text, hidden = _without_drawers(data.decode())
    root = orgparse.loads(text)
    blocks: list[str] = []
    for node in root:
        if node.level:
            todo = f"{node.todo} " if node.todo else ""
            blocks.append("#" * min(node.level, 6) + f" {todo}{_plain(node.get_heading(format='raw'))}")
            tags = sorted(node.shallow_tags)
            blocks += [f"Tags: {', '.join(tags)}"] if tags else []
        body = _body(node.get_body(format="raw"), hidden)
        blocks += [body] if body else []
    return Parsed(["\n\n".join(blocks)])


def _without_drawers(text: str) -> tuple[str, list[str]]:
    """Return the text without PROPERTIES and LOGBOOK drawers, and the lines that are hidden from orgparse.

    Lines of code, and drawers that are not closed, are no business of orgparse's: a NUL and their number stand for them.
    """
    lines, kept, hidden, at, block = text.split("\n"), list[str](), list[str](), 0, ""
    while at < len(lines):
        line, was_code = lines[at], block in _CODE
        if begin := _BLOCK.fullmatch(line):
            block = block or begin[1].lower()
        elif (end := _BLOCK_END.fullmatch(line)) and end[1].lower() == block:
            block = ""
        is_code = was_code and block in _CODE
        if not is_code and _DRAWER.fullmatch(line):
            within = range(at + 1, min(at + _LONGEST_DRAWER, len(lines)))
            close = next((number for number in within if _DRAWER_END.fullmatch(lines[number])), None)
            if close is not None:
                at = close + 1
                continue
        if is_code or ":PROPERTIES:" in line:
            hidden.append(line)
            line = f"\0{len(hidden) - 1}"
        kept.append(line)
        at += 1
    return "\n".join(kept), hidden


def _body(text: str, hidden: list[str]) -> str:
    """Return the text below a heading: code between fences as it stands, keywords of the export dropped."""
    lines: list[str] = []
    block = ""
    for line in text.split("\n"):
        begin, end = _BLOCK.fullmatch(line), _BLOCK_END.fullmatch(line)
        if line.startswith("\0"):
            lines.append(hidden[int(line[1:])])
        elif block:
            closes = end is not None and end[1].lower() == block
            inside = line if block in _CODE else _plain(line)
            lines += (["```"] if block in _CODE else []) if closes else [inside]
            block = "" if closes else block
        elif begin is not None:
            block = begin[1].lower()
            lines += [f"```{(begin[2] or '') if block == 'src' else ''}"] if block in _CODE else []
        else:
            lines += _line(line)
    return "\n".join([*lines, *(["```"] if block in _CODE else [])]).strip("\n")


def _line(line: str) -> list[str]:
    """Return a line outside of blocks, or nothing for a keyword or a comment."""
    keyword = _KEYWORD.fullmatch(line)
    if keyword is not None:
        name, value = keyword[1].lower(), keyword[2].strip()
        if name == "title" and value:
            return [f"# {value}", ""]
        return [f"Tags: {', '.join(filter(None, value.split(':')))}", ""] if name == "filetags" and value else []
    return [] if _COMMENT.fullmatch(line) else [_plain(line)]


def _plain(text: str) -> str:
    """Return text with links as their descriptions, and without pictures."""
    return _LINK.sub(_description, text)


def _description(link: re.Match[str]) -> str:
    if link[2]:
        return link[2]
    return "" if _PICTURE.search(link[1]) else _TARGET.sub("", link[1])
