"""Reads chats in JSON lines as Documents with turns: Guanaco's text, messages, or ShareGPT's conversations.

    {"text": "### Human: How deep? ### Assistant: Two inches."}            Guanaco (QLoRA's OASST1)
    {"messages": [{"role": "user", "content": "How deep?"}, ...]}          OpenAI's and Hugging Face's
    {"conversations": [{"from": "human", "value": "How deep?"}, ...]}      ShareGPT

A {"text": ...} without the markers of turns is a plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from edgetune.documents.document import Document, Reason, Skipped, Turn
from edgetune.documents.encoding import unify_line_ends

MAX_LINE_BYTES = 4 << 20
"""Longest line that is read, in bytes. Chosen by hand."""
MAX_TURNS = 1000
"""Largest number of turns in one chat. Chosen by hand."""
_LINES_LISTED = 20
"""Largest number of line numbers that a skip lists. Chosen by hand."""
_MARKER = re.compile(r"### (Human|Assistant):")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_GUANACO_NAMES = {"user": "### Human: ", "assistant": "### Assistant: ", "system": ""}


def read_chats(file: BinaryIO, path: str) -> tuple[list[Document], list[Skipped]]:
    """Return the documents of a JSON-lines file, and its unreadable lines, counted by reason."""
    documents: list[Document] = []
    bad: dict[Reason, list[int]] = {}
    for number, line in bounded_lines(file):
        if line is None:
            bad.setdefault(Reason.LONG_LINE, []).append(number)
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError):  # RecursionError: nested deeper than any chat
            bad.setdefault(Reason.BAD_LINE, []).append(number)
            continue
        document = read_record(record, f"{path}#{number}")
        if document is None:
            bad.setdefault(Reason.NOT_A_CHAT, []).append(number)
        else:
            documents.append(document)
    skipped = [Skipped(path, reason, len(lines), tuple(lines[:_LINES_LISTED])) for reason, lines in bad.items()]
    return documents, skipped


def bounded_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line with its number, counted from 1; None stands for a line over MAX_LINE_BYTES, which is skipped."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield number, None


def read_record(record: Any, path: str) -> Document | None:
    """Return the document in one parsed line; None if it is neither a text nor a chat."""
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("text"), str):
        return from_text(drop_invalid(record["text"]), path)
    for key, role_key, text_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        messages = record.get(key)
        if isinstance(messages, list) and 0 < len(messages) <= MAX_TURNS:
            turns = tidy([read_message(message, role_key, text_key) for message in messages])
            return Document.of(path, guanaco_text(turns), turns) if turns else None
    return None


def from_text(text: str, path: str) -> Document | None:
    """Return a chat in Guanaco's form if the text begins with a turn's marker, else a plain text; None if it is empty."""
    if not text.strip():
        return None
    pieces = _MARKER.split(text)  # before, name, text, name, text, ...
    if len(pieces) == 1 or pieces[0].strip():
        return Document.of(path, text)
    if len(pieces) // 2 > MAX_TURNS:
        return None
    names, texts = pieces[1::2], pieces[2::2]
    turns = tidy([Turn(_ROLES[name.lower()], text.strip()) for name, text in zip(names, texts, strict=True)])
    return Document.of(path, text, turns) if turns else None


def read_message(message: Any, role_key: str, text_key: str) -> Turn | None:
    """Return the turn in a message whose content is a string, or a list of parts with text; None for anything else."""
    if not isinstance(message, dict):
        return None
    role, content = message.get(role_key), message.get(text_key)
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(content) else None
    if not isinstance(role, str) or role not in _ROLES or not isinstance(content, str):
        return None
    return Turn(_ROLES[role], drop_invalid(content).strip())


def tidy(turns: list[Turn | None]) -> tuple[Turn, ...] | None:
    """Return the conversation as every chat template accepts it: alternating turns, the user's first. None if it holds no
    answer, or a turn that is None.

    Empty turns and an assistant's greeting before any question are dropped; neighbouring turns of one role become one.
    """
    tidied: list[Turn] = []
    for turn in turns:
        if turn is None:
            return None  # one unreadable message would change what the others answer
        if not turn.text or (turn.role == "assistant" and not any(old.role == "user" for old in tidied)):
            continue
        if tidied and tidied[-1].role == turn.role:
            tidied[-1] = Turn(turn.role, f"{tidied[-1].text}\n\n{turn.text}")
        else:
            tidied.append(turn)
    return tuple(tidied) if any(turn.role == "assistant" for turn in tidied) else None


def guanaco_text(turns: tuple[Turn, ...] | None) -> str:
    """Return a conversation in Guanaco's form, in which QLoRA was trained."""
    return " ".join(_GUANACO_NAMES[turn.role] + turn.text for turn in turns or ())


def drop_invalid(text: str) -> str:
    """Return `text` without what JSON can spell but no text holds: NUL, halves of surrogate pairs; unify its line ends."""
    return unify_line_ends(re.sub("[\ud800-\udfff]", "\ufffd", text.replace("\0", "")))
