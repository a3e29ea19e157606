"""Recognises an export by what is in it, and reads it into documents: conversations in which the user is the assistant."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import partial

from edgetune.documents.chat_forms import Unread, guanaco_text
from edgetune.documents.chats import Window, encoding_of_chats
from edgetune.documents.document import Document, Skipped
from edgetune.documents.encoding import Encoding
from edgetune.documents.messengers import assistants, discord, imessage, signal, slack, telegram, whatsapp
from edgetune.documents.messengers.lines import lines, texts
from edgetune.documents.messengers.messages import MOST_PEOPLE, Me, Message
from edgetune.documents.messengers.sessions import People, conversations
from edgetune.documents.reasons import Reason

SUFFIXES = (".txt", ".md", ".json", ".html", ".htm")
"""Suffixes of files that may be an export."""

HEAD_BYTES = 1 << 16
"""Bytes at the beginning of a file by which it is recognised. Chosen by hand."""

Blocks = Callable[[], Iterator[bytes]]
"""Reads a file from its beginning, block by block."""
Keep = Callable[[Document], None]


class App(StrEnum):
    """An app and the form of its export."""

    WHATSAPP = "WhatsApp"
    TELEGRAM = "Telegram"
    SIGNAL_MARKDOWN = "Signal (chat.md)"
    SIGNAL_LINES = "Signal (data.json)"
    SIGNAL_DESKTOP = "Signal Desktop"
    DISCORD = "Discord"
    IMESSAGE_TEXT = "iMessage (text)"
    IMESSAGE_HTML = "iMessage (HTML)"
    ASSISTANT = "ChatGPT or Claude"


_WHATSAPP_NAME = re.compile(r"_chat\.txt|.*whatsapp.*\.txt", re.I)
_NAMES_SHOWN = 6
"""Most people whom --dry-run names. Chosen by hand."""
_NUMBERS = ("nobody", "one person", "two people", "three people", "four people", "five people", "six people")


def recognise(name: str, first: bytes) -> App | None:
    """Return the app whose export a file is, by its name and its first HEAD_BYTES, or None for any other."""
    encoding = encoding_of_chats(first)
    try:
        head = "".join(texts([first[:HEAD_BYTES]], Encoding(encoding.name, encoding.codec, "replace"))).lstrip("\ufeff")
    except UnicodeError:
        return None
    suffix = f".{name.lower().rpartition('.')[2]}"
    if suffix == ".json":
        return _recognise_json(head)
    if suffix in (".html", ".htm"):
        return App.IMESSAGE_HTML if imessage.looks_like_html(head) else None
    if suffix == ".md":
        return App.SIGNAL_MARKDOWN if signal.looks_like_chat(lines([head])) else None
    if suffix == ".txt" and whatsapp.looks_like_chat(lines([head]), _WHATSAPP_NAME.fullmatch(name) is not None):
        return App.WHATSAPP
    return App.IMESSAGE_TEXT if suffix == ".txt" and imessage.looks_like_text(lines([head])) else None


def _recognise_json(head: str) -> App | None:
    """Return the app by the names in the beginning of a JSON text. Inside a string, a quotation mark follows a backslash."""
    begin = head.lstrip()[:1]

    def has(name: str, value: str = "") -> bool:
        return re.search(rf'(?<!\\)"{name}"\s*:\s*{value}', head) is not None

    if (has("mapping", r"\{") and has("parent") and has("message")) or has("chat_messages", r"\["):
        return App.ASSISTANT
    if begin == "{" and has("messages", r"\[") and has("channel", r"\{") and has("guild", r"\{"):
        return App.DISCORD
    if begin == "{" and has("messages", r"\[") and (has("from_id") or has("actor_id")) and has("type"):
        return App.TELEGRAM
    if begin == "{" and has("personal_information", r"\{") and has("about", '"'):
        return App.TELEGRAM
    if begin == "{" and all(has(name) for name in ("sender", "body", "reactions", "attachments", "date")):
        return App.SIGNAL_LINES
    if begin == "[" and has("sent_at", r"\d") and has("conversationId", '"') and has("type", '"(?:incoming|outgoing)"'):
        return App.SIGNAL_DESKTOP
    return None


def read_export(app: App, blocks: Blocks, path: str, me: Sequence[str], keep: Keep) -> list[Skipped]:
    """Pass each conversation of an export to `keep`, and return what was left out of it, counted by cause."""
    encoding = encoding_of_chats(next(blocks(), b""))
    dropped: Counter[Reason] = Counter()

    def pieces() -> Iterator[str]:
        return texts(blocks(), encoding)

    if app is App.ASSISTANT:
        return _read_assistant(Window(pieces()), path, keep, dropped)
    return read_people(_messages(app, pieces, Me(me), dropped), path, me, keep, dropped)


def read_slack(files: Mapping[str, Blocks], path: str, me: Sequence[str], keep: Keep) -> list[Skipped]:
    """Pass each conversation of a Slack export to `keep`, and return what was left out.

    files: the export's files by their path in it, in the order of `slack.exports`.
    """
    dropped: Counter[Reason] = Counter()

    def window(blocks: Blocks) -> Window:
        return Window(texts(blocks(), encoding_of_chats(b"")))

    names: slack.Names = {}
    try:
        names = slack.people(window(files[slack.USERS])) if slack.USERS in files else {}
    except Unread as problem:
        dropped[problem.reason] += 1
    days = [(name, partial(window, blocks)) for name, blocks in files.items() if slack.is_day(name)]
    return read_people(slack.messages(days, names, dropped), path, me, keep, dropped)


def _messages(app: App, pieces: Callable[[], Iterator[str]], me: Me, dropped: Counter[Reason]) -> Iterator[Message]:
    """Return the messages of an export of people's chats. A WhatsApp chat in which the user alone writes becomes notes."""

    def numbered() -> Iterator[str]:
        for number, line in enumerate(lines(pieces())):
            yield line.removeprefix("\ufeff") if number == 0 else line

    match app:
        case App.WHATSAPP:
            if whatsapp.is_monologue(numbered, me):
                return (dataclasses.replace(found, is_note=True) for found in whatsapp.messages(numbered, dropped))
            return whatsapp.messages(numbered, dropped)
        case App.SIGNAL_MARKDOWN:
            return signal.from_markdown(numbered(), dropped)
        case App.IMESSAGE_TEXT:
            return imessage.from_text(numbered(), dropped)
        case App.IMESSAGE_HTML:
            return imessage.from_html(pieces(), dropped)
        case App.TELEGRAM:
            return telegram.messages(Window(pieces()), dropped)
        case App.DISCORD:
            return discord.messages(Window(pieces()), dropped)
        case App.SIGNAL_LINES:
            return signal.from_json_lines(Window(pieces()), dropped)
        case _:
            return signal.from_desktop(Window(pieces()), dropped)


def read_people(
    messages: Iterable[Message], path: str, me: Sequence[str], keep: Keep, dropped: Counter[Reason]
) -> list[Skipped]:
    """Pass each conversation between people to `keep`, and return what was left out.

    Where neither the export nor --me says who the user is, nothing is kept, and that is the one reason returned.
    """
    people = People(Me(me))
    dropped.update(conversations(messages, people, path, keep))
    if people.broken is not None:
        dropped[people.broken] += 1
    if people.names and not people.has_me:
        return [_unknown_me(people, path)]
    return account(path, dropped)


def account(path: str, dropped: Counter[Reason]) -> list[Skipped]:
    """Return what was left out of an export as skips."""
    return [Skipped(path, reason, count) for reason, count in sorted(dropped.items()) if count]


def _unknown_me(people: People, path: str) -> Skipped:
    """Return the skip of an export in which nobody is known to be the user. Its sentence tells no name."""
    count = len(people.names)
    number = f"over {MOST_PEOPLE:,} people" if count >= MOST_PEOPLE else f"{count:,} people"
    number = _NUMBERS[count] if count < len(_NUMBERS) else number
    write = "writes" if count == 1 else "write"
    advice = "type --me with your name as the export writes it"
    if people.me.is_given:
        found = (
            f"none of the names given with --me is among the {number} who {write} here"
            if count > 1
            else ("the one person who writes here has none of the names given with --me")
        )
    else:
        found = f"{number} {write} here"
    names = tuple(list(people.names)[:_NAMES_SHOWN])
    return Skipped(path, Reason.WHO_IS_ME, detail=f"{found}; {advice}", people=names)


def _read_assistant(window: Window, path: str, keep: Keep, dropped: Counter[Reason]) -> list[Skipped]:
    """Pass each conversation with ChatGPT or Claude to `keep`, and return what was left out."""
    try:
        for number, turns in assistants.conversations(window, dropped):
            keep(Document.of(f"{path}#{number}", guanaco_text(turns), turns))
    except Unread as problem:
        dropped[problem.reason] += 1
    return account(path, dropped)
