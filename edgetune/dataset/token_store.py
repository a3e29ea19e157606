"""Documents to a token store: a private folder of memory-mapped arrays, written document by document in bounded memory.

ids.bin          int32  every document in turn: start ids, text ids, end id
trained.bin      uint8  what each token is as a target: CONTEXT, TEXT or STOP
documents.json   per document its path, digest, first token, number of tokens and bytes of scored text
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgetune.documents.document import Document, Turn
from edgetune.runtime.errors import DataError
from edgetune.runtime.files import PRIVATE_FILE, atomic_folder

CONTEXT, TEXT, STOP = 0, 1, 2  # not trained; trained and scored; trained, but no part of the text (the end of a turn)
FORMAT = 1

TrainOn = Literal["assistant", "all"]
ChatFormat = Literal["auto", "template", "guanaco"]


class TextTokenizer(Protocol):
    """What is asked of a tokenizer here; `edgetune.runtime.tokenizer.Tokenizer` gives it."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def start_ids(self) -> list[int]: ...
    @property
    def has_template(self) -> bool: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_chat(self, messages: Any, add_generation_prompt: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class StoredDocument:
    """Where a document's tokens lie: `tokens` of them from `start`; `bytes` of text belong to those marked TEXT."""

    path: str
    digest: str
    start: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class TokenStore:
    """`ids` (n,) int32 and `trained` (n,) uint8 of all documents, one after another."""

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.uint8]
    documents: tuple[StoredDocument, ...]

    @property
    def tokens(self) -> int:
        """All tokens, start and end ids included."""
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """Tokens that one epoch trains, each once."""
        return int(np.count_nonzero(self.trained))

    @property
    def bytes(self) -> int:
        """Bytes of text that are trained or scored."""
        return sum(document.bytes for document in self.documents)

    @classmethod
    def open(cls, path: Path | str) -> TokenStore:
        """Map a store from its folder. Raises DataError if it is damaged."""
        path = Path(path)
        try:
            index = json.loads((path / "documents.json").read_bytes())
            documents = tuple(StoredDocument(**document) for document in index["documents"])
            ids = np.memmap(path / "ids.bin", dtype=np.int32, mode="r")
            trained = np.memmap(path / "trained.bin", dtype=np.uint8, mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"The token store {path} is unreadable ({type(error).__name__}): delete it and run again."
            ) from error
        ends = [0, *(document.start + document.tokens for document in documents)]
        starts = [document.start for document in documents]
        if index.get("format") != FORMAT or starts != ends[:-1] or len(ids) != ends[-1] or len(trained) != ends[-1]:
            raise DataError(f"The token store {path} is incomplete or of another version: delete it and run again.")
        return cls(ids, trained, documents)


def tokenize(
    documents: Iterable[Document],
    tokenizer: TextTokenizer,
    path: Path | str,
    train_on: TrainOn = "assistant",
    chat_format: ChatFormat = "auto",
) -> TokenStore:
    """Write the tokens of `documents` to the folder `path` (replacing it, atomically; files 0600) and map them.

    A note is `start_ids + ids + [eos]`, all of it trained but the start. In a chat the assistant's turns and their ends
    are trained (`train_on="all"`: everything). Chats are rendered by the model's own template ("auto", where it has
    one), else in Guanaco's form. Raises DataError where nothing would be trained.
    """
    writer = ChatWriter(tokenizer, train_on, chat_format)
    stored: list[StoredDocument] = []
    start = trained = 0
    with atomic_folder(path) as folder:
        with private_file(folder / "ids.bin") as ids_file, private_file(folder / "trained.bin") as trained_file:
            for document in documents:
                if document.turns is None:
                    pieces, scored = note_pieces(tokenizer, document.text), document.size
                else:
                    pieces, scored = writer.pieces(document)
                tokens = 0
                for ids, marks in pieces:
                    ids_file.write(np.asarray(ids, dtype=np.int32).tobytes())
                    trained_file.write(np.asarray(marks, dtype=np.uint8).tobytes())
                    tokens += len(ids)
                    trained += len(marks) - marks.count(CONTEXT)
                if tokens:
                    stored.append(StoredDocument(document.path, document.digest, start, tokens, scored))
                    start += tokens
        if not trained:
            raise DataError(
                f"Nothing to train on: {len(stored)} documents gave no trained token; expected notes with text, or "
                "chats in which the assistant answers; type the same command with --dry-run to see what is read."
            )
        index = {"format": FORMAT, "train_on": train_on, "documents": [asdict(document) for document in stored]}
        with private_file(folder / "documents.json") as file:
            file.write(json.dumps(index, ensure_ascii=False).encode())
    return TokenStore.open(path)


def private_file(path: Path) -> BinaryIO:
    """A new file that its owner alone can read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), PRIVATE_FILE), "wb")


# Notes. A text is encoded whole, as it was when the base model learned; only a very long one goes in pieces, so that no
# tokenizer holds it all, or takes quadratic time.

PIECE_CHARS = 1 << 16
_CUT_WITHIN = 1 << 12
_SEEN_CHARS = 64
_BETWEEN_WORDS = re.compile(r"\w(?= \w)")
Piece = tuple[Sequence[int], Sequence[int]]  # ids and their marks


def note_pieces(tokenizer: TextTokenizer, text: str) -> Iterator[Piece]:
    """The tokens of a note, from its start ids to its end."""
    yield tokenizer.start_ids, [CONTEXT] * len(tokenizer.start_ids)
    for ids in encode_text(tokenizer, text):
        yield ids, [TEXT] * len(ids)
    yield tokenizer.eos_ids[:1], [STOP] * len(tokenizer.eos_ids[:1])


def encode_text(tokenizer: TextTokenizer, text: str, piece_chars: int = PIECE_CHARS) -> Iterator[list[int]]:
    """The ids of `text`, in pieces of about `piece_chars`; joined they are those of the whole."""
    start = 0
    while start < len(text):
        end = cut(text, start, piece_chars)
        yield continuation(tokenizer, text[max(0, start - _SEEN_CHARS) : start], text[start:end])
        start = end


def cut(text: str, start: int, piece_chars: int) -> int:
    """Where a piece from `start` ends: before a space between two words, across which no tokenizer we know merges."""
    end = start + piece_chars
    if end >= len(text):
        return len(text)
    nearest = max(start, end - _CUT_WITHIN)
    words = list(_BETWEEN_WORDS.finditer(text, nearest, end))
    if words:
        return words[-1].end()
    spaces = max(text.rfind(" ", nearest + 1, end), text.rfind("\n", nearest + 1, end))
    return spaces if spaces > start else end


def continuation(tokenizer: TextTokenizer, before: str, text: str) -> list[int]:
    """The ids of `text` where it follows `before`: alone, sentencepiece would put a space in front of it."""
    ids = tokenizer.encode(before + text)
    if not before:
        return ids
    seen = tokenizer.encode(before)
    return ids[len(seen) :] if ids[: len(seen)] == seen else tokenizer.encode(text)


# Chats.


class ChatWriter:
    """Conversations to tokens, with marks for what is trained."""

    # A long conversation is rendered in parts that begin at a user's turn: finding each turn's ends encodes what stands
    # before it again, so a part's cost grows with the square of its turns.
    PART_TURNS = 32
    PART_CHARS = 1 << 15

    def __init__(self, tokenizer: TextTokenizer, train_on: TrainOn, chat_format: ChatFormat) -> None:
        self.tokenizer = tokenizer
        self.train_all = train_on == "all"
        self.template = tokenizer.has_template if chat_format == "auto" else chat_format == "template"
        self.end = tuple(tokenizer.eos_ids[:1])

    def pieces(self, document: Document) -> tuple[Iterator[Piece], int]:
        """The tokens of one conversation, and the bytes of text that those marked TEXT stand for.

        Scored are the assistant's texts, but for Guanaco's recipe, where it is the whole conversation.
        """
        turns = document.turns or ()
        answers = sum(len(turn.text.encode()) for turn in turns if turn.role == "assistant")
        if self.template:
            return self._template_pieces(turns), answers
        if self.train_all:
            return note_pieces(self.tokenizer, document.text), document.size
        answered = sum(turn.role == "assistant" for turn in turns)
        return self._guanaco_pieces(turns), answers + answered  # each begins with a space

    def _guanaco_pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        """`### Human: ... ### Assistant:` as context; the answer and an end after each of them as targets."""
        yield self.tokenizer.start_ids, [CONTEXT] * len(self.tokenizer.start_ids)
        prompt = ""
        for turn in turns:
            if turn.role != "assistant":
                prompt += f"### Human: {turn.text} " if turn.role == "user" else f"{turn.text} "
                continue
            prompt += "### Assistant:"
            seen = self.tokenizer.encode(prompt)
            ids = continuation(self.tokenizer, prompt, f" {turn.text}")
            yield seen, [CONTEXT] * len(seen)
            yield [*ids, *self.end], [TEXT] * len(ids) + [STOP] * len(self.end)
            prompt = ""

    def _template_pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        for part in in_parts(turns, self.PART_TURNS, self.PART_CHARS):
            messages = [{"role": turn.role, "content": turn.text} for turn in part]
            ids = self.tokenizer.encode_chat(messages, add_generation_prompt=False)
            marks = [STOP if self.train_all else CONTEXT] * len(ids)
            for at, turn in enumerate(part):
                if turn.role == "assistant":
                    self._mark_answer(ids, marks, messages, at)
            yield self._finished(ids, marks)

    def _mark_answer(self, ids: list[int], marks: list[int], messages: list[dict[str, str]], at: int) -> None:
        """Mark the answer `messages[at]` within `ids`: from its generation prompt's end to its own end id."""
        prompt = self.tokenizer.encode_chat(messages[:at], add_generation_prompt=True)
        answered = ids
        if at + 1 < len(messages):
            answered = self.tokenizer.encode_chat(messages[: at + 1], add_generation_prompt=False)
        begin, end = common_prefix(prompt, ids), common_prefix(answered, ids)
        ends = [place for place in range(begin, end) if ids[place] in self.tokenizer.eos_ids]
        stop = ends[-1] if ends else end
        marks[begin:stop] = [TEXT] * (stop - begin)
        if ends:
            marks[stop] = STOP

    def _finished(self, ids: list[int], marks: list[int]) -> Piece:
        """A rendered conversation with a start the model knows and an end it can learn."""
        while marks and marks[-1] == CONTEXT:  # what follows the last answer teaches nothing
            del ids[-1], marks[-1]
        if not ids:
            return [], []
        if ids[-1] not in self.tokenizer.eos_ids and not self.train_all:
            ids, marks = [*ids, *self.end], marks + [STOP] * len(self.end)
        if self.tokenizer.bos_id is not None and ids[0] != self.tokenizer.bos_id:
            ids, marks = [self.tokenizer.bos_id, *ids], [CONTEXT, *marks]
        marks[0] = CONTEXT
        return ids, marks


def in_parts(turns: Sequence[Turn], most_turns: int, most_chars: int) -> Iterator[list[Turn]]:
    """`turns` in parts that begin at a user's turn, each with the system's turn that opened the conversation."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    part: list[Turn] = []
    chars = 0
    for at, turn in enumerate(turns[len(system) :], len(system)):
        pair = turn.text + (turns[at + 1].text if at + 1 < len(turns) else "")
        if part and turn.role == "user" and (len(part) + 2 > most_turns or chars + len(pair) > most_chars):
            yield system + part
            part, chars = [], 0
        part.append(turn)
        chars += len(turn.text)
    if part:
        yield system + part


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
