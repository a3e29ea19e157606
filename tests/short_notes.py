"""A folder of short notes about repairs, for tests that need enough of them for some to be held out."""

from __future__ import annotations

from pathlib import Path

WORDS = ["harbour", "allotment", "bicycle", "spoke", "kettle", "ledger", "orchard", "gasket"]


def write_short_notes(folder: Path) -> Path:
    """Write 240 short notes to a new folder, and return it. Twelve or so of them are held out."""
    folder.mkdir()
    for number in range(240):
        first, second = WORDS[number % 8], WORDS[number // 8 % 8]
        (folder / f"log{number}.md").write_text(f"Note {number}: the {first} by the {second} was mended on day {number}. " * 3)
    return folder
