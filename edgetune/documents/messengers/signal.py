"""Reads exports of Signal: sigexport's chat.md and data.json, and the messages of Signal Desktop as JSON (sigtop).

    [2024-03-05 10:15:32] Me: Are you coming?                                      chat.md
    {"date": "2024-03-05T10:15:32", "sender": "Me", "body": "Are you coming?"}     data.json, one a line
    [{"type": "outgoing", "sent_at": 1709633732000, "body": "Are you coming?", "conversationId": "..."}]     Signal Desktop

All say which messages are the user's own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from edgetune.documents.chats import Window, line_records
from edgetune.documents.messengers.clock import seconds_of
from edgetune.documents.messengers.json_items import items, text_at
from edgetune.documents.messengers.lines import LongText
from edgetune.documents.messengers.messages import Message
from edgetune.documents.reasons import Reason

_HEADER = re.compile(r"\[(\d{4}-\d{2}-\d{2}),? (\d{2}:\d{2}(?::\d{2})?)\] ([^:\n]{1,100}):(?: |$)")
_STICKER = re.compile(r"\n?\(\( [^\n]{0,100} \)\)")
_ATTACHED = re.compile(r"!?\[[^\[\]\n]{0,300}\]\(\.{1,2}/(?:media|exported_stickers)/[^()\n]{1,600}\)")
_QUOTED = re.compile(r"\A\n\n(?:> [^\n]{0,20000}\n)+\n?")
_DELETED = "(This message was deleted)"
_CALL = re.compile(r"(?:Incoming|Outgoing|Missed) (?:voice |video |group |adhoc )?call(?: \([^()\n]{1,60}\))?")
_ME = "Me"
_FEWEST = 2
"""Messages that a chat.md begins with at least, among its first lines. Chosen by hand."""
_LINES_JUDGED = 50


def looks_like_chat(lines: Iterable[str]) -> bool:
    """Return True if a Markdown text is sigexport's by its first lines."""
    head = [line for line, _ in zip(lines, range(_LINES_JUDGED), strict=False) if line.strip()]
    return bool(head) and _HEADER.match(head[0]) is not None and sum(map(bool, map(_HEADER.match, head))) >= _FEWEST


def from_markdown(lines: Iterable[str], dropped: Counter[Reason]) -> Iterator[Message]:
    """Yield the messages of a chat.md."""
    found: re.Match[str] | None = None
    text = LongText()
    for line in lines:
        match = _HEADER.match(line)
        if match is None:
            text.add(line)
            continue
        yield from _from_markdown(found, text, dropped)
        found, text = match, LongText(line[match.end() :])
    yield from _from_markdown(found, text, dropped)


def _from_markdown(found: re.Match[str] | None, text: LongText, dropped: Counter[Reason]) -> Iterator[Message]:
    """Yield the message that a header begins, without what sigexport adds to its text: quotes, reactions, attachments."""
    if found is None:
        return
    if text.is_too_long:
        dropped[Reason.LONG_MESSAGE] += 1
        return
    body = _QUOTED.sub("", text.text.rstrip())
    body, files = _ATTACHED.subn("", body)
    body, stickers = _STICKER.subn("", _without_reactions(body.rstrip()))
    dropped[Reason.MEDIA] += files + stickers
    message = _message(found[3], body, seconds_of(f"{found[1]}T{found[2]}"), dropped)
    if message is not None:
        yield message


def _without_reactions(text: str) -> str:
    """Return a text without its last line if that lists reactions: (- Anna: 👍 -)."""
    before, _, last = text.rpartition("\n")
    return before if last.startswith("(- ") and last.endswith(" -)") else text


def _message(sender: str, body: str, seconds: float | None, dropped: Counter[Reason]) -> Message | None:
    """Return a message of sigexport, or None, counted, for what nobody typed."""
    body = body.strip()
    if body == _DELETED:
        dropped[Reason.DELETED_MESSAGE] += 1
    elif _CALL.fullmatch(body) or sender == "No-Sender":
        dropped[Reason.NOTICE] += 1
    elif body:
        return Message(sender, body, seconds, mine=sender == _ME)
    return None


def from_json_lines(window: Window, dropped: Counter[Reason]) -> Iterator[Message]:
    """Yield the messages of a data.json of sigexport."""
    window.move(0)
    for found in line_records(window):
        record = found.value
        if not isinstance(record, dict):
            dropped[Reason.BAD_EXPORT] += 1
            continue
        if record.get("attachments") or record.get("sticker"):
            dropped[Reason.MEDIA] += 1
        if record.get("deleted") is True:
            dropped[Reason.DELETED_MESSAGE] += 1
        elif record.get("call") is True:
            dropped[Reason.NOTICE] += 1
        else:
            message = _message(
                text_at(record, "sender") or "?", text_at(record, "body"), seconds_of(record.get("date")), dropped
            )
            if message is not None:
                yield message


def from_desktop(window: Window, dropped: Counter[Reason]) -> Iterator[Message]:
    """Yield the messages of Signal Desktop's own JSON, an array."""
    for path, record in items(window, frozenset([()])):
        if path == ("*",) and (message := _desktop_message(record, dropped)) is not None:
            yield message


def _desktop_message(record: Any, dropped: Counter[Reason]) -> Message | None:
    kind = text_at(record, "type")
    if kind not in ("incoming", "outgoing"):
        dropped[Reason.NOTICE] += 1
        return None
    if record.get("deletedForEveryone") is True:
        dropped[Reason.DELETED_MESSAGE] += 1
        return None
    if record.get("attachments") or record.get("sticker"):
        dropped[Reason.MEDIA] += 1
    body = text_at(record, "body").strip()
    if not body:
        return None
    sent = seconds_of(record.get("sent_at"))
    chat = text_at(record, "conversationId")
    writer = _ME if kind == "outgoing" else text_at(record, "source") or text_at(record, "sourceServiceId") or chat
    return Message(writer, body, None if sent is None else sent / 1000, mine=kind == "outgoing", chat=chat)
