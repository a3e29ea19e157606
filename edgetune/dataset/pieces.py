"""Turns texts into pieces of tokens, with the role of each token as a target.

A text is encoded as a whole, as the base model saw it in training. Only a very long text is cut into pieces, because a
tokenizer would hold all of it in memory, or take time that grows with its square.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from edgetune.runtime.start_tokens import StartTokens
from edgetune.runtime.tokenizer import EncodedChat

CONTEXT, TEXT, STOP = 0, 1, 2
"""A token's role as a target. CONTEXT: not trained. TEXT: trained and scored. STOP: trained but not scored, because it is the
end of a turn or document and no part of the text."""
PIECE_CHARS = 1 << 16
"""Characters of a text that are encoded at a time; chosen by hand."""
_CUT_WITHIN = 1 << 12
"""Characters before the end of a piece that are searched for a good place to cut; chosen by hand."""
_SEEN_CHARS = 64
"""Characters before a piece that are encoded with it, so that its first token is that of running text; chosen by hand."""
_BETWEEN_WORDS = re.compile(r"\w(?= \w)")
Piece = tuple[Sequence[int], Sequence[int]]
"""Token ids, and the role of each."""


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
