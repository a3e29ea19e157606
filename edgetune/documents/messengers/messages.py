"""Defines a message of a chat between people, and recognises the messages that the user wrote."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

MARKS = "\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff"
"""Invisible marks for the direction of a text, as they stand in a regular expression's class. Apps put them around names."""
_MARKS = re.compile(f"[{MARKS}]")
_NUMBER = re.compile(r"\+?[\d\s().\-/\u00a0\u202f]{7,25}")


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `seconds` are on the export's own clock, which only serves to measure gaps; None where it has none."""

    writer: str
    text: str
    seconds: float | None
    ids: tuple[str, ...] = ()
    """Further names by which the user may be meant: an account's id, its user name, a phone number."""
    mine: bool | None = None
    """True or False where the export itself says whether the user wrote this; None where --me has to say."""
    chat: str = ""
    """The chat of an export that holds several: messages of two chats are never one conversation."""
    is_note: bool = False
    """True for a message of the user to themselves, which is a note and answers nobody."""


class Me:
    """The names, numbers and ids that the user gave with --me."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {plain_name(name) for name in names}
        self._known: dict[tuple[str, tuple[str, ...]], bool] = {}

    @property
    def is_given(self) -> bool:
        """Return True if the user said who they are."""
        return bool(self._names)

    def wrote(self, message: Message) -> bool:
        """Return True if the user wrote this message."""
        if message.mine is not None:
            return message.mine
        if not self._names:
            return False
        key = message.writer, message.ids
        if key not in self._known:
            if len(self._known) >= MOST_PEOPLE:
                self._known.clear()
            self._known[key] = any(plain_name(name) in self._names for name in (message.writer, *message.ids) if name)
        return self._known[key]


MOST_PEOPLE = 10_000
"""Most writers of an export that are told apart by name. Chosen by hand, so that a hostile export takes little memory."""


def plain_name(name: str) -> str:
    """Return a name in the form in which two spellings of it are equal: case, spaces and invisible marks do not matter.

    A phone number is reduced to its digits, and the tilde is dropped that WhatsApp puts before a name from nobody's contacts.
    """
    name = unicodedata.normalize("NFC", _MARKS.sub("", name)).strip().removeprefix("~").strip()
    if _NUMBER.fullmatch(name) and sum(char.isdigit() for char in name) >= 7:
        return "".join(char for char in name if char.isdigit())
    return " ".join(name.casefold().removeprefix("@").split())


def without_marks(text: str) -> str:
    """Return a text without invisible marks of direction."""
    return text if text.isascii() else _MARKS.sub("", text)
