"""Reads HTML: headings, paragraphs, lists, tables and code as Markdown-like text, without scripts, styles and navigation."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

from edgetune.documents.formats.parsed import Parsed

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

VERSION = 1
_DROPPED = frozenset(
    {
        "script",
        "style",
        "nav",
        "head",
        "noscript",
        "template",
        "svg",
        "iframe",
        "object",
        "button",
        "select",
        "input",
        "textarea",
    }
    | {"img", "picture", "video", "audio", "canvas", "-comment"}
)
_BLOCKS = frozenset(
    {
        "p",
        "div",
        "section",
        "article",
        "main",
        "header",
        "footer",
        "aside",
        "figure",
        "figcaption",
        "ul",
        "ol",
        "li",
        "dl",
        "dt",
    }
    | {"dd", "table", "tr", "caption", "blockquote", "address", "details", "summary", "fieldset", "form", "center", "hr"}
    | {"h1", "h2", "h3", "h4", "h5", "h6", "body"}
)
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s{0,9}=\s{0,9}["']?([A-Za-z0-9_.:-]{1,40})""", re.IGNORECASE)
_HEAD_BYTES = 4096
"""Bytes of a page in which its encoding is looked for. Chosen by hand; HTML's own limit is 1024."""
_BREAK = "\0"
"""Stands for a line break until white space is collapsed. No text of a parsed page holds a NUL."""
_SPACE = re.compile(r"[ \t\n\r\f]+")
_FENCE = re.compile(r"`{3,}")


def charset(first: bytes) -> str | None:
    """Return the encoding that a page which begins with `first` names, if Python knows it.

    A page in which the name can be read as ASCII is not in UTF-16 or UTF-32, whatever it says.
    """
    found = _CHARSET.search(first[:_HEAD_BYTES])
    try:
        name = codecs.lookup(found[1].decode()).name if found else "utf-8"
        "".encode(name)  # raises LookupError for a codec that is none of text
    except LookupError:
        return None
    return None if name.startswith(("utf-8", "utf-16", "utf-32")) else name


def read(data: bytes) -> Parsed:
    """Return the text of a page in UTF-8, under its title if it has no heading of the first rank."""
    return Parsed([to_text(data.decode())])


def to_text(page: str) -> str:
    """Return the text of a page or of a fragment of HTML."""
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(page)
    writer = _Writer()
    if tree.body is not None:
        writer.write(tree.body)
    title = tree.css_first("head > title")
    heading = _SPACE.sub(" ", title.text()).strip() if title is not None else ""
    with_title = [f"# {heading}"] if heading and tree.css_first("h1") is None else []
    return "\n\n".join([*with_title, *writer.finish()])


class _Writer:
    """Collects the blocks of a page while its tree is walked without recursion, however deep it is."""

    def __init__(self) -> None:
        self._blocks: list[str] = []
        self._tight = False  # the last block is a list item or a table's row, which the next one may follow without a gap
        self._inline: list[str] = []
        self._lists: list[int | None] = []
        """The number of the last item of each open list; None for a list with bullets."""
        self._marker = ""
        self._quotes = self._rows = 0

    def write(self, root: LexborNode) -> None:
        """Walk the tree below `root` in the order of the page."""
        pending: list[tuple[LexborNode, bool]] = [(root, True)]
        while pending:
            node, entering = pending.pop()
            tag = node.tag or ""
            if not entering:
                self._leave(tag)
            elif tag == "-text":
                self._inline.append(_SPACE.sub(" ", node.text_content or ""))
            elif tag == "pre":
                self._code(node)
            elif tag not in _DROPPED:
                self._enter(tag)
                pending.append((node, False))
                children = []
                child = node.child
                while child is not None:
                    children.append((child, True))
                    child = child.next
                pending += reversed(children)

    def finish(self) -> list[str]:
        """Return the blocks."""
        self._flush()
        return self._blocks

    def _enter(self, tag: str) -> None:
        if tag == "br":
            self._inline.append(_BREAK)
        elif tag == "code":
            self._inline.append("`")
        elif tag in ("td", "th"):
            self._inline.append(" | " if "".join(self._inline).strip() else "")
        if tag in _BLOCKS:
            self._boundary(tag)
        if tag in ("ul", "ol"):
            self._lists.append(0 if tag == "ol" else None)
        elif tag == "li" and not self._rows:
            self._marker = "  " * (len(self._lists) - 1) + self._next_marker()
        elif tag == "blockquote":
            self._quotes += 1
        elif tag == "tr":
            self._rows += 1
        elif len(tag) == 2 and tag[0] == "h" and tag[1].isdigit() and not self._rows:
            self._marker = "#" * int(tag[1]) + " "

    def _leave(self, tag: str) -> None:
        if tag == "code":
            self._inline.append("`")
        if tag == "tr":
            self._rows -= 1
        if tag in _BLOCKS:
            self._boundary(tag)
        if tag in ("ul", "ol") and self._lists:
            self._lists.pop()
            self._tight = self._tight and bool(self._lists)
        elif tag == "table":
            self._tight = False
        elif tag == "blockquote":
            self._quotes -= 1
        if tag in _BLOCKS and not self._rows:
            self._marker = ""

    def _next_marker(self) -> str:
        if not self._lists or self._lists[-1] is None:
            return "- "
        self._lists[-1] += 1
        return f"{self._lists[-1]}. "

    def _boundary(self, tag: str) -> None:
        """End a block. Inside a table's row, which is one line, add a space instead."""
        if self._rows:
            self._inline.append(" ")
        else:
            self._flush(tight=tag in ("li", "tr"))

    def _flush(self, tight: bool = False) -> None:
        lines = [" ".join(line.split(" ")).strip() for line in _SPACE.sub(" ", "".join(self._inline)).split(_BREAK)]
        self._inline = []
        text = "\n".join(lines).strip("\n")
        if text.strip():
            self._add(self._marker + text, tight or bool(self._lists))
            self._marker = ""

    def _code(self, node: LexborNode) -> None:
        """Add a block of code between fences; inside a table's row, as it stands."""
        code = (node.text() or "").strip("\n")
        if self._rows:
            self._inline.append(code)
            return
        self._flush()
        fence = "`" * max([3, *(len(run) + 1 for run in _FENCE.findall(code))])
        self._add(f"{fence}\n{code}\n{fence}", False)

    def _add(self, block: str, tight: bool) -> None:
        if self._quotes:
            block = "\n".join("> " * self._quotes + line for line in block.split("\n"))
        if tight and self._tight:
            self._blocks[-1] += f"\n{block}"
        else:
            self._blocks.append(block)
        self._tight = tight
