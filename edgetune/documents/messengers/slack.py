"""Reads Slack's export, a folder or an archive: users.json, channels.json, and a folder a channel with a file a day.

general/2024-03-05.json     [{"type": "message", "user": "U024BE7LH", "text": "Ask <@U0AB1CD2E>", "ts": "1709632800.000200"}]
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from edgetune.documents.chat_forms import Unread
from edgetune.documents.chats import Window
from edgetune.documents.messengers.clock import seconds_of
from edgetune.documents.messengers.json_items import items, text_at
from edgetune.documents.messengers.messages import MOST_PEOPLE, Message
from edgetune.documents.reasons import Reason

USERS = "users.json"
"""The file at the top of an export that names the people."""
_LISTS = frozenset({"channels.json", "groups.json", "dms.json", "mpims.json"})
_OTHERS = frozenset(
    {"integration_logs.json", "canvases.json", "lists.json", "file_conversations.json", "huddle_transcripts.json"}
)
_DAY = re.compile(r"(?:.*/)?([^/]+)/\d{4}-\d{2}-\d{2}\.json")
_ARRAY = frozenset([()])
_MENTION = re.compile(r"<([@#!]?)([^<>|]{1,2000})(?:\|([^<>]{0,2000}))?>")
_WRITTEN = {"", "me_message", "thread_broadcast", "file_share", "reply_broadcast"}
"""Subtypes of messages that a person wrote; all others are notices, or a bot's."""

Names = Mapping[str, tuple[str, ...]]
"""The names of a person by their id: the one that is shown, then others."""


def exports(paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the files of each Slack export among `paths`, which have forward slashes, by the export's folder ("" or "x/").

    The days come last, channel by channel.
    """
    found = list(paths)
    known = set(found)
    roots = [path.removesuffix(USERS) for path in found if path.rpartition("/")[2] == USERS]
    roots = [root for root in roots if any(f"{root}{name}" in known for name in _LISTS)]
    result: dict[str, list[str]] = {}
    for root in sorted(roots, key=lambda root: -len(root)):
        about = [f"{root}{name}" for name in (USERS, *sorted(_LISTS | _OTHERS)) if f"{root}{name}" in known]
        days = sorted(path for path in known if path.startswith(root) and is_day(path.removeprefix(root)))
        result[root] = about + days
        known -= set(result[root])
    return result


def is_day(path: str) -> bool:
    """Return True for the path of a channel's day, relative to the export's folder."""
    return path.count("/") == 1 and _DAY.fullmatch(path) is not None


def people(window: Window) -> Names:
    """Return the people in users.json, MOST_PEOPLE at most. Raises Unread if it is no JSON."""
    names: dict[str, tuple[str, ...]] = {}
    for path, user in items(window, _ARRAY):
        if path != ("*",) or not isinstance(user, dict) or len(names) >= MOST_PEOPLE:
            continue
        spelled = [
            text_at(user, "profile", "display_name"), text_at(user, "profile", "real_name"), text_at(user, "real_name"),
            text_at(user, "name"), text_at(user, "profile", "email"), text_at(user, "id"),
        ]  # fmt: skip
        names[text_at(user, "id")] = tuple(dict.fromkeys(name for name in spelled if name))
    return names


def messages(days: Iterable[tuple[str, Callable[[], Window]]], names: Names, dropped: Counter[Reason]) -> Iterator[Message]:
    """Yield the messages of (path, content) of every day. A day that is no JSON is counted, and the next one is read."""
    for path, content in days:
        match = _DAY.fullmatch(path)
        channel = match[1] if match is not None else ""
        try:
            for place, record in items(content(), _ARRAY):
                message = _message(record, names, channel, dropped) if place == ("*",) else None
                if message is not None:
                    yield message
        except Unread as problem:
            dropped[problem.reason] += 1


def _message(record: Any, names: Names, channel: str, dropped: Counter[Reason]) -> Message | None:
    """Return the message in a record, or None, counted, for what no person wrote."""
    if not isinstance(record, dict) or record.get("type") != "message":
        dropped[Reason.NOTICE] += 1
        return None
    subtype, user = text_at(record, "subtype"), text_at(record, "user")
    if subtype == "bot_message" or record.get("bot_id") is not None:
        dropped[Reason.BOT] += 1
        return None
    if subtype == "tombstone":
        dropped[Reason.DELETED_MESSAGE] += 1
        return None
    if subtype not in _WRITTEN or not user:
        dropped[Reason.NOTICE] += 1
        return None
    if record.get("files"):
        dropped[Reason.MEDIA] += 1
    text = plain_text(text_at(record, "text"), names).strip()
    if not text:
        return None
    known = names.get(user) or (text_at(record, "user_profile", "display_name") or user, user)
    return Message(known[0], text, seconds_of(record.get("ts")), known, chat=channel)


def plain_text(text: str, names: Names) -> str:
    """Return a text without Slack's markup: mentions as @name and #channel, links as their address or label."""

    def replaced(match: re.Match[str]) -> str:
        kind, target, label = match[1], match[2], match[3]
        if kind == "@":
            return f"@{names[target][0] if names.get(target) else label or target}"
        if kind == "#":
            return f"#{label or target}"
        if kind == "!":
            return label or f"@{target.partition('^')[0]}"
        return label or target

    return html.unescape(_MENTION.sub(replaced, text))
