"""What is held out is about a twentieth of the text, on one side only, and stays there when notes are added."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.documents.copies import original_path
from edgetune.documents.document import Document, Turn
from edgetune.documents.heldout import FEWEST_BYTES, HeldOutSplit, cut_before_end, split_held_out
from edgetune.documents.lineage import Known, Lineage
from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases" / "notes"


def words(seed: str, size: int) -> str:
    """Return `size` bytes of paragraphs that no other seed gives."""
    text = ""
    while len(text) < size:
        digest = hashlib.sha256(f"{seed} {len(text)}".encode()).hexdigest()
        text += " ".join(digest[at : at + 6] for at in range(0, 60, 6)) + ("\n\n" if int(digest, 16) % 5 == 0 else "\n")
    return text[: size - 1] + "\n"


def notes(count: int, size: int = 300, prefix: str = "") -> list[Document]:
    return [Document.of(f"{prefix}{number}.md", words(f"{prefix}{number}", size)) for number in range(count)]


def sizes(sides: HeldOutSplit) -> tuple[int, int]:
    return sum(document.size for document in sides.train), sum(document.size for document in sides.held_out)


def test_one_note_in_twenty_is_held_out():
    sides = split_held_out(notes(2000))
    assert sides.held_out == [document for document in notes(2000) if int(document.digest, 16) % 20 == 0]
    assert 60 < len(sides.held_out) < 140


def test_sides_are_disjoint_and_complete():
    documents = notes(200)
    sides = split_held_out(documents)
    assert sorted(sides.train + sides.held_out, key=lambda d: d.path) == sorted(documents, key=lambda d: d.path)


@pytest.mark.parametrize("count", [100, 400])
def test_a_note_held_out_by_its_digest_stays_held_out_when_notes_are_added(count):
    before = {document.digest for document in split_held_out(notes(count)).held_out if int(document.digest, 16) % 20 == 0}
    added = [*notes(150, 700, "new"), *notes(2, 60_000, "long")]
    after = {document.digest for document in split_held_out([*notes(count), *added]).held_out}
    assert before
    assert before <= after


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30_000), max_size=40))
def test_the_held_out_side_has_a_floor_and_a_ceiling(lengths):
    documents = [Document.of(f"{number}.md", words(str(number), size + 1)) for number, size in enumerate(lengths)]
    sides = split_held_out(documents)
    trained, held_out = sizes(sides)
    assert trained + held_out == sum(document.size for document in documents)
    assert held_out <= 0.15 * (trained + held_out)
    assert held_out == 0 or held_out >= FEWEST_BYTES
    assert sides == split_held_out(documents)


@pytest.mark.parametrize(("count", "expected"), [(66, 0), (67, 10), (100, 10), (2000, None)])
def test_enough_notes_to_judge_by_are_held_out_where_there_are_enough_in_all(count, expected):
    short = [document for document in notes(3000) if int(document.digest, 16) % 20][:count]  # one in twenty is none of these
    sides = split_held_out(short)
    trained, held_out = sizes(sides)
    assert held_out <= 0.15 * (trained + held_out) + 1
    assert len(sides.held_out) == expected if expected else len(sides.held_out) < 0.03 * count + 1


def test_notes_held_out_to_judge_by_stay_so_in_the_runs_that_follow():
    documents = notes(80)
    first = split_held_out(documents)
    assert len(first.held_out) == 10
    lineage = Lineage.after(documents, first.cuts, Lineage())
    later = [*documents, *notes(60, 300, "new")]
    after = split_held_out(later, Known.among(later, lineage))
    assert {document.digest for document in first.held_out} <= {document.digest for document in after.held_out}
    assert not {document.digest for document in first.train} & {document.digest for document in after.held_out}


def test_a_diary_gives_its_end_and_not_the_whole():
    diary = Document.of("diary.md", words("diary", 26_000))
    sides = split_held_out([diary, *notes(11, 45)])
    kept = next(document for document in sides.train if document.path == "diary.md")
    end = next(document for document in sides.held_out if document.path == "diary.md#end")
    assert kept.text + end.text == diary.text
    assert kept.text.endswith("\n\n")
    assert 0.05 <= end.size / diary.size <= 0.1
    assert kept.digest == hashlib.sha256(kept.text.encode()).hexdigest()
    assert len({diary.digest, kept.digest, end.digest}) == 3


def test_a_diary_to_which_text_is_added_trains_on_no_more_than_its_new_cut():
    diary = words("diary", 26_000)
    longer = diary + words("more", 3_000)
    sides = split_held_out([Document.of("diary.md", longer)])
    assert sides.train[0].text + sides.held_out[0].text == longer


def test_one_long_note_alone_is_cut_and_few_short_ones_are_all_trained():
    assert [d.path for d in split_held_out([Document.of("book.txt", words("book", 100_000))]).held_out] == ["book.txt#end"]
    assert split_held_out(notes(9)).held_out == []
    assert split_held_out(notes(12, 43)).held_out == []


def test_notes_of_middle_length_give_an_end_where_no_whole_one_fits():
    sides = split_held_out(notes(5, 15_000))
    trained, held_out = sizes(sides)
    assert all(document.path.endswith("#end") for document in sides.held_out)
    assert 0.025 <= held_out / (trained + held_out) <= 0.1


def test_a_chat_is_never_cut():
    turns = (Turn("user", "How deep?"), Turn("assistant", "Two inches. " * 5_000))
    chat = Document.of("chats.jsonl#1", "### Human: How deep? ### Assistant: " + turns[1].text, turns)
    sides = split_held_out([chat, *notes(30)])
    assert chat in sides.train
    assert chat.turns == turns


@pytest.mark.parametrize("text", ["字" * 20_000, "é" * 30_000, "x" * 40_001, "word " * 9_000, "a line\n" * 7_000])
def test_a_cut_falls_between_lines_or_words_or_letters(text):
    document = Document.of("a.md", text)
    cut = cut_before_end(document)
    assert document.part(0, cut, "a.md").text + document.part(cut, document.size, "b.md").text == text
    assert 0.9 * document.size <= cut <= 0.95 * document.size + 3


# Duplicates and copies


def test_a_note_that_differs_in_white_space_mark_or_normal_form_is_a_duplicate(tmp_path):
    text = "# Größe\n\nThe hub of the café bicycle\nwas loose.\n"
    variants = {
        "a.md": text,
        "b.md": text.rstrip("\n"),
        "c.md": text + "\n\n",
        "d.md": text.replace("\n", "\r\n"),
        "e.md": unicodedata.normalize("NFD", text),
        "f.md": "\ufeff" + text,
        "g.md": text.replace(" loose.", " loose.   "),
        "h.md": text.replace("bicycle\nwas", "bicycle was"),
    }
    for name, variant in variants.items():
        (tmp_path / name).write_text(variant, newline="")
    (tmp_path / "other.md").write_text(text.replace("loose", "lost"))
    (tmp_path / "chats.jsonl").write_text(
        '{"text": "### Human: a  b ### Assistant: c"}\n{"text": "### Human: a b ### Assistant: c "}\n'
    )
    reading = read_notes([tmp_path])
    assert [document.path for document in reading.documents] == ["a.md", "chats.jsonl#1", "other.md"]
    assert {skip.reason for skip in reading.skipped} == {Reason.DUPLICATE}


def test_the_original_is_read_and_not_its_copy(tmp_path):
    for name in ("n (conflicted copy 2024-05-01).md", "n 2.md", "n.md", "m (1).md", "m (2).md"):
        (tmp_path / name).write_text(f"The same {name[0]}.")
    assert [document.path for document in read_notes([tmp_path]).documents] == ["m (1).md", "n.md"]


@pytest.mark.parametrize(
    "copy",
    [
        "a/bench (conflicted copy 2024-05-01).md",
        "a/bench (Ann's conflicted copy 2024-05-01).md",
        "a/bench (Case Conflict).md",
        "a/bench.sync-conflict-20240501-101112-ABCDEFG.md",
        "a/bench_conflict-20240501-101112.md",
        "a/bench - Copy.md",
        "a/bench - Copy (2).md",
        "a/bench copy 3.md",
        "a/bench (1).md",
        "a/bench 2.md",
    ],
)
def test_copies_of_a_note_stay_on_its_side(copy):
    assert original_path(copy) == "a/bench.md"
    assert original_path("a/bench.md") == "a/bench.md"
    for number in range(40):
        text = words(str(number), 400)
        again = f"{copy.removesuffix('.md')} (2).md"  # a copy of the copy
        copies = [
            Document.of("a/bench.md", text),
            Document.of(copy, text + "One more line.\n"),
            Document.of(again, text + "And one more.\n"),
        ]
        sides = split_held_out([*notes(90), *copies])
        assert len([document for document in sides.held_out if document in copies]) in (0, 3)


def test_a_name_with_a_number_is_a_copy_only_of_a_note_that_exists():
    chapters = [Document.of(f"Chapter {number}.md", words(str(number), 400)) for number in range(1, 10)]
    sides = split_held_out([*chapters, *notes(300)])
    held = {document.path for document in sides.held_out}
    assert {d.path for d in chapters if int(d.digest, 16) % 20 == 0} == {path for path in held if path.startswith("Chapter")}


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not on this machine")
def test_the_case_of_one_diary_and_eleven_lines():
    trained, held_out = sizes(split_held_out(read_notes([CASES / "23-held-out-takes-nearly-everything/notes"]).documents))
    assert 0.025 <= held_out / (trained + held_out) <= 0.1
