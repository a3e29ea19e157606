"""Reads Telegram Desktop's result.json: the export of one chat, or of all.

    {"name": "Anna", "type": "personal_chat", "id": 1, "messages": [{"type": "message", "from_id": "user1", "text": ...}, ...]}
    {"personal_information": {"user_id": 1, ...}, "chats": {"list": [the above, ...]}}

A text is a string, or a list of strings and of objects with the text of a link, a mention or a bold word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from edgetune.documents.chats import Window
from edgetune.documents.messengers.clock import seconds_of
from edgetune.documents.messengers.json_items import OPENED, Path, items, text_at
from edgetune.documents.messengers.messages import Message
from edgetune.documents.reasons import Reason

_LISTS = (("chats", "list"), ("left_chats", "list"))
_CHATS: tuple[Path, ...] = ((), *((*path, "*") for path in _LISTS))
OPENED_PATHS: frozenset[Path] = frozenset(
    [
        *_CHATS,
        *((*chat, "messages") for chat in _CHATS),
        *((name,) for name, _ in _LISTS),
        *_LISTS,
    ]
)
"""Containers of an export that are read value by value."""
_MEDIA = ("photo", "file", "media_type", "sticker_emoji", "location_information", "contact_information", "poll", "game_title")


def messages(window: Window, dropped: Counter[Reason]) -> Iterator[Message]:
    """Yield the messages of all chats. The export of all chats says who the user is; that of one chat does not."""
    me, is_saved, chat = "", False, 0
    for path, value in items(window, OPENED_PATHS):
        if path in _CHATS and value is OPENED:
            chat, is_saved = chat + 1, False
        elif path == ("personal_information",):
            me = _account(value.get("user_id")) if isinstance(value, dict) else ""
        elif path[:-1] in _CHATS and path[-1] == "type":
            is_saved = value == "saved_messages"
        elif path[-2:] == ("messages", "*") and path[:-2] in _CHATS:
            message = _message(value, me, str(chat), is_saved, dropped)
            if message is not None:
                yield message


def _message(record: Any, me: str, chat: str, is_saved: bool, dropped: Counter[Reason]) -> Message | None:
    """Return the message in a record, or None, counted, for what its writer did not write."""
    if not isinstance(record, dict) or record.get("type") != "message":
        dropped[Reason.NOTICE] += 1
        return None
    if record.get("forwarded_from") is not None or record.get("forwarded_from_id") is not None:
        dropped[Reason.FORWARDED] += 1
        return None
    if record.get("via_bot") is not None:
        dropped[Reason.BOT] += 1
        return None
    if any(record.get(key) is not None for key in _MEDIA):
        dropped[Reason.MEDIA] += 1
    text = _text(record.get("text")).strip()
    if not text:
        return None
    account = _account(record.get("from_id"))
    writer = text_at(record, "from") or account or "?"
    seconds = seconds_of(record.get("date_unixtime"))
    return Message(
        writer=writer,
        text=text,
        seconds=seconds_of(record.get("date")) if seconds is None else seconds,
        ids=(account, account.removeprefix("user")) if account else (),
        mine=True if is_saved else account == me if me else None,
        chat=chat,
        is_note=is_saved,
    )


def _account(value: Any) -> str:
    """Return an account's id as new exports write it: user1234. Old ones have the number alone."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return f"user{value}"
    return value if isinstance(value, str) else ""


def _text(value: Any) -> str:
    """Return a message's text, which is a string or a list of strings and of objects with a text."""
    parts = value if isinstance(value, list) else [value]
    return "".join(part if isinstance(part, str) else text_at(part, "text") for part in parts)
