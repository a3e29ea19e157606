"""Exports that are damaged or made to harm cost little time and memory, and are named."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
from pathlib import Path

import pytest

from edgetune.config import DataConfig
from edgetune.documents import limits
from edgetune.documents.document import Reading
from edgetune.documents.messengers import archive, files
from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason
from edgetune.documents.summary import unread_chats

CHAT = "31.12.23, 19:02 - Anna: Is the kiln free?\n31.12.23, 19:04 - Ben: From eight.\n31.12.23, 19:05 - Anna: Good\n"


def read(folder: Path, name: str, data: bytes | str, *me: str) -> Reading:
    """Read a file beside a note, so that there always is something to read."""
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    (folder / "note.md").write_text("The kiln takes nine hours.")
    return read_notes([folder], DataConfig(me=me))


def reasons(reading: Reading) -> dict[Reason, int]:
    return {skip.reason: skip.count for skip in reading.skipped}


def test_json_that_is_nested_too_deep_is_named(tmp_path: Path) -> None:
    deep = '[{"mapping": {"r": {"message": null, "parent": null}, "a": ' + "[" * 200_000 + "]" * 200_000 + "}}]"
    reading = read(tmp_path, "conversations.json", deep)
    assert [document.path for document in reading.documents] == ["note.md"]
    assert reasons(reading) == {Reason.BAD_EXPORT: 1}


def test_a_value_longer_than_the_window_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.documents.chats.MAX_RECORD_CHARS", 1000)
    monkeypatch.setattr("edgetune.documents.messengers.files.BLOCK_BYTES", 512)
    long = (
        '{"name": "Anna", "type": "personal_chat", "messages": [{"from_id": "user1", "type": "message", "text": "' + "x" * 9000
    )
    assert reasons(read(tmp_path, "result.json", long, "Ben")) == {Reason.LONG_VALUE: 1}


def test_halves_of_letters_become_marks_and_never_fail(tmp_path: Path) -> None:
    rows = [{"from": "Anna", "text": "\ud83d half"}, {"from": "Ben", "text": "yes \udc00"}]
    messages = [{"type": "message", "date_unixtime": "1", "from_id": row["from"], **row} for row in rows]
    reading = read(tmp_path, "result.json", json.dumps({"type": "personal_chat", "messages": messages}), "Ben")
    (document,) = [document for document in reading.documents if document.is_chat]
    assert [turn.text for turn in document.turns or ()] == ["\ufffd half", "yes \ufffd"]
    damaged = CHAT.encode().replace(b"kiln", b"k\xffln")
    reading = read(tmp_path, "chat.txt", damaged, "Ben")
    assert reading.damaged["chat.txt#1"] == 1


def test_a_message_or_line_of_megabytes_is_dropped_and_said(tmp_path: Path) -> None:
    lines = "word " * 20_000 + "\n"
    text = CHAT + "31.12.23, 19:06 - Anna: " + lines * 20 + "31.12.23, 19:07 - Ben: Shorter please.\n"
    reading = read(tmp_path, "chat.txt", text, "Ben")
    assert reasons(reading) == {Reason.LONG_MESSAGE: 1}
    assert reading.documents[0].text.endswith("Shorter please.")
    reading = read(tmp_path, "chat.txt", CHAT + "31.12.23, 19:06 - Anna: " + "x" * 3_000_000, "Ben")
    assert reasons(reading) == {Reason.LONG_MESSAGE: 1}


def test_ever_new_people_take_little_memory_and_are_counted_up_to_a_limit(tmp_path: Path) -> None:
    rows = "".join(f"31.12.23, 19:02 - P{number}: x\n" for number in range(12_000))
    reading = read(tmp_path, "chat.txt", CHAT + rows)
    assert "chat.txt: over 10,000 people write here; type --me" in unread_chats(reading)[0]
    assert len(reading.skipped[0].people) == 6


def test_values_of_the_wrong_type_are_counted_and_never_fail(tmp_path: Path) -> None:
    odd = [None, 7, "x", [], {"type": "message"}, {"type": "message", "from": 3, "from_id": [], "text": {"a": 1}, "date": []},
           {"type": "message", "from": "Anna", "from_id": "user1", "text": ["a", 5, {"text": 7}], "date": "1e999"}]  # fmt: skip
    text = json.dumps({"type": "x", "messages": [{"from_id": 1, "type": "service"}, *odd], "name": None})
    assert reasons(read(tmp_path, "result.json", text))[Reason.WHO_IS_ME] == 1
    conversations = [{"mapping": {"a": None, "b": {"parent": 5, "message": {"author": "x", "content": {"parts": 3}}}}}, 5, {},
                     {"chat_messages": [None, {"sender": "human", "content": 5}]}]  # fmt: skip
    found = reasons(read(tmp_path, "result.json", json.dumps(conversations)))
    assert found == {Reason.NO_ANSWER: 2, Reason.NOT_A_CONVERSATION: 2, Reason.TOOL_MESSAGE: 2}


@pytest.mark.parametrize(
    "tail", ["<!" * 200_000, "<div class='" + "x" * 300_000, "<div>" * 100_000, "&" * 300_000, "<a " * 100_000]
)
def test_a_page_made_to_be_slow_is_read_in_seconds(tmp_path: Path, tail: str) -> None:
    begin = '<div class="message"><div class="received"><span class="timestamp">x</span><span class="sender">Anna</span>'
    start = time.process_time()
    read(tmp_path, "Anna.html", begin + '<span class="bubble">' + tail)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("filler", ["(- (- ", "[", " ", "<", "![](", "> ", "\u200e<"])
def test_a_message_made_to_be_slow_is_read_in_seconds(tmp_path: Path, filler: str) -> None:
    long = filler * (200_000 // len(filler))
    start = time.process_time()
    read(tmp_path, "chat.txt", CHAT + "31.12.23, 19:06 - Anna: " + long, "Ben")
    read(tmp_path, "chat.md", f"[2023-12-31 19:02:00] Anna: x\n[2023-12-31 19:02:00] Me: {long}\n")
    assert time.process_time() - start < 5


# --- archives ---------------------------------------------------------------------------------------------------------


def packed(**members: str | bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in members.items():
            made.writestr(name.replace("__", "/"), content)
    return data.getvalue()


def test_an_archive_is_read_without_unpacking_its_pictures(tmp_path: Path) -> None:
    made = packed(**{"_chat.txt": CHAT, "IMG-1.jpg": b"\xff\xd8", "conversations.json": "[]", "notes.txt": "no chat"})
    reading = read(tmp_path, "WhatsApp Chat - Anna.zip", made, "Ben")
    assert [document.path for document in reading.documents] == ["WhatsApp Chat - Anna.zip/_chat.txt#1", "note.md"]


def test_an_archive_without_an_export_is_no_note(tmp_path: Path) -> None:
    assert reasons(read(tmp_path, "photos.zip", packed(**{"a.jpg": "x", "a.txt": "a note"}))) == {Reason.UNKNOWN_KIND: 1}


@pytest.mark.parametrize(
    "data",
    [b"", b"PK", b"no archive" * 9, packed(a="x")[:-5], b"PK\x05\x06" + b"\xff" * 18],
    ids=["empty", "its first bytes", "text", "cut", "its end alone"],
)
def test_a_damaged_archive_is_named(tmp_path: Path, data: bytes) -> None:
    assert reasons(read(tmp_path, "chat.zip", data)) in ({Reason.BAD_ARCHIVE: 1}, {Reason.LARGE_ARCHIVE: 1})


def test_a_member_that_is_damaged_or_encrypted_is_named(tmp_path: Path) -> None:
    made = bytearray(packed(**{"_chat.txt": CHAT * 400}))
    made[200:220] = bytes(20)
    assert reasons(read(tmp_path, "chat.zip", bytes(made), "Ben")) in ({Reason.BAD_ARCHIVE: 1}, {Reason.UNKNOWN_KIND: 1})


def test_an_archive_that_unpacks_to_too_much_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_UNPACKED_EXPORT_BYTES", 3 << 20)
    bomb = packed(**{"_chat.txt": CHAT + "\n" * (8 << 20)})
    assert len(bomb) < 50_000
    assert reasons(read(tmp_path, "chat.zip", bomb, "Ben"))[Reason.LARGE_ARCHIVE] == 1
    monkeypatch.setattr(archive, "MAX_EXPORT_BYTES", 1 << 20)
    assert reasons(read(tmp_path, "chat.zip", bomb, "Ben")) == {Reason.LARGE_EXPORT: 1}


def test_the_list_of_members_is_limited_before_it_is_read() -> None:
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, limits.MAX_ARCHIVE_DIRECTORY_BYTES + 1, 0, 0)
    for data in (end, packed(a="x")[:-22] + b"PK\x06\x07" + bytes(16) + packed(a="x")[-22:]):
        with pytest.raises(archive.NotAnArchive, match="too large"):
            archive.check_directory(io.BytesIO(data))


def test_an_export_over_the_limit_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_EXPORT_BYTES", 60)
    reading = read(tmp_path, "chat.txt", CHAT, "Ben")
    assert [(skip.path, skip.explanation) for skip in reading.skipped] == [("chat.txt", "1 chat export over 1024 MiB")]
