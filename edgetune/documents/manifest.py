"""Lists every file that a reading found, for --dry-run: read or skipped, why, its tokens, its language, and what it is like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgetune.documents.document import Document, Reading
from edgetune.documents.heldout import END, HeldOutSplit
from edgetune.documents.language import guess
from edgetune.documents.walk import order_key
from edgetune.progress import Progress, ignore
from edgetune.reports.text import human_bytes, one_line

TRAINED, HELD_OUT, SKIPPED = "read", "held out", "skipped"
"""Uses of a file: training, measuring whether training helps, or none."""


@dataclass(frozen=True)
class Row:
    """One line of the manifest: a document, or something that is not read. `why` also tells what was left out of a document."""

    path: str
    state: str
    why: str = ""
    tokens: int | None = None
    bytes: int | None = None
    language: str = ""
    near_duplicate_of: str = ""
    similarity: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the row for --json."""
        return asdict(self)


def rows(
    reading: Reading, split: HeldOutSplit, count: Callable[[str], int] | None = None, progress: Progress = ignore
) -> list[Row]:
    """Return a row for each document and each thing that was skipped, sorted by path.

    count: returns the tokens of a text; None where no tokenizer is here. A long text is counted a mebibyte at a time, and a
    chat in Guanaco's form. progress: receives the documents done and their number.
    """
    states = [(document, TRAINED) for document in split.train] + [(document, HELD_OUT) for document in split.held_out]
    found = []
    for number, (document, state) in enumerate(states):
        progress(number, len(states))
        found.append(_row(reading, document, state, count))
    found += [Row(skip.path, SKIPPED, skip.explanation) for skip in reading.skipped]
    progress(len(states), len(states))
    return sorted(found, key=lambda row: order_key(row.path))


def table(found: Sequence[Row]) -> list[str]:
    """Return the manifest as lines of text, the first of them with the columns' names."""
    width = max([len("tokens"), *(len(f"{row.tokens:,}") for row in found if row.tokens is not None)])
    lines = [f"{'tokens':>{width}}  language  {'state':<8}  file"]
    for row in found:
        tokens = "-" if row.tokens is None else f"{row.tokens:,}"
        remarks = [text for text in (row.why, _likeness(row)) if text]
        named = f"{one_line(row.path)}: {one_line('; '.join(remarks))}" if remarks else one_line(row.path)
        lines.append(f"{tokens:>{width}}  {row.language or '-':<8}  {row.state:<8}  {named}")
    return lines


def _row(reading: Reading, document: Document, state: str, count: Callable[[str], int] | None) -> Row:
    """Return the row of one document."""
    path = document.path.removesuffix(END) if document.path.endswith(END) else document.path
    near, similarity = reading.near_duplicates.get(path, ("", None))
    is_end = path != document.path
    return Row(
        path=document.path,
        state=state,
        why="the end of a long note; the rest is trained on" if is_end else _left_out(reading, path),
        tokens=None if count is None else sum(map(count, document.blocks())),
        bytes=document.size,
        language=guess(next(document.blocks(), "")),
        near_duplicate_of=near,
        similarity=similarity,
    )


def _left_out(reading: Reading, path: str) -> str:
    """Return what was damaged in a document, or left out of it."""
    said = []
    if letters := reading.damaged.get(path):
        said.append(f"{letters:,} damaged")
    if size := reading.embedded.get(path):
        said.append(f"{human_bytes(size)} left out")
    file = path if path in reading.left_out else path.rpartition("#")[0]
    if file == path or path == f"{file}#1":  # once for a file with many documents
        said += [f"{kind} left out ({count:,})" for kind, count in reading.left_out.get(file, {}).items()]
    return ", ".join(said)


def _likeness(row: Row) -> str:
    return f"{row.similarity:.0%} like {row.near_duplicate_of}" if row.similarity is not None else ""
