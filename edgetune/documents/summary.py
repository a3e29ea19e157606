"""Says in a few sentences what reading the notes left out, so that nothing is missing silently."""

from __future__ import annotations

import dataclasses

from edgetune.documents.document import Reading
from edgetune.reports.text import counted, human_bytes


def sentences(reading: Reading) -> tuple[str, ...]:
    """Return a sentence each for files that were not read, damaged notes, embedded files, unused --exclude patterns, and each
    cause for which records of a file of chats were not read."""
    said = []
    files = dataclasses.replace(reading, skipped=[skip for skip in reading.skipped if not skip.has_sentence])
    if files.skipped:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in files.skipped_counts().items())
        said.append(f"Not read: {counts}. Type edgetune train --dry-run to see which.")
    if reading.damaged:
        letters = sum(reading.damaged.values())
        said.append(
            f"Damaged: {counted(letters, 'letter')} in {counted(len(reading.damaged), 'note')} could not be decoded and "
            " will be learnt as \ufffd."
        )
    if reading.embedded:
        said.append(
            f"Left out: pictures or other files embedded in {counted(len(reading.embedded), 'note')}, "
            f"{human_bytes(sum(reading.embedded.values()))}."
        )
    said += [f"--exclude {pattern} matched nothing." for pattern in reading.unused_excludes]
    return (*said, *reading.unread_chats())
