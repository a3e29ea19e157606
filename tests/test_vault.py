"""Markdown of Obsidian, Logseq and Joplin loses its marks, and no other text changes."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason
from edgetune.documents.vault import VaultText


def filtered(text: str, *cuts: int) -> str:
    """Return a note filtered in blocks that end at these lines."""
    vault, lines = VaultText(), text.splitlines(keepends=True)
    places = [0, *cuts, len(lines)]
    return "".join(vault.add("".join(lines[a:b])) for a, b in itertools.pairwise(places)) + vault.finish()


UUID = "01234567-89ab-cdef-0123-456789abcdef"
ID = "0123456789abcdef0123456789abcdef"
OBSIDIAN = [
    ("See [[Beans]].", "See Beans."),
    ("See [[Beans|the beans]].", "See the beans."),
    ("See [[Beans#In May]] and [[#Later]].", "See Beans and Later."),
    ("| [[Beans\\|b]] | 2 |", "| b | 2 |"),
    ("参见[[豆子]]。", "参见豆子。"),
    ("[[2024-05-01]]", "2024-05-01"),
    ("![[bean.png]] ![[bean.png|300]] ![[Plan.canvas]]seen", "  seen"),
    ("![[Beans]] ![[Beans#May]]", "Beans Beans"),
    ("> [!note] Sow early\n> Deep.", "> Sow early\n> Deep."),
    ("> [!WARNING]-\n> Deep.", "> Warning\n> Deep."),
    ("Sow %%when?%% early.", "Sow  early."),
    ("Sow.\n%%\nlater\n%%\nWait.", "Sow.\nWait."),
    ("%% kanban:settings\n```\n{}\n```\n%%", ""),
    ("A rule. ^a1b2c3\nNext.", "A rule.\nNext."),
    ("- item ^list-item", "- item"),
]
LOGSEQ = [
    ("- Beans\n  id:: x\n  collapsed:: true\n  tags:: a, b\n\t- inner", "- Beans\n  tags: a, b\n\t- inner"),
    (f"- see (({UUID})) there", "- see  there"),
    (f"- [the rule]((({UUID})))", "- the rule"),
    (f"- {{{{embed (({UUID}))}}}}\n- {{{{embed [[Beans]]}}}}", "- \n- Beans"),
    ("- DONE sow\n  :LOGBOOK:\n  CLOCK: [2024-05-01]\n  :END:\n- next", "- DONE sow\n- next"),
]
JOPLIN = [
    (f"![](:/{ID}) [a file](:/{ID})", " a file"),
    (f"Beans\n\nSow.\n\nid: {ID}\nparent_id: \ncreated_time: 2024\ntype_: 1", "Beans\n\nSow.\n\n"),
]


@pytest.mark.parametrize(("note", "learnt"), [*OBSIDIAN, *LOGSEQ, *JOPLIN])
def test_marks_of_vaults_become_words_or_go(note: str, learnt: str) -> None:
    assert filtered(note) == learnt


SAME = [
    "if [[ -f x ]]; then y; fi", "[[ $a == b ]]", "m = [[1, 2], [3, 4]]", "[[1]] and [[0.5]]", 'x[["name"]] and df[[a]]',
    "[[:alpha:]]", "[[a]](https://example.org)", "[[a]: b", "\\[[a]]", "100%% sure and 50%% not", "printf '%%d'",
    "%%time\nx = 1\n", "%%\nnever closed\nSow.", "std::vector and A::b", "map :: (a -> b)", "x ^2", "2 ^10 and ^",
    "[^1] and text[^note]", "```\n[[a]] %%b%% ^abc\n```\n", "~~~ md\n[[a]]\n~~~", "Sow.\n\n    [[a]]\n\n    %%b%%\n",
    "\t[[a]]", "`[[a]]` and `` %%b%% ``", ":LOGBOOK:\nnever closed", f"id: {ID}\nis an id",
    f"Sow.\n\nid: {ID}\nparent_id: x\n\nMore.", "((not an id))", "[a](:/not-an-id)", "> [!] no", "> quoted [!x] text", "",
    "\n", "\n\n\n", "[[", "]]", "![[", "[[]]", "[[|]]", "%%", "a\x0b[[b\x0c]]", "[[a\nb]]", "[[ a ]]", "[[a ]]",
]  # fmt: skip


@pytest.mark.parametrize("text", SAME)
def test_a_text_that_is_not_a_vaults_stays_as_it_is(text: str) -> None:
    assert filtered(text) == text


def test_where_blocks_are_cut_makes_no_difference() -> None:
    pick = random.Random(0)
    notes = [note for note, _ in [*OBSIDIAN, *LOGSEQ, *JOPLIN]] + SAME
    for _ in range(200):
        text = "\n".join(pick.choices(notes, k=6)) + "\n"
        count = len(text.splitlines(keepends=True))
        cuts = sorted(pick.sample(range(count + 1), min(3, count)))
        assert filtered(text, *cuts) == filtered(text), repr(text)


def test_every_line_that_the_examples_folder_holds_stays(tmp_path: Path) -> None:
    for page in sorted((Path(__file__).parent.parent / "examples" / "notes").glob("*.md")):
        text = page.read_text()
        assert filtered(text) == text


def test_markdown_is_read_so_and_plain_text_is_not(tmp_path: Path) -> None:
    for name in ("a.md", "b.txt"):
        (tmp_path / name).write_text(f"In {name}: see [[Beans|the beans]].")
    (tmp_path / "Plan.canvas").write_text("{}")
    (tmp_path / "Sketch.excalidraw").write_text("{}")
    reading = read_notes([tmp_path])
    assert [document.text for document in reading.documents] == [
        "In a.md: see the beans.",
        "In b.txt: see [[Beans|the beans]].",
    ]
    assert {skip.path: skip.reason for skip in reading.skipped} == {
        "Plan.canvas": Reason.CANVAS,
        "Sketch.excalidraw": Reason.DRAWING,
    }
