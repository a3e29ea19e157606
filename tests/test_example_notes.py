"""The example notes that ship with edgetune are complete and numerous enough that some are held out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgetune.documents.heldout import split_held_out
from edgetune.documents.reading import read_notes

NOTES = Path(__file__).resolve().parent.parent / "examples" / "notes"


def test_every_example_note_is_read_and_some_are_held_out() -> None:
    reading = read_notes([str(NOTES)])
    assert len(reading.documents) >= 40
    assert reading.skipped == []
    assert len(split_held_out(reading.documents).held_out) >= 3


@pytest.mark.parametrize("path", sorted(NOTES.rglob("*.md")), ids=lambda path: path.stem)
def test_an_example_note_has_front_matter_and_links_that_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.match(r"---\ntitle: .+\ntags: \[.+\]\ndate: 202\d-\d\d-\d\d\n---\n\n# ", text)
    for target in re.findall(r"\[\[([^]|#]+)\]\]", text):
        assert list(NOTES.rglob(f"{target}.md")), target


def test_the_python_in_the_example_notes_runs() -> None:
    blocks = [block for path in NOTES.rglob("*.md") for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.S)]
    assert blocks
    for block in blocks:
        exec(compile(block, "note", "exec"), {})
