"""Says in a few sentences what reading the notes left out, so that nothing is missing silently."""

from __future__ import annotations

import dataclasses

from edgetune.documents.document import Reading
from edgetune.documents.limits import PARSE_SECONDS
from edgetune.documents.reasons import Reason
from edgetune.privacy import kinds
from edgetune.reports.text import counted, human_bytes

_CAUSES_SHOWN = 8
"""Most causes for unread chats that a run names before it begins. Chosen by hand."""


def sentences(reading: Reading) -> tuple[str, ...]:
    """Return a sentence for each kind of thing that was not read, left out, damaged or masked, and for what is missing here."""
    said = []
    files = dataclasses.replace(reading, skipped=[skip for skip in reading.skipped if not skip.has_sentence])
    if files.skipped:
        said.append(f"Not read: {skipped_in_words(files)}. Type edgetune train --dry-run to see which.")
    if reading.damaged:
        letters = sum(reading.damaged.values())
        said.append(
            f"Damaged: {counted(letters, 'letter')} in {counted(len(reading.damaged), 'note')} could not be decoded and "
            "will be learnt as \ufffd."
        )
    if reading.embedded:
        said.append(
            f"Left out: pictures or other files embedded in {counted(len(reading.embedded), 'note')}, "
            f"{human_bytes(sum(reading.embedded.values()))}."
        )
    said += _of_parsed(reading)
    if reading.masked:
        said.append(f"Masked before training: {kinds.in_words(reading.masked)}. Placeholders stand in their place.")
    said += [f"--exclude {pattern} matched nothing." for pattern in reading.unused_excludes]
    return (*said, *unread_chats(reading))


def unread_chats(reading: Reading) -> tuple[str, ...]:
    """Return a sentence for each cause for which records of a file of chats were not read; the first ones, if many."""
    said = [f"{skip.path}: {skip.explanation}." for skip in reading.skipped if skip.has_sentence]
    if (more := len(said) - _CAUSES_SHOWN) > 0:
        said[_CAUSES_SHOWN:] = [f"Chats were not read for {counted(more, 'more cause')}; edgetune train --dry-run lists them."]
    return tuple(said)


def skipped_in_words(reading: Reading) -> str:
    """Return the number of things that were skipped for each reason: "2 empty, 1 hidden"."""
    return ", ".join(Reason(reason).counted(count) for reason, count in reading.skipped_counts().items())


def _of_parsed(reading: Reading) -> list[str]:
    """Return the sentences about files that a parser reads, and about notes that are much alike."""
    said = []
    if reading.left_out:
        counts = ", ".join(f"{kind} ({count:,})" for kind, count in reading.left_out_counts().most_common())
        said.append(f"Left out of {counted(len(reading.left_out), 'file')}: {counts}.")
    if reading.lacking:
        counts = _listed([f"{count:,} {name}" for name, count in reading.lacking.items()])
        verb = "file needs" if sum(reading.lacking.values()) == 1 else "files need"
        said.append(f"{counts} {verb} the extra documents: pip install 'edgetune[documents]'")
    if reading.as_plain:
        counts = _listed([f"{count:,} {name}" for name, count in reading.as_plain.items()])
        kind = "file was" if sum(reading.as_plain.values()) == 1 else "files were"
        said.append(f"{counts} {kind} read as plain text; to leave markup out, pip install 'edgetune[documents]'")
    if not reading.compared:
        said.append(
            "Notes were not compared, so that nearly the same text may be learnt twice: pip install 'edgetune[documents]'"
        )
    if reading.near_duplicates:
        count = len(reading.near_duplicates)
        alike = "is much like another one" if count == 1 else "are much like others"
        said.append(f"{counted(count, 'note')} {alike}; edgetune train --dry-run says which.")
    if reading.unlimited:
        said.append(
            f"On this system nothing limits the {' and '.join(reading.unlimited)} of the process that parses documents, except "
            f"that it is ended after {PARSE_SECONDS} s on a file."
        )
    return said


def _listed(items: list[str]) -> str:
    """Return items as a sentence lists them: "a", "a and b", "a, b and c"."""
    return " and ".join([*[", ".join(items[:-1])][: len(items) > 1], items[-1]])
