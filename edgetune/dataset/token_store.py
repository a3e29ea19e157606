"""Turns documents into a token store: a private folder of memory-mapped arrays, written document by document in little memory.

ids.bin          int32  every document in turn: start ids, text ids, end id
trained.bin      uint8  the role of each token as a target: CONTEXT, TEXT or STOP
documents.json   for each document its path, digest, first token, number of tokens and bytes of scored text
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.dataset.chat_notices import ChatNotices
from edgetune.dataset.chat_writer import ChatFormat, ChatWriter, TrainOn
from edgetune.dataset.pieces import CONTEXT, Piece, TextTokenizer, note_pieces
from edgetune.documents.document import Document
from edgetune.progress import Progress, ignore
from edgetune.runtime.errors import DataError
from edgetune.runtime.files import atomic_folder, map_own, private_file, read_own

FORMAT = 1
"""Version of the store's files."""
BYTES_PER_TOKEN = 4
"""About how many bytes a token stands for, to show the progress within a long note."""


@dataclass(frozen=True)
class StoredDocument:
    """A document in the store: `tokens` tokens from `start` on. `bytes` counts the text behind the tokens marked TEXT."""

    path: str
    digest: str
    start: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class TokenStore:
    """The tokens of all documents, one after another: `ids` (n,) int32 and their roles `trained` (n,) uint8."""

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.uint8]
    documents: tuple[StoredDocument, ...]

    @property
    def tokens(self) -> int:
        """Return the number of tokens, start and end ids included."""
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """Return the number of tokens that one epoch trains, each once."""
        return int(np.count_nonzero(self.trained))

    @property
    def bytes(self) -> int:
        """Return the bytes of text that are trained or scored."""
        return sum(document.bytes for document in self.documents)

    @classmethod
    def open(cls, path: Path | str) -> TokenStore:
        """Map a store from its folder. Raises DataError if it is damaged."""
        path = Path(path)
        try:
            index = json.loads(read_own(path / "documents.json"))
            documents = tuple(StoredDocument(**document) for document in index["documents"])
            ids = mapped(path / "ids.bin", np.int32)
            trained = mapped(path / "trained.bin", np.uint8)
            ends = [0, *(document.start + document.tokens for document in documents)]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"The token store {path} is unreadable ({type(error).__name__}). Delete it and run the command again."
            ) from error
        starts = [document.start for document in documents]
        if index.get("format") != FORMAT or starts != ends[:-1] or len(ids) != ends[-1] or len(trained) != ends[-1]:
            raise DataError(f"The token store {path} is incomplete or of another version. Delete it and run the command again.")
        return cls(ids, trained, documents)


def tokenize(
    documents: Sequence[Document],
    tokenizer: TextTokenizer,
    path: Path | str,
    train_on: TrainOn = "assistant",
    chat_format: ChatFormat = "auto",
    may_be_empty: bool = False,
    progress: Progress = ignore,
    notices: ChatNotices | None = None,
) -> TokenStore:
    """Write the tokens of `documents` to the folder `path` (replaced atomically; files 0600) and return them memory-mapped.

    A note becomes `start_ids + ids + [eos]`; all of it is trained except the start. In a chat, the assistant's turns and
    their ends are trained (with `train_on="all"`: everything). With "auto", chats are rendered by the model's own template
    if it has one, else in Guanaco's form. Raises DataError where nothing would be trained, unless it `may_be_empty`.

    progress: called after each piece of text with the bytes that are done and the bytes in total. It may raise to end the work.
    notices: receives the chats that the model's chat template changes or leaves out.
    """
    documents, notices = list(documents), ChatNotices() if notices is None else notices
    writer = ChatWriter(tokenizer, train_on, chat_format, notices)
    with atomic_folder(path) as folder:
        stored, trained = _write_tokens(folder, documents, tokenizer, writer, progress)
        if not trained and not may_be_empty:
            raise DataError(
                f"Nothing to train on: none of {len(documents):,} documents holds a token to train on; expected notes with "
                "text, or chats in which the assistant answers. Type edgetune train --dry-run to see what is read."
                + "".join(f" {notice}" for notice in notices.sentences()[:1])
            )
        index = {"format": FORMAT, "train_on": train_on, "documents": [asdict(document) for document in stored]}
        with private_file(folder / "documents.json") as file:
            file.write(json.dumps(index, ensure_ascii=False).encode())
    return TokenStore.open(path)


def _write_tokens(
    folder: Path, documents: Sequence[Document], tokenizer: TextTokenizer, writer: ChatWriter, progress: Progress
) -> tuple[list[StoredDocument], int]:
    """Write ids.bin and trained.bin; return the documents that have tokens, and the number of tokens that are trained."""
    done, total = 0, sum(document.size for document in documents)
    stored: list[StoredDocument] = []
    start = trained = 0
    with private_file(folder / "ids.bin") as ids_file, private_file(folder / "trained.bin") as trained_file:
        for document in documents:
            pieces: Iterable[Piece]
            if document.is_chat:
                pieces, scored = writer.pieces(document)
            else:
                pieces, scored = note_pieces(tokenizer, document.blocks()), document.size
            tokens = 0
            for ids, marks in pieces:
                ids_file.write(np.asarray(ids, dtype=np.int32).tobytes())
                trained_file.write(np.asarray(marks, dtype=np.uint8).tobytes())
                tokens += len(ids)
                trained += len(marks) - marks.count(CONTEXT)
                progress(done + min(BYTES_PER_TOKEN * tokens, document.size), total)
            done += document.size
            progress(done, total)
            if tokens:
                stored.append(StoredDocument(document.path, document.digest, start, tokens, scored))
                start += tokens
    return stored, trained


def mapped(path: Path, dtype: Any) -> npt.NDArray[Any]:
    """Map a file of numbers; an encrypted one is read into memory. Raises OSError, ValueError or DataError."""
    mapping = map_own(path)
    return np.empty(0, dtype) if mapping is None else np.frombuffer(mapping, dtype)
