"""What lies among notes and is none is left out with its reason, and nothing but what was listed is read."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgetune.config import DataConfig
from edgetune.documents.embedded import MARK, without_embedded_files
from edgetune.documents.not_notes import is_in_cloud
from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason
from edgetune.documents.spool import MEMORY_BYTES
from edgetune.documents.summary import sentences

posix = pytest.mark.skipif(os.name == "nt", reason="links and modes are POSIX's here")


def put(folder: Path, name: str, content: str | bytes = "") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content or f"text of {name}".encode())
    return path


def reasons(reading) -> dict[str, Reason]:
    return {skip.path: skip.reason for skip in reading.skipped}


def read_paths(reading) -> list[str]:
    return [document.path for document in reading.documents]


# Other programs' files and edgetune's own


def test_the_folder_of_a_saved_web_page_is_left_out_and_the_page_is_read(tmp_path):
    for name in ("kiln.html", "kiln_files/style.txt", "Ofen.htm", "Ofen-Dateien/a.md", "my_files/a.md", "x_files/b/c.md"):
        put(tmp_path, name, f"text of {name}")
    reading = read_notes([tmp_path])
    assert read_paths(reading) == ["Ofen.htm", "kiln.html", "my_files/a.md", "x_files/b/c.md"]
    assert reasons(reading) == {"kiln_files": Reason.PAGE_FOLDER, "Ofen-Dateien": Reason.PAGE_FOLDER}
    assert read_paths(read_notes([tmp_path / "kiln_files"])) == ["style.txt"]  # naming it was a decision


def test_folders_of_apps_are_left_out_each_with_its_reason(tmp_path):
    for name in ("pages/a.md", "bak/b.md", "logseq/c.md", "logseq/bak/pages/a.md", "logseq/version-files/a.md",
                 "logseq/.recycle/a.md", ".obsidian/x.md", ".trash/y.md", ".git/z.md", ".stversions/a.md"):  # fmt: skip
        put(tmp_path, name, f"text of {name}")
    reading = read_notes([tmp_path])
    assert read_paths(reading) == ["bak/b.md", "logseq/c.md", "pages/a.md"]
    assert reasons(reading) == {
        "logseq/bak": Reason.OLD_VERSION,
        "logseq/version-files": Reason.OLD_VERSION,
        "logseq/.recycle": Reason.TRASH,
        ".obsidian": Reason.APP_SETTINGS,
        ".trash": Reason.TRASH,
        ".git": Reason.HIDDEN,
        ".stversions": Reason.OLD_VERSION,
    }
    assert read_paths(read_notes([tmp_path / "logseq" / "bak"])) == ["pages/a.md"]  # naming it was a decision


def test_edgetunes_own_folder_logs_and_models_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path / "tuned"))
    put(tmp_path, "a.md", "a note")
    put(tmp_path, "tuned/runs/1/events.jsonl", '{"event": "sampled", "text": "The model wrote this."}\n')
    put(tmp_path, "moved/runs/1/events.jsonl", '{"event": "started", "run": "1"}\n{"text": "The model wrote this."}\n')
    put(tmp_path, "calendar.jsonl", '{"event": "birthday", "text": "Marra was given a hoe."}\n')
    put(tmp_path, "adapter/adapter_config.json", "{}")
    put(tmp_path, "adapter/README.md", "A model card.")
    put(tmp_path, "export/tokenizer_config.json", "{}")
    put(tmp_path, "export/merges.txt", "a b")
    reading = read_notes([tmp_path])
    assert read_paths(reading) == ["a.md", "calendar.jsonl#1"]
    assert reasons(reading) == {
        "tuned": Reason.OWN_FILE,
        "moved/runs/1/events.jsonl": Reason.OWN_FILE,
        "adapter": Reason.MODEL_FOLDER,
        "export": Reason.MODEL_FOLDER,
    }
    put(tmp_path, "tuned/notes/b.md", "notes that somebody keeps in there")
    assert read_paths(read_notes([tmp_path / "tuned" / "notes"])) == ["b.md"]


def test_notes_that_stay_in_a_cloud_are_not_called_hidden(tmp_path):
    put(tmp_path, "a.md", "a note")
    put(tmp_path, ".May.md.icloud", b"bplist00")
    put(tmp_path, ".photo.jpg.icloud", b"bplist00")
    assert reasons(read_notes([tmp_path])) == {
        ".May.md.icloud": Reason.NOT_DOWNLOADED,
        ".photo.jpg.icloud": Reason.UNKNOWN_KIND,
    }
    about = [
        {"st_flags": 0x40000000},
        {"st_file_attributes": 0x400000},
        {"st_file_attributes": 0x40020},
        {"st_flags": 0x20},
        {},
    ]
    assert [is_in_cloud(SimpleNamespace(**fields)) for fields in about] == [True, True, True, False, False]


def test_what_was_left_out_is_said_in_a_few_sentences(tmp_path):
    put(tmp_path, "a.md", "a note with a bad letter in größer text: \xff".encode()[:-2] + b"\xff")
    put(tmp_path, "b.md", f"![x](data:image/png;base64,{'QUJD' * 100})")
    put(tmp_path, "c.md", "Привет, мир".encode("cp1251"))
    put(tmp_path, ".d.md.icloud", b"bplist00")
    said = sentences(read_notes([tmp_path], DataConfig(exclude=("drfats",))))
    assert said == (
        "Not read: 1 not downloaded (in iCloud or another cloud), 1 encoding not recognised (save it as UTF-8, or name it with "
        "--encoding). Type edgetune train --dry-run to see which.",
        "Damaged: 1 letter in 1 note could not be decoded and will be learnt as \ufffd.",
        "Left out: pictures or other files embedded in 1 note, 409 B.",
        "--exclude drfats matched nothing.",
    )
    (tmp_path / "only").mkdir()
    assert sentences(read_notes([put(tmp_path, "only/e.md", "e")])) == ()


# Embedded files

PHOTO = base64.b64encode(random.Random(5).randbytes(30_000)).decode()
LINES = "\n\n".join(PHOTO[at : at + 256] for at in range(0, 2560, 256))  # as Excalidraw writes them


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"A.\n\n![bench](data:image/png;base64,{PHOTO})\n\nB.\n", f"A.\n\n![bench]({MARK})\n\nB.\n"),
        (f'<img src="data:image/svg+xml;charset=utf-8;base64,{PHOTO}" width=3>B', f'<img src="{MARK}" width=3>B'),
        (f"[ref]: DATA:application/pdf;BASE64,{PHOTO}\nB", f"[ref]: {MARK}\nB"),
        (f"<data:;base64,{PHOTO}> B", f"<{MARK}> B"),
        (f"data:image/png;base64,{PHOTO[:76]}\n{PHOTO[76:152]}\n{PHOTO[:20]}==\nB and more.", f"{MARK}\nB and more."),
        (f"A.\n{PHOTO}\nB.", f"A.\n{MARK}\nB."),
        ("A.\n" + "\n".join(PHOTO[at : at + 76] for at in range(0, 7600, 76)) + "\nB.", f"A.\n{MARK}\nB."),
        ("```compressed-json\n" + LINES + "\n```", f"```compressed-json\n{MARK}\n```"),
        ("![](data:image/svg+xml," + "%3Csvg%20d=%22M0" * 40 + ")B", f"![]({MARK})B"),
    ],
)
def test_an_embedded_file_leaves_a_mark(text, left):
    shorter, count = without_embedded_files(text)
    assert shorter == left
    assert count == len(text) - len(left)


@pytest.mark.parametrize(
    "text",
    [
        "A data URI is `data:text/plain;base64,SGVsbG8=`.",
        "base64, data: and image/png;base64, are words.",
        f"sha512 {hashlib.sha512(b'x').hexdigest()} and sha256 {hashlib.sha256(b'x').hexdigest()}",
        "x" * 3_000,
        "-" * 900 + "\n" + "=" * 900 + "\n" + "_" * 900,
        "https://example.org/" + "a-long-path/" * 40,
        "ssh-rsa " + PHOTO[:370] + " me@home",
        "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch-station\n" * 5,
        "0" * 700 + "1" * 700,
        "字" * 900,
    ],
)
def test_other_text_stays(text):
    assert without_embedded_files(text) == (text, 0)


@pytest.mark.parametrize(
    "text",
    [
        "data:" * 400_000,
        "data:image/png;base64," * 90_000,
        "A1b" * 700_000 + " ",
        ";base64," * 200_000,
        ("a" * 59 + "\n") * 30_000,
        ("Ab1" * 30 + " \n") * 20_000,
    ],
    ids=["data", "beginnings", "one word", "marks", "short lines", "lines"],
)
def test_looking_for_embedded_files_is_cheap(text):
    started = time.process_time()
    without_embedded_files(text)
    assert time.process_time() - started < 2


def test_a_photo_longer_than_a_block_leaves_nothing_but_marks(tmp_path, monkeypatch):
    monkeypatch.setattr("edgetune.documents.reading.BLOCK_BYTES", 1000)
    monkeypatch.setattr("edgetune.documents.reading.WHOLE_CHARS", 4000)
    put(tmp_path, "a.md", f"A.\n\n![bench](data:image/png;base64,{PHOTO})\n\nB.\n")
    reading = read_notes([tmp_path])
    assert reading.documents[0].text.replace(MARK, "") == "A.\n\n![bench]()\n\nB.\n"
    assert reading.embedded["a.md"] > 39_000


# Nothing but what was listed is read


def swap(action):
    """Return a progress callback that calls `action` once, between listing and reading."""
    done = []

    def progress(_, total):
        if total and not done:
            done.append(True)
            action()

    return progress


@posix
@pytest.mark.parametrize("kind", ["link", "link to a folder", "fifo", "another file", "folder"])
def test_a_note_that_was_replaced_since_it_was_listed_is_not_read(tmp_path, kind):
    secret = put(tmp_path, "secret/key.md", "a private key")
    put(tmp_path, "notes/a.md", "a")
    note = put(tmp_path, "notes/b.md", "b")

    def replace():
        note.rename(tmp_path / "old")
        if kind == "link":
            note.symlink_to(secret)
        elif kind == "link to a folder":
            note.symlink_to(secret.parent)
        elif kind == "fifo":
            os.mkfifo(note)
        elif kind == "folder":
            note.mkdir()
        else:
            note.write_text("another")

    started = time.monotonic()
    reading = read_notes([tmp_path / "notes"], progress=swap(replace))
    assert time.monotonic() - started < 5
    assert [document.text for document in reading.documents] == ["a"]
    assert reasons(reading) == {"b.md": Reason.CHANGED}


@posix
def test_a_folder_that_was_replaced_by_a_link_is_not_read(tmp_path, monkeypatch):
    put(tmp_path, "secret/key.md", "a private key")
    put(tmp_path, "notes/a.md", "a")
    put(tmp_path, "notes/sub/key.md", "a note")

    def replace():
        (tmp_path / "notes/sub").rename(tmp_path / "old")
        (tmp_path / "notes/sub").symlink_to(tmp_path / "secret")

    reading = read_notes([tmp_path / "notes"], progress=swap(replace))
    assert [document.text for document in reading.documents] == ["a"]
    assert reasons(reading) == {"sub/key.md": Reason.CHANGED}

    (tmp_path / "notes/sub").unlink()
    (tmp_path / "old").rename(tmp_path / "notes/sub")
    calls = []

    def between_listings(_, total):
        calls.append(total)
        if len(calls) == 2:  # the first folder is listed, the second is not yet
            replace()

    reading = read_notes([tmp_path / "notes"], progress=between_listings)
    assert [document.text for document in reading.documents] == ["a"]
    assert set(reasons(reading)) == {"sub"}


@posix
def test_a_link_and_devices_that_are_named_themselves(tmp_path):
    real = put(tmp_path, "real.md", "real")
    (tmp_path / "link.md").symlink_to(real)
    assert [document.text for document in read_notes([tmp_path / "link.md"]).documents] == ["real"]
    reading = read_notes([real, "/dev/zero"])
    assert list(reasons(reading).values()) == [Reason.NOT_A_FILE]


# Little memory, and an end at any time


def test_texts_beyond_the_spools_memory_come_back_whole(tmp_path):
    texts = [f"{number} ☕ " + "word " * (MEMORY_BYTES // 20) + "\n" for number in range(6)]
    for number, text in enumerate(texts):
        put(tmp_path, f"{number}.txt", text)
    put(tmp_path, "chats.jsonl", json.dumps({"text": "### Human: How deep? ### Assistant: Two inches."}))
    documents = read_notes([tmp_path]).documents
    assert [document.text for document in documents[:6]] == texts
    assert [turn.text for turn in documents[6].turns] == ["How deep?", "Two inches."]
    assert all("".join(document.blocks()) == document.text for document in documents)
    assert max(len(block) for document in documents for block in document.blocks()) <= 1 << 20


def test_reading_tells_its_progress_in_bytes_and_ends_when_that_raises(tmp_path):
    put(tmp_path, "a.txt", "word " * 1_000_000)
    put(tmp_path, "b.txt", "b")
    calls = []
    read_notes([tmp_path], progress=lambda done, total: calls.append((done, total)))
    told = [done for done, total in calls if total]
    assert told == sorted(told)
    assert calls[-1] == (5_000_001, 5_000_001)
    assert len(told) >= 8

    def stop(done, total):
        if done > 2_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_notes([tmp_path], progress=stop)


def test_a_long_note_is_read_and_walked_through_in_little_memory(tmp_path, monkeypatch):
    for name in ("spool.MEMORY_BYTES", "reading.BLOCK_BYTES", "reading.WHOLE_CHARS", "document.BLOCK_BYTES"):
        monkeypatch.setattr(f"edgetune.documents.{name}", 1 << 16)
    monkeypatch.setattr("edgetune.privacy.masking.TAIL", 1 << 13)
    put(tmp_path, "a.txt", b"some words of a long diary\n" * 200_000)
    tracemalloc.start()
    (document,) = read_notes([tmp_path]).documents
    assert sum(len(block) for block in document.blocks()) == document.size == 5_400_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
