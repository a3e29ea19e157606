"""Mark control tokens that a message merely spells, so that they are told from those that the chat template writes."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any


def new_nonce() -> str:
    """Return a random number that no message contains; it is of digits, which no filter of a template changes."""
    return f"{secrets.randbelow(10**24):024d}"


class Marker:
    """Puts a nonce inside each control token that a message spells, so that it is not one after rendering.

    Does the same if a message ends or begins with part of such a spelling, which the template's text or the next
    message could complete. White space at the edges of a message stays at the edges, so a template that trims a message
    trims the same as without the nonce.
    """

    def __init__(self, spelled: re.Pattern[str], spellings: list[str], nonce: str) -> None:
        self._spelled, self._spellings, self._nonce = spelled, spellings, nonce

    def mark(self, value: Any, whole: bool = False) -> Any:
        """Return a message, or a value inside it, with the nonces put in.

        `whole`: look for whole spellings only. This is for keys and roles, which a template joins to its own text on
        purpose: a role "assistant" becomes the token `<|assistant|>`.
        """
        if isinstance(value, str):
            text = self._spelled.sub(lambda match: self._with_nonce_at(match[0], 1), value)
            return text if whole else self._with_nonce_at_edges(text)
        if isinstance(value, Mapping):
            return {self.mark(key, True): self.mark(item, key == "role") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def _with_nonce_at(self, text: str, at: int) -> str:
        return text[:at] + self._nonce + text[at:]

    def _with_nonce_at_edges(self, text: str) -> str:
        """Return `text` with a nonce where it ends with the beginning of a spelling or begins with the end of one."""
        body = text.strip()
        if not body:
            return text
        start = len(text) - len(text.lstrip())
        longest_end = max(
            (n for token in self._spellings for n in range(1, min(len(token), len(body) + 1)) if body.endswith(token[:n])),
            default=0,
        )
        if longest_end:
            text = self._with_nonce_at(text, start + len(body) - longest_end + 1)
        if any(body.startswith(token[-n:]) for token in self._spellings for n in range(1, len(token))):
            text = self._with_nonce_at(text, start + 1)
        return text
