"""Reads a long JSON text value by value: containers that a parser names are entered, everything in them is parsed whole.

A window of a few megabytes moves through the text, so that an export of a gigabyte takes little memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from edgetune.documents.chat_forms import Unread
from edgetune.documents.chats import Window
from edgetune.documents.reasons import Reason

Path = tuple[str, ...]
"""The keys that lead to a value; "*" stands for any place in an array."""
OPENED = object()
"""Stands for the value of a container that was entered: its own values follow."""

_SPACE = re.compile(r"[ \t\r\n]*")
_ENDS = {"{": "}", "[": "]"}
_DECODER = json.JSONDecoder()
_LONGEST_WORD = 64
"""A value that the window cuts fails within this many characters of its end. Chosen by hand."""


def items(window: Window, opened: frozenset[Path]) -> Iterator[tuple[Path, Any]]:
    """Yield (path, value) for each value in the containers whose paths are `opened`, in the order of the text.

    Raises Unread where the text is no JSON, or a value is longer than the window; what came before was yielded.
    """
    at = window.move(0)
    path: list[str] = []
    ends: list[str] = []
    while True:
        at, char = _next(window, at)
        place = tuple(path)
        entered = char in _ENDS and place in opened
        if entered:
            yield place, OPENED
            ends.append(_ENDS[char])
            path.append("*")
            at += 1
        else:
            value, at = _value(window, at)
            yield place, value
        at = _to_next_value(window, at, path, ends, entered)
        if not ends:
            return


def _to_next_value(window: Window, at: int, path: list[str], ends: list[str], entered: bool) -> int:
    """Pass commas, keys and closing brackets up to the next value; `path` and `ends` are changed with them."""
    while ends:
        at, char = _next(window, at)
        if char == ends[-1]:
            ends.pop()
            path.pop()
            at, entered = at + 1, False
            continue
        if not entered:
            if char != ",":
                raise Unread(Reason.BAD_EXPORT)
            at += 1
        if ends[-1] == "}":
            at, _ = _next(window, at)
            key, at = _value(window, at)
            at, colon = _next(window, at)
            if not isinstance(key, str) or colon != ":":
                raise Unread(Reason.BAD_EXPORT)
            path[-1], at = key, at + 1
        return at
    return at


def _next(window: Window, at: int) -> tuple[int, str]:
    """Return where the next character lies that is no space, and the character; "" at the end of the text."""
    while True:
        at = window.move(at)
        match = _SPACE.match(window.text, at)
        at = match.end() if match else at
        if at < len(window.text) or window.at_end:
            return at, window.text[at : at + 1]


def _value(window: Window, at: int) -> tuple[Any, int]:
    """Parse the value at `at`, and return it with the place after it. Raises Unread."""
    try:
        return _DECODER.raw_decode(window.text, at)
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated string") or error.pos > len(window.text) - _LONGEST_WORD
        raise Unread(Reason.LONG_VALUE if cut and not window.at_end else Reason.BAD_EXPORT) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested too deep
        raise Unread(Reason.BAD_EXPORT) from error


def value_at(record: Any, *keys: str) -> Any:
    """Return the value that lies under `keys` in nested objects, or None."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def text_at(record: Any, *keys: str) -> str:
    """Return the text that lies under `keys` in nested objects, or "" if anything else does."""
    value = value_at(record, *keys)
    return value if isinstance(value, str) else ""
