"""Says in a few sentences what reading the notes left out, so that nothing is missing silently."""

from __future__ import annotations

import dataclasses

from edgetune.documents.document import Reading
from edgetune.privacy.kinds import counted
from edgetune.reports.text import human_bytes


def sentences(reading: Reading) -> tuple[str, ...]:
    """Return a sentence each for files that were not read, damaged notes, embedded files, what was masked, unused --exclude
    patterns, and each cause for which records of a file of chats were not read."""
    said = []
    files = dataclasses.replace(reading, skipped=[skip for skip in reading.skipped if not skip.lines])
    if files.skipped:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in files.skipped_counts().items())
        said.append(f"Not read: {counts}. Type edgetune train --dry-run to see which.")
    if reading.damaged:
        letters = sum(reading.damaged.values())
        said.append(
            f"Damaged: {letters:,} {'letter' if letters == 1 else 'letters'} in {_notes(len(reading.damaged))} could not be "
            "decoded and will be learnt as \ufffd."
        )
    if reading.embedded:
        said.append(
            f"Left out: pictures or other files embedded in {_notes(len(reading.embedded))}, "
            f"{human_bytes(sum(reading.embedded.values()))}."
        )
    if reading.masked:
        said.append(f"Masked before training: {counted(reading.masked)}. Placeholders stand in their place.")
    said += [f"--exclude {pattern} matched nothing." for pattern in reading.unused_excludes]
    return (*said, *reading.unread_chats())


def _notes(count: int) -> str:
    return f"{count:,} {'note' if count == 1 else 'notes'}"
