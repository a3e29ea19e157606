"""Notes are read or skipped with a reason, and the result does not depend on the file system."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_front_matter import without_front_matter

from edgetune.config import DataConfig
from edgetune.documents.document import Document
from edgetune.documents.encoding import NotText, decode
from edgetune.documents.heldout import split_held_out
from edgetune.documents.patterns import match_parts
from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason
from edgetune.documents.walk import Walk
from edgetune.reports.text import one_line
from edgetune.runtime.errors import DataError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
posix = pytest.mark.skipif(os.name == "nt", reason="links and modes are POSIX's here")


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def paths(documents: list[Document]) -> list[str]:
    return [document.path for document in documents]


def reasons(reading) -> dict[str, Reason]:
    return {skip.path: skip.reason for skip in reading.skipped}


# The walk


def test_order_is_by_path_whatever_order_files_were_made_in(tmp_path):
    names = ["b.md", "a/z.txt", "a.md", "a/b/c.rst", "É.md", "zz.org", "B.markdown"]
    orders = []
    for seed in range(3):
        folder = tmp_path / str(seed) / "notes"
        shuffled = list(names)
        random.Random(seed).shuffle(shuffled)
        for name in shuffled:
            put(folder, name, f"text of {name}")
        orders.append([(d.path, d.digest) for d in read_notes([folder]).documents])
    assert orders[0] == orders[1] == orders[2]
    assert sorted(names) == sorted(path for path, _ in orders[0])
    assert [path for path, _ in orders[0]] == ["B.markdown", "a.md", "a/b/c.rst", "a/z.txt", "b.md", "zz.org", "É.md"]


def test_everything_left_out_is_told_with_its_reason(tmp_path):
    put(tmp_path, "good.md", "hello")
    put(tmp_path, "twin.md", "hello")
    put(tmp_path, ".obsidian/x.md", "hidden")
    put(tmp_path, ".hidden.md", "hidden")
    put(tmp_path, "photo.jpg", b"\xff\xd8")
    put(tmp_path, "binary.md", b"ab\0cd")
    put(tmp_path, "control.txt", bytes(range(1, 9)) * 10)
    put(tmp_path, "empty.md", "")
    put(tmp_path, "blank.md", " \n\t\n")
    put(tmp_path, "drafts/x.md", "a draft")
    reading = read_notes([tmp_path], DataConfig(exclude=("drafts",)))
    assert paths(reading.documents) == ["good.md"]
    assert reasons(reading) == {
        "twin.md": Reason.DUPLICATE,
        ".obsidian": Reason.APP_SETTINGS,
        ".hidden.md": Reason.HIDDEN,
        "photo.jpg": Reason.UNKNOWN_KIND,
        "binary.md": Reason.BINARY,
        "control.txt": Reason.BINARY,
        "empty.md": Reason.EMPTY,
        "blank.md": Reason.EMPTY,
        "drafts": Reason.EXCLUDED,
    }
    assert reading.files == 10
    assert reading.skipped_counts()["empty"] == 2
    assert reading.as_dict()["bytes"] == 5


@posix
def test_links_are_not_followed_and_loops_do_not_catch_the_walk(tmp_path):
    notes = tmp_path / "notes"
    put(notes, "real.md", "real")
    put(tmp_path, "outside/secret.md", "secret")
    (notes / "out").symlink_to(tmp_path / "outside")
    (notes / "out.md").symlink_to(tmp_path / "outside" / "secret.md")
    (notes / "up").symlink_to(notes)
    (notes / "self.md").symlink_to(notes / "self.md")
    (notes / "gone.md").symlink_to(notes / "nowhere.md")
    reading = read_notes([notes])
    assert paths(reading.documents) == ["real.md"]
    assert reasons(reading) == {
        "out": Reason.LINK_OUTSIDE,
        "out.md": Reason.LINK_OUTSIDE,
        "up": Reason.LINK_INSIDE,
        "self.md": Reason.LINK_BROKEN,
        "gone.md": Reason.LINK_BROKEN,
    }


@posix
def test_a_pipe_does_not_hang_the_reading(tmp_path):
    put(tmp_path, "a.md", "a")
    os.mkfifo(tmp_path / "pipe.md")
    assert reasons(read_notes([tmp_path])) == {"pipe.md": Reason.NOT_A_FILE}


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_note_and_folder_are_skipped(tmp_path):
    put(tmp_path, "a.md", "a")
    put(tmp_path, "closed.md", "b").chmod(0)
    put(tmp_path, "shut/c.md", "c").parent.chmod(0)
    assert reasons(read_notes([tmp_path])) == {"closed.md": Reason.UNREADABLE, "shut": Reason.UNREADABLE}
    (tmp_path / "shut").chmod(0o700)


def test_a_file_that_vanishes_between_walk_and_read_is_unreadable(tmp_path):
    put(tmp_path, "a.md", "a")
    gone = put(tmp_path, "b.md", "b")
    reading = read_notes([tmp_path], progress=lambda done, total: gone.unlink(missing_ok=True) if total else None)
    assert reasons(reading) == {"b.md": Reason.UNREADABLE}


def test_several_arguments_and_overlapping_ones_read_each_note_once(tmp_path):
    put(tmp_path, "notes/a.md", "a")
    put(tmp_path, "notes/sub/b.md", "b")
    put(tmp_path, "journal/a.md", "c")
    once = read_notes([tmp_path / "journal", tmp_path / "notes", tmp_path / "notes/sub", tmp_path / "notes/a.md"])
    assert paths(once.documents) == ["journal/a.md", "notes/a.md", "notes/sub/b.md"]
    assert once.skipped == []
    again = read_notes([tmp_path / "notes/a.md", tmp_path / "notes", tmp_path / "journal"])
    assert again.documents == once.documents


def test_a_file_named_itself_is_read_whatever_its_suffix(tmp_path):
    assert paths(read_notes([put(tmp_path, ".journal", "a line")]).documents) == [".journal"]


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("drafts", ["a.md", "deep/b.txt"]),
        ("drafts/", ["a.md", "deep/b.txt"]),
        ("*.txt", ["a.md", "deep/drafts/c.md", "drafts/d.md"]),
        ("drafts/*", ["a.md", "deep/b.txt"]),
        ("/drafts", ["a.md", "deep/b.txt", "deep/drafts/c.md"]),
        ("notes/drafts", ["a.md", "deep/b.txt", "deep/drafts/c.md"]),
        ("./deep/**", ["a.md", "drafts/d.md"]),
        ("**/c.md", ["a.md", "deep/b.txt", "drafts/d.md"]),
        ("deep/*", ["a.md", "drafts/d.md"]),
        ("[ab].*", ["deep/drafts/c.md", "drafts/d.md"]),
    ],
)
def test_exclude_globs(tmp_path, pattern, left):
    notes = tmp_path / "notes"
    for name in ("a.md", "deep/b.txt", "deep/drafts/c.md", "drafts/d.md"):
        put(notes, name, name)
    reading = read_notes([notes], DataConfig(exclude=(pattern,)))
    assert paths(reading.documents) == left
    assert reading.unused_excludes == ()


def test_an_absolute_exclude_and_one_that_matches_nothing(tmp_path):
    put(tmp_path, "a.md", "a")
    put(tmp_path, "b.md", "b")
    reading = read_notes([tmp_path], DataConfig(exclude=(str(tmp_path / "b.md"), "diary")))
    assert paths(reading.documents) == ["a.md"]
    assert reading.unused_excludes == ("diary",)


def test_glob_stars_stand_for_any_number_of_folders():
    assert match_parts(("a", "b", "c.md"), ("**", "c.md"))
    assert match_parts(("c.md",), ("**", "c.md"))
    assert not match_parts(("a",), ("a", "**"))


@posix
def test_names_stand_in_json_as_they_are_and_reach_the_terminal_without_control_characters(tmp_path):
    names = ["a\x1b[31m\n.md", "\u202egnp.md", "می\u200cروم.md", "👩\u200d🍳.md"]
    for name in names:
        put(tmp_path, name, f"text of {name}")
    if sys.platform == "linux":
        put(tmp_path, os.fsdecode(b"caf\xe9.md"), "bytes")
    read = read_notes([tmp_path]).as_dict()["read_paths"]
    assert sorted(read) == sorted([*names, *["caf\ufffd.md"] * (sys.platform == "linux")])
    assert [one_line(name) for name in names] == ["a\u241b[31m .md", "\ufffdgnp.md", *names[2:]]
    for path in read:
        path.encode()


@posix
@pytest.mark.parametrize("name", ["~draft.md", "~", os.fsdecode(b"caf\xe9.md"), "می\u200cروم.md"])
def test_a_file_is_read_under_the_name_that_a_shell_gives(tmp_path, monkeypatch, name):
    if name == "~":
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        put(tmp_path, "home/a.md", "at home")
    monkeypatch.chdir(tmp_path)
    put(tmp_path, name + "/a.md" if name == "~" else name, "a draft")
    assert [document.text for document in read_notes([name]).documents] == ["at home" if name == "~" else "a draft"]


# Errors


def one_sentence(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(("name a folder that holds some.", "name another folder or file.", "type it again."))
    return message


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError) as error:
        read_notes([tmp_path / "nowhere"])
    assert "no file or folder" in one_sentence(error)


def test_the_time_to_read_grows_with_the_notes_and_not_with_their_square(tmp_path, monkeypatch):
    for number in range(20):
        put(tmp_path, f"{number}.md", f"{number} " * 60)
    sums = []
    monkeypatch.setattr(Walk, "bytes", property(lambda walk: sums.append(1) or 1))
    assert len(read_notes([tmp_path]).documents) == 20
    assert len(sums) == 1


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError) as error:
        read_notes([tmp_path])
    assert "is empty" in one_sentence(error)


def test_only_binaries(tmp_path):
    put(tmp_path, "a.jpg", b"\0")
    put(tmp_path, "b.md", b"\0secret")
    with pytest.raises(DataError) as error:
        read_notes([tmp_path])
    message = one_sentence(error)
    assert "1 binary" in message
    assert "1 not a note" in message
    assert "secret" not in message


def test_no_argument():
    with pytest.raises(DataError, match="No notes were named"):
        read_notes([])


def test_no_text_of_a_note_in_what_is_printed(tmp_path):
    put(tmp_path, "a.md", "a very private line")
    put(tmp_path, "c.jsonl", json.dumps({"text": "### Human: private? ### Assistant: very private"}))
    reading = read_notes([tmp_path])
    assert "private" not in repr(reading) + json.dumps(reading.as_dict())


# Encodings


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        ("naïve café ☕".encode(), "utf-8"),
        ("naïve café ☕".encode("utf-8-sig"), "utf-8 with BOM"),
        ("naïve café ☕".encode("utf-16"), "utf-16 with BOM"),
        (b"\xfe\xff" + "naïve café ☕".encode("utf-16-be"), "utf-16 with BOM"),
        ("naïve café ☕".encode("utf-32"), "utf-32 with BOM"),
    ],
)
def test_unicode_is_decoded(data, encoding):
    assert decode(data) == ("naïve café ☕", encoding)


def test_utf8_with_one_broken_byte_stays_utf8():
    text, encoding = decode("größere Übel".encode() + b"\xff")
    assert (text, encoding) == ("größere Übel\ufffd", "utf-8 (damaged)")


def test_utf16_without_a_mark_is_binary():
    with pytest.raises(NotText) as problem:
        decode("hello".encode("utf-16-le"))
    assert problem.value.reason is Reason.BINARY


@given(st.binary(max_size=200))
def test_any_bytes_are_a_clean_text_or_refused(data):
    try:
        text, _ = decode(data)
    except NotText:
        return
    assert "\r" not in text
    assert "\0" not in text
    text.encode()  # fails if half of a surrogate pair is left


def test_line_ends_of_every_system_give_one_digest(tmp_path):
    for name, end in (("unix", "\n"), ("dos", "\r\n"), ("mac", "\r")):
        put(tmp_path, f"{name}.md", f"one{end}two{end}")
    reading = read_notes([tmp_path])
    assert paths(reading.documents) == ["dos.md"]
    assert reading.documents[0].text == "one\ntwo\n"
    assert reading.documents[0].digest == hashlib.sha256(b"one\ntwo\n").hexdigest()


# Front matter


@pytest.mark.parametrize(
    ("note", "text"),
    [
        ("---\ntitle: Beans\ndate: 2026-01-01\n---\n\nSow.\n", "# Beans\n\nSow.\n"),
        (
            "---\ntitle: 'Beans: a diary'\ntags: [garden, \"to do\"]\n---\nSow.",
            "# Beans: a diary\n\nTags: garden, to do\n\nSow.",
        ),
        ("---\ntags:\n  - garden\n  - soil\nid: 7\n...\nSow.", "Tags: garden, soil\n\nSow."),
        ("---\ntags:\n- '#a'\n- b\n---\nSow.", "Tags: a, b\n\nSow."),
        ("---\ntitle: Beans\n---\n# Beans\n\nSow.", "# Beans\n\nSow."),
        ("---\naliases: [x]\n---\nSow.", "Sow."),
        (
            "+++\ntitle = \"Beans\"\ntags = ['a', 'b']\n[extra]\ntitle = 'No'\n+++\nSow.",
            "# Beans\n\nTags: a, b\n\nSow.",
        ),
        ("+++\ntags = [\n  'a',\n  'b',\n]\n+++\nSow.", "Tags: a, b\n\nSow."),
        ("---\nA thought between rulers.\n---\nMore.", "---\nA thought between rulers.\n---\nMore."),
        ("---\ntitle: never closed\n\nSow.", "---\ntitle: never closed\n\nSow."),
        ("----\nSow.", "----\nSow."),
        ("--- a list\nSow.\n---\n", "--- a list\nSow.\n---\n"),
        ("Sow.\n---\ntitle: x\n---\n", "Sow.\n---\ntitle: x\n---\n"),
    ],
)
def test_front_matter_keeps_title_and_tags(note, text):
    assert without_front_matter(note) == text


@pytest.mark.parametrize(
    "inside",
    ["title: a" + " " * 60_000 + "b\n", "tags: " + "[" * 60_000 + "\n", "tags:\n" + "- x\n" * 15_000, "a:\n" * 20_000,
     "tags: [" + "a," * 30_000 + "\n", "\ttitle" * 9_000 + "\n"],
    ids=["spaces", "brackets", "items", "keys", "commas", "tabs"],
)  # fmt: skip
def test_hostile_front_matter_costs_nothing(inside):
    started = time.process_time()
    without_front_matter(f"---\n{inside}---\nbody")
    assert time.process_time() - started < 1


@given(st.text(alphabet="-+ \n\ttile:tags=[]'\"#,a", max_size=80))
def test_front_matter_never_loses_what_stands_below_it(middle):
    for fence in ("---", "+++"):
        assert without_front_matter(f"{fence}\n{middle}\n{fence}\nthe body").endswith("the body")


def test_front_matter_can_be_kept_as_it_stands(tmp_path):
    put(tmp_path, "a.md", "---\ntitle: x\n---\nbody")
    assert read_notes([tmp_path], DataConfig(recipe="raw")).documents[0].text == "---\ntitle: x\n---\nbody"
    assert read_notes([tmp_path]).documents[0].text == "# x\n\nbody"


def test_front_matter_is_markdowns_alone(tmp_path):
    put(tmp_path, "a.txt", "---\ntitle: x\n---\nbody")
    assert read_notes([tmp_path]).documents[0].text.startswith("---")


# Sizes


@pytest.mark.slow
def test_a_note_of_50_mb_on_one_line(tmp_path):
    put(tmp_path, "long.md", b"word " * 10_000_000)
    (document,) = read_notes([tmp_path]).documents
    assert document.size == 50_000_000
    assert document.digest == hashlib.sha256(b"word " * 10_000_000).hexdigest()


def test_a_file_over_the_limit_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("edgetune.documents.reading.MAX_FILE_BYTES", 100)
    put(tmp_path, "a.md", "a" * 100)
    put(tmp_path, "b.md", "b" * 101)
    assert reasons(read_notes([tmp_path])) == {"b.md": Reason.TOO_LARGE}


# Chats


def chat_lines(tmp_path: Path, *lines: str | dict) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return put(tmp_path, "chats.jsonl", text)


def test_guanacos_text_is_kept_as_it_stands(tmp_path):
    text = "### Human: How deep? ### Assistant: Two inches.### Human: And wide? ### Assistant: Three."
    (document,) = read_notes([chat_lines(tmp_path, {"text": text})]).documents
    assert document.text == text
    assert [turn.text for turn in document.turns] == ["How deep?", "Two inches.", "And wide?", "Three."]


def test_messages_are_told_in_guanacos_form_and_neighbours_joined(tmp_path):
    messages = [("system", "Be brief."), ("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "")]
    record = {"messages": [{"role": role, "content": content} for role, content in messages]}
    (document,) = read_notes([chat_lines(tmp_path, record)]).documents
    assert document.text == "Be brief. ### Human: a\n\nb ### Assistant: c"


def test_a_text_without_turns_is_a_note(tmp_path):
    (document,) = read_notes([chat_lines(tmp_path, {"text": "just a text"})]).documents
    assert document.turns is None


def test_bad_lines_are_counted_with_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("edgetune.documents.chats.MAX_RECORD_CHARS", 1_000_000)
    good = {"text": "### Human: a ### Assistant: b"}
    nobody = {"text": "### Human: is there nobody?"}
    tool = {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}
    deep, digits, long = "[" * 200_000, '{"text": ' + "9" * 5_000 + "}", '{"text": "' + "x" * 2_500_000 + '"}'
    more = {"text": "### Human: a2 ### Assistant: b2"}
    reading = read_notes([chat_lines(tmp_path, good, "{oops", "", deep, nobody, tool, "3", long, digits, more)])
    assert paths(reading.documents) == ["chats.jsonl#1", "chats.jsonl#10"]
    assert {skip.reason: skip.lines for skip in reading.skipped} == {
        Reason.BAD_LINE: (2, 4, 9),
        Reason.NO_ANSWER: (5, 6),
        Reason.NOT_A_CHAT: (7,),
        Reason.LONG_LINE: (8,),
    }


def test_json_escapes_cannot_smuggle_what_no_text_holds(tmp_path):
    (document,) = read_notes([chat_lines(tmp_path, r'{"text": "a\ud800b\u0000c\r\n"}')]).documents
    assert document.text == "a\ufffdbc\n"


def test_a_hostile_run_of_spaces_is_read_at_once(tmp_path):
    started = time.process_time()
    read_notes([chat_lines(tmp_path, {"text": "### Human: a ### Assistant: b" + " " * 1_000_000 + "c"})])
    assert time.process_time() - started < 2


@pytest.mark.skipif(not (SHARED / "oasst_guanaco.jsonl").is_file(), reason="the chats are not on this machine")
def test_real_guanaco_chats():
    reading = read_notes([SHARED / "oasst_guanaco.jsonl"])
    assert len(reading.documents) == reading.chats == 700
    assert reading.skipped == []
    assert all(turn.role == ("user", "assistant")[at % 2] for d in reading.documents for at, turn in enumerate(d.turns))


@pytest.mark.skipif(not (SHARED / "til").is_dir(), reason="the til notes are not on this machine")
def test_til_splits_as_the_yardstick_did():
    reading = read_notes([SHARED / "til"], DataConfig(mask="none"))
    assert len(reading.documents) == 1871
    assert len(split_held_out(reading.documents).held_out) == 93
