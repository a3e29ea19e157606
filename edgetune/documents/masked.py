"""Masks chats: every message, tool call and description of a tool, before anything of a chat is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

from edgetune.documents.chat_forms import guanaco_text
from edgetune.documents.document import Document
from edgetune.privacy.masking import Masker

_LINKS = frozenset({"id", "tool_call_id", "type", "role", "$ref"})
"""Keys whose values tie a tool call to its result or name a type."""
_LONGEST_LINK = 64
"""Longest value under such a key that stays as it is, in characters. Chosen by hand: the longest in use has 40."""
_LEAST_NUMBER = 10**6
"""Smallest whole number that may be a phone or card number. Chosen by hand."""


def masked_chat(document: Document, masker: Masker) -> Document:
    """Return a document in memory, as a file of chats gives it, with everything masked."""
    turns = document.turns
    if masker.level == "none":
        return document
    if turns is None:
        return Document.of(document.path, masker.mask(document.text))
    written = guanaco_text(turns) == document.text
    masked = tuple(
        dataclasses.replace(turn, text=masker.mask(turn.text), extras=masked_value(turn.extras, masker)) for turn in turns
    )
    # The same text once more, in the form that its file has: what is found in it was counted above.
    text = guanaco_text(masked) if written else masker.without_counting().mask(document.text)
    return Document.of(document.path, text, masked, tuple(masked_value(tool, masker) for tool in document.tools))


def masked_value(value: Any, masker: Masker, key: str = "") -> Any:
    """Return a JSON value with every text in it masked, and every number that is an identifier replaced by its placeholder.

    The key of a text is read with it, so that {"password": "..."} is found.
    """
    if isinstance(value, dict):
        return {name: masked_value(item, masker, name) for name, item in value.items()}
    if isinstance(value, list):
        return [masked_value(item, masker, key) for item in value]
    if isinstance(value, str):
        return value if key in _LINKS and len(value) <= _LONGEST_LINK else masker.mask_named(key, value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _LEAST_NUMBER:
        text = masker.mask_named(key, str(value))
        return value if text == str(value) else text
    return value
