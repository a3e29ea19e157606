"""Present the two tokenizer libraries, `tokenizers` and `sentencepiece`, as one small interface.

Both open untrusted files: the size of a file is checked before it is parsed, and every fault that a library reports
becomes a TokenizerError of one sentence.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Protocol

from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.special_tokens import AddedToken


class TokenizerLibrary(Protocol):
    """A tokenizer library with one model's vocabulary loaded.

    size: the number of ids. added: the tokens that are looked for before a text is split.
    strips_space: decoding drops one space at the beginning of a text, which encoding put there.
    leading: the ids that the file itself puts before a text. starts_as_llama: texts begin with bos if no file says otherwise.
    """

    size: int
    added: list[AddedToken]
    strips_space: bool
    leading: tuple[int, ...]
    starts_as_llama: bool

    def is_used(self, id: int) -> bool:
        """Return True if the vocabulary has a token or piece with this id."""

    def encode(self, text: str, first: bool, inside: bool = False) -> list[int]:
        """Return the ids of `text`; special tokens that it spells stay text.

        first: no other text comes before it. inside: it is the rest of a text that was cut, so no space is put before it.
        """

    def id_of(self, token: str) -> int | None:
        """Return the id of the token or piece with this spelling, or None if the vocabulary has none."""

    def bytes_of(self, id: int) -> bytes:
        """Return the UTF-8 bytes, perhaps part of a character, that the token with this id stands for."""


@contextlib.contextmanager
def one_sentence(sentence: str) -> Iterator[None]:
    """Turn any fault of a library into a TokenizerError with this sentence; one that is raised inside stays as it is.

    A panic inside a Rust library arrives as a BaseException that is not an Exception.
    """
    try:
        yield
    except (TokenizerError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:
        raise TokenizerError(sentence) from None


class TokenFinder:
    """Finds added tokens in a text, the first of `tokens` where several match at the same place."""

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self._tokens = list(tokens)
        self._pattern = re.compile("|".join(f"({token.pattern})" for token in tokens) or "(?!)")

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield the start, the end and the id of each token in the text, with the white space that the token takes."""
        at = 0
        for match in self._pattern.finditer(text):
            token, start = self._tokens[(match.lastindex or 1) - 1], match.start()
            if token.lstrip:  # not part of the pattern, where it would take quadratic time on long runs of white space
                start = at + len(text[at:start].rstrip())
            at = match.end()
            yield start, at, token.id

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the text between tokens, never empty, and each token's id."""
        at = 0
        for start, end, id in self.find(text):
            if at < start:
                yield text[at:start]
            yield id
            at = end
        if at < len(text):
            yield text[at:]
