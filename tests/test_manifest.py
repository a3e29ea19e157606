"""A dry run names every file, read or not, with its tokens and its language; notes that are nearly the same are found."""

from __future__ import annotations

import json
import random
from pathlib import Path

import documents_in as made
import pytest
from click.testing import CliRunner

from edgetune.cli.main import cli
from edgetune.config import DataConfig, TrainConfig
from edgetune.documents import manifest
from edgetune.documents.heldout import split_held_out
from edgetune.documents.language import guess
from edgetune.documents.near_duplicates import FEWEST_SHINGLES, jaccard, shingles_of
from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason
from edgetune.documents.summary import sentences
from edgetune.training.run_notes import read_and_split

MAIL = b"From a@example.org Wed May  1 10:00:00 2024\nFrom: a@example.org\nSubject: day\n\n%s\n\n"


def words(seed: int, count: int) -> list[str]:
    """Return random words, among which no run of five is twice."""
    pick = random.Random(seed)
    return ["".join(pick.choices("abcdefghij", k=6)) for _ in range(count)]


def changed(text: list[str], *places: int) -> str:
    return " ".join("changed" if place in places else word for place, word in enumerate(text))


LANGUAGES = {
    "en": "The beans were watered in the morning, and it was clear that they had grown since we last looked at the row.",
    "de": "Die Bohnen wurden am Morgen gegossen, und es ist klar, dass sie nicht mit dem Regen, sondern von der Sonne wuchsen.",
    "fr": "Les haricots ont été arrosés le matin et il est clair que la pluie ne suffit pas pour une rangée dans le jardin.",
    "es": "Las judías se regaron por la mañana y está claro que no han crecido con la lluvia, sino por el sol de mayo.",
    "it": "I fagioli sono stati annaffiati la mattina e non è chiaro se la pioggia sia più utile del sole per una fila.",
    "pt": "Os feijões foram regados de manhã e não é claro se a chuva é mais útil do que o sol para uma fila de plantas.",
    "nl": "De bonen zijn in de ochtend begoten en het is niet duidelijk of ze met de regen of door de zon zijn gegroeid.",
    "pl": "Fasola została podlana rano i nie wiadomo, czy to deszcz jest lepszy, bo od słońca też jej się tak dobrze rosło.",
    "ru": "Фасоль полили утром, и ясно, что она выросла не от дождя.",
    "uk": "Квасолю полили вранці, і її ріст не від дощу є ясним.",
    "ja": "豆に水をやったのは朝のことで、雨ではなく太陽のおかげで育ちました。",
    "zh": "早上给豆子浇了水，它们显然不是因为下雨才长高的。",
    "ko": "아침에 콩에 물을 주었고 비 때문에 자란 것은 아니다.",
    "el": "Τα φασόλια ποτίστηκαν το πρωί και δεν μεγάλωσαν από τη βροχή.",
}


@pytest.mark.parametrize("code", LANGUAGES)
def test_the_language_of_a_short_note_is_guessed(code: str) -> None:
    assert guess(LANGUAGES[code]) == code


@pytest.mark.parametrize(
    "text", ["", "x = 1", "12:30 14:45", "TODO", "qwerty uiop asdf ghjk zxcv bnm " * 20, "milk, eggs, flour"]
)
def test_a_text_that_gives_no_evidence_has_no_language(text: str) -> None:
    assert guess(text) == "?"


def test_similarity_is_the_share_of_common_runs_of_five_words() -> None:
    first, second = shingles_of("a b c d e f"), shingles_of("A b\nc d e g")
    assert (len(first), len(second)) == (2, 2)
    assert jaccard(first, second) == 1 / 3
    assert jaccard(frozenset(), frozenset()) == 0.0


def test_a_note_that_another_repeats_almost_word_for_word_is_left_out(tmp_path: Path) -> None:
    text = words(1, 400)
    (tmp_path / "a.md").write_text(" ".join(text[:-2]))
    (tmp_path / "b.md").write_text(" ".join(text))
    (tmp_path / "c (1).md").write_text(changed(text, 200))  # as long as c.md, and its copy
    (tmp_path / "c.md").write_text(changed(text, 100))
    found = read_notes([tmp_path])
    assert [document.path for document in found.documents] == ["b.md"] or [d.path for d in found.documents] == ["c.md"]
    (longest,) = found.documents
    assert {skip.path: (skip.reason, skip.detail) for skip in found.skipped} == {
        name: (Reason.NEAR_DUPLICATE, longest.path) for name in ("a.md", "b.md", "c (1).md", "c.md") if name != longest.path
    }


def test_a_note_that_is_much_like_another_is_reported_and_stays(tmp_path: Path) -> None:
    text = words(2, 400)
    (tmp_path / "a.md").write_text(" ".join(text))
    (tmp_path / "b.md").write_text(changed(text, *range(20, 390, 50)))  # 8 words changed: 8 * 5 of 396 runs
    (tmp_path / "c.md").write_text(" ".join(text[:200] + words(3, 200)))  # half of it
    found = read_notes([tmp_path])
    assert found.skipped == []
    ((path, (other, similarity)),) = found.near_duplicates.items()
    assert {path, other} == {"a.md", "b.md"}
    assert similarity == round((396 - 40) / (396 + 40), 3)


def test_short_notes_and_chats_are_not_compared(tmp_path: Path) -> None:
    text = words(4, FEWEST_SHINGLES + 2)
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text(f"{' '.join(text)} {name}")
    chat = {"messages": [{"role": "user", "content": "Tell."}, {"role": "assistant", "content": " ".join(words(5, 300))}]}
    for name in ("a.jsonl", "b.jsonl"):
        chat["messages"][0]["content"] = f"Tell me of {name}."
        (tmp_path / name).write_text(json.dumps(chat))
    assert len(read_notes([tmp_path]).documents) == 4


def test_without_the_package_nothing_is_compared_and_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.documents.near_duplicates.importlib.util.find_spec", lambda name: None)
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text(f"{' '.join(words(6, 400))} {name}")
    found = read_notes([tmp_path])
    assert (len(found.documents), found.compared, found.as_dict()["compared"]) == (2, False, False)
    said = "Notes were not compared, so that nearly the same text may be learnt twice: pip install 'edgetune[documents]'"
    assert said in sentences(found)
    (tmp_path / "b.md").write_text("A short note, with which there is nothing to compare.")
    assert read_notes([tmp_path]).compared


def test_every_file_is_either_read_or_skipped(tmp_path: Path) -> None:
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text(LANGUAGES["en"])  # the second is the same text
    (tmp_path / "c.mbox").write_bytes(b"".join(MAIL % text for text in (b"One.", b"Two. #private", b"Three.")))
    (tmp_path / "d.jsonl").write_text('{"text": "A line."}\n{bad\n')
    (tmp_path / "slack" / "general").mkdir(parents=True)
    (tmp_path / "slack" / "users.json").write_text('[{"id": "U1", "name": "ben"}, {"id": "U2", "name": "anna"}]')
    (tmp_path / "slack" / "channels.json").write_text('[{"id": "C1", "name": "general"}]')
    messages = [{"type": "message", "user": f"U{1 + n % 2}", "text": f"Message {n}.", "ts": f"{n}.0"} for n in range(4)]
    (tmp_path / "slack" / "general" / "2024-01-01.json").write_text(json.dumps(messages))
    (tmp_path / "~$letter.docx").write_bytes(b"a lock of Word's")
    (tmp_path / ".obsidian").mkdir()
    (tmp_path / "e.png").write_bytes(b"\x89PNG")
    found = read_notes([tmp_path], DataConfig(me=("ben",)))
    # a.md, c.mbox, d.jsonl and three files of Slack; b.md, the lock, the folder of an app and a picture
    assert (found.files, found.files_read) == (10, 6)
    assert {skip.path: skip.explanation for skip in found.skipped if not skip.lines} == {
        "b.md": "same text as another note",
        "c.mbox#2": "marked private (edgetune: false, or the tag #private)",
        "~$letter.docx": "hidden",
        ".obsidian": "settings of an app",
        "e.png": "not a note (by its suffix)",
    }


@pytest.mark.parametrize(
    ("reason", "one", "two"),
    [
        (Reason.BAD_LINE, "1 line that is not JSON", "2 lines that are not JSON"),
        (Reason.NO_ANSWER_OF_MINE, "1 stretch of chats in which you answer nobody", "2 stretches of chats in which"),
        (Reason.DELETED_MESSAGE, "1 deleted message", "2 deleted messages"),
        (Reason.NOT_TEXT, "1 chat with images or other parts that are not text", "2 chats with images or other parts"),
        (Reason.MEDIA, "1 file in chats, such as pictures and voice messages", "2 files in chats, such as"),
        (Reason.EMPTY, "1 empty", "2 empty"),
        (Reason.UNKNOWN_KIND, "1 not a note (by its suffix)", "2 not a note (by its suffix)"),
    ],
)
def test_numbers_of_things_are_said_in_good_english(reason: Reason, one: str, two: str) -> None:
    assert reason.counted(1) == one
    assert reason.counted(2).startswith(two)


def test_notes_that_the_chat_recipe_leaves_out_stand_in_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("A note.")
    (tmp_path / "b.jsonl").write_text('{"prompt": "Who?", "completion": "Me."}')
    reading, _ = read_and_split(TrainConfig(data=DataConfig(notes=(str(tmp_path),), recipe="chat")))
    assert [(skip.path, skip.explanation) for skip in reading.skipped] == [("a.md", "not a chat (left out by --recipe chat)")]
    assert (reading.files, reading.files_read) == (2, 1)


def test_the_manifest_names_everything_that_a_walk_meets_once(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(LANGUAGES["en"])
    (tmp_path / "b.pdf").write_bytes(made.pdf(["Sow in May.", ""]))
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    (tmp_path / "d.md").write_text("We rode to the lake and back.\n\n" * 1000)
    (tmp_path / ".e").write_text("hidden")
    (tmp_path / "f.md").write_text("half \ufffd")
    (tmp_path / "empty.md").write_text("")
    found = read_notes([tmp_path])
    rows = {row.path: row for row in manifest.rows(found, split_held_out(found.documents), lambda text: len(text.split()))}
    assert set(rows) == {".e", "a.md", "b.pdf", "c.png", "d.md", "d.md#end", "empty.md", "f.md"}
    assert (rows["a.md"].state, rows["a.md"].tokens, rows["a.md"].language) == ("read", 22, "en")
    assert (rows["b.pdf"].tokens, rows["b.pdf"].why) == (3, "pages without text, perhaps scanned left out (1)")
    assert (rows["c.png"].state, rows["c.png"].why, rows["c.png"].tokens) == ("skipped", "not a note (by its suffix)", None)
    assert (rows["d.md#end"].state, rows["d.md"].state) == ("held out", "read")
    assert rows["f.md"].why == "1 damaged"
    assert rows["empty.md"].why == "empty"


def test_a_dry_run_shows_the_manifest_as_a_table_and_as_json(tmp_path: Path) -> None:
    text = words(7, 400)
    (tmp_path / "a.md").write_text(" ".join(text))
    (tmp_path / "b.md").write_text(changed(text, *range(20, 390, 50)))
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    arguments = ["train", str(tmp_path), "--dry-run", "--model", "demo"]
    shown = CliRunner().invoke(cli, arguments, catch_exceptions=False).output
    assert "Tokens are counted with the tokenizer of demo." in shown
    assert "1 note is much like another one; edgetune train --dry-run says which." in shown
    lines = shown.splitlines()
    assert [line.split() for line in lines if "c.png" in line] == [
        ["-", "-", "skipped", "c.png:", "not", "a", "note", "(by", "its", "suffix)"]
    ]
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).stdout)
    rows = {row["path"]: row for row in found["manifest"]}
    assert found["tokenizer"] == "demo"
    assert set(rows) == {"a.md", "b.md", "c.png"}
    assert rows["a.md"]["tokens"] > 400
    alike = [row for row in rows.values() if row["near_duplicate_of"]]
    assert [(row["near_duplicate_of"], row["similarity"]) for row in alike] in ([("a.md", 0.817)], [("b.md", 0.817)])
    assert any(line.endswith(f"{alike[0]['path']}: 82% like {alike[0]['near_duplicate_of']}") for line in lines)
    assert json.dumps(found).count(text[0]) == 0
