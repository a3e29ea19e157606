"""The ledger keeps each text once and no longer than a run names it; the log of what was trained notices every change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgetune.cli.main import cli
from edgetune.documents.document import Document, Turn
from edgetune.documents.forgotten import Forgotten, file_digests, text_digests
from edgetune.documents.reading import read_notes
from edgetune.home import home, private_folder, unfinished_folder
from edgetune.library import adapter_registry as registry
from edgetune.library import ledger, training_log
from edgetune.library.kept_adapters import delete
from edgetune.library.ledger import Cut, Entry, SeenNote, Side, Texts
from edgetune.runtime.errors import DataError, UsageError

BASE = "ab" * 32
NOTES = [Document.of(f"{number}.md", f"Note number {number}, with ß and 道.") for number in range(4)]
CHAT = Document.of("chat.jsonl#1", "Hi\nHello", (Turn("user", "Hi"), Turn("assistant", "Hello", extras={"name": "x"})))


def add(run: str, documents: list[Document], ended: float, parent: str | None = None) -> Entry:
    """Add a run over these documents to the ledger, with an adapter of its name."""
    notes = tuple(
        SeenNote(name, words, document.path, f"/notes/{document.path}", Side.TRAINED)
        for name, words, document in zip(ledger.ids_of(documents), ledger.words_of(documents), documents, strict=True)
    )
    entry = Entry(run, BASE, "m", {"data": {"notes": ["/notes"]}}, {}, "2", 1, parent, notes, cut=Cut(3, None, 2), ended=ended)
    entry.folder.mkdir()
    (entry.folder / "adapter_config.json").write_text("{}")
    texts = home() / "new.notes"
    with texts.open("wb") as file:
        ledger.write_texts(file, documents, ledger.ids_of(documents), ledger.known_ids())
    ledger.keep(entry, texts)
    return entry


def stored() -> str:
    return "".join(path.read_text() for path in sorted((home() / "ledger").glob("*.notes")))


def test_an_entry_and_its_texts_come_back_as_they_were() -> None:
    entry = add("2026-11-28-010000", [*NOTES, CHAT], 1.0)
    assert ledger.entries() == [entry]
    texts = Texts.of({note.id for note in entry.notes})
    found = texts.documents(entry.notes)
    assert found == [*NOTES, CHAT]  # path, digests and size
    assert [document.content() for document in found] == [document.content() for document in [*NOTES, CHAT]]
    assert found[-1].turns == CHAT.turns
    if os.name != "nt":
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (home() / "ledger").glob("*.json")}
        assert modes == {0o600}


def test_a_text_is_kept_once_and_as_long_as_a_run_names_it() -> None:
    add("2026-11-28-010000", NOTES[:3], 1.0)
    add("2026-11-29-010000", NOTES[1:], 2.0)
    assert [stored().count(f"number {number},") for number in range(4)] == [1, 1, 1, 1]
    delete(registry.adapters_folder(BASE) / "2026-11-28-010000")
    assert [entry.run for entry in ledger.entries()] == ["2026-11-29-010000"]
    assert [stored().count(f"number {number},") for number in range(4)] == [0, 1, 1, 1]


def test_a_run_whose_adapter_was_deleted_stays_while_another_descends_from_it() -> None:
    add("2026-11-28-010000", NOTES[:3], 1.0)
    add("2026-11-29-010000", NOTES, 2.0, parent="2026-11-28-010000")
    delete(registry.adapters_folder(BASE) / "2026-11-28-010000")
    assert [entry.run for entry in ledger.entries()] == ["2026-11-28-010000", "2026-11-29-010000"]
    delete(registry.adapters_folder(BASE) / "2026-11-29-010000")
    assert ledger.entries() == []
    assert stored() == ""


def test_the_oldest_runs_leave_a_ledger_of_too_many_and_one_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "KEPT", 2)
    for number in range(3):
        add(f"2026-11-{number + 10}-010000", [NOTES[number]], float(number))
    assert [entry.run for entry in ledger.entries()] == ["2026-11-11-010000", "2026-11-12-010000"]
    assert "number 0" not in stored()
    monkeypatch.setattr(ledger, "MOST_BYTES", 10)
    ledger.tidy()
    assert ledger.entries() == []
    assert list((home() / "ledger").iterdir()) == []


def test_a_text_stays_while_a_run_that_is_not_finished_names_it() -> None:
    first = add("2026-11-28-010000", NOTES, 1.0)
    begun = dataclasses.replace(first, run="2026-11-29-010000", ended=2.0)
    folder = private_folder(unfinished_folder() / "0123456789abcdef")
    begun.save(folder / ledger.UNFINISHED_RECORD)
    delete(first.folder)
    assert ledger.entries() == []
    begun.folder.mkdir()
    (begun.folder / "adapter_config.json").write_text("{}")
    ledger.keep(begun, folder / "none")
    assert Texts.of({note.id for note in begun.notes}).documents(begun.notes) == NOTES


def test_what_a_killed_process_left_half_written_is_deleted_a_day_later() -> None:
    add("2026-11-28-010000", NOTES, 1.0)
    left = home() / "ledger" / ".2026-11-28-010000.notes.abcd1234.tmp"
    left.write_text("Note number 2")
    ledger.tidy()
    assert left.exists()  # a process may be writing it
    os.utime(left, (time.time() - 90_000,) * 2)
    ledger.tidy()
    assert not left.exists()
    assert len(ledger.entries()) == 1


def test_a_damaged_text_is_not_used() -> None:
    entry = add("2026-11-28-010000", NOTES, 1.0)
    path = home() / "ledger" / "2026-11-28-010000.notes"
    path.write_text(path.read_text().replace("Note number 2", "Note number 9"))
    with pytest.raises(DataError, match="lacks some of the texts"):
        Texts.of({note.id for note in entry.notes}).documents(entry.notes)
    assert Entry.load(path) is None


def test_a_forgotten_note_is_left_out_by_its_words_and_by_its_place(tmp_path: Path) -> None:
    for name, text in (("a.md", "alpha beta"), ("b.md", "gamma delta"), ("c.md", "epsilon")):
        (tmp_path / name).write_text(text)
    words = read_notes([str(tmp_path / "a.md")]).documents[0].words
    Forgotten().with_notes(text_digests([words]), file_digests([str(tmp_path / "b.md")])).save()
    (tmp_path / "renamed.md").write_text("alpha\n\nbeta\n")
    (tmp_path / "b.md").write_text("something else")
    reading = read_notes([str(tmp_path)])
    assert [document.path for document in reading.documents] == ["c.md"]
    assert sorted(skip.path for skip in reading.skipped) == ["a.md", "b.md", "renamed.md"]
    record = (home() / "forgotten.json").read_text()
    assert not any(secret in record for secret in ("alpha", "b.md", words))
    (home() / "forgotten.json").write_text('{"texts": [1]}')
    with pytest.raises(UsageError, match="not a list of forgotten notes"):
        read_notes([str(tmp_path)])


def log_lines() -> list[str]:
    return training_log.path_of_log().read_text().splitlines(keepends=True)


def test_the_log_is_a_chain_and_every_change_of_it_is_noticed() -> None:
    for number in range(4):
        training_log.append("promoted", adapter=f"a{number}", base=BASE[:12])
    lines = log_lines()
    assert training_log.read().faults == ()
    assert [json.loads(line)["previous"] for line in lines] == [
        training_log.START, *(json.loads(line)["hash"] for line in lines[:3]),
    ]  # fmt: skip
    path = training_log.path_of_log()
    for changed, fault in (
        ([lines[0], lines[1].replace("a1", "a9"), *lines[2:]], "Line 2 was changed"),
        ([lines[0], *lines[2:]], "Line 2 does not follow the line before it"),
        ([lines[1], lines[0], *lines[2:]], "Line 1 does not follow the line before it"),
        (lines[1:], "Line 1 does not follow the line before it"),
    ):
        path.write_text("".join(changed))
        assert any(found.startswith(fault) for found in training_log.read().faults)
        told = CliRunner().invoke(cli, ["adapters", "log"])
        assert told.exit_code == 1
        assert fault in told.stdout
        assert "the chain is broken" in told.stdout


def test_a_line_that_a_crash_left_half_written_stays_and_the_next_one_says_so() -> None:
    training_log.append("promoted", adapter="a", base=BASE[:12])
    path = training_log.path_of_log()
    torn = path.read_bytes()[:40]
    with path.open("ab") as file:
        file.write(torn)
    assert training_log.read().is_torn
    training_log.append("promoted", adapter="b", base=BASE[:12])
    log = training_log.read()
    assert (log.faults, log.is_torn) == ((), False)
    assert [line["event"] for line in log.lines] == ["promoted", "mended", "promoted"]
    assert path.read_bytes().splitlines()[1] == torn
    told = CliRunner().invoke(cli, ["adapters", "log"])
    assert told.exit_code == 0
    assert f"3 lines, the chain is whole; last hash {log.last_hash}." in told.stdout


def test_a_line_that_somebody_put_in_with_a_right_hash_is_shown_and_stops_nothing() -> None:
    training_log.append("promoted", adapter="a", base="b")
    path = training_log.path_of_log()
    for line in ({"number": "x", "event": "forgot"}, {"number": 2, "event": "trained", "repeated": None, "notes": 5}):
        record = {"time": "2026-11-28T01:00:00+00:00", "previous": training_log.read().last_hash, **line}
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        path.write_text(path.read_text() + json.dumps({**record, "hash": digest}) + "\n")
    shown = CliRunner().invoke(cli, ["adapters", "log"])
    assert shown.exit_code == 1
    assert "trained (not as edgetune writes it)" in shown.stdout
    assert "Line 2 was changed" in shown.stdout
    training_log.append("promoted", adapter="c", base="b")
    assert training_log.read().lines[-1]["number"] == 3


def test_a_log_without_a_line_is_one_sentence() -> None:
    told = CliRunner().invoke(cli, ["adapters", "log"])
    assert told.exit_code == 0
    assert told.stdout == "Nothing is logged yet: the first `edgetune train` or night writes the first line.\n"


def test_the_root_of_a_set_of_notes_does_not_depend_on_their_order() -> None:
    ids = ledger.ids_of(NOTES)
    assert training_log.root(ids) == training_log.root(reversed(ids)) != training_log.root(ids[1:])
    entry = dataclasses.replace(add("2026-11-28-010000", NOTES, 1.0), adapter="f" * 64)
    training_log.trained(entry.run, BASE, entry, promoted=True, repeated=False)
    (line,) = training_log.read().lines
    assert (line["notes"], line["root"], line["adapter"]) == ({"trained": 4}, training_log.root(ids), "f" * 64)
