"""Reads the files that the walk found into Documents: each text once, and every failure a counted skip."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from io import BytesIO

from edgetune.documents.chats import read_chats
from edgetune.documents.document import Document, Reading, Reason, Skipped
from edgetune.documents.encoding import NotText, decode
from edgetune.documents.front_matter import without_front_matter
from edgetune.documents.walk import CHAT_SUFFIXES, KINDS, FoundFile, Walk, walk
from edgetune.runtime.errors import DataError

MAX_FILE_BYTES = 256 << 20
"""Largest file that is read, in bytes. Chosen by hand."""
_MARKDOWN = (".md", ".markdown")


def read_notes(
    paths: Sequence[str | os.PathLike[str]],
    exclude: Sequence[str] = (),
    keep_front_matter: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reading:
    """Read every note and chat under `paths` (folders or files), except those that an `exclude` glob matches.

    keep_front_matter: leave front matter as it is, instead of reducing it to title and tags.
    Raises DataError if a path does not exist, or if there is nothing to read.
    """
    found = walk(paths, exclude)
    documents: list[Document] = []
    skipped = list(found.skipped)
    encodings: Counter[str] = Counter()
    digests: set[str] = set()
    for number, file in enumerate(found.found.values()):
        progress(number, len(found.found))
        read, failed, encoding = read_file(file, keep_front_matter)
        skipped += failed
        if encoding:
            encodings[encoding] += 1
        for document in read:
            if document.digest in digests:
                skipped.append(Skipped(document.path, Reason.DUPLICATE))
            else:
                digests.add(document.digest)
                documents.append(document)
    unused = tuple(exclude.pattern for exclude in found.excludes if not exclude.used)
    reading = Reading(documents, skipped, found.entries, dict(encodings.most_common()), unused)
    if not documents:
        raise DataError(nothing_found(paths, reading, found))
    return reading


def read_file(found: FoundFile, keep_front_matter: bool = False) -> tuple[list[Document], list[Skipped], str]:
    """Return the documents of one file, what was skipped in it, and its encoding ("" if no document was read)."""
    try:
        with open(found.file, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError:
        return [], [Skipped(found.path, Reason.UNREADABLE)], ""
    if len(data) > MAX_FILE_BYTES:
        return [], [Skipped(found.path, Reason.TOO_LARGE)], ""
    if found.file.suffix.lower() in CHAT_SUFFIXES:
        documents, skipped = read_chats(BytesIO(data), found.path)
        if not documents and not skipped:
            skipped = [Skipped(found.path, Reason.EMPTY)]
        return documents, skipped, "utf-8" if documents else ""
    try:
        text, encoding = decode(data)
    except NotText as problem:
        return [], [Skipped(found.path, problem.reason)], ""
    if found.file.suffix.lower() in _MARKDOWN and not keep_front_matter:
        text = without_front_matter(text)
    if not text.strip():
        return [], [Skipped(found.path, Reason.EMPTY)], ""
    return [Document.of(found.path, text)], [], encoding


def nothing_found(paths: Sequence[str | os.PathLike[str]], reading: Reading, found: Walk) -> str:
    """Return the error message for paths under which there is nothing to read."""
    named = ", ".join(os.fspath(path) for path in paths)
    if not reading.skipped:
        return f"The folder {named} is empty: expected {KINDS}; name a folder that holds some."
    counts = ", ".join(f"{count} {reason}" for reason, count in reading.skipped_counts().items())
    return f"Nothing to read in {named}: found {counts}; expected {KINDS} with text in them; name another folder or file."
