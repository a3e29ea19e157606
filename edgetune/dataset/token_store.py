"""Turns documents into a token store: a private folder of memory-mapped arrays, written document by document in little memory.

ids.bin          int32  every document in turn: start ids, text ids, end id
trained.bin      uint8  the role of each token as a target: CONTEXT, TEXT or STOP
documents.json   for each document its path, digest, first token, number of tokens and bytes of scored text
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgetune.dataset.chat_notices import ANSWERS_LOST, LEFT_OUT, REASONING_LOST, SYSTEM_JOINED, ChatNotices
from edgetune.documents.document import Document, Turn
from edgetune.progress import Progress, ignore
from edgetune.runtime.errors import DataError, TokenizerError
from edgetune.runtime.files import PRIVATE_FILE, atomic_folder
from edgetune.runtime.start_tokens import StartTokens
from edgetune.runtime.tokenizer import EncodedChat

CONTEXT, TEXT, STOP = 0, 1, 2
"""A token's role as a target. CONTEXT: not trained. TEXT: trained and scored. STOP: trained but not scored, because it is the
end of a turn or document and no part of the text."""
FORMAT = 1
"""Version of the store's files."""
BYTES_PER_TOKEN = 4
"""About how many bytes a token stands for, to show the progress within a long note."""

TrainOn = Literal["assistant", "all"]
ChatFormat = Literal["auto", "template", "guanaco"]


class TextTokenizer(Protocol):
    """The part of `edgetune.runtime.tokenizer.Tokenizer` that this module uses."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def start(self) -> StartTokens: ...
    @property
    def start_ids(self) -> list[int]: ...
    @property
    def has_template(self) -> bool: ...
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def encode_chat(self, messages: Any, add_generation_prompt: bool = True, tools: Sequence[Any] = ()) -> list[int]:
        """Return the ids of a conversation, rendered by the model's chat template."""

    def check_template(self) -> None:
        """Raise TokenizerError if the chat template cannot be used for any conversation."""

    def encode_answers(self, messages: Any, tools: Sequence[Any] = ()) -> EncodedChat:
        """Return the ids of a conversation, and where the assistant's turns stand in them."""


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
    notices: tuple[str, ...] = ()
    """Sentences for the user about chats that were changed or left out, because of the model's chat template. They are not in
    the files, which are the same on every machine."""

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
            ids = _mapped(path / "ids.bin", np.int32)
            trained = _mapped(path / "trained.bin", np.uint8)
            ends = [0, *(document.start + document.tokens for document in documents)]
        except (OSError, ValueError, KeyError, TypeError) as error:
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
) -> TokenStore:
    """Write the tokens of `documents` to the folder `path` (replaced atomically; files 0600) and return them memory-mapped.

    A note becomes `start_ids + ids + [eos]`; all of it is trained except the start. In a chat, the assistant's turns and
    their ends are trained (with `train_on="all"`: everything). With "auto", chats are rendered by the model's own template
    if it has one, else in Guanaco's form. Raises DataError where nothing would be trained, unless it `may_be_empty`.

    progress: called after each piece of text with the bytes that are done and the bytes in total. It may raise to end the work.
    """
    documents = list(documents)
    done, total = 0, sum(document.size for document in documents)
    writer = ChatWriter(tokenizer, train_on, chat_format)
    stored: list[StoredDocument] = []
    start = trained = read = 0
    with atomic_folder(path) as folder:
        with private_file(folder / "ids.bin") as ids_file, private_file(folder / "trained.bin") as trained_file:
            for document in documents:
                read += 1
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
        notices = writer.notices.sentences()
        if not trained and not may_be_empty:
            raise DataError(
                f"Nothing to train on: none of {read:,} documents holds a token to train on; expected notes with text, or "
                "chats in which the assistant answers. Type the same command with --dry-run to see what is read."
                + "".join(f" {notice}" for notice in notices[:1])
            )
        index = {"format": FORMAT, "train_on": train_on, "documents": [asdict(document) for document in stored]}
        with private_file(folder / "documents.json") as file:
            file.write(json.dumps(index, ensure_ascii=False).encode())
    return replace(TokenStore.open(path), notices=notices)


def _mapped(path: Path, dtype: Any) -> npt.NDArray[Any]:
    """Map a file of numbers. An empty file cannot be mapped; it is an empty array."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


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


def note_pieces(tokenizer: TextTokenizer, blocks: Iterable[str]) -> Iterator[Piece]:
    """Yield the tokens of a note, whose text comes in `blocks`, from its start ids to its end id."""
    yield tokenizer.start_ids, [CONTEXT] * len(tokenizer.start_ids)
    for ids in encode_text(tokenizer, blocks):
        yield ids, [TEXT] * len(ids)
    yield tokenizer.eos_ids[:1], [STOP] * len(tokenizer.eos_ids[:1])


def encode_text(tokenizer: TextTokenizer, blocks: Iterable[str], piece_chars: int = PIECE_CHARS) -> Iterator[list[int]]:
    """Yield the ids of the text in `blocks` in pieces of about `piece_chars` characters; joined, they are those of the whole.

    The pieces depend on the text alone, not on its blocks.
    """
    text, start = "", 0
    for block in blocks:
        text, start = text[max(0, start - _SEEN_CHARS) :] + block, min(start, _SEEN_CHARS)
        # One more character than a piece has: whether a piece ends the text changes where it is cut.
        while start + piece_chars < len(text):
            end = find_cut(text, start, piece_chars)
            yield continuation(tokenizer, text[max(0, start - _SEEN_CHARS) : start], text[start:end])
            start = end
    if start < len(text):
        yield continuation(tokenizer, text[max(0, start - _SEEN_CHARS) : start], text[start:])


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


class Unwritable(Exception):
    """A chat that cannot be written in the chosen form. The message says why, and holds no text of the chat."""


_REASONING_KEYS = {"reasoning_content", "reasoning", "thinking"}
_TOOL_KEYS = {"tool_calls"}
_ANSWERS_NOT_FOUND = "the model's chat template does not show where they begin and end"


class ChatWriter:
    """Turns conversations into tokens, with the role of each as a target. `notices` counts what was left out, by its cause."""

    # Finding the ends of a turn renders everything before it again, so the cost grows with the square of the turns. A long
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
        self.notices = ChatNotices()

    def pieces(self, document: Document) -> tuple[list[Piece], int]:
        """Return the tokens of one conversation, and the bytes of text behind those marked TEXT.

        These are the assistant's texts; in Guanaco's recipe they are the whole conversation. A conversation that cannot be
        written has no tokens, and `notices` tells its cause.
        """
        if self.template:
            self.tokenizer.check_template()
        try:
            if self.template:
                return self._template_pieces(document)
            return self._guanaco_pieces(document)
        except Unwritable as problem:
            self.notices.add(LEFT_OUT, str(problem), document.path)
            return [], 0

    def _guanaco_pieces(self, document: Document) -> tuple[list[Piece], int]:
        """Return `### Human: ... ### Assistant:` as context, and every answer and its end as targets."""
        turns = document.turns or ()
        if any(turn.role == "tool" or turn.extras.keys() & _TOOL_KEYS for turn in turns):
            raise Unwritable("they call tools, which only a model's chat template can write")
        if any(turn.extras.keys() & _REASONING_KEYS for turn in turns):
            self.notices.add(REASONING_LOST, "only a model's chat template can write it", document.path)
        if self.train_all and all(turn.trained for turn in turns):
            return list(note_pieces(self.tokenizer, document.blocks())), document.size
        pieces: list[Piece] = [(self.tokenizer.start_ids, [CONTEXT] * len(self.tokenizer.start_ids))]
        prompt, scored = "", 0
        for turn in turns:
            if turn.role != "assistant":
                prompt += f"### Human: {turn.text} " if turn.role == "user" else f"{turn.text} "
                continue
            prompt += "### Assistant:"
            answer = f" {turn.text}"
            seen = self.tokenizer.encode(prompt)
            ids = continuation(self.tokenizer, prompt, answer)
            as_prompt, as_answer = (TEXT if self.train_all else CONTEXT), (TEXT if turn.trained else CONTEXT)
            pieces.append((seen, [as_prompt] * len(seen)))
            pieces.append(([*ids, *self.end], [as_answer] * len(ids) + [STOP if turn.trained else CONTEXT] * len(self.end)))
            scored += (len(prompt.encode()) if self.train_all else 0) + (len(answer.encode()) if turn.trained else 0)
            prompt = ""
        return (pieces, scored) if any(TEXT in marks for _, marks in pieces) else ([], 0)

    def _template_pieces(self, document: Document) -> tuple[list[Piece], int]:
        """Return the conversation as the model's template renders it, with the answers and their ends as targets."""
        pieces: list[Piece] = []
        scored = lost = 0
        for part in split_turns(document.turns or (), self.PART_TURNS, self.PART_CHARS):
            part, chat = self._encode(document, part)
            marks = [STOP if self.train_all else CONTEXT] * len(chat.ids)
            for number, turn in enumerate(part):
                answer = chat.answers.get(number)
                if turn.role != "assistant" or not turn.trained:
                    continue
                if answer is None:
                    lost += 1
                    continue
                marks[answer.start : answer.end] = [TEXT] * (answer.end - answer.start)
                for control in answer.controls:
                    marks[control] = STOP
                if answer.has_stop:
                    marks[answer.end] = STOP
                scored += answer.bytes
            pieces.append(self._complete(list(chat.ids), marks))
        if lost and not scored:
            raise Unwritable(_ANSWERS_NOT_FOUND)
        if lost:
            self.notices.add(ANSWERS_LOST, _ANSWERS_NOT_FOUND, document.path)
        return pieces, scored

    def _encode(self, document: Document, part: list[Turn]) -> tuple[list[Turn], EncodedChat]:
        """Render and encode a part. Raises Unwritable if the template refuses it, or leaves out what it says to tools."""
        try:
            chat = self._encode_answers(part, document)
        except TokenizerError as error:
            part, chat = self._encode_joined(document, part, str(error))
        tools = [number for number, turn in enumerate(part) if turn.role == "tool" and turn.text.strip()]
        if not chat.shown.issuperset(tools) or self._ignores(part, document, chat, _TOOL_KEYS):
            raise Unwritable("they call tools, which the model's chat template does not write")
        if self._ignores(part, document, chat, _REASONING_KEYS):
            self.notices.add(REASONING_LOST, "the model's chat template does not write it", document.path)
        return part, chat

    def _encode_joined(self, document: Document, part: list[Turn], refusal: str) -> tuple[list[Turn], EncodedChat]:
        """Encode a part that the template refused as it is, with the system's turns joined to the user's."""
        joined = join_system(part)
        try:
            if joined != part:
                chat = self._encode_answers(joined, document)
                self.notices.add(SYSTEM_JOINED, "the model's chat template refuses a system's turn there", document.path)
                return joined, chat
        except TokenizerError:
            pass
        raise Unwritable(f"{refusal[:1].lower()}{refusal[1:].removesuffix('.')}")

    def _encode_answers(self, part: Sequence[Turn], document: Document) -> EncodedChat:
        return self.tokenizer.encode_answers([turn.message() for turn in part], document.tools)

    def _ignores(self, part: Sequence[Turn], document: Document, chat: EncodedChat, keys: AbstractSet[str]) -> bool:
        """Return True if the part has some of `keys` and the template renders it as if it had none."""
        if not any(turn.extras.keys() & keys for turn in part):
            return False
        bare = [{key: value for key, value in turn.message().items() if key not in keys} for turn in part]
        try:
            return self.tokenizer.encode_chat(bare, False, document.tools) == chat.ids
        except TokenizerError:
            return False

    def _complete(self, ids: list[int], marks: list[int]) -> Piece:
        """Complete a rendered conversation: a start id, an end id to learn, and nothing after the last answer."""
        while marks and marks[-1] == CONTEXT:  # tokens after the last answer teach nothing
            del ids[-1], marks[-1]
        if not ids:
            return [], []
        if ids[-1] not in self.tokenizer.eos_ids and not self.train_all:
            ids, marks = [*ids, *self.end], marks + [STOP] * len(self.end)
        started = self.tokenizer.start.before_chat(ids)
        ids, marks = started, [CONTEXT] * (len(started) - len(ids)) + marks
        marks[0] = CONTEXT
        return ids, marks


def join_system(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with each system's turn put in front of the user's turn that follows it, as LLaMA 2 has it.

    Without one, it joins the user's turn before it; at the end, after the last answer, it is dropped.
    """
    joined: list[Turn] = []
    waiting: list[str] = []
    for turn in turns:
        if turn.role == "system":
            waiting.append(turn.text)
        elif turn.role == "user" and waiting:
            joined.append(Turn("user", "\n\n".join([*waiting, turn.text]), turn.trained, turn.extras))
            waiting = []
        else:
            if waiting and joined and joined[-1].role == "user":
                joined[-1] = Turn("user", "\n\n".join([joined[-1].text, *waiting]), joined[-1].trained, joined[-1].extras)
                waiting = []
            joined.append(turn)
    return joined


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
