"""Makes conversations of messages: what the user wrote are the assistant's turns, what all others wrote the user's.

Messages that follow one another within minutes are one burst; an hour of silence ends a conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from edgetune.documents.chat_forms import Unread, drop_invalid, guanaco_text, tidy
from edgetune.documents.document import Document, Turn
from edgetune.documents.limits import MAX_SESSION_CHARS, MAX_SESSION_MESSAGES
from edgetune.documents.messengers.messages import MOST_PEOPLE, Me, Message
from edgetune.documents.reasons import Reason

BURST_SECONDS = 300.0
"""Longest silence within a burst, in seconds. Chosen by hand."""
SESSION_SECONDS = 3600.0
"""Silence that ends a conversation, in seconds. Chosen by hand: an hour."""


@dataclass
class People:
    """The people who write in an export, counted while its messages pass."""

    me: Me
    names: dict[str, None] = field(default_factory=dict)
    """The writers in the order of their first messages, MOST_PEOPLE at most."""
    has_me: bool = False
    broken: Reason | None = None
    """The reason why the rest of the export cannot be read."""

    def pass_on(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield the messages, up to a damaged place, and note who wrote them."""
        try:
            for message in messages:
                self.has_me = self.has_me or self.me.wrote(message)
                if len(self.names) < MOST_PEOPLE:
                    self.names[message.writer] = None
                yield message
        except Unread as problem:
            self.broken = problem.reason


def sessions(messages: Iterable[Message]) -> Iterator[list[Message]]:
    """Split messages where another chat begins, after an hour's silence, and where a conversation gets too long."""
    session: list[Message] = []
    chars = 0
    for message in messages:
        if session and (_is_new(session[-1], message) or len(session) >= MAX_SESSION_MESSAGES or chars > MAX_SESSION_CHARS):
            yield session
            session, chars = [], 0
        session.append(message)
        chars += len(message.text)
    if session:
        yield session


def _is_new(before: Message, message: Message) -> bool:
    """Return True if a message begins another conversation than the one before it belongs to."""
    return message.chat != before.chat or message.is_note != before.is_note or _gap(before, message) > SESSION_SECONDS


def _gap(before: Message, message: Message) -> float:
    """Return the seconds between two messages; 0 if the export gives no time. A clock that was set back is no silence."""
    if before.seconds is None or message.seconds is None:
        return 0.0
    return abs(message.seconds - before.seconds)


def bursts(session: Iterable[Message]) -> Iterator[Message]:
    """Join the messages that one person wrote within minutes, a line each."""
    texts: list[str] = []
    last: Message | None = None
    first: Message | None = None
    for message in session:
        if last is not None and first is not None and (message.writer != last.writer or _gap(last, message) > BURST_SECONDS):
            yield _joined(first, texts)
            first, texts = None, []
        first, last = first or message, message
        texts.append(message.text)
    if first is not None:
        yield _joined(first, texts)


def _joined(first: Message, texts: list[str]) -> Message:
    return Message(first.writer, "\n".join(texts), first.seconds, first.ids, first.mine, first.chat, first.is_note)


def turns(session: list[Message], me: Me) -> tuple[Turn, ...]:
    """Return the turns of a conversation. Raises Unread if the user answers nobody in it.

    What the user wrote before anybody else did is context: it opens the other side's first turn, under the user's name. Where
    several others write, each of their messages begins with its writer's name.
    """
    parts = [(message, me.wrote(message)) for message in bursts(session)]
    several = len({message.writer for message, mine in parts if not mine}) > 1
    opening = next((number for number, (_, mine) in enumerate(parts) if not mine), len(parts))
    answered = next((number for number in range(opening, len(parts)) if parts[number][1]), len(parts))
    said: list[Turn] = []
    for number, (message, mine) in enumerate(parts):
        text = drop_invalid(message.text)
        if (number < answered and (opening or several)) or (several and not mine):
            text = f"{drop_invalid(message.writer)}: {text}"
        said.append(Turn("assistant" if mine and number >= answered else "user", text))
    return tidy(said)


def conversations(
    messages: Iterable[Message], people: People, path: str, keep: Callable[[Document], None]
) -> dict[Reason, int]:
    """Pass each conversation with an answer of the user's to `keep`, and return how many others there were.

    A conversation is named by its place among all of the export: `path#3`. Messages of the user to themselves become notes.
    """
    left = 0
    for number, session in enumerate(sessions(people.pass_on(messages)), 1):
        name = f"{path}#{number}"
        if session[0].is_note:
            keep(Document.of(name, "\n\n".join(drop_invalid(message.text) for message in bursts(session))))
            continue
        try:
            said = turns(session, people.me)
        except Unread:
            left += 1
            continue
        keep(Document.of(name, guanaco_text(said), said))
    return {Reason.NO_ANSWER_OF_MINE: left} if left else {}
