"""The windows of a token store that an evaluation scores, and the score that comes of it.

An evaluation may score less than the whole store. It then scores windows spread at random over all documents, always the
same ones, in the same order and in the same batches: so any two evaluations can be compared, even where one of them was cut
short, over the batches that both have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgetune.dataset.packing import Int, Windows, check_settings, cut_windows, make_batch, random_words
from edgetune.dataset.pieces import TEXT
from edgetune.dataset.token_store import TokenStore
from edgetune.events import judges
from edgetune.runtime.batch import Batch


@dataclass(frozen=True)
class Score:
    """The result of an evaluation, batch by batch: the losses in nats, and the tokens and bytes of text that were scored.

    windows: for each batch, (number of the document, bytes, nats) of each of its windows; empty where nobody counted them.
    """

    nats: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    bytes: tuple[float, ...] = ()
    windows: tuple[tuple[tuple[int, float, float], ...], ...] = ()

    def __len__(self) -> int:
        return len(self.nats)

    def first(self, batches: int) -> Score:
        """Return the score of the first batches alone."""
        return Score(self.nats[:batches], self.tokens[:batches], self.bytes[:batches], self.windows[:batches])

    def by_document(self) -> dict[int, tuple[float, float]]:
        """Return the bytes and the bits of each document that was scored, by its number in the store."""
        found: dict[int, tuple[float, float]] = {}
        for document, size, nats in itertools.chain.from_iterable(self.windows):
            size_before, bits_before = found.get(document, (0.0, 0.0))
            found[document] = size_before + size, bits_before + nats / math.log(2)
        return found

    def is_better_than(self, other: Score | None) -> bool:
        """Return True if this score is finite and lower than another, over the text that both cover."""
        if other is None:
            return math.isfinite(self.bits_per_byte)
        common = min(len(self), len(other))
        return self.first(common).bits_per_byte < other.first(common).bits_per_byte

    @property
    def judges(self) -> bool:
        """Return True if enough tokens were scored to say that one score is better than another."""
        return judges(sum(self.tokens))

    @property
    def bits_per_byte(self) -> float:
        """Return the bits per byte of text, which no tokenizer flatters; nan if nothing was scored."""
        return math.fsum(self.nats) / math.log(2) / math.fsum(self.bytes) if self.bytes else math.nan


@dataclass(frozen=True)
class EvaluationSet:
    """Windows of a store in the order in which they are scored.

    Windows overlap by half: every scored token has seen at least half a window of its document, unless it stands near the
    beginning. Every text token of the whole set is scored once; starts and ends of documents are not scored.
    """

    store: TokenStore
    windows: Windows
    order: Int
    """Numbers of the windows to score."""
    bytes: npt.NDArray[np.float64]
    """For each window, the bytes of text that it scores. A document's bytes are shared out by its scored tokens."""
    owner: Int
    """For each window, the number of its document in the store."""

    @classmethod
    def of(cls, store: TokenStore, seq_len: int) -> EvaluationSet:
        """Return the set of all windows of a store, of at most `seq_len` tokens each."""
        check_settings(seq_len, seq_len)
        windows = cut_windows(store, seq_len, seq_len // 2)
        scored = _scored_tokens(store, windows)
        starts = np.array([document.start for document in store.documents], dtype=np.int64)
        owner = np.searchsorted(starts, windows.start, side="right") - 1
        whole = np.bincount(owner, scored, len(starts))
        bytes_ = np.array([document.bytes for document in store.documents], dtype=np.float64)
        share = scored / np.maximum(whole[owner], 1)
        useful = np.flatnonzero(scored)
        shuffled = np.argsort(random_words(0, 0, 0, len(useful)), kind="stable")
        return cls(store, windows, useful[shuffled], bytes_[owner] * share, owner)

    @property
    def tokens(self) -> int:
        """Return the number of tokens that an evaluation reads."""
        return int(self.windows.length[self.order].sum())

    def limited(self, tokens: int) -> EvaluationSet:
        """Return the set of the first windows that come to at most `tokens` tokens: at least one, the shortest if need be."""
        lengths = self.windows.length[self.order]
        kept = self.order[np.cumsum(lengths) <= tokens]
        return replace(self, order=kept if len(kept) else self.order[[int(lengths.argmin())]])

    def batches(self, row_tokens: int) -> Iterator[tuple[Batch, float]]:
        """Yield packed batches of at most `row_tokens` tokens (one window may be longer), each with its bytes of text.

        Short documents are scored side by side in one batch; attention stays within each.
        """
        for chosen in self.groups(row_tokens):
            yield self.batch(chosen)

    def groups(self, row_tokens: int) -> Iterator[list[int]]:
        """Yield the numbers of the windows in each batch of `batches`, in the order of its segments."""
        chosen: list[int] = []
        tokens = 0
        for window in self.order.tolist():
            length = int(self.windows.length[window])
            if chosen and tokens + length > row_tokens:
                yield chosen
                chosen, tokens = [], 0
            chosen.append(window)
            tokens += length
        if chosen:
            yield chosen

    def batch(self, chosen: list[int]) -> tuple[Batch, float]:
        """Return the batch of the windows with these numbers, and its bytes of text."""
        return make_batch(self.store, self.windows, chosen, text_only=True), float(self.bytes[chosen].sum())


def _scored_tokens(store: TokenStore, windows: Windows) -> Int:
    """Return the number of text tokens that each window scores, (number of windows,)."""
    if not len(windows):
        return np.zeros(0, np.int64)
    is_text = np.append(store.trained == TEXT, False)
    # reduceat sums from each index to the next, so every second sum is a window's: from its first own target to its last.
    ends = np.stack([windows.start + windows.context + 1, windows.start + windows.length + 1], axis=1)
    return np.add.reduceat(is_text, ends.ravel(), dtype=np.int64)[::2]
