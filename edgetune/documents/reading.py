"""Reads the files that the walk found into Documents: each text once, and every failure a counted skip.

A file is read a block at a time, and its text goes to a spool, so that many notes and long ones take little memory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO

from edgetune.config import DataConfig
from edgetune.documents.chat_forms import Unread
from edgetune.documents.chats import CHAT_SUFFIXES_WHEN_NAMED, encoding_of_chats, read_chats
from edgetune.documents.copies import original_path
from edgetune.documents.document import Document, Draft, Reading, Reason, Skipped
from edgetune.documents.embedded import without_embedded_files
from edgetune.documents.encoding import NotText, decoded, find_encoding
from edgetune.documents.front_matter import split_front_matter
from edgetune.documents.limits import BLOCK_BYTES, MAX_FILE_BYTES
from edgetune.documents.masked import masked_chat
from edgetune.documents.not_notes import is_own_log
from edgetune.documents.note_file import NotReadable, open_listed
from edgetune.documents.private_notes import has_private_tag, is_private
from edgetune.documents.spool import Spool
from edgetune.documents.walk import CHAT_SUFFIXES, KINDS, FoundFile, Walk, walk
from edgetune.privacy.masking import Masker
from edgetune.privacy.own_list import new_masker
from edgetune.progress import Progress, ignore
from edgetune.runtime.errors import DataError

WHOLE_CHARS = 1 << 20
"""Characters of a note that are handled at a time: front matter and embedded files are found within them. Chosen by hand."""
_MARKDOWN = (".md", ".markdown")


@dataclass
class Reader:
    """Reads files one after another, and keeps the account of what was read and what was not."""

    keep_front_matter: bool
    encoding: str | None
    progress: Progress
    total: int
    masker: Masker
    done: int = 0
    spool: Spool = field(default_factory=Spool.on_disk)
    documents: list[Document] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    encodings: Counter[str] = field(default_factory=Counter)
    damaged: dict[str, int] = field(default_factory=dict)
    embedded: dict[str, int] = field(default_factory=dict)

    def read(self, found: FoundFile) -> None:
        """Read one file: add its documents, or the reason why there are none."""
        try:
            with open_listed(found.file, found.listed) as file:
                if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                    raise NotText(Reason.TOO_LARGE)
                if found.file.suffix.lower() in CHAT_SUFFIXES + CHAT_SUFFIXES_WHEN_NAMED:
                    self._read_chats(found, file)
                else:
                    self._read_note(found, file)
        except (NotReadable, NotText) as problem:
            self.skipped.append(Skipped(found.path, problem.reason))
        except OSError:
            self.skipped.append(Skipped(found.path, Reason.UNREADABLE))
        self.done += found.size
        self.progress(self.done, self.total)

    def _read_chats(self, found: FoundFile, file: FileIO) -> None:
        first = next(self._blocks(file), b"")
        if is_own_log(first):
            raise NotText(Reason.OWN_FILE)
        documents: list[Document] = []

        def keep(document: Document) -> None:
            if has_private_tag(document.text):
                raise Unread(Reason.PRIVATE)
            document = masked_chat(document, self.masker)
            damaged = document.text.count("\ufffd")
            if damaged:
                self.damaged[document.path] = damaged
            documents.append(document.kept_in(self.spool))

        encoding = encoding_of_chats(first)
        skipped = read_chats(self._blocks(file, found.size), encoding, found.path, keep)
        if not documents and not skipped:
            raise NotText(Reason.EMPTY)
        self.documents += documents
        self.skipped += skipped
        if documents:
            self.encodings[encoding.name] += 1

    def _read_note(self, found: FoundFile, file: FileIO) -> None:
        encoding = find_encoding(lambda: self._blocks(file), self.encoding)
        draft, masker = Draft(self.spool), self.masker.without_counting()
        left_out = 0

        def pieces() -> Iterator[str]:
            nonlocal left_out
            for number, text in enumerate(whole_blocks(decoded(self._blocks(file, found.size), encoding))):
                if has_private_tag(text):
                    raise NotText(Reason.PRIVATE)
                if number == 0:
                    text = self._beginning(found, text.lstrip("\ufeff"))
                text, embedded = without_embedded_files(text)
                left_out += embedded
                yield text

        for text in masker.blocks(pieces()):
            draft.add(text)
        if draft.empty:
            raise NotText(Reason.EMPTY)
        self.masker.counts.update(masker.counts)
        if left_out:
            self.embedded[found.path] = left_out
        if draft.damaged:
            self.damaged[found.path] = draft.damaged
        self.encodings[encoding.name] += 1
        self.documents.append(draft.finish(found.path))

    def _beginning(self, found: FoundFile, text: str) -> str:
        """Return the beginning of a note with its front matter reduced. Raises NotText for a drawing and for a private note."""
        front_matter = split_front_matter(text) if found.file.suffix.lower() in _MARKDOWN else None
        if front_matter is None:
            return text
        if front_matter.is_drawing:
            raise NotText(Reason.DRAWING)
        if is_private(front_matter):
            raise NotText(Reason.PRIVATE)
        return text if self.keep_front_matter else front_matter.reduced()

    def _blocks(self, file: FileIO, size: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from its beginning. `size` counts them as progress; 0 for a first look."""
        file.seek(0)
        done = 0
        while block := file.read(BLOCK_BYTES):
            yield block
            done += len(block)
            if done > MAX_FILE_BYTES:  # it has grown since
                raise NotText(Reason.TOO_LARGE)
            self.progress(self.done + min(done, size), self.total)


def read_notes(
    paths: Sequence[str | os.PathLike[str]],
    exclude: Sequence[str] = (),
    keep_front_matter: bool = False,
    encoding: str | None = None,
    progress: Progress = ignore,
    masker: Masker | None = None,
) -> Reading:
    """Read every note and chat under `paths` (folders or files), except those that an `exclude` glob matches.

    keep_front_matter: leave front matter as it is, instead of reducing it to title and tags.
    encoding: Python's name for the encoding of notes that are not UTF-8 and have no byte-order mark.
    masker: replaces secrets and identifiers before a text is kept; None for the default settings of masking.
    progress: receives the bytes that are done and the bytes in total (0 while they are counted). It may raise to end the work.
    Raises DataError if a path does not exist, or if there is nothing to read.
    """
    found = walk(paths, exclude, lambda: progress(0, 0))
    masker = new_masker(DataConfig()) if masker is None else masker
    reader = Reader(keep_front_matter, encoding, progress, found.bytes, masker)
    for file in found.found.values():
        reader.read(file)
    documents, twins = without_duplicates(reader.documents)
    reading = Reading(
        documents=documents,
        skipped=found.skipped + reader.skipped + twins,
        files=found.entries,
        encodings=dict(reader.encodings.most_common()),
        unused_excludes=tuple(exclude.pattern for exclude in found.excludes if not exclude.used),
        damaged=reader.damaged,
        embedded=reader.embedded,
        masked=dict(masker.counts),
    )
    if not documents:
        raise DataError(nothing_found(paths, reading, found))
    return reading


def without_duplicates(documents: Sequence[Document]) -> tuple[list[Document], list[Skipped]]:
    """Return each text once, and the others as skips. Texts are equal if their words are.

    The one that is kept is the original rather than its copy ("note.md" and not "note (1).md"), or else the first.
    """
    kept: dict[str, Document] = {}
    for document in documents:
        first = kept.setdefault(document.words, document)
        if original_path(first.path) != first.path and original_path(document.path) == document.path:
            kept[document.words] = document
    chosen = {id(document) for document in kept.values()}  # two names that are not UTF-8 may be shown alike
    return (
        [document for document in documents if id(document) in chosen],
        [Skipped(document.path, Reason.DUPLICATE) for document in documents if id(document) not in chosen],
    )


def whole_blocks(pieces: Iterable[str]) -> Iterator[str]:
    """Yield text in blocks of about WHOLE_CHARS that end at a line's end; of a longer line, where it is that long."""
    waiting: list[str] = []
    length = 0
    for piece in pieces:
        waiting.append(piece)
        length += len(piece)
        if length >= WHOLE_CHARS:
            text = "".join(waiting)
            end = text.rfind("\n") + 1 or len(text)
            yield text[:end]
            waiting, length = [text[end:]], len(text) - end
    if length:
        yield "".join(waiting)


def nothing_found(paths: Sequence[str | os.PathLike[str]], reading: Reading, found: Walk) -> str:
    """Return the error message for paths under which there is nothing to read."""
    named = ", ".join(os.fspath(path) for path in paths)
    if not reading.skipped:
        return f"The folder {named} is empty: expected {KINDS}; name a folder that holds some."
    counts = ", ".join(f"{count} {reason}" for reason, count in reading.skipped_counts().items())
    unread = "".join(f" {sentence}" for sentence in reading.unread_chats())
    return (
        f"Nothing to read in {named}: found {counts}; expected {KINDS} with text in them; name another folder or file.{unread}"
    )
