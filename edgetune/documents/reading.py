"""Reads the files that the walk found into Documents: each text once, and every failure a counted skip.

A file is read a block at a time, and its text goes to a spool, so that many notes and long ones take little memory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import FileIO

from edgetune.config import DataConfig
from edgetune.documents.chat_forms import Unread
from edgetune.documents.chats import CHAT_SUFFIXES_WHEN_NAMED, encoding_of_chats, read_chats
from edgetune.documents.document import Document, Draft, Reading, Skipped
from edgetune.documents.embedded import without_embedded_files
from edgetune.documents.encoding import Encoding, NotText, decoded, find_encoding
from edgetune.documents.forgotten import Forgotten
from edgetune.documents.formats import html
from edgetune.documents.front_matter import split_front_matter
from edgetune.documents.limits import BLOCK_BYTES, MAX_FILE_BYTES, MAX_PARSED_BYTES
from edgetune.documents.masked import masked_chat
from edgetune.documents.messengers.exports import read_slack
from edgetune.documents.messengers.files import LISTED_SUFFIXES, blocks, read_file
from edgetune.documents.messengers.slack import exports
from edgetune.documents.not_notes import is_own_log
from edgetune.documents.note_file import NotReadable, open_listed
from edgetune.documents.parsed_cache import ParsedCache
from edgetune.documents.parsed_files import ParsedFiles
from edgetune.documents.parser_process import ParserProcess
from edgetune.documents.private_notes import is_marked_private, is_private
from edgetune.documents.readers import Format, format_of
from edgetune.documents.reasons import Reason
from edgetune.documents.repeats import without_repeats
from edgetune.documents.spool import Spool
from edgetune.documents.summary import skipped_in_words, unread_chats
from edgetune.documents.vault import VaultText
from edgetune.documents.walk import CHAT_SUFFIXES, KINDS, FoundFile, Walk, is_note_name, walk
from edgetune.privacy.masking import Masker
from edgetune.privacy.own_list import new_masker
from edgetune.progress import Progress, ignore
from edgetune.runtime.errors import DataError

WHOLE_CHARS = 1 << 20
"""Characters of a note that are handled at a time: front matter and embedded files are found within them. Chosen by hand."""
DEFAULTS = DataConfig()
"""The settings of reading where none are given."""
_MARKDOWN = (".md", ".markdown")


@dataclass
class Reader:
    """Reads files one after another, and keeps the account of what was read and what was not."""

    data: DataConfig
    progress: Progress
    total: int
    parsed: ParsedFiles
    masker: Masker
    done: int = 0
    spool: Spool = field(default_factory=Spool.on_disk)
    documents: list[Document] = field(default_factory=list)
    sources: dict[str, Sequence[str]] = field(default_factory=dict)
    """The files that each document comes from; several for a Slack export. All by path."""
    skipped: list[Skipped] = field(default_factory=list)
    encodings: Counter[str] = field(default_factory=Counter)
    damaged: dict[str, int] = field(default_factory=dict)
    embedded: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)

    def read_all(self, files: Iterable[FoundFile]) -> None:
        """Read every file. Those of a Slack export are read together, where the first of them is reached."""
        listed = list(files)
        by_path = {found.path: found for found in listed}
        slack = exports(by_path)
        root_of = {path: root for root, paths in slack.items() for path in paths}
        for found in listed:
            root = root_of.get(found.path)
            if root is None:
                self.read(found)
            elif root in slack:
                paths = slack.pop(root)
                self.read_slack(root.rstrip("/") or "slack", {path.removeprefix(root): by_path[path] for path in paths})

    def read(self, found: FoundFile) -> None:
        """Read one file: add its documents, or the reason why there are none."""
        first = len(self.documents)
        try:
            with open_listed(found.file, found.listed) as file:
                if self._read_export(found, file):
                    pass
                elif os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                    raise NotText(Reason.TOO_LARGE)
                elif found.file.name.lower().endswith(LISTED_SUFFIXES) and not (found.named or is_note_name(found.file.name)):
                    raise NotText(Reason.UNKNOWN_KIND)
                elif found.file.suffix.lower() in CHAT_SUFFIXES + CHAT_SUFFIXES_WHEN_NAMED:
                    self._read_chats(found, file)
                elif (format := format_of(found.file.name)) is not None and self.parsed.can_read(format):
                    self._read_parsed(found, file, format)
                else:
                    self._read_note(found, file)
        except (NotReadable, NotText) as problem:
            self.skipped.append(Skipped(found.path, problem.reason))
        except OSError:
            self.skipped.append(Skipped(found.path, Reason.UNREADABLE))
        self.sources |= {document.path: (found.path,) for document in self.documents[first:]}
        self.done += found.size
        self.progress(self.done, self.total)

    def _read_chats(self, found: FoundFile, file: FileIO) -> None:
        first = next(self._blocks(file), b"")
        if is_own_log(first):
            raise NotText(Reason.OWN_FILE)
        documents: list[Document] = []
        encoding = encoding_of_chats(first)
        skipped = read_chats(self._blocks(file, found.size), encoding, found.path, self._keep(documents))
        if not documents and not skipped:
            raise NotText(Reason.EMPTY)
        self.documents += documents
        self.skipped += skipped
        if documents:
            self.encodings[encoding.name] += 1

    def _keep(self, documents: list[Document]) -> Callable[[Document], None]:
        """Return a function that adds a chat to `documents`, with its text in the spool."""

        def keep(document: Document) -> None:
            if is_marked_private(document.text):
                raise Unread(Reason.PRIVATE)
            document = masked_chat(document, self.masker)
            damaged = document.text.count("\ufffd")
            if damaged:
                self.damaged[document.path] = damaged
            documents.append(document.kept_in(self.spool))

        return keep

    def _keep_or_skip(self, documents: list[Document]) -> Callable[[Document], None]:
        """Return `_keep`'s function for chat apps' exports: it counts a conversation that is marked private as skipped."""
        keep = self._keep(documents)

        def keep_or_skip(document: Document) -> None:
            try:
                keep(document)
            except Unread as unread:
                self.skipped.append(Skipped(document.path, unread.reason))

        return keep_or_skip

    def _told(self, size: int) -> Callable[[int], None]:
        """Return a function that reports the bytes done of a file of `size` bytes."""
        return lambda done: self.progress(self.done + min(done, size), self.total)

    def _read_export(self, found: FoundFile, file: FileIO) -> bool:
        """Read a file as a chat app's export; return False if it is none."""
        documents: list[Document] = []
        skipped = read_file(file, found.path, self.data.me, self._keep_or_skip(documents), self._told(found.size))
        if skipped is None or (found.named and not documents and [skip.reason for skip in skipped] == [Reason.BAD_ARCHIVE]):
            return False
        if not documents and not skipped:
            raise NotText(Reason.EMPTY)
        self.documents += documents
        self.skipped += skipped
        return True

    def read_slack(self, folder: str, files: dict[str, FoundFile]) -> None:
        """Read the files of a Slack export in a folder, given by their paths in it."""
        documents: list[Document] = []
        before = self.done
        sources = {name: partial(self._listed_blocks, found) for name, found in files.items()}
        self.skipped += read_slack(sources, folder, self.data.me, self._keep_or_skip(documents))
        self.documents += documents
        self.sources |= {document.path: [found.path for found in files.values()] for document in documents}
        self.done = before + sum(found.size for found in files.values())

    def _listed_blocks(self, found: FoundFile) -> Iterator[bytes]:
        """Yield the bytes of a file of a Slack export; none, and a skip, if it cannot be read."""
        try:
            with open_listed(found.file, found.listed) as file:
                yield from blocks(file, self._told(found.size))
        except NotReadable as problem:
            self.skipped.append(Skipped(found.path, problem.reason))
        except OSError:
            self.skipped.append(Skipped(found.path, Reason.UNREADABLE))
        self.done += found.size

    def _read_note(self, found: FoundFile, file: FileIO) -> None:
        encoding = find_encoding(lambda: self._blocks(file), self.data.encoding)
        self._add_note(found.path, self._plain_text(found, decoded(self._blocks(file, found.size), encoding)))
        self.encodings[encoding.name] += 1

    def _plain_text(self, found: FoundFile, pieces: Iterable[str]) -> Iterator[str]:
        """Yield the text of a note in blocks; of Markdown, without front matter and the marks of vaults."""
        vault = VaultText() if found.file.suffix.lower() in _MARKDOWN else None
        for number, text in enumerate(whole_blocks(pieces)):
            if is_marked_private(text):
                raise NotText(Reason.PRIVATE)
            if number == 0:
                text = self._beginning(found, text.lstrip("\ufeff"))
            yield text if vault is None else vault.add(text)
        if vault is not None:
            yield vault.finish()

    def _read_parsed(self, found: FoundFile, file: FileIO, format: Format) -> None:
        """Read a file in a format that a parser knows. One with several texts, such as a mailbox, gives several documents."""
        if os.fstat(file.fileno()).st_size > MAX_PARSED_BYTES:
            raise NotText(Reason.TOO_LARGE_TO_PARSE)
        encoding = self._encoding_of(file, format) if format.is_text else None
        if encoding is None:
            data = b"".join(self._blocks(file, found.size))
        else:
            whole = "".join(decoded(self._blocks(file, found.size), encoding)).lstrip("\ufeff")
            if format.readable and is_marked_private(whole):  # a parser drops some of the marks
                raise NotText(Reason.PRIVATE)
            data = whole.encode()
        parsed = self.parsed.read(format, data, lambda: self.progress(self.done, self.total))
        if not parsed.texts:
            raise NotText(Reason.EMPTY)
        for number, text in enumerate(parsed.texts, 1):
            path = f"{found.path}#{number}" if len(parsed.texts) > 1 else found.path
            try:
                if is_marked_private(text):
                    raise NotText(Reason.PRIVATE)
                self._add_note(path, whole_blocks(self._slices(text)))
            except NotText as problem:  # the others of a mailbox are read
                self.skipped.append(Skipped(path, problem.reason))
        if parsed.left_out:
            self.left_out[found.path] = dict(parsed.left_out)
        if encoding is not None:
            self.encodings[encoding.name] += 1

    def _encoding_of(self, file: FileIO, format: Format) -> Encoding:
        """Return the encoding of a text to parse: the one named by the user or by the page itself comes first."""
        named = self.data.encoding
        if named is None and format.name == "HTML":
            named = html.charset(next(self._blocks(file), b""))
        try:
            return find_encoding(lambda: self._blocks(file), named)
        except NotText:
            if named == self.data.encoding:
                raise
            return find_encoding(lambda: self._blocks(file), None)

    def _add_note(self, path: str, blocks: Iterable[str]) -> None:
        """Add a document of these blocks of text, masked. Raises NotText if there is no text in them."""
        draft, masker = Draft(self.spool), self.masker.without_counting()
        embedded = 0

        def pieces() -> Iterator[str]:
            nonlocal embedded
            for block in blocks:
                text, count = without_embedded_files(block)
                embedded += count
                yield text

        for text in masker.blocks(pieces()):
            draft.add(text)
        if draft.empty:
            raise NotText(Reason.EMPTY)
        self.masker.counts.update(masker.counts)
        if embedded:
            self.embedded[path] = embedded
        if draft.damaged:
            self.damaged[path] = draft.damaged
        self.documents.append(draft.finish(path))

    @staticmethod
    def _slices(text: str) -> Iterator[str]:
        for start in range(0, len(text), WHOLE_CHARS):
            yield text[start : start + WHOLE_CHARS]

    def _beginning(self, found: FoundFile, text: str) -> str:
        """Return the beginning of a note with its front matter reduced. Raises NotText for a drawing and for a private note."""
        front_matter = split_front_matter(text) if found.file.suffix.lower() in _MARKDOWN else None
        if front_matter is None:
            return text
        if front_matter.is_drawing:
            raise NotText(Reason.DRAWING)
        if is_private(front_matter):
            raise NotText(Reason.PRIVATE)
        return text if self.data.recipe == "raw" else front_matter.reduced()

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
    data: DataConfig = DEFAULTS,
    progress: Progress = ignore,
    forgotten: Forgotten | None = None,
) -> Reading:
    """Read every note and chat under `paths` (folders or files) with the settings in `data`, whose own `notes` are not read.

    Secrets and identifiers are masked before a text is kept.
    progress: receives the bytes that are done and the bytes in total (0 while they are counted). It may raise to end the work.
    forgotten: notes that are left out; None stands for the list on disk.
    Raises DataError if a path does not exist, or if there is nothing to read.
    """
    left_out = {path: Reason(why) for path, why in data.left_out}
    found = walk(paths, data.exclude, lambda: progress(0, 0), data.code, left_out)
    total = found.bytes
    cache, masker = ParsedCache(paths), new_masker(data)
    forgotten = Forgotten.load() if forgotten is None else forgotten
    with ParserProcess() as parser:
        reader = Reader(data, progress, total, ParsedFiles(cache, parser), masker)
        files, forgotten_files = forgotten.files(list(found.found.values()))
        reader.read_all(files)
    cache.tidy()
    everything, forgotten_texts = forgotten.documents(reader.documents)
    documents, twins, near = without_repeats(everything, lambda: progress(total, total))
    reading = Reading(
        documents=documents,
        skipped=found.skipped + reader.skipped + forgotten_files + forgotten_texts + twins,
        files=found.entries,
        sources=reader.sources,
        everything=everything,
        places={file.path: str(file.file) for file in files},
        encodings=dict(reader.encodings.most_common()),
        unused_excludes=tuple(exclude.pattern for exclude in found.excludes if not exclude.used),
        damaged=reader.damaged,
        embedded=reader.embedded,
        left_out=reader.left_out,
        near_duplicates=near.pairs,
        compared=near.compared,
        lacking=dict(reader.parsed.lacking),
        as_plain=dict(reader.parsed.as_plain),
        unlimited=reader.parsed.unlimited,
        masked=dict(masker.counts),
    )
    if not documents:
        raise DataError(nothing_found(paths, reading, found))
    return reading


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
    unread = "".join(f" {sentence}" for sentence in unread_chats(reading))
    return (
        f"Nothing to read in {named}: found {skipped_in_words(reading)}; expected {KINDS} with text in them; name another "
        f"folder or file.{unread}"
    )
