"""Reads OpenDocument text (ODT): headings, paragraphs, lists and tables, without comments and tracked changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetune.documents.encoding import NotText
from edgetune.documents.formats.package import Package
from edgetune.documents.formats.parsed import Parsed
from edgetune.documents.limits import MAX_SPACES
from edgetune.documents.reasons import Reason

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

VERSION = 1
_TEXT = "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}"
_TABLE = "{urn:oasis:names:tc:opendocument:xmlns:table:1.0}"
_OFFICE = "{urn:oasis:names:tc:opendocument:xmlns:office:1.0}"
_DROPPED = frozenset({f"{_OFFICE}annotation", f"{_TEXT}tracked-changes", f"{_OFFICE}forms", f"{_TEXT}sequence-decls"})
_MANIFEST = "META-INF/manifest.xml"


def read(data: bytes) -> Parsed:
    """Return the text of a document. Raises NotText for a damaged or an encrypted one."""
    from defusedxml.ElementTree import fromstring

    package = Package(data)
    if _MANIFEST in package.names and b"encryption-data" in package.read(_MANIFEST):
        raise NotText(Reason.ENCRYPTED)
    body = fromstring(package.read("content.xml")).find(f"{_OFFICE}body")
    if body is None:
        raise NotText(Reason.UNPARSED)
    blocks: list[str] = []
    _blocks(body, 0, blocks)
    return Parsed(["\n\n".join(blocks).replace("\n\n\0", "\n").replace("\0", "")])


def _blocks(element: Element, depth: int, blocks: list[str]) -> None:
    """Add the blocks below an element; one that begins with a NUL follows the last one without a gap.

    depth: number of lists around it. XML nested deeper than Python's stack ends as RecursionError: such a file is damaged.
    """
    for child in element:
        if child.tag in _DROPPED:
            continue
        if child.tag == f"{_TEXT}h":
            level = child.get(f"{_TEXT}outline-level", "1")
            blocks.append("#" * (int(level) if level in "123456" else 1) + " " + _inline(child))
        elif child.tag == f"{_TEXT}p":
            if text := _inline(child):
                blocks.append("\0" + "  " * (depth - 1) + "- " + text if depth else text)
        elif child.tag == f"{_TABLE}table-row":
            cells = [_cell(cell) for cell in child if cell.tag == f"{_TABLE}table-cell"]
            if any(cells):
                blocks.append("\0" + " | ".join(cells))
        else:
            _blocks(child, depth + (child.tag == f"{_TEXT}list"), blocks)


def _cell(cell: Element) -> str:
    """Return the text of a table's cell on one line."""
    blocks: list[str] = []
    _blocks(cell, 0, blocks)
    return " ".join(" ".join(blocks).replace("\0", "").split())


def _inline(element: Element) -> str:
    """Return the text of a paragraph with its spaces, tabs and line breaks."""
    parts = [element.text or ""]
    for child in element:
        if child.tag == f"{_TEXT}s":
            count = child.get(f"{_TEXT}c", "1")
            parts.append(" " * (min(int(count), MAX_SPACES) if count.isdecimal() and len(count) < 9 else 1))
        elif child.tag == f"{_TEXT}tab":
            parts.append("\t")
        elif child.tag == f"{_TEXT}line-break":
            parts.append("\n")
        elif child.tag not in _DROPPED:
            parts.append(_inline(child))
        parts.append(child.tail or "")
    return "".join(parts).strip(" ")
