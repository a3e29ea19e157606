"""Reads EPUB: the chapters of a book in the order of its spine."""

from __future__ import annotations

import posixpath
import re

from edgetune.documents.encoding import NotText, decode
from edgetune.documents.formats import html
from edgetune.documents.formats.package import Package
from edgetune.documents.formats.parsed import Parsed
from edgetune.documents.reasons import Reason

VERSION = 1
_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"


def read(data: bytes) -> Parsed:
    """Return the text of a book. Raises NotText for a damaged or an encrypted one."""
    from defusedxml.ElementTree import fromstring

    archive = Package(data)
    root = next((_attribute(item, "full-path") for item in fromstring(archive.read(_CONTAINER)).iter()
                 if _name(item) == "rootfile"), "")  # fmt: skip
    package = fromstring(archive.read(root))
    pages = {_attribute(item, "id"): _attribute(item, "href") for item in package.iter() if _name(item) == "item"}
    spine = [pages.get(_attribute(item, "idref"), "") for item in package.iter() if _name(item) == "itemref"]
    folder = posixpath.dirname(root)
    names = [posixpath.normpath(posixpath.join(folder, _unquoted(page.partition("#")[0]))) for page in spine if page]
    chapters = [_chapter(archive, name) for name in dict.fromkeys(names) if name in archive.names]
    texts = [chapter for chapter in chapters if chapter]
    if not texts:
        raise NotText(Reason.ENCRYPTED if _ENCRYPTION in archive.names else Reason.NO_TEXT)
    return Parsed(["\n\n".join(texts)])


def _chapter(archive: Package, name: str) -> str:
    """Return the text of a chapter; empty for one that is no text, as in a book with copy protection."""
    try:
        return html.to_text(decode(archive.read(name))[0])
    except NotText:
        return ""


def _unquoted(address: str) -> str:
    """Return an address with its %20 and the like as letters."""
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda code: bytes([int(code[1], 16)]), address.encode()).decode("utf-8", "replace")


def _name(item: object) -> str:
    """Return the name of an XML element without its namespace."""
    return str(getattr(item, "tag", "")).rpartition("}")[2]


def _attribute(item: object, name: str) -> str:
    found: dict[str, str] = getattr(item, "attrib", {})
    return found.get(name, "")
