"""Reads imessage-exporter's text and HTML, in which the user is called Me.

    May 17, 2022  5:29:42 PM (Read by you after 1 hour)      a header, the writer, the text, and an empty line
    Anna
    Are you coming?

Replies to a message stand below it, indented, and again at their own time: only the latter are read.
"""

from __future__ import annotations

import html
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from edgetune.documents.chat_forms import Unread
from edgetune.documents.limits import MAX_MESSAGE_CHARS
from edgetune.documents.messengers.clock import seconds_at
from edgetune.documents.messengers.lines import LongText
from edgetune.documents.messengers.messages import Message
from edgetune.documents.reasons import Reason

_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
_TIME = re.compile(rf"({'|'.join(_MONTHS)}) (\d{{1,2}}), (\d{{4}}) {{1,2}}(\d{{1,2}}):(\d{{2}}):(\d{{2}}) ([AP])M")
_RECEIPT = re.compile(r"(?: \(Read by [^\n]{1,80}\))?")
_ME = "Me"
_REPLY = "This message responded to an earlier message."
_ATTACHED = re.compile(r"(?:/|~/|attachments/|[A-Z]:\\)[^\n]{0,500}\.\w{2,5}")
_TAPBACKS = ("Tapbacks:", "Reactions:")
_UNSENT = re.compile(r"(?:You|[^\n]{1,100}) unsent (?:this|a) message(?: part)?[^\n]{0,80}")
_SENT_WITH = re.compile(r"Sent with [A-Z][\w ]{2,30}")
_LINES_JUDGED, _FEWEST = 200, 4
"""Lines at the beginning by which a text is recognised, and messages in them of people who are not Me. Chosen by hand."""


def seconds_in(text: str) -> float | None:
    """Return the seconds of a time at the beginning of a text, or None if there is none."""
    match = _TIME.match(text)
    if match is None:
        return None
    hour = int(match[4]) % 12 + (12 if match[7] == "P" else 0)
    month = _MONTHS.index(match[1]) + 1
    return seconds_at(int(match[3]), month, int(match[2]), hour, int(match[5]), int(match[6]))


def looks_like_text(lines: Iterable[str]) -> bool:
    """Return True if a text is imessage-exporter's by its first lines: the line after a time alone is Me, or often the same.

    A journal whose entries begin with a time is none.
    """
    head = [line for line, _ in zip(lines, range(_LINES_JUDGED), strict=False)]
    if not head or _TIME.match(head[0]) is None:
        return False
    writers = [after.strip() for line, after in itertools.pairwise(head) if _is_header(line)]
    return _ME in writers or (len(writers) >= _FEWEST and len(set(writers)) * 2 <= len(writers))


def _is_header(line: str) -> bool:
    match = _TIME.match(line)
    return match is not None and _RECEIPT.fullmatch(line, match.end()) is not None


def from_text(lines: Iterable[str], dropped: Counter[Reason]) -> Iterator[Message]:
    """Yield the messages of a text export."""
    header = writer = ""
    text = LongText()
    for line in lines:
        if _is_header(line):
            yield from _from_text(header, writer, text, dropped)
            header, writer, text = line, "", LongText()
        elif _TIME.match(line):  # a notice, such as a renamed conversation, on the line of its time
            dropped[Reason.NOTICE] += 1
            yield from _from_text(header, writer, text, dropped)
            header, writer, text = "", "", LongText()
        elif header and not writer:
            writer = line.strip() or "?"
        else:
            text.add(line)
    yield from _from_text(header, writer, text, dropped)


def _from_text(header: str, writer: str, text: LongText, dropped: Counter[Reason]) -> Iterator[Message]:
    """Yield a message, without what the exporter adds to its text."""
    if not header or not writer:
        return
    if text.is_too_long:
        dropped[Reason.LONG_MESSAGE] += 1
        return
    typed: list[str] = []
    skips_indented = False
    for line in text.text.split("\n"):
        bare = line.strip()
        if line.startswith("    ") and (skips_indented or _is_header(bare)):
            skips_indented = True  # the rest of a reply, which stands at its own time too
        elif bare in _TAPBACKS:
            skips_indented = True
        elif _UNSENT.fullmatch(bare):
            dropped[Reason.DELETED_MESSAGE] += 1
        elif _ATTACHED.fullmatch(bare):
            dropped[Reason.MEDIA] += 1
        elif bare != _REPLY and not _SENT_WITH.fullmatch(bare):
            skips_indented = skips_indented and not bare
            typed.append(line.rstrip())
    said = "\n".join(typed).strip()
    if said:
        yield Message(writer, said, seconds_in(header), mine=writer == _ME)


# --- HTML --------------------------------------------------------------------------------------------------------------

_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)([^<>]*)>")
_CLASS = re.compile(r"\bclass\s*=\s*\"([^\"<>]*)\"")
_VOID = {"img", "hr", "br", "meta", "link", "input", "source", "wbr"}
_MEDIA_TAGS = {"img", "video", "audio"}
_LONGEST_TAG = 1 << 16
"""Most characters of a tag; what is longer is text. Chosen by hand."""
_MOST_DEPTH = 100
"""Deepest nesting of tags. Chosen by hand: the exporter's own is about 10."""
_PARTS = {"timestamp": "time", "sender": "writer", "bubble": "text"}
_IGNORED = {"replies", "tapbacks", "reactions", "announcement", "reply_context", "expressive"}


def looks_like_html(text: str) -> bool:
    """Return True if the beginning of a page is imessage-exporter's."""
    has = all(f'class="{name}"' in text or f'class ="{name}"' in text for name in ("message", "timestamp", "sender"))
    return has and re.search(r'class="(?:sent [A-Za-z]+|received)"', text) is not None


def from_html(pieces: Iterable[str], dropped: Counter[Reason]) -> Iterator[Message]:
    """Yield the messages of an HTML export. Raises Unread for tags that are nested too deep."""
    page = _Page(dropped)
    rest = ""
    for piece in pieces:
        text = rest + piece
        cut = text.rfind("<")
        if cut < 0 or len(text) - cut > _LONGEST_TAG:
            cut = len(text)
        rest = text[cut:]
        yield from page.read(text[:cut])
    yield from page.read(rest)


@dataclass
class _Page:
    """The state between two tags: the open tags, with the part of a message that each begins."""

    dropped: Counter[Reason]
    open: list[tuple[str, str]] = field(default_factory=list)
    parts: dict[str, list[str]] = field(default_factory=dict)
    size: int = 0
    mine: bool = False

    def read(self, text: str) -> Iterator[Message]:
        """Yield the messages that end in the next piece of the page."""
        at = 0
        for tag in _TAG.finditer(text):
            self._text(text[at : tag.start()])
            at = tag.end()
            name = tag[2].lower()
            if tag[1]:
                yield from self._close(name)
            else:
                self._open(name, tag[3])
        self._text(text[at:])

    def _part(self) -> str:
        """Return the part of a message that the innermost open tag belongs to; "ignored" in what the exporter adds."""
        kinds = [kind for _, kind in self.open if kind]
        return "ignored" if "ignored" in kinds else kinds[-1] if kinds else ""

    def _text(self, text: str) -> None:
        part = self._part() if text else ""
        if part in ("time", "writer", "text"):
            self.size += len(text)
            if self.size <= MAX_MESSAGE_CHARS:
                self.parts.setdefault(part, []).append(html.unescape(text))

    def _open(self, name: str, rest: str) -> None:
        found = _CLASS.search(rest.replace("class =", "class="))
        classes = found[1].split() if found is not None else []
        part = self._part()
        if name in _VOID:
            if name == "br" and part == "text":
                self.parts.setdefault("text", []).append("\n")
            elif name in _MEDIA_TAGS and part == "message":
                self.dropped[Reason.MEDIA] += 1
            return
        kind = ""
        if _IGNORED.intersection(classes):
            kind = "ignored"
        elif name == "div" and "message" in classes and not part:
            kind, self.parts, self.size, self.mine = "message", {}, 0, False
        elif part == "message":
            kind = next((_PARTS[name] for name in classes if name in _PARTS), "")
            self.mine = self.mine or (name == "div" and "sent" in classes)
            if name in _MEDIA_TAGS:
                self.dropped[Reason.MEDIA] += 1
            elif kind == "text" and self.parts.get("text"):
                self.parts["text"].append("\n")
        if len(self.open) >= _MOST_DEPTH:
            raise Unread(Reason.BAD_EXPORT)
        self.open.append((name, kind))

    def _close(self, name: str) -> Iterator[Message]:
        """Close the innermost open tag of this name and what was left open in it; yield the message that ends so."""
        if not any(name == opened for opened, _ in self.open):
            return
        while self.open:
            opened, kind = self.open.pop()
            if kind == "message":
                yield from self._finished()
            if opened == name:
                return

    def _finished(self) -> Iterator[Message]:
        said, writer, time = ("".join(self.parts.get(part, [])).strip() for part in ("text", "writer", "time"))
        if self.size > MAX_MESSAGE_CHARS:
            self.dropped[Reason.LONG_MESSAGE] += 1
        elif said:
            yield Message(_ME if self.mine else writer or "?", said, seconds_in(time), mine=self.mine)
