"""Reads Evernote's export (ENEX): a document for each note, without its attachments."""

from __future__ import annotations

import io
from collections import Counter

from edgetune.documents.formats import html
from edgetune.documents.formats.parsed import ATTACHMENTS, Parsed

VERSION = 1


def read(data: bytes) -> Parsed:
    """Return a text for each note: its title as a heading, its tags, its text."""
    from defusedxml.ElementTree import iterparse

    texts: list[str] = []
    left_out: Counter[str] = Counter()
    for _, element in iterparse(io.BytesIO(data), events=("end",)):
        if element.tag == "resource":
            left_out[ATTACHMENTS] += 1
            element.clear()
        elif element.tag == "note":
            title = " ".join((element.findtext("title") or "").split())
            tags = ", ".join(tag.text.strip() for tag in element.findall("tag") if tag.text)
            body = html.to_text((element.findtext("content") or "").replace('<en-todo checked="true"/>', "[x] "))
            head = [f"# {title}"] if title else []
            head += [f"Tags: {tags}"] if tags else []
            texts.append("\n\n".join([*head, body]))
            element.clear()
    return Parsed(texts, left_out)
