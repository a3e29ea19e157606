"""Finds where each answer of a conversation stands in the text that a chat template renders.

A template does not say where it puts a message: it may trim it, drop its reasoning, or write something before it. So each
message is framed by marks (random digits, which no message can contain) and the conversation is rendered again. A mark counts
only if the text is the same without the marks, and then it stands exactly where the message begins or ends in it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.runtime.errors import TokenizerError

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""Renders messages, with the beginning of the next answer (the generation prompt) if the flag is True."""
EndsOf = Callable[[str], list[int]]
"""Returns the positions at which a rendered text has a token that ends generation."""

_WHITE_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Span:
    """The assistant's turn in a rendered text: characters from `start`, where generation would begin, to `end`.

    `stop` is the position of the token that ends the turn, which is `end` itself, or None if the template writes none.
    """

    start: int
    end: int
    stop: int | None


class RenderedChat:
    """A conversation as its template renders it (`text`), and where its messages stand in there."""

    def __init__(self, render: Render, messages: Sequence[Message], ends_of: EndsOf) -> None:
        """Render `messages`. Raises TokenizerError as `render` does."""
        self._render, self._messages = render, messages
        self.text = render(messages, False)
        self._ends = ends_of(self.text)
        self._marks = _Marks(len(messages))
        self._starts: dict[int, int] = {}
        self._stops: dict[int, int] = {}
        self._framed_at: dict[int, tuple[int, int]] = {}
        self._tried: set[tuple[int, tuple[int, int]]] = set()
        for place in _PLACES:
            self._find(place)

    def shows(self, number: int) -> bool:
        """Return True if the text of a message stands in the rendered text."""
        return number in self._stops

    def answer(self, number: int) -> Span | None:
        """Return the span of the assistant's turn `number`; None if it cannot be told where it begins or ends."""
        is_silent = not str(self._messages[number].get("content") or "").strip()  # it calls tools, and says nothing
        start = self._answer_start(number) if is_silent or number in self._starts or number in self._stops else None
        if start is None:
            return None
        limit = min((place for other, place in self._starts.items() if other > number), default=len(self.text))
        is_last = number + 1 == len(self._messages)
        if not is_last and limit == len(self.text):
            return None  # what follows cannot be told from this turn
        own_end = max(self._stops.get(number, start), start)
        stop = next((place for place in self._ends if own_end <= place <= limit), None)
        if stop is not None:
            return Span(start, stop, stop)
        if number not in self._stops:
            return None
        return Span(start, len(self.text) if is_last else self._end_without_token(number, own_end, limit), None)

    # --- where the messages stand -----------------------------------------------------------------------------------------

    def _find(self, place: Callable[[str], tuple[int, int]]) -> None:
        """Look for the messages not found yet, framed at `place`: all together, or one by one if that changes the text."""
        missing = {
            number: place(message["content"])
            for number, message in enumerate(self._messages)
            if (number not in self._starts or number not in self._stops)
            and isinstance(message.get("content"), str)
            and message["content"].strip()
        }
        missing = {number: at for number, at in missing.items() if (number, at) not in self._tried}
        self._tried.update(missing.items())
        if missing and not self._take(missing):
            for number, at in missing.items():
                self._take({number: at})

    def _take(self, frames: dict[int, tuple[int, int]]) -> bool:
        """Render with marks around some messages and note where they stand; return False if the marks change the text."""
        found = self._marks.render(self._render, self._messages, frames, False)
        if found is None or found.text != self.text:
            return False
        for number, at in frames.items():
            start, stop = found.places.get((number, 0)), found.places.get((number, 1))
            if start is not None:
                self._starts.setdefault(number, start)
            if stop is not None and number not in self._stops:
                self._stops[number], self._framed_at[number] = stop, at
        return True

    # --- where an answer begins and ends ----------------------------------------------------------------------------------

    def _answer_start(self, number: int) -> int | None:
        """Return where generation would begin: after the generation prompt, as far as the rendered text has it."""
        own = self._starts.get(number)
        before = number - 1
        if before not in self._stops or (own is not None and own < self._stops[before]):
            return own
        prompt, bare = (self._tail(before + 1, before, flag) for flag in (True, False))
        if prompt is None or bare is None:
            return own
        between = self.text[self._stops[before] : own]
        agreed = common_prefix(prompt, between)
        # Without the answer's own mark, the whole prompt must be there. With it, the end of the turn before is enough: a
        # prompt may go on with `<think>`, which the template does not write before earlier answers.
        needed = common_prefix(prompt, bare) if own is not None else len(prompt)
        return self._stops[before] + agreed if agreed >= needed else own

    def _end_without_token(self, number: int, own_end: int, limit: int) -> int:
        """Return the end of an answer after which no token ends generation: as far as it is written the same at the end."""
        tail = self._tail(number + 1, number, False)
        return own_end + common_prefix(tail or "", self.text[own_end:limit])

    def _tail(self, count: int, number: int, prompt: bool) -> str | None:
        """Render the first `count` messages and return what follows message `number`; None if it cannot be told."""
        found = self._marks.render(self._render, self._messages[:count], {number: self._framed_at[number]}, prompt)
        place = found.places.get((number, 1)) if found is not None else None
        return found.text[place:] if found is not None and place is not None else None


@dataclass(frozen=True)
class _Found:
    """A rendered text without its marks, and the position of each mark that it held once: (message, 0 or 1) to position."""

    text: str
    places: dict[tuple[int, int], int]


class _Marks:
    """Frames messages with marks and finds these again. A mark is a random number: no filter of a template changes digits."""

    def __init__(self, messages: int) -> None:
        self._width = len(str(2 * messages))
        self._secret = f"{secrets.randbelow(10**24):024d}"
        self._pattern = re.compile(rf"{self._secret}(\d{{{self._width}}})")

    def render(
        self, render: Render, messages: Sequence[Message], frames: Mapping[int, tuple[int, int]], prompt: bool
    ) -> _Found | None:
        """Render with a mark at both positions that `frames` gives of a message; None if the template refuses that."""
        framed = list(messages)
        for number, (start, stop) in frames.items():
            content = framed[number]["content"]
            marks = (f"{self._secret}{2 * number + side:0{self._width}d}" for side in (0, 1))
            content = content[:start] + next(marks) + content[start:stop] + next(marks) + content[stop:]
            framed[number] = {**framed[number], "content": content}
        try:
            text = render(framed, prompt)
        except TokenizerError:
            return None
        places: dict[tuple[int, int], list[int]] = {}
        pieces, at, size = [], 0, 0
        for match in self._pattern.finditer(text):
            pieces.append(text[at : match.start()])
            size += len(pieces[-1])
            places.setdefault(divmod(int(match[1]), 2), []).append(size)
            at = match.end()
        once = {mark: where[0] for mark, where in places.items() if len(where) == 1}
        return _Found("".join([*pieces, text[at:]]), once)


def _whole(content: str) -> tuple[int, int]:
    """Return the range of a message with the white space around it, for templates that keep it."""
    return 0, len(content)


def _trimmed(content: str) -> tuple[int, int]:
    """Return the range of a message without the white space around it, for templates that trim it."""
    return len(content) - len(content.lstrip()), len(content.rstrip())


def _after_thought(content: str) -> tuple[int, int]:
    """Return the range of a message after its reasoning, for templates that drop or move that."""
    start, stop = _trimmed(content)
    thought = content.rfind("</think>", start, stop)
    if thought < 0:
        return start, stop
    after = _WHITE_SPACE.match(content, thought + len("</think>"))
    return min(after.end() if after else start, stop), stop


_PLACES = (_whole, _trimmed, _after_thought)


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return the number of leading items that two sequences share."""
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
