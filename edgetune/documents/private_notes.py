"""Knows how people mark a note that must not be trained on: `edgetune: false` in its front matter, or the tag #private."""

from __future__ import annotations

import re

from edgetune.documents.front_matter import FrontMatter

_TAG = re.compile(r"(?<![\w&/`#.])#private(?![\w-])", re.IGNORECASE)
"""The tag in a text; #private/health counts, and `#private` between backquotes does not."""
_ORG_TAG = re.compile(r"^(?:\*+ |#\+filetags:)[^\n]*:private:", re.IGNORECASE | re.MULTILINE)


def has_private_tag(text: str) -> bool:
    """Return True for a text with the tag #private, or Org's :private:."""
    return bool("private" in text.lower() and (_TAG.search(text) or _ORG_TAG.search(text)))


def is_private(front_matter: FrontMatter) -> bool:
    """Return True for a note whose front matter says that it must not be trained on."""
    tags = (tag.lower().split("/")[0] for tag in front_matter.tags)
    return front_matter.opted_out or "private" in tags
