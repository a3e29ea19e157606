"""Defines what every format's `read` returns."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

ATTACHMENTS = "attachments"
OUTPUTS = "outputs of notebook cells"
PAGES = "pages without text, perhaps scanned"
PROTECTED = "encrypted messages"
WORDLESS = "messages without words of their sender"
UNREADABLE = "unreadable messages"
KINDS = frozenset({ATTACHMENTS, OUTPUTS, PAGES, PROTECTED, WORDLESS, UNREADABLE})
"""Every kind of thing that a format leaves out and counts."""


@dataclass
class Parsed:
    """The texts in a file, in its order: one for most formats, one a message or note for mail and Evernote.

    `left_out` counts by kind what the file holds beside text, for the account of the reading.
    """

    texts: list[str]
    left_out: Counter[str] = field(default_factory=Counter)
