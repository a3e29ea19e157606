"""Knows how people mark a note that must not be trained on: with the tag private, or with `edgetune: false`."""

from __future__ import annotations

import re

from edgetune.documents.front_matter import FENCES, FrontMatter
from edgetune.documents.limits import MAX_FRONT_MATTER_CHARS

PRIVATE_TEXT = "#private"
"""Stands for a text that is marked private where the text itself must not be kept."""
_TAG = re.compile(r"(?<![\w&/`#.])#(?:private(?![\w-])|\[\[private(?:/[^\[\]\n]*)?\]\])", re.IGNORECASE)
"""The tag in a text; #private/health and Logseq's #[[private]] count, and `#private` between backquotes does not."""
_ORG_TAG = re.compile(r"^(?:\*+ |#\+filetags:)[^\n]*:private:", re.IGNORECASE | re.MULTILINE)
_TAGS_LINE = re.compile(r"^[ \t]*(?:[-*][ \t]+)?tags?::?[ \t](?:[^\n]*[\s,;:\[\"'#])?private(?:/|[\s,;:\]\"']|$)", re.I | re.M)
"""A line of tags: Logseq's `tags:: private`, front matter's on one line, and what is made of the tags of Org and Evernote."""
_NO = r"[ \t]*[\"']?(?:false|no|off|0|never)[\"']?[ \t]*(?:#[^\n]*)?$"
_PROPERTY = re.compile(rf"^[ \t]*(?:(?:[-*][ \t]+)?edgetune::|#\+edgetune:|:edgetune:){_NO}", re.IGNORECASE | re.MULTILINE)
"""Logseq's and Org's way to say `edgetune: false`."""
_KEY = re.compile(rf"^[\"']?edgetune[\"']?[ \t]*[:=]{_NO}", re.IGNORECASE | re.MULTILINE)
_LIST_ITEM = re.compile(r"^tags?:[ \t]*\n(?:[ \t]*-[^\n]*\n)*?[ \t]*-[ \t]*[\"']?#?private(?:/|[\s\"']|$)", re.I | re.M)
_WORDS = ("private", "edgetune")


def is_private(front_matter: FrontMatter) -> bool:
    """Return True for a note whose front matter says that it must not be trained on.

    Several tags may stand in one text, with spaces between them.
    """
    words = [word.lstrip("#") for tag in front_matter.tags for word in tag.lower().split()]
    return front_matter.opted_out or any(word.split("/")[0] == "private" for word in words)


def is_marked_private(text: str) -> bool:
    """Return True for a text that says itself that it must not be trained on, in whatever format it is.

    Front matter is searched for its lines, so that one that is too long or damaged to be parsed counts too.
    """
    lowered = text.lower()
    if not any(word in lowered for word in _WORDS):
        return False
    if any(mark.search(text) for mark in (_TAG, _ORG_TAG, _TAGS_LINE, _PROPERTY)):
        return True
    text = text.lstrip("\ufeff")
    if text[:3] not in FENCES:
        return False
    head = text[:MAX_FRONT_MATTER_CHARS]
    close = re.search(rf"^(?:{re.escape(text[:3])}|\.\.\.)[ \t]*$", head[3:], re.MULTILINE)
    inside = head[: close.start() + 3] if close else head
    return any(mark.search(inside) for mark in (_KEY, _LIST_ITEM))
