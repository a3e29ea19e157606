"""Reads the exports of ChatGPT and Claude: conversations.json, an array of conversations with an assistant.

    ChatGPT   {"current_node": "b", "mapping": {"b": {"parent": "a", "message": {"author": {"role": "user"}, "content": ...}}}}
    Claude    {"chat_messages": [{"sender": "human", "text": "How deep?", "content": [{"type": "text", "text": ...}]}, ...]}

In ChatGPT's, an edited question begins another branch of a tree: the branch that was last on the screen is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from edgetune.documents.chat_forms import Unread, drop_invalid, tidy
from edgetune.documents.chats import Window
from edgetune.documents.document import Turn
from edgetune.documents.messengers.json_items import OPENED, items, text_at, value_at
from edgetune.documents.reasons import Reason

_ARRAY, _ALONE = frozenset([()]), frozenset[tuple[str, ...]]()
_ROLES = {"user": "user", "human": "user", "assistant": "assistant"}
_NOT_SHOWN = "This block is not supported on your current device yet."
"""Line that Claude's export has in a message's text in place of what its assistant did with a tool."""


def conversations(window: Window, dropped: Counter[Reason]) -> Iterator[tuple[int, tuple[Turn, ...]]]:
    """Yield (number, turns) of each conversation that has an answer, numbered from 1 in the order of the file."""
    window.move(0)
    paths = _ARRAY if window.text.lstrip("\ufeff \t\r\n")[:1] == "[" else _ALONE
    number = 0
    for _, record in items(window, paths):
        if record is OPENED:
            continue
        number += 1
        try:
            yield number, tidy(_turns(record, dropped))
        except Unread as problem:
            dropped[problem.reason] += 1


def _turns(record: Any, dropped: Counter[Reason]) -> Iterator[Turn]:
    """Yield the turns of a conversation of either app. Raises Unread for anything else."""
    if isinstance(record, dict) and isinstance(record.get("mapping"), dict):
        yield from _chatgpt_turns(record, dropped)
    elif isinstance(record, dict) and isinstance(record.get("chat_messages"), list):
        yield from _claude_turns(record["chat_messages"], dropped)
    else:
        raise Unread(Reason.NOT_A_CONVERSATION)


def _chatgpt_turns(record: dict[str, Any], dropped: Counter[Reason]) -> Iterator[Turn]:
    for message in branch(record["mapping"], record.get("current_node")):
        role = text_at(message, "author", "role")
        is_hidden = value_at(message, "metadata", "is_visually_hidden_from_conversation") is True or message.get("weight") == 0
        is_said = value_at(message, "content", "content_type") in ("text", "multimodal_text") and role in _ROLES
        to_a_tool = message.get("recipient") not in (None, "all") or message.get("channel") == "commentary"
        if is_hidden or not is_said or to_a_tool:
            dropped[Reason.TOOL_MESSAGE] += 1
            continue
        parts = value_at(message, "content", "parts")
        parts = parts if isinstance(parts, list) else []
        texts = [part if isinstance(part, str) else text_at(part, "text") for part in parts]
        if any(not isinstance(part, str) for part in parts):
            dropped[Reason.MEDIA] += 1
        yield Turn(_ROLES[role], drop_invalid("".join(texts)))


def branch(mapping: dict[str, Any], current: Any) -> list[dict[str, Any]]:
    """Return the messages from the root of ChatGPT's tree to its current node.

    A tree whose nodes are each other's parents is followed once round. Where the current node is missing, the last one in the
    file without children is taken.
    """
    if not isinstance(current, str) or current not in mapping:
        parents = {text_at(node, "parent") for node in mapping.values()}
        current = next((name for name in reversed(mapping) if name not in parents), None)
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    while isinstance(current, str) and current in mapping and current not in seen:
        seen.add(current)
        message = value_at(mapping[current], "message")
        if isinstance(message, dict):
            found.append(message)
        current = value_at(mapping[current], "parent")
    return found[::-1]


def _claude_turns(messages: list[Any], dropped: Counter[Reason]) -> Iterator[Turn]:
    for message in messages:
        role = _ROLES.get(text_at(message, "sender"))
        if role is None:
            dropped[Reason.TOOL_MESSAGE] += 1
            continue
        parts = message.get("content") if isinstance(message.get("content"), list) else []
        texts = [text_at(part, "text") for part in parts if text_at(part, "type") == "text"]
        dropped[Reason.TOOL_MESSAGE] += sum(text_at(part, "type") in ("tool_use", "tool_result") for part in parts)
        dropped[Reason.MEDIA] += len(message.get("files") or []) if isinstance(message.get("files"), list) else 0
        text = "\n\n".join(text for text in texts if text.strip()) or text_at(message, "text")
        lines = [line for line in text.split("\n") if line.strip("` ") != _NOT_SHOWN]
        yield Turn(role, drop_invalid("\n".join(lines).strip()))
