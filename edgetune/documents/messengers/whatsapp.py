"""Reads WhatsApp's exported chats, of iOS and of Android, in the spellings of many languages.

    [12/31/23, 10:15:32 PM] Anna: Are you coming?            iOS; notices and attachments begin with an invisible U+200E
    31.12.23, 22:15 - Anna: Are you coming?                  Android; notices have no writer

The order of day and month differs between phones, and no line says which it is: the whole file decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from edgetune.documents.messengers.clock import seconds_at
from edgetune.documents.messengers.lines import LongText
from edgetune.documents.messengers.messages import MARKS, Me, Message, without_marks
from edgetune.documents.reasons import Reason

_DATE = r"(\d{1,4})(?:[./-]\s?|[年년]\s?)(\d{1,2})(?:[./-]\s?|[月월]\s?)(\d{1,4})[.日일]?"
_WORD = r"[^\d\s\[\]:,–-][^\d\[\]:,–-]{0,11}?"
_TIME = rf"(?:({_WORD})\s?)?(\d{{1,2}})[:.](\d{{2}})(?:[:.](\d{{2}}))?(?:\s?({_WORD}))?"
_HEADER = re.compile(rf"[{MARKS}]*(?:\[{_DATE},?\s+{_TIME}\]\s|{_DATE},?\s+{_TIME}\s[-–]\s)")
_WRITER = re.compile(r"([^:\n\"“”„«»]{1,100}): ?")
_HEADER_CHARS = 80
"""Most characters of a message's date and time. Chosen by hand."""

_PM = {"pm", "μμ", "م", "下午", "午後", "오후", "晚上", "ip", "du", "nm", "em", "ös", "ch", "pg", "หลังเที่ยง"}
"""Words before or after an hour in the afternoon, without their dots and spaces."""
_AM = {"am", "πμ", "ص", "上午", "午前", "오전", "凌晨", "早上", "ap", "de", "vm", "fm", "öö", "sa", "ptg", "ก่อนเที่ยง"}
"""Words before or after an hour in the morning, without their dots and spaces. All other words, such as "klo" or "à",
say nothing about the hour."""

_LTR = "\u200e"
"""The mark with which WhatsApp begins what nobody typed: notices, attachments, deleted messages."""
_EDITED = {
    "This message was edited", "Diese Nachricht wurde bearbeitet", "Ce message a été modifié", "Se editó este mensaje",
    "Mensagem editada", "Esta mensagem foi editada", "Questo messaggio è stato modificato", "Dit bericht is bewerkt",
    "Данное сообщение изменено", "Wiadomość edytowana", "Bu mesaj düzenlendi",
}  # fmt: skip
_ATTACHED_FILE = re.compile(r":\s.*\.\w{2,5}")
_LONGEST_TAG = 240
"""Most characters of what WhatsApp appends in angle brackets. Chosen by hand: a file's name and a word."""
_OMITTED = re.compile(
    r"(?:image|video|video note|audio|sticker|GIF|document|Contact card) omitted|"
    r"(?:Bild|Video|Audio|Sticker|GIF|Dokument|Kontaktkarte) weggelassen",
    re.I,
)
_OMITTED_MARKED = re.compile(
    r"[^\n]{1,160}(?:omitted|weggelassen|omise?s?|absente?s?|omitid[oa]s?|omess[oaie]|ocult[oa]s?|weggelaten|pominięt\w|"
    r"пропущен\w?|utelämna\w|udeladt|vynechán\w?|edilmedi|省略|忽略|생략됨?)\W?",
    re.I,
)
"""Words for attachments in more languages, for a text that begins with the mark of what nobody typed."""
_PLACEHOLDER = re.compile(r"<([^<>\n]{3,200})>(?:\n|$)")
_FILE = re.compile(
    r"(?:\w{3}-\d{8}-WA\d{4}\.\w{2,5} \([^()\n]{4,40}\)|[^\n/\\<>]{1,120}\.\w{2,5} \((?:file attached|Datei angehängt|"
    r"fichier joint|archivo adjunto|file allegato|arquivo anexado|ficheiro anexado|bestand bijgevoegd|файл добавлен|"
    r"plik dołączony|załączono plik)\))(?:\n|$)",
    re.I,
)
_FILE_MARKED = re.compile(r"[^\n/\\<>]{1,160}\.\w{2,5} \([^()\n]{4,40}\)(?:\n|$)")
"""The name of an attached file, alone on the first line; a caption follows on the next."""
_DELETED = re.compile(
    r"(?:This message was deleted|You deleted this message|Diese Nachricht wurde gelöscht|Du hast diese Nachricht gelöscht|"
    r"Ce message a été supprimé|Vous avez supprimé ce message|Se eliminó este mensaje|Eliminaste este mensaje|"
    r"Mensagem apagada|Esta mensagem foi apagada|Você apagou esta mensagem|Questo messaggio è stato eliminato|"
    r"Hai eliminato questo messaggio|Dit bericht is verwijderd|U hebt dit bericht verwijderd|Данное сообщение удалено|"
    r"Вы удалили данное сообщение|Ta wiadomość została usunięta|Bu mesaj silindi)\.?",
    re.I,
)
_LOG_LEVELS = {"DEBUG", "INFO", "WARN", "WARNING", "ERROR", "TRACE", "FATAL", "NOTICE", "CRITICAL"}
_LINES_JUDGED = 200
"""Lines at the beginning of a file by which it is recognised. Chosen by hand."""
_FEWEST, _FEWEST_WRITTEN, _LARGEST_SHARE = 3, 2, 8
"""Messages that a chat has at least among those lines, those of them with a writer, and lines for each. Chosen by hand."""


@dataclass(frozen=True)
class Header:
    """The date and time that begin a message: three numbers of the date as they stand, and seconds of the day."""

    date: tuple[int, int, int]
    seconds: int
    rest: str


def header(line: str) -> Header | None:
    """Return the header of a line that begins a message, or None for a line that continues one."""
    match = _HEADER.match(line[:_HEADER_CHARS])
    if match is None:
        return None
    parts = next(part for part in (match.groups()[:8], match.groups()[8:]) if part[0])
    first, second, third, before, hour, minute, second_of_minute, after = parts
    hours = int(hour)
    word = re.sub(r"[\s.]", "", before or after or "").casefold()
    if word in _PM and hours < 12:
        hours += 12
    elif word in _AM and hours == 12:
        hours = 0
    seconds = hours * 3600 + int(minute) * 60 + int(second_of_minute or 0)
    return Header((int(first), int(second), int(third)), seconds, line[match.end() :])


ORDERS = ((2, 1, 0), (2, 0, 1), (0, 1, 2))
"""Orders of a date's numbers, as places of year, month and day; the first is taken where a file allows several alike."""


def order_of(dates: Iterable[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Return the order in which a file writes its dates: the one with the fewest impossible dates, then the shortest way from
    message to message, since a chat goes on from day to day."""
    wrong, way = [0] * len(ORDERS), [0.0] * len(ORDERS)
    last: list[float | None] = [None] * len(ORDERS)
    before: tuple[int, int, int] | None = None
    for date in dates:
        if date == before:
            continue
        before = date
        for number, order in enumerate(ORDERS):
            day = day_of(date, order)
            if day is None:
                wrong[number] += 1
                continue
            way[number] += abs(day - (last[number] or day))
            last[number] = day
    return min(zip(wrong, way, range(len(ORDERS)), ORDERS, strict=True))[3]


def day_of(date: tuple[int, int, int], order: tuple[int, int, int]) -> float | None:
    """Return the seconds at which a day begins, or None for an impossible date."""
    year, month, day = (date[place] for place in order)
    return seconds_at(year + 2000 if year < 100 else year, month, day)


def messages(lines: Callable[[], Iterable[str]], dropped: Counter[Reason]) -> Iterator[Message]:
    """Yield the messages of a chat. `lines` reads the file from its beginning: it is read twice.

    What nobody typed is counted in `dropped`.
    """
    order = order_of(found.date for line in lines() if (found := header(line)) is not None)
    current: Header | None = None
    text = LongText()
    for line in lines():
        found = header(line)
        if found is None:
            text.add(line)
            continue
        if current is not None:
            yield from _message(current, text, order, dropped)
        current, text = found, LongText(found.rest)
    if current is not None:
        yield from _message(current, text, order, dropped)


def is_monologue(lines: Callable[[], Iterable[str]], me: Me) -> bool:
    """Return True if the user wrote every message of a chat, as in "Message yourself". Stops reading at another's message."""
    is_mine = False
    for message in messages(lines, Counter()):
        is_mine = me.wrote(message)
        if not is_mine:
            break
    return is_mine


def _message(found: Header, text: LongText, order: tuple[int, int, int], dropped: Counter[Reason]) -> Iterator[Message]:
    """Yield the message that begins with a header, unless nobody typed it."""
    if text.is_too_long:
        dropped[Reason.LONG_MESSAGE] += 1
        return
    match = _WRITER.match(text.text)
    if match is None:
        dropped[Reason.NOTICE] += 1
        return
    typed, reason = typed_text(text.text[match.end() :])
    if reason is not None:
        dropped[reason] += 1
    if typed:
        day = day_of(found.date, order)
        writer = without_marks(match[1]).strip().removeprefix("~").strip()
        yield Message(writer, typed, None if day is None else day + found.seconds)


def typed_text(text: str) -> tuple[str, Reason | None]:
    """Return what a person typed of a message, or "", and the reason why something was dropped of it."""
    is_marked = text.startswith(_LTR)
    text, has_file = _without_tag(text.rstrip())
    bare = without_marks(text).strip()
    if _DELETED.fullmatch(bare):
        return "", Reason.DELETED_MESSAGE
    placeholder, file = _PLACEHOLDER.match(bare), (_FILE_MARKED if is_marked else _FILE).match(bare)
    if placeholder is not None and (" " in placeholder[1] or not placeholder[1].isascii()):
        # Android names the file on the next line where it knows the name.
        first, _, caption = bare[placeholder.end() :].strip().partition("\n")
        return (caption if re.fullmatch(r".{1,160}\.\w{2,5}", first) else f"{first}\n{caption}").strip(), Reason.MEDIA
    if file is not None:
        return bare[file.end() :].strip(), Reason.MEDIA
    if bare == "null" or (_OMITTED_MARKED if is_marked else _OMITTED).fullmatch(bare):
        return "", Reason.MEDIA
    if is_marked:
        return "", Reason.MEDIA if has_file else Reason.NOTICE
    return bare, Reason.MEDIA if has_file else None if bare else Reason.NOTICE


def _without_tag(text: str) -> tuple[str, bool]:
    """Return a text without what WhatsApp appended in angle brackets, and True if that is the name of an attached file."""
    at = text.rfind("<", max(len(text) - _LONGEST_TAG, 0))
    if at < 0 or not text.endswith(">"):
        return text, False
    is_marked, inner = text[:at].endswith(_LTR), text[at + 1 : -1]
    has_file = is_marked and _ATTACHED_FILE.search(inner) is not None
    if has_file or inner.rstrip(".") in _EDITED or (is_marked and at > 1 and text[: at - 1].strip()):
        return text[:at].rstrip(f"{_LTR} \n"), has_file
    return text, False


def looks_like_chat(lines: Iterable[str], is_named_so: bool) -> bool:
    """Return True if a text is an exported chat by its first lines. `is_named_so`: its name is one that WhatsApp gives.

    A note that quotes a message or two, a journal and a program's log are none.
    """
    head = [line for line, _ in zip(lines, range(_LINES_JUDGED), strict=False) if line.strip()]
    if not head or header(head[0]) is None:
        return False
    found = [header(line) for line in head]
    written = [match for one in found if one is not None and (match := _WRITER.match(one.rest))]
    if any(match[1].strip().upper() in _LOG_LEVELS for match in written):
        return False
    if is_named_so:
        return True
    begun = sum(one is not None for one in found)
    return begun >= _FEWEST and len(written) >= _FEWEST_WRITTEN and begun * _LARGEST_SHARE >= len(head)
