"""Reads the JSON of DiscordChatExporter: one channel a file.

{"guild": {...}, "channel": {...}, "messages": [{"type": "Default", "timestamp": ..., "content": ..., "author": {...}}, ...]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from edgetune.documents.chats import Window
from edgetune.documents.messengers.clock import seconds_of
from edgetune.documents.messengers.json_items import Path, items, text_at
from edgetune.documents.messengers.messages import Message
from edgetune.documents.reasons import Reason

OPENED_PATHS: frozenset[Path] = frozenset([(), ("messages",)])
"""Containers of an export that are read value by value."""
_WRITTEN = ("Default", "Reply", "0", "19")
"""Types of messages that a person wrote; old exports number them. All others are notices."""


def messages(window: Window, dropped: Counter[Reason]) -> Iterator[Message]:
    """Yield the messages of a channel."""
    for path, record in items(window, OPENED_PATHS):
        if path != ("messages", "*"):
            continue
        if not isinstance(record, dict) or str(record.get("type", "Default"))[:20] not in _WRITTEN:
            dropped[Reason.NOTICE] += 1
            continue
        author = record.get("author")
        if isinstance(author, dict) and author.get("isBot") is True:
            dropped[Reason.BOT] += 1
            continue
        if record.get("attachments") or record.get("stickers"):
            dropped[Reason.MEDIA] += 1
        text = text_at(record, "content").strip()
        if text:
            name, number = text_at(author, "name"), text_at(author, "discriminator")
            ids = (name, f"{name}#{number}", text_at(author, "id"))
            writer = text_at(author, "nickname") or name or "?"
            yield Message(writer, text, seconds_of(record.get("timestamp")), ids)
