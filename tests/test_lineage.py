"""From one adapter to the next, notes stay on their side, new ones are learnt, and a share of the learnt ones comes again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.config import DataConfig, TrainConfig
from edgetune.documents.document import Document, Turn
from edgetune.documents.heldout import END, HeldOutSplit, split_held_out
from edgetune.documents.lineage import KEY, MARK_DIGITS, Known, Lineage, new_and_changed, replayed
from edgetune.events import Event, Finished, Started
from edgetune.runtime import peft_folder
from edgetune.training.run_notes import notes_to_train
from edgetune.training.train import train


def note(name: str, size: int = 400, path: str = "") -> Document:
    text = ""
    while len(text) < size:
        text += hashlib.sha256(f"{name} {len(text)}".encode()).hexdigest()[:8] + ("\n\n" if len(text) % 90 > 80 else " ")
    return Document.of(path or f"{name}.md", text[:size])


def notes(count: int, size: int = 400, prefix: str = "n") -> list[Document]:
    return [note(f"{prefix}{number}", size) for number in range(count)]


def night(documents: Sequence[Document], before: Lineage) -> tuple[HeldOutSplit, Lineage]:
    """Return the split of a run on these documents, and the marks that its adapter has."""
    split = split_held_out(documents, Known.among(documents, before))
    return split, Lineage.of_adapter({KEY: Lineage.after(documents, split.cuts, before).as_dict()})


def paths(documents: Sequence[Document]) -> set[str]:
    return {document.path for document in documents}


@settings(deadline=None, max_examples=30)
@given(st.integers(10, 60), st.sets(st.integers(0, 59)), st.integers(0, 80), st.sampled_from([300, 5_000]))
def test_a_note_stays_on_its_side_whatever_notes_come_and_go(count: int, gone: set[int], added: int, size: int) -> None:
    first = notes(count, size)
    one, lineage = night(first, Lineage())
    kept = [document for number, document in enumerate(first) if number not in gone]
    two, _ = night([*kept, *notes(added, 700, "new")], lineage)
    for side, later in ((one.train, two.train), (one.held_out, two.held_out)):
        stayed = paths(side) & (paths(kept) | {document.path + END for document in kept})
        assert stayed <= paths(later)
        assert {d.digest for d in side if d.path in stayed} <= {d.digest for d in later}


def test_a_renamed_or_edited_note_stays_on_its_side() -> None:
    first = notes(200)
    one, lineage = night(first, Lineage())
    assert 3 <= len(one.held_out) <= 20
    renamed = [Document.of(f"moved/{document.path}", document.text) for document in first]
    edited = [Document.of(document.path, document.text + "One more line.\n") for document in first]
    assert paths(night(renamed, lineage)[0].held_out) == {f"moved/{path}" for path in paths(one.held_out)}
    assert paths(night(edited, lineage)[0].held_out) == paths(one.held_out)
    by_digest = paths(split_held_out(edited).held_out)
    assert by_digest != paths(one.held_out)  # without the marks, learnt notes would be held out


def test_a_chat_is_known_by_its_text_alone() -> None:
    def chat(line: int, answer: str) -> Document:
        return Document.of(f"c.jsonl#{line}", f"q {answer}", (Turn("user", "q"), Turn("assistant", answer)))

    learnt = [chat(line, f"answer {line}") for line in range(1, 20)]
    lineage = Lineage.of_adapter({KEY: Lineage.after(learnt, {}, Lineage()).as_dict()})
    assert len(lineage.trained) == 19
    moved = [chat(1, "new"), *(chat(line + 1, f"answer {line}") for line in range(1, 20))]
    assert Known.among(moved, lineage).unchanged == {document.digest for document in learnt}


def test_new_and_changed_notes_are_told_by_their_texts_alone() -> None:
    first = notes(40)
    _, lineage = night(first, Lineage())
    renamed = Document.of("renamed.md", first[0].text)
    edited = [Document.of(document.path, document.text + "and more") for document in first[1:4]]
    chat = Document.of("c.jsonl#1", "q answer", (Turn("user", "q"), Turn("assistant", "answer")))
    documents = [renamed, *edited, *first[4:], *notes(2, 400, "new"), chat]
    assert new_and_changed(documents, lineage) == (3, 3)
    assert new_and_changed(documents, Lineage()) == (len(documents), 0)


def test_all_new_and_changed_notes_are_trained_and_a_share_of_the_others() -> None:
    first = notes(100)
    _, lineage = night(first, Lineage())
    changed = Document.of(first[0].path, first[0].text + "and more")
    documents = [changed, *first[1:], *notes(8, 400, "new")]
    whole = split_held_out(documents, Known.among(documents, lineage))
    split, said = notes_to_train(whole, documents, lineage, 0.25, seed=0)
    new = {path for path in paths(whole.train) if path.startswith("new") or path == changed.path}
    assert len(new) >= 7
    assert new <= paths(split.train)
    old = [document for document in split.train if document.path not in new]
    size = sum(document.size for document in old)
    assert 0.25 <= size / sum(document.size for document in split.train) < 0.25 + 400 / 3600
    assert split.held_out == whole.held_out
    learnt = len(whole.train) - len(new)
    assert said == (
        f"This run trains on {len(new)} new or changed notes and on {len(old)} of the {learnt} that the adapter has learnt "
        "already.",
    )
    none, _ = notes_to_train(whole, documents, lineage, 0.0, seed=0)
    assert paths(none.train) == new


def test_each_run_takes_others_of_the_learnt_notes_and_the_same_run_the_same() -> None:
    old = notes(60)
    taken = [paths(replayed(old, 4_000, 0, nights)) for nights in range(1, 30)]
    assert {len(chosen) for chosen in taken} == {10}
    assert taken[0] == paths(replayed(list(reversed(old)), 4_000, 0, 1))
    assert len(set().union(*taken)) >= 58
    assert taken[0] != taken[1]
    assert replayed(old, 0, 0, 1) == []


def test_where_nothing_is_new_or_nothing_is_known_all_notes_are_trained() -> None:
    first = notes(50)
    split, lineage = night(first, Lineage())
    assert notes_to_train(split, first, lineage, 0.25, 0) == (split, ())
    assert notes_to_train(split, first, Lineage(), 0.25, 0) == (split, ())


def test_notes_that_are_gone_leave_no_mark() -> None:
    first = notes(30)
    _, lineage = night(first, Lineage())
    _, later = night(first[:10], lineage)
    every = later.trained | later.held_out | later.cut
    assert len(every) == 20
    assert every <= lineage.trained | lineage.held_out | lineage.cut
    assert (lineage.nights, later.nights) == (1, 2)


@pytest.mark.parametrize(
    "stored",
    [None, [], "x", {}, {"trained": "ab", "held_out": "", "cut": 3, "nights": 1}, {"trained": "", "held_out": "", "cut": ""},
     {"trained": "", "held_out": "", "cut": "", "nights": True}],
)  # fmt: skip
def test_marks_in_another_form_are_none(stored: object) -> None:
    assert Lineage.of_adapter({KEY: stored}) == Lineage()


def test_more_marks_than_the_file_may_hold_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.documents.lineage.MOST_MARKS", 5)
    lineage = Lineage.after(notes(3), {}, Lineage())
    assert lineage == Lineage(nights=1)
    many = {"trained": "a b c d e f g", "held_out": "", "cut": "", "nights": 1}
    assert Lineage.of_adapter({KEY: many}).trained == set("abcde")


# Runs


def run(folder: Path, out: str, start: str | None = None) -> tuple[list[Event], dict[str, object]]:
    data = DataConfig(notes=(str(folder / "notes"),), seq_len=64, batch_tokens=256)
    config = TrainConfig(
        data=data, model=str(folder / "model"), steps=2, rank=4, out=str(folder / out), from_adapter=start, anchor=0.0
    )
    events = list(train(config))
    assert isinstance(events[-1], Finished)
    return events, json.loads((folder / out / peft_folder.EDGETUNE_FILE).read_text())


def test_a_second_run_from_the_first_adapter_learns_the_new_notes_and_replays_some(tmp_path: Path) -> None:
    tiny.save_trainable(tmp_path / "model")
    (tmp_path / "notes").mkdir()
    for number in range(40):
        (tmp_path / "notes" / f"{number}.md").write_text(
            f"# Tide {number}\n\n" + f"The tide turned at {number * 7}, we left. " * 5
        )
    first, about = run(tmp_path, "first")
    marks = about[KEY]
    assert isinstance(marks, dict)
    assert marks["nights"] == 1
    assert isinstance(first[0], Started)
    held = first[0].heldout_paths
    assert len(marks["held_out"].split()) == 2 * len(held) > 0
    assert len(marks["trained"].split()) == 2 * (40 - len(held))
    assert all(len(mark) == MARK_DIGITS for mark in marks["trained"].split())
    assert "tide" not in json.dumps(about).lower()
    for number in range(40, 46):
        (tmp_path / "notes" / f"{number}.md").write_text(
            f"# Wind {number}\n\n" + f"The wind rose at {number * 7}, we came. " * 5
        )
    second, about = run(tmp_path, "second", str(tmp_path / "first"))
    assert isinstance(second[0], Started)
    assert set(held) <= set(second[0].heldout_paths)
    assert any(notice.startswith("This run trains on") for notice in second[0].notices)
    assert second[0].documents < 12
    marks = about[KEY]
    assert isinstance(marks, dict)
    assert marks["nights"] == 2
    assert sum(len(marks[side].split()) for side in ("trained", "held_out")) == 2 * 46
