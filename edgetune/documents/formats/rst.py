"""Reads reStructuredText with docutils, whose directives that read files or insert raw HTML are switched off."""

from __future__ import annotations

import io
import re
import textwrap
from typing import TYPE_CHECKING

from edgetune.documents.formats.parsed import Parsed

if TYPE_CHECKING:
    from docutils.nodes import Element, Node

VERSION = 1
_SETTINGS = {
    "file_insertion_enabled": False,
    "raw_enabled": False,
    "_disable_config": True,
    "report_level": 5,  # nothing is reported, and nothing ends the work
    "halt_level": 5,
    "syntax_highlight": "none",
    "smart_quotes": False,
    "doctitle_xform": False,
    "docinfo_xform": False,
}
_DROPPED = frozenset({"comment", "image", "substitution_definition", "target", "pending", "raw", "meta", "colspec", "topic"})
_READS_FILES = re.compile(r"\.\.\s+(?:raw|include|csv-table|literalinclude|image|figure|toctree|contents)::")
_CODE_BLOCK = re.compile(r"\.\.\s+(?:code-block|code|sourcecode)::\s*([\w+-]*)")
_OPTION = re.compile(r"\s+:[\w-]+:.*")


def read(data: bytes) -> Parsed:
    """Return the text of a document in UTF-8."""
    from docutils.core import publish_doctree

    tree = publish_doctree(data.decode(), settings_overrides={**_SETTINGS, "warning_stream": io.StringIO()})
    blocks: list[str] = []
    _blocks(tree, 0, "", blocks)
    return Parsed(["\n\n".join(block.rstrip() for block in blocks if block.strip())])


def _blocks(element: Element, level: int, indent: str, blocks: list[str]) -> None:
    """Add the blocks below an element. level: rank of the section around it; indent: spaces of the list around it."""
    number = int(element.get("start", 1)) if element.tagname == "enumerated_list" else 0
    for child in element.children:
        name = child.tagname
        if name in _DROPPED:
            continue
        if name in ("title", "subtitle", "rubric"):
            rank = level + (name == "subtitle") if name != "rubric" else 6
            blocks.append(f"{'#' * min(max(rank, 1), 6)} {child.astext()}")
        elif name == "section":
            _blocks(child, level + 1, indent, blocks)
        elif name in ("literal_block", "doctest_block", "math_block"):
            blocks.append(_code(child, indent))
        elif name == "list_item":
            _item(child, f"{number}. " if number else "- ", level, indent, blocks)
            number += bool(number)
        elif name in ("block_quote", "footnote", "citation"):
            inner: list[str] = []
            _blocks(child, level, "", inner)
            blocks += ["\n".join(f"{indent}> {line}".rstrip() for line in block.split("\n")) for block in inner]
        elif name == "system_message":
            blocks += _unknown(child, indent)
        elif name == "row":
            blocks.append(indent + " | ".join(" ".join(cell.astext().split()) for cell in child.children))
        elif name == "field":
            blocks.append(f"{indent}{child.children[0].astext()}: {' '.join(child.children[-1].astext().split())}")
        elif name in ("paragraph", "term", "line", "attribution", "caption", "classifier"):
            blocks.append(indent + _inline(child).replace("\n", f"\n{indent}"))
        elif hasattr(child, "children"):
            _blocks(child, level, indent, blocks)


def _item(item: Element, marker: str, level: int, indent: str, blocks: list[str]) -> None:
    """Add an item of a list as one block, its further paragraphs indented below the first."""
    inner: list[str] = []
    _blocks(item, level, indent + " " * len(marker), inner)
    text = "\n\n".join(inner)
    blocks.append(indent + marker + text.lstrip())


def _inline(element: Node) -> str:
    """Return the text of a paragraph, with code between backticks and without pictures."""
    parts = []
    for child in element.children:
        if child.tagname == "literal":
            parts.append(f"`{child.astext()}`")
        elif child.tagname not in _DROPPED:
            parts.append(_inline(child) if child.children else child.astext())
    return "".join(parts)


def _code(block: Element, indent: str) -> str:
    """Return a block of code between fences."""
    language = next((name for name in block.get("classes", []) if name != "code"), "")
    text = block.astext()
    fence = "````" if "```" in text else "```"
    return "\n".join(indent + line for line in [f"{fence}{language}", *text.split("\n"), fence])


def _unknown(message: Element, indent: str) -> list[str]:
    """Return the content of a directive that docutils does not know (Sphinx has many), unless it would read a file."""
    sources = [child.astext() for child in message.children if child.tagname == "literal_block"]
    found = []
    for source in sources:
        first, _, rest = source.partition("\n")
        kept = "\n".join(line for line in rest.split("\n") if not _OPTION.fullmatch(line))
        lines = textwrap.dedent(kept).strip("\n").split("\n")
        if _READS_FILES.match(first) or not any(lines):
            continue
        code = _CODE_BLOCK.match(first)
        fenced = [f"```{code[1]}", *lines, "```"] if code else lines
        found.append("\n".join(indent + line for line in fenced))
    return found
