"""Exports of chat apps become conversations in which the user is the assistant, and nothing of them is lost unsaid."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edgetune.config import DataConfig
from edgetune.documents.document import Document, Reading
from edgetune.documents.messengers.exports import App, recognise
from edgetune.documents.messengers.messages import Me, Message
from edgetune.documents.messengers.sessions import bursts, sessions, turns
from edgetune.documents.messengers.slack import plain_text
from edgetune.documents.messengers.whatsapp import header, order_of, typed_text
from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason
from edgetune.documents.summary import unread_chats
from edgetune.runtime.errors import DataError

LTR, NARROW = "\u200e", "\u202f"


def put(folder: Path, name: str, content: Any) -> Path:
    """Write a file of a text, of bytes, or of a value as JSON."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(data)
    return path


def said(document: Document) -> list[tuple[str, str]]:
    """Return (role, text) of each turn."""
    return [(turn.role, turn.text) for turn in document.turns or ()]


def read(path: Path, *me: str) -> Reading:
    """Read a file or folder, with what --me says."""
    return read_notes([path], DataConfig(me=me))


def counts(reading: Reading) -> dict[Reason, int]:
    """Return how much was left out for each reason."""
    return {skip.reason: skip.count for skip in reading.skipped}


EVENING = [("user", "Is the kiln free tonight?"), ("assistant", "From eight.\nBring the glaze.")]

# --- WhatsApp ---------------------------------------------------------------------------------------------------------

IOS = f"""\
{LTR}[12/31/23, 7:02:11{NARROW}PM] Anna: {LTR}Messages and calls are end-to-end encrypted.
[12/31/23, 7:02:11{NARROW}PM] Anna: Is the kiln free tonight?
{LTR}[12/31/23, 7:03:00{NARROW}PM] Anna: {LTR}<attached: 00000012-PHOTO-2023-12-31.jpg>
[12/31/23, 7:04:05{NARROW}PM] ~{NARROW}Ben Potter: From eight. {LTR}<This message was edited>
[12/31/23, 7:04:45{NARROW}PM] ~{NARROW}Ben Potter: Bring the glaze.
[12/31/23, 7:05:00{NARROW}PM] Anna: {LTR}This message was deleted.
"""
ANDROID = """\
31.12.23, 19:01 - Nachrichten und Anrufe sind Ende-zu-Ende-verschlüsselt. Tippe hier.
31.12.23, 19:02 - Anna: Is the kiln free tonight?
31.12.23, 19:03 - Anna: <Medien ausgeschlossen>
31.12.23, 19:04 - Ben Potter: From eight. <Diese Nachricht wurde bearbeitet.>
31.12.23, 19:04 - Ben Potter: Bring the glaze.
31.12.23, 19:05 - Anna: Diese Nachricht wurde gelöscht.
"""


@pytest.mark.parametrize(
    "text", [IOS, ANDROID, IOS.replace("\n", "\r\n"), "\ufeff" + ANDROID], ids=["iOS", "Android", "CRLF", "BOM"]
)
def test_a_whatsapp_chat_becomes_a_conversation_without_what_nobody_typed(tmp_path: Path, text: str) -> None:
    reading = read(put(tmp_path, "_chat.txt", text), "ben potter")
    assert [said(document) for document in reading.documents] == [EVENING]
    assert counts(reading) == {Reason.NOTICE: 1, Reason.MEDIA: 1, Reason.DELETED_MESSAGE: 1}


def test_a_message_over_several_lines_stays_whole(tmp_path: Path) -> None:
    lines = "31.12.23, 19:02 - Anna: Flour\n\n  - 200 g\n31.12.23, 19:03 - Ben: Yes\n31.12.23, 19:03 - Anna: Good\n"
    (document,) = read(put(tmp_path, "a.txt", lines), "Ben").documents
    assert said(document) == [("user", "Flour\n\n  - 200 g"), ("assistant", "Yes"), ("user", "Good")]


HEADERS = {
    "[31.12.23, 22:15:32] Anna: x": ((31, 12, 23), 80132),
    "[31/12/2023 22:15:32] Anna: x": ((31, 12, 2023), 80132),
    "12/31/23, 10:15 PM - Anna: x": ((12, 31, 23), 80100),
    f"12/31/23, 12:15{NARROW}AM - Anna: x": ((12, 31, 23), 900),
    "31/12/2023, 10:15 p. m. - Anna: x": ((31, 12, 2023), 80100),
    "31.12.2023 klo 22.15 - Anna: x": ((31, 12, 2023), 80100),
    "31/12/2023 à 22:15 - Anna: x": ((31, 12, 2023), 80100),
    "2023. 12. 31. 22:15 - Anna: x": ((2023, 12, 31), 80100),
    "2023/12/31 下午10:15 - Anna: x": ((2023, 12, 31), 80100),
    "2023년 12월 31일 오후 10:15 - Anna: x": ((2023, 12, 31), 80100),
    "31-12-2023 22:15 - Anna: x": ((31, 12, 2023), 80100),
}


@pytest.mark.parametrize("line", HEADERS)
def test_a_header_of_whatsapp_is_read_in_many_languages(line: str) -> None:
    found = header(line)
    assert found is not None
    assert (found.date, found.seconds, found.rest) == (*HEADERS[line], "Anna: x")


@pytest.mark.parametrize(
    "line", ["- 12/31/23, 10:15 PM", "12.5 - 3 = 9.5", "2023-12-31 a day", "[12] note", "1/2/3", "31.12.23, 22:15 Anna: x"]
)
def test_other_lines_with_numbers_are_no_headers(line: str) -> None:
    assert header(line) is None


def test_the_whole_file_decides_between_day_and_month() -> None:
    assert order_of([(1, 2, 24), (2, 2, 24), (3, 2, 24)]) == (2, 1, 0)  # three days of February, not of three months
    assert order_of([(1, 2, 24), (1, 3, 24), (1, 4, 24)]) == (2, 0, 1)  # three days of January
    assert order_of([(1, 2, 24), (2, 13, 24)]) == (2, 0, 1)
    assert order_of([(1, 2, 24), (13, 2, 24)]) == (2, 1, 0)
    assert order_of([(2023, 12, 30), (2023, 12, 31)]) == (0, 1, 2)
    assert order_of([(3, 4, 24)]) == (2, 1, 0)  # nothing decides: day first, as in most of the world


TYPED = {
    "image omitted": ("", Reason.MEDIA),
    f"{LTR}sticker omitted": ("", Reason.MEDIA),
    f"{LTR}Bild weggelassen": ("", Reason.MEDIA),
    "<Media omitted>": ("", Reason.MEDIA),
    "<省略多媒体文件>": ("", Reason.MEDIA),
    "<Médias omis>\nkiln.mod": ("", Reason.MEDIA),
    "IMG-20250330-WA0001.jpg (Datei angehängt)\nthe kiln": ("the kiln", Reason.MEDIA),
    f"{LTR}shard list.pdf (file attached)": ("", Reason.MEDIA),
    f"Look {LTR}<attached: 00000012-PHOTO.jpg>": ("Look", Reason.MEDIA),
    "You deleted this message": ("", Reason.DELETED_MESSAGE),
    f"{LTR}Missed voice call": ("", Reason.NOTICE),
    "Das habe ich weggelassen": ("Das habe ich weggelassen", None),
    "see plan.txt (the old one)": ("see plan.txt (the old one)", None),
    "a <b> c": ("a <b> c", None),
    "<grin>": ("<grin>", None),
    "@\u2068Anna\u2069 yes": ("@Anna yes", None),
}


@pytest.mark.parametrize("text", TYPED)
def test_what_a_person_typed_is_told_from_what_whatsapp_wrote(text: str) -> None:
    assert typed_text(text) == TYPED[text]


def test_a_note_that_quotes_messages_and_a_log_stay_notes(tmp_path: Path) -> None:
    quotes = "31.12.23, 19:02 - Anna: Is the kiln free?\n31.12.23, 19:04 - Ben: From eight.\nI wrote this down at once.\n"
    put(tmp_path, "quotes.txt", quotes)
    put(tmp_path, "later.txt", "What they wrote:\n" + ANDROID)
    put(tmp_path, "log.txt", "".join(f"2024-03-0{day} 10:00 - INFO: started {day}\n" for day in range(1, 9)))
    put(tmp_path, "journal.txt", "".join(f"Dec {day}, 2023 10:00:00 PM\nFired {day} bowls.\n\n" for day in range(10, 20)))
    put(tmp_path, "signal.md", "# Signal\n[2024-03-05, 10:15] Me: hello\n")
    reading = read(tmp_path, "Ben")
    assert [(document.path, document.is_chat) for document in reading.documents] == [
        ("journal.txt", False), ("later.txt", False), ("log.txt", False), ("quotes.txt", False), ("signal.md", False)
    ]  # fmt: skip


def test_a_whatsapp_chat_with_oneself_becomes_notes(tmp_path: Path) -> None:
    alone = "".join(f"31.12.23, {hour}:0{minute} - Ben: {text}\n" for hour, minute, text in (
        (9, 1, "Order cobalt"), (9, 2, "and two bags of clay"), (15, 0, "The kiln takes nine hours"),
    ))  # fmt: skip
    put(tmp_path, "WhatsApp Chat with Ben.txt", alone)
    reading = read(tmp_path, "Ben")
    assert [(document.text, document.is_chat) for document in reading.documents] == [
        ("Order cobalt\nand two bags of clay", False), ("The kiln takes nine hours", False)
    ]  # fmt: skip
    assert counts(reading) == {}
    # Of somebody else it is no note of the user's.
    with pytest.raises(DataError, match="the one person who writes here has none of the names given with --me"):
        read(tmp_path, "Anna")


# --- who is me --------------------------------------------------------------------------------------------------------


def test_without_me_a_chat_is_skipped_in_one_sentence_that_tells_no_name(tmp_path: Path) -> None:
    put(tmp_path, "chats.txt", ANDROID)
    put(tmp_path, "note.md", "The kiln takes nine hours.")
    reading = read(tmp_path)
    assert unread_chats(reading) == ("chats.txt: two people write here; type --me with your name as the export writes it.",)
    assert counts(reading) == {Reason.WHO_IS_ME: 1}
    assert reading.skipped[0].people == ("Anna", "Ben Potter")
    assert "Anna" not in repr(reading.skipped) + json.dumps(reading.as_dict())
    with pytest.raises(DataError, match=r"two people write here; type --me") as caught:
        read(tmp_path / "chats.txt")
    assert "Anna" not in str(caught.value)


def test_a_name_that_nobody_has_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the names given with --me is among the two people who write here"):
        read(put(tmp_path, "chats.txt", ANDROID), "Cleo")


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("+49 170 1234567", "\u202a+49\u00a0170\u00a01234567\u202c"),
        ("BEN  potter", "Ben Potter"),
        ("@ben", "ben"),
        ("é", "e\u0301"),
    ],
)
def test_me_is_found_in_whatever_way_it_is_written(given: str, written: str) -> None:
    assert Me([given]).wrote(Message(written, "x", 0.0))
    assert Me([given]).wrote(Message("x", "x", 0.0, ids=(written,)))
    assert not Me([given]).wrote(Message("Anna", "x", 0.0))


def test_no_name_of_a_person_enters_a_runs_settings() -> None:
    from edgetune.config import DataConfig, TrainConfig

    config = TrainConfig(DataConfig(notes=("n",), me=("Ben Potter",)))
    assert "Ben Potter" not in json.dumps(config.as_dict())


# --- conversations ----------------------------------------------------------------------------------------------------


def chat(*rows: tuple[str, str, float]) -> list[Message]:
    """Return messages of (writer, text, minutes)."""
    return [Message(writer, text, 60.0 * minutes) for writer, text, minutes in rows]


def spoken(*rows: tuple[str, str, float]) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in turns(chat(*rows), Me(["Ben"]))]


def test_bursts_are_merged_and_an_hours_silence_ends_a_conversation() -> None:
    messages = chat(("Anna", "a", 0), ("Anna", "b", 5), ("Anna", "c", 11), ("Ben", "d", 71), ("Ben", "e", 131.1))
    assert [[message.text for message in session] for session in sessions(messages)] == [["a", "b", "c", "d"], ["e"]]
    assert [message.text for message in bursts(messages)] == ["a\nb", "c", "d", "e"]
    assert spoken(("Anna", "a", 0), ("Anna", "b", 5), ("Anna", "c", 11), ("Ben", "d", 12)) == [
        ("user", "a\nb\n\nc"),
        ("assistant", "d"),
    ]


def test_in_a_group_each_other_message_begins_with_its_writers_name() -> None:
    assert spoken(("Anna", "Tea?", 0), ("Cleo", "Yes", 1), ("Ben", "Me too", 2), ("Anna", "Come", 3)) == [
        ("user", "Anna: Tea?\n\nCleo: Yes"), ("assistant", "Me too"), ("user", "Anna: Come")
    ]  # fmt: skip


def test_what_i_wrote_first_is_context_and_not_learnt() -> None:
    assert spoken(("Ben", "Coming?", 0), ("Anna", "At eight", 1), ("Ben", "Good", 2), ("Anna", "See you", 3)) == [
        ("user", "Ben: Coming?\n\nAnna: At eight"), ("assistant", "Good"), ("user", "See you")
    ]  # fmt: skip


def test_stretches_without_an_answer_of_mine_are_counted(tmp_path: Path) -> None:
    more = "01.01.24, 09:00 - Anna: Happy new year\n02.01.24, 09:00 - Ben Potter: Late\n"
    reading = read(put(tmp_path, "_chat.txt", ANDROID + more), "Ben Potter")
    assert [document.path for document in reading.documents] == ["_chat.txt#1"]
    assert counts(reading)[Reason.NO_ANSWER_OF_MINE] == 2


def test_a_conversation_that_never_pauses_is_split() -> None:
    messages = chat(*[("Anna", "x", minute / 10) for minute in range(1025)])
    assert [len(session) for session in sessions(messages)] == [512, 512, 1]
    assert [len(session) for session in sessions(chat(*[("Anna", "x" * 40000, 0)] * 5))] == [2, 2, 1]


def test_two_chats_of_an_export_are_never_one_conversation() -> None:
    messages = [Message("Anna", "a", 0.0, chat="1"), Message("Ben", "b", 1.0, chat="2")]
    assert [len(session) for session in sessions(messages)] == [1, 1]


# --- Telegram ---------------------------------------------------------------------------------------------------------


def telegram_message(number: int, writer: str, account: str, text: Any, **more: Any) -> dict[str, Any]:
    record = {"id": number, "type": "message", "date": "2023-12-31T19:02:00", "date_unixtime": str(1704049320 + 30 * number)}
    return {**record, "from": writer, "from_id": account, "text": text, **more}


TELEGRAM_MESSAGES = [
    {
        "id": 1,
        "type": "service",
        "date": "2023-12-31T19:00:00",
        "actor": "Anna",
        "actor_id": "user1",
        "action": "join",
        "text": "",
    },
    telegram_message(2, "Anna", "user1", ["Is the ", {"type": "bold", "text": "kiln"}, " free tonight?"]),
    telegram_message(3, "Anna", "user1", "", media_type="sticker", file="s.webp"),
    telegram_message(4, "Anna", "user1", "News of others", forwarded_from="Radio"),
    telegram_message(5, "Ben", "user2", "From eight.", edited="2024-01-01T00:00:00"),
    telegram_message(6, "Ben", "user2", "Bring the glaze.", photo="p.jpg"),
]
TELEGRAM = {"name": "Anna", "type": "personal_chat", "id": 1, "messages": TELEGRAM_MESSAGES}


@pytest.mark.parametrize("me", ["Ben", "user2", "2"])
def test_one_chat_of_telegram_is_read_by_name_or_account(tmp_path: Path, me: str) -> None:
    reading = read(put(tmp_path, "result.json", TELEGRAM), me)
    assert [(document.path, said(document)) for document in reading.documents] == [("result.json#1", EVENING)]
    assert counts(reading) == {Reason.NOTICE: 1, Reason.MEDIA: 2, Reason.FORWARDED: 1}


def test_all_chats_of_telegram_say_who_i_am_and_saved_messages_are_notes(tmp_path: Path) -> None:
    saved = {"type": "saved_messages", "id": 9, "messages": [telegram_message(1, "Ben", "user2", "Cone 6 is 1,222 degrees")]}
    news = {"name": "News", "type": "public_channel", "id": 8, "messages": [telegram_message(1, "News", "channel8", "Rain")]}
    whole = {
        "about": "Here is your data", "personal_information": {"user_id": 2, "first_name": "Ben"},
        "contacts": {"about": "", "list": [{"user_id": 1}]}, "chats": {"about": "", "list": [TELEGRAM, saved, news]},
    }  # fmt: skip
    reading = read(put(tmp_path, "export/result.json", json.dumps(whole, indent=1)))
    assert [said(document) or document.text for document in reading.documents] == [EVENING, "Cone 6 is 1,222 degrees"]
    assert counts(reading)[Reason.NO_ANSWER_OF_MINE] == 1


def test_a_telegram_export_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    reading = read(put(tmp_path, "result.json", json.dumps(TELEGRAM)[:-9]), "Ben")
    assert [said(document) for document in reading.documents] == [[EVENING[0], ("assistant", "From eight.")]]
    assert counts(reading)[Reason.BAD_EXPORT] == 1


# --- Signal, Discord, iMessage ----------------------------------------------------------------------------------------

SIGNAL = """\
[2023-12-31 19:02:00] Anna: Is the kiln free tonight?  ![kiln.jpg](./media/kiln.jpg)
(- Me: 👍, Cleo: 👍 -)
[2023-12-31 19:04:00] Me:

> Is the kiln free tonight?

From eight.
[2023-12-31 19:04:30] Me: Bring the glaze.
[2023-12-31 19:05:00] Anna: (This message was deleted)
[2023-12-31 19:06:00] Anna: Missed voice call
"""


def test_signals_markdown_needs_no_me(tmp_path: Path) -> None:
    reading = read(put(tmp_path, "Anna/chat.md", SIGNAL))
    assert [said(document) for document in reading.documents] == [EVENING]
    assert counts(reading) == {Reason.MEDIA: 1, Reason.DELETED_MESSAGE: 1, Reason.NOTICE: 1}


def test_signals_json_is_read(tmp_path: Path) -> None:
    rest = {"quote": "", "sticker": "", "reactions": [], "attachments": []}
    rows = [
        ("19:02:00", "Anna", "Is the kiln free tonight?"),
        ("19:04:00", "Me", "From eight."),
        ("19:04:30", "Me", "Bring the glaze."),
    ]
    lines = [{"date": f"2023-12-31T{time}", "sender": sender, "body": f"{body}  ", **rest} for time, sender, body in rows]
    put(tmp_path, "a/data.json", "\n".join(json.dumps(line) for line in lines))
    put(tmp_path, "b/messages.json", [
        {"type": "incoming", "sent_at": 1704049320000, "body": "Who has the key?", "conversationId": "c", "source": "+1"},
        {"type": "outgoing", "sent_at": 1704049380000, "body": "I have", "conversationId": "c"},
    ])  # fmt: skip
    assert [said(document) for document in read(tmp_path).documents] == [
        EVENING, [("user", "Who has the key?"), ("assistant", "I have")]
    ]  # fmt: skip


def test_discords_json_is_read_without_bots_and_notices(tmp_path: Path) -> None:
    def message(time: str, kind: str, text: str, name: str, **more: Any) -> dict[str, Any]:
        author = {"id": f"1{name}", "name": name, "discriminator": "0000", "nickname": name.title(), "isBot": name == "bot"}
        return {
            "id": "1",
            "type": kind,
            "timestamp": f"2023-12-31T{time}.1234567+00:00",
            "content": text,
            "author": author,
            **more,
        }

    channel = {"guild": {"id": "1", "name": "Pottery"}, "channel": {"id": "2", "type": "GuildTextChat", "name": "kiln"}}
    messages = [
        message("19:01:00", "GuildMemberJoin", "Joined the server.", "anna"),
        message("19:02:00", "Default", "Is the kiln free tonight?", "anna"),
        message("19:03:00", "Default", "beep", "bot"),
        message("19:04:00", "Reply", "From eight.", "ben", attachments=[{"url": "x.png"}]),
        message("19:04:30", "Default", "Bring the glaze.", "ben"),
    ]
    path = put(tmp_path, "kiln.json", {**channel, "messages": messages, "messageCount": 5})
    for me in ("ben", "Ben", "1ben", "ben#0000"):
        reading = read(path, me)
        assert [said(document) for document in reading.documents] == [EVENING]
        assert counts(reading) == {Reason.NOTICE: 1, Reason.BOT: 1, Reason.MEDIA: 1}


IMESSAGE = """\
Dec 31, 2023  7:02:00 PM (Read by you after 5 seconds)
+14155550134
Is the kiln free tonight?

Dec 31, 2023  7:03:00 PM You renamed the conversation to Kiln

Dec 31, 2023  7:04:00 PM
Me
From eight.
Tapbacks:
    Loved by +14155550134

    Dec 31, 2023  7:04:10 PM
    +14155550134
    Which eight?

Dec 31, 2023  7:04:30 PM
Me
attachments/12/kiln.jpeg
Bring the glaze.
This message responded to an earlier message.

"""


def test_imessages_text_is_read(tmp_path: Path) -> None:
    reading = read(put(tmp_path, "+14155550134.txt", IMESSAGE))
    assert [said(document) for document in reading.documents] == [EVENING]
    assert counts(reading) == {Reason.NOTICE: 1, Reason.MEDIA: 1}


def imessage_html(kind: str, time: str, writer: str, inside: str) -> str:
    return (
        f'<div class="message"><div class="{kind}"><p><span class="timestamp"><a href="#">Dec 31, 2023  {time} PM</a></span>\n'
        f'<span class="sender">{writer}</span></p><hr>{inside}</div></div>\n'
    )


def test_imessages_html_is_read_each_reply_once(tmp_path: Path) -> None:
    part = '<div class="message_part"><span class="bubble">{}</span></div>'.format
    answer = imessage_html("sent iMessage", "7:04:00", "Me", part("From eight."))
    reply = f'<div class="replies"><div class="reply">{answer}</div></div>'
    picture = '<div class="message_part"><img src="a.png"></div>'
    page = '<html><meta charset="UTF-8"><style>.message { color: red }</style>' + "".join([
        imessage_html("received", "7:02:00", "Anna", part("Is the kiln<br> free &lt;tonight&gt;?") + reply),
        '<div class="announcement"><p><span class="timestamp">Dec 31</span> You named it.</p></div>',
        answer,
        imessage_html("sent SMS", "7:04:30", "Me", part("Bring the glaze.") + picture),
    ])  # fmt: skip
    reading = read(put(tmp_path, "Anna.html", page))
    assert [said(document) for document in reading.documents] == [[("user", "Is the kiln\n free <tonight>?"), EVENING[1]]]
    assert counts(reading) == {Reason.MEDIA: 1}
    put(tmp_path, "Anna.html", "<html><p class='message'>A page like any other</p></html>")
    put(tmp_path, "note.md", "x")
    reading = read(tmp_path)
    assert [document.text.strip() for document in reading.documents] == ["A page like any other", "x"]
    assert counts(reading) == {}


# --- Slack ------------------------------------------------------------------------------------------------------------


def slack_files() -> dict[str, Any]:
    def message(ts: str, user: str, text: str, **more: Any) -> dict[str, Any]:
        return {"type": "message", "ts": ts, "user": user, "text": text, **more}

    return {
        "users.json": [
            {"id": "U1", "name": "anna", "profile": {"display_name": "Anna", "real_name": "Anna A."}},
            {"id": "U2", "name": "ben", "real_name": "Ben Potter", "profile": {"display_name": "", "email": "ben@example.com"}},
        ],
        "channels.json": [{"id": "C1", "name": "kiln"}],
        "kiln/2023-12-31.json": [
            message("1704063000.0", "U1", "<@U1> has joined the channel", subtype="channel_join"),
            message(
                "1704066900.1", "U1", "Is the kiln free, <@U2>? See <https://example.com|the plan> &amp; <#C1|kiln>", files=[{}]
            ),
        ],
        "kiln/2024-01-01.json": [message("1704067201.0", "U2", "From eight."), message("1.0", "U3", "beep", bot_id="B1")],
    }


@pytest.mark.parametrize("me", ["ben", "Ben Potter", "U2", "ben@example.com"])
@pytest.mark.parametrize("form", ["folder", "folder above", "archive"])
def test_slacks_export_is_read_across_days_with_mentions_resolved(tmp_path: Path, me: str, form: str) -> None:
    if form == "archive":
        path = zipped(tmp_path / "slack.zip", slack_files())
    else:
        path = tmp_path / "team"
        for name, content in slack_files().items():
            put(path, f"export/{name}" if form == "folder above" else name, content)
    reading = read(path, me)
    answer = [("user", "Is the kiln free, @Ben Potter? See the plan & #kiln"), ("assistant", "From eight.")]
    assert [said(document) for document in reading.documents] == [answer]
    assert counts(reading) == {Reason.NOTICE: 1, Reason.MEDIA: 1, Reason.BOT: 1}


def test_slacks_markup_becomes_plain_text() -> None:
    names = {"U1": ("Anna",)}
    assert plain_text("<!here> <@U1> <@U9|old> <@U8> <http://a.b> 1 &lt; 2", names) == "@here @Anna @old @U8 http://a.b 1 < 2"


# --- assistants -------------------------------------------------------------------------------------------------------


def node(name: str, parent: str | None, role: str, text: Any, kind: str = "text", **more: Any) -> dict[str, Any]:
    message = {"author": {"role": role}, "content": {"content_type": kind, "parts": text}, "recipient": "all", **more}
    return {"id": name, "parent": parent, "children": [], "message": message}


ASKED = [("user", "How hot is cone 6?"), ("assistant", "1,222 degrees Celsius.")]
CHATGPT = {
    "title": "Cones",
    "mapping": {
        "root": {"id": "root", "parent": None, "children": ["s"], "message": None},
        "s": node("s", "root", "system", ["You are helpful"], metadata={"is_visually_hidden_from_conversation": True}),
        "old": node("old", "s", "user", ["How hot is a kiln?"]),
        "q": node("q", "s", "user", [{"content_type": "image_asset_pointer"}, "How hot is cone 6?"], "multimodal_text"),
        "t": node("t", "q", "assistant", ["search()"], "code", ),
        "u": node("u", "t", "tool", ["results"]),
        "a": node("a", "u", "assistant", ["1,222 degrees Celsius."]),
    },
    "current_node": "a",
}  # fmt: skip


def test_chatgpts_conversations_are_read_along_the_branch_that_was_shown(tmp_path: Path) -> None:
    reading = read(put(tmp_path, "conversations.json", [CHATGPT]))
    assert [(document.path, said(document)) for document in reading.documents] == [("conversations.json#1", ASKED)]
    assert counts(reading) == {Reason.TOOL_MESSAGE: 3, Reason.MEDIA: 1}


def test_a_tree_whose_nodes_are_each_others_parents_ends(tmp_path: Path) -> None:
    mapping = {
        "q": node("q", "a", "user", ["How hot is cone 6?"]),
        "a": node("a", "q", "assistant", ["1,222 degrees Celsius."]),
    }
    reading = read(put(tmp_path, "c.json", [{"title": "", "mapping": mapping, "current_node": "a"}]))
    assert [said(document) for document in reading.documents] == [ASKED]
    alone = {"q": node("q", "q", "user", ["x"])}
    with pytest.raises(DataError, match="1 chat without an answer"):
        read(put(tmp_path, "d.json", [{"mapping": alone, "current_node": "q"}]))


def test_claudes_conversations_are_read_without_tools(tmp_path: Path) -> None:
    claude = {
        "uuid": "1", "name": "Cones", "chat_messages": [
            {"sender": "human", "text": "How hot is cone 6?", "content": [], "files": [{"file_name": "a.png"}]},
            {"sender": "assistant", "text": "wrong", "content": [
                {"type": "tool_use", "input": {}}, {"type": "text", "text": "1,222 degrees Celsius."},
            ]},
        ],
    }  # fmt: skip
    notice = "```\nThis block is not supported on your current device yet.\n```"
    second = {"chat_messages": [{"sender": "human", "text": "Hi"}, {"sender": "assistant", "text": f"{notice}\nHello"}]}
    reading = read(put(tmp_path, "conversations.json", [claude, second]))
    assert said(reading.documents[0]) == ASKED
    assert said(reading.documents[1])[1][1].endswith("Hello")
    assert "not supported" not in reading.documents[1].text
    assert counts(reading) == {Reason.TOOL_MESSAGE: 1, Reason.MEDIA: 1}


def test_a_json_file_that_is_no_export_is_left_alone_in_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "package.json", {"name": "x", "messages": ["from_id"]})
    put(tmp_path, "index.json", {"mapping": {"a": 1}})
    put(tmp_path, "quoting.json", {"text": '"mapping": {"chat_messages": ['})
    put(tmp_path, "note.md", "x")
    reading = read(tmp_path)
    assert [document.path for document in reading.documents] == ["note.md"]
    assert [skip.reason for skip in reading.skipped] == [Reason.UNKNOWN_KIND] * 3


@pytest.mark.parametrize("name", ["chats.json", "chats.jsonl"])
def test_files_of_messages_are_read_as_before(tmp_path: Path, name: str) -> None:
    record = {"messages": [{"role": role, "content": text} for role, text in ASKED]}
    assert said(read(put(tmp_path, name, record)).documents[0]) == ASKED
    assert recognise(name, json.dumps(record).encode()) is None


def test_each_form_is_recognised_by_what_is_in_it() -> None:
    forms = {
        App.WHATSAPP: ("x.txt", ANDROID), App.IMESSAGE_TEXT: ("x.txt", IMESSAGE), App.SIGNAL_MARKDOWN: ("x.md", SIGNAL),
        App.TELEGRAM: ("x.json", json.dumps(TELEGRAM)), App.ASSISTANT: ("x.json", json.dumps([CHATGPT], indent=2)),
    }  # fmt: skip
    for app, (name, text) in forms.items():
        assert recognise(name, text.encode()) is app
        assert recognise("x.pdf", text.encode()) is None


def test_reading_an_export_twice_gives_the_same_documents(tmp_path: Path) -> None:
    path = put(tmp_path, "_chat.txt", ANDROID)
    first, second = (read(path, "Ben Potter").documents for _ in range(2))
    assert [(document.path, document.digest) for document in first] == [(document.path, document.digest) for document in second]
    assert Counter(document.is_chat for document in first) == {True: 1}


def zipped(path: Path, files: dict[str, Any]) -> Path:
    """Write an archive of texts, bytes and values as JSON."""
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content if isinstance(content, str | bytes) else json.dumps(content))
    return path
