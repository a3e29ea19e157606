"""Turns documents into a token store: a private folder of memory-mapped arrays, written document by document in little memory.

ids.bin          int32  every document in turn: start ids, text ids, end id
trained.bin      uint8  the role of each token as a target: CONTEXT, TEXT or STOP
documents.json   for each document its path, digest, first token, number of tokens and bytes of scored text
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgetune.documents.document import Document, Turn
from edgetune.runtime.errors import DataError
from edgetune.runtime.files import PRIVATE_FILE, atomic_folder

CONTEXT, TEXT, STOP = 0, 1, 2
"""A token's role as a target. CONTEXT: not trained. TEXT: trained and scored. STOP: trained but not scored, because it is the
end of a turn or document and no part of the text."""
FORMAT = 1
"""Version of the store's files."""

TrainOn = Literal["assistant", "all"]
ChatFormat = Literal["auto", "template", "guanaco"]


class TextTokenizer(Protocol):
    """The part of `edgetune.runtime.tokenizer.Tokenizer` that this module uses."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def start_ids(self) -> list[int]: ...
    @property
    def has_template(self) -> bool: ...
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def encode_chat(self, messages: Any, add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a conversation, rendered by the model's chat template."""


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
            index = json.loads((path / "documents.json").read_bytes())
            documents = tuple(StoredDocument(**document) for document in index["documents"])
            ids = np.memmap(path / "ids.bin", dtype=np.int32, mode="r")
            trained = np.memmap(path / "trained.bin", dtype=np.uint8, mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"The token store {path} is unreadable ({type(error).__name__}). Delete it and run the command again."
            ) from error
        ends = [0, *(document.start + document.tokens for document in documents)]
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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TokenStore:
    """Write the tokens of `documents` to the folder `path` (replaced atomically; files 0600) and return them memory-mapped.

    A note becomes `start_ids + ids + [eos]`; all of it is trained except the start. In a chat, the assistant's turns and
    their ends are trained (with `train_on="all"`: everything). With "auto", chats are rendered by the model's own template
    if it has one, else in Guanaco's form. Raises DataError where nothing would be trained.
    """
    writer = ChatWriter(tokenizer, train_on, chat_format)
    stored: list[StoredDocument] = []
    start = trained = 0
    with atomic_folder(path) as folder:
        with private_file(folder / "ids.bin") as ids_file, private_file(folder / "trained.bin") as trained_file:
            whole, done = sum(document.size for document in documents), 0
            for document in documents:
                progress(done, whole)
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
                done += document.size
                if tokens:
                    stored.append(StoredDocument(document.path, document.digest, start, tokens, scored))
                    start += tokens
        if not trained:
            raise DataError(
                f"Nothing to train on: none of {len(stored)} documents holds a token to train on; expected notes with text, or "
                "chats in which the assistant answers. Type the same command with --dry-run to see what is read."
            )
        index = {"format": FORMAT, "train_on": train_on, "documents": [asdict(document) for document in stored]}
        with private_file(folder / "documents.json") as file:
            file.write(json.dumps(index, ensure_ascii=False).encode())
    return TokenStore.open(path)


def private_file(path: Path) -> BinaryIO:
    """Create a file that its owner alone can read, and open it for writing."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), PRIVATE_FILE), "wb")


# Notes. A text is encoded as a whole, as the base model saw it in training. Only a very long text is cut into pieces, because
# a tokenizer would hold all of it in memory, or take time that grows with its square.

PIECE_CHARS = 1 << 16
"""Characters of a text that are encoded at a time; chosen by hand."""
_CUT_WITHIN = 1 << 12
"""Characters before the end of a piece that are searched for a good place to cut; chosen by hand."""
_SEEN_CHARS = 64
"""Characters before a piece that are encoded with it, so that its first token is that of running text; chosen by hand."""
_BETWEEN_WORDS = re.compile(r"\w(?= \w)")
Piece = tuple[Sequence[int], Sequence[int]]
"""Token ids, and the role of each."""


def note_pieces(tokenizer: TextTokenizer, text: str) -> Iterator[Piece]:
    """Yield the tokens of a note, from its start ids to its end id."""
    yield tokenizer.start_ids, [CONTEXT] * len(tokenizer.start_ids)
    for ids in encode_text(tokenizer, text):
        yield ids, [TEXT] * len(ids)
    yield tokenizer.eos_ids[:1], [STOP] * len(tokenizer.eos_ids[:1])


def encode_text(tokenizer: TextTokenizer, text: str, piece_chars: int = PIECE_CHARS) -> Iterator[list[int]]:
    """Yield the ids of `text` in pieces of about `piece_chars` characters; joined, they are the ids of the whole text."""
    start = 0
    while start < len(text):
        end = find_cut(text, start, piece_chars)
        yield continuation(tokenizer, text[max(0, start - _SEEN_CHARS) : start], text[start:end])
        start = end


def find_cut(text: str, start: int, piece_chars: int) -> int:
    """Return the end of a piece that begins at `start`: before a space between two words, where no known tokenizer merges."""
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
    """Return the ids of `text` as a continuation of `before`. Encoded alone, sentencepiece would put a space in front of it."""
    ids = tokenizer.encode(before + text)
    if not before:
        return ids
    seen = tokenizer.encode(before)
    return ids[len(seen) :] if ids[: len(seen)] == seen else tokenizer.encode(text)


# Chats.


class ChatWriter:
    """Turns conversations into tokens, with the role of each as a target."""

    # Finding the ends of a turn encodes everything before it again, so the cost grows with the square of the turns. A long
    # conversation is therefore rendered in parts that begin at a user's turn.
    PART_TURNS = 32
    """Most turns of a part; chosen by hand."""
    PART_CHARS = 1 << 15
    """Most characters of a part; chosen by hand."""

    def __init__(self, tokenizer: TextTokenizer, train_on: TrainOn, chat_format: ChatFormat) -> None:
        self.tokenizer = tokenizer
        self.train_all = train_on == "all"
        self.template = tokenizer.has_template if chat_format == "auto" else chat_format == "template"
        self.end = tuple(tokenizer.eos_ids[:1])

    def pieces(self, document: Document) -> tuple[Iterator[Piece], int]:
        """Return the tokens of one conversation, and the bytes of text behind those marked TEXT.

        These are the assistant's texts; in Guanaco's recipe they are the whole conversation.
        """
        turns = document.turns or ()
        answers = sum(len(turn.text.encode()) for turn in turns if turn.role == "assistant")
        if self.template:
            return self._template_pieces(turns), answers
        if self.train_all:
            return note_pieces(self.tokenizer, document.text), document.size
        answered = sum(turn.role == "assistant" for turn in turns)
        return self._guanaco_pieces(turns), answers + answered  # every answer begins with a space

    def _guanaco_pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        """Yield `### Human: ... ### Assistant:` as context, and every answer and its end as targets."""
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
        """Yield the conversation as the model's template renders it, with the answers and their ends as targets."""
        for part in split_turns(turns, self.PART_TURNS, self.PART_CHARS):
            messages = [{"role": turn.role, "content": turn.text} for turn in part]
            ids = self.tokenizer.encode_chat(messages, add_generation_prompt=False)
            marks = [STOP if self.train_all else CONTEXT] * len(ids)
            for at, turn in enumerate(part):
                if turn.role == "assistant":
                    self._mark_answer(ids, marks, messages, at)
            yield self._complete(ids, marks)

    def _mark_answer(self, ids: list[int], marks: list[int], messages: list[dict[str, str]], at: int) -> None:
        """Mark the answer `messages[at]` within `ids`: from the end of its generation prompt to its own end id."""
        # A template does not say where a turn lies among the ids. So the conversation is rendered twice more, up to the
        # answer and up to its end: `ids` agrees with the first as far as the answer's start, with the second to its end.
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

    def _complete(self, ids: list[int], marks: list[int]) -> Piece:
        """Complete a rendered conversation: a start id, an end id to learn, and nothing after the last answer."""
        while marks and marks[-1] == CONTEXT:  # tokens after the last answer teach nothing
            del ids[-1], marks[-1]
        if not ids:
            return [], []
        if ids[-1] not in self.tokenizer.eos_ids and not self.train_all:
            ids, marks = [*ids, *self.end], marks + [STOP] * len(self.end)
        if self.tokenizer.bos_id is not None and ids[0] != self.tokenizer.bos_id:
            ids, marks = [self.tokenizer.bos_id, *ids], [CONTEXT, *marks]
        marks[0] = CONTEXT
        return ids, marks


def split_turns(turns: Sequence[Turn], most_turns: int, most_chars: int) -> Iterator[list[Turn]]:
    """Split `turns` into parts that begin at a user's turn; each part repeats the system's turn that opened the chat."""
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
    """Return the number of leading ids that two sequences share."""
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
