"""Windows of documents packed into rows: what step `s` trains is a pure function of (store, settings, seed, s).

A document's tokens are its windows' targets, each token once; a later window begins with `overlap` tokens of context
whose loss is masked. A row is whole windows side by side, without padding; attention sees `segments` and never crosses
one. N below is the tokens of a row.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edgetune.dataset.token_store import CONTEXT, TEXT, TokenStore
from edgetune.runtime.batch import Batch
from edgetune.runtime.errors import DataError, UsageError
from edgetune.runtime.ops_types import Segment

Int = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """All windows of a store, in its order; each array is (number of windows,) int64.

    Window w reads the `length[w]` tokens from `start[w]` of the store and predicts the token after each; the loss of
    its first `context[w]` predictions is masked, because an earlier window made them with more to go on.
    """

    start: Int
    length: Int
    context: Int

    def __len__(self) -> int:
        return len(self.start)


def cut_windows(store: TokenStore, seq_len: int, overlap: int) -> Windows:
    """The windows of every document, at most `seq_len` inputs each; windows without a trained target are left out."""
    columns: list[Int] = []
    for document in store.documents:
        targets = document.tokens - 1
        if targets < 1:
            continue
        # Window 0 predicts tokens 1..seq_len; window k starts k strides later and predicts one stride's tokens more.
        start = np.arange(0, max(targets - overlap, 1), seq_len - overlap, dtype=np.int64)
        length = np.minimum(seq_len, targets - start)
        context = np.where(start == 0, 0, overlap)
        marks = store.trained[document.start : document.start + document.tokens]
        if not marks[1:].all():
            start, length, context = _without_idle_ends(np.flatnonzero(marks), start, length, context)
        columns.append(np.stack([start + document.start, length, context]))
    joined = np.concatenate(columns, axis=1) if columns else np.zeros((3, 0), np.int64)
    return Windows(*joined)


def _without_idle_ends(trained: Int, start: Int, length: Int, context: Int) -> tuple[Int, Int, Int]:
    """Drop what follows a window's last trained target (a question that nobody answers), and windows that have none."""
    # A window's new targets are the places start+context+1 .. start+length of its document.
    place = np.searchsorted(trained, start + length, side="right")
    last = np.where(place > 0, trained[np.maximum(place, 1) - 1] if len(trained) else 0, 0)
    kept = last > start + context
    return start[kept], (last - start)[kept], context[kept]


def make_batch(store: TokenStore, windows: Windows, chosen: Sequence[int], text_only: bool = False) -> Batch:
    """The row of the windows `chosen`. With `text_only` a turn's or document's end is not scored."""
    ids, targets, masks, positions, segments = [], [], [], [], []
    end = 0
    for window in chosen:
        start, length, context = (int(column[window]) for column in (windows.start, windows.length, windows.context))
        row = np.asarray(store.ids[start : start + length + 1], dtype=np.int64)
        marks = np.asarray(store.trained[start + 1 : start + length + 1])
        mask = (marks == TEXT if text_only else marks != CONTEXT).astype(np.float32)
        mask[:context] = 0
        ids.append(row[:-1])
        targets.append(row[1:])
        masks.append(mask)
        positions.append(np.arange(length, dtype=np.int64))
        segments.append(Segment.packed(end, end + length))
        end += length
    return Batch(
        input_ids=torch.from_numpy(np.concatenate(ids)),
        targets=torch.from_numpy(np.concatenate(targets)),
        loss_mask=torch.from_numpy(np.concatenate(masks)),
        positions=torch.from_numpy(np.concatenate(positions)),
        segments=tuple(segments),
    )


def training_overlap(seq_len: int) -> int:
    """Context repeated in a later window: an eighth.

    It costs at most a seventh more compute, and that on long documents alone. Measured on base-16m and 24 long chats, a
    window that starts blind loses 0.5 to 1.3 nats a token over its first 64 tokens and about 0.1 after them.
    """
    return seq_len // 8


class Packer:
    """Deals a store's windows into rows of at most `batch_tokens`, anew each epoch.

    Every epoch has `steps_per_epoch` rows, about equally full: with Adam, which takes a step of one size from any
    gradient, a row of leftovers would count as much as a full one.
    """

    def __init__(self, store: TokenStore, seq_len: int, batch_tokens: int, seed: int) -> None:
        check_settings(seq_len, batch_tokens)
        self.store = store
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.windows = cut_windows(store, seq_len, training_overlap(seq_len))
        if not len(self.windows):
            raise DataError("Nothing to train on: no document has a trained token; expected notes with text in them.")
        self.steps_per_epoch = self._fewest_rows()
        self.plan = functools.lru_cache(maxsize=2)(self._plan)

    def micro_batches(self, step: int, micro_tokens: int) -> list[Batch]:
        """The windows of step `step`, counted from 0 over all epochs, in rows of at most `micro_tokens` (or of one window,
        where that is longer).

        To accumulate gradients exactly, divide each row's summed loss by the sum of all rows' `trained`.
        """
        epoch, number = divmod(step, self.steps_per_epoch)
        chosen = np.asarray(self.plan(epoch)[number])
        lengths = self.windows.length[chosen]
        order = np.argsort(-lengths, kind="stable")
        most = max(micro_tokens, int(lengths.max()))
        for rows in range(-(-int(lengths.sum()) // most), len(chosen) + 1):
            dealt = deal(lengths, order, rows, most)
            if dealt is not None:
                return [make_batch(self.store, self.windows, chosen[row].tolist()) for row in dealt if row]
        raise AssertionError("one window a row always fits")

    def _fewest_rows(self) -> int:
        rows = -(-int(self.windows.length.sum()) // self.batch_tokens)
        while self._try(0, rows) is None:
            rows = min(rows + max(1, rows // 64), len(self.windows))
        return rows

    def _plan(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, as lists of windows."""
        dealt = self._try(epoch, self.steps_per_epoch) or self._try(0, self.steps_per_epoch)
        assert dealt is not None  # steps_per_epoch was chosen so
        order = np.argsort(random_words(self.seed, epoch, 0, len(dealt)), kind="stable")
        return [dealt[row] for row in order.tolist()]

    def _try(self, epoch: int, rows: int) -> list[list[int]] | None:
        """Deal in an order that is random, but on the whole longest first; less random at each try, to pack better."""
        lengths = self.windows.length
        for attempt, jitter in enumerate((1.0, 0.5, 0.25, 0.0), 1):
            chance = random_words(self.seed, epoch, attempt, len(lengths)).astype(np.float64) / 2.0**64
            order = np.lexsort((chance, -lengths * (1 + jitter * chance)))
            dealt = deal(lengths, order, rows, self.batch_tokens)
            if dealt is not None:
                return dealt
        return None


def deal(lengths: Int, order: Int, rows: int, most: int) -> list[list[int]] | None:
    """Give each window, in `order`, to the least full row; None if a row would hold more than `most` tokens."""
    heap = [(0, row) for row in range(rows)]
    dealt: list[list[int]] = [[] for _ in range(rows)]
    for window in order.tolist():
        held, row = heap[0]
        held += int(lengths[window])
        if held > most:
            return None
        heapq.heapreplace(heap, (held, row))
        dealt[row].append(window)
    return dealt


def random_words(seed: int, epoch: int, stream: int, count: int) -> npt.NDArray[np.uint64]:
    """(count,) random uint64 that depend on the arguments alone.

    Philox's raw words are fixed by its paper (Salmon et al. 2011); numpy may change what it derives from them.
    """
    generator = np.random.Philox(
        key=np.array([seed % 2**64, epoch], dtype=np.uint64), counter=np.array([0, 0, 0, stream], dtype=np.uint64)
    )
    return generator.random_raw(count)


def check_settings(seq_len: int, batch_tokens: int) -> None:
    """Raises UsageError for lengths that cannot be honoured."""
    if seq_len < 2:
        raise UsageError(f"A sequence length of {seq_len} was given: expected 2 or more; type --seq-len 512.")
    if batch_tokens < seq_len:
        raise UsageError(
            f"A batch of {batch_tokens} tokens cannot hold a sequence of {seq_len}: expected at least as many; "
            f"type --batch-tokens {seq_len} or --seq-len {batch_tokens}."
        )


def evaluation_batches(store: TokenStore, seq_len: int, batch_tokens: int) -> Iterator[Batch]:
    """Rows that score every text token of the store once, in its order; starts and ends are not scored.

    Windows overlap by half, so that what is scored has seen at least half a window of its document, unless it stands near
    the beginning. Bits per byte: `bits_per_byte`.
    """
    check_settings(seq_len, batch_tokens)
    windows = cut_windows(store, seq_len, seq_len // 2)
    row: list[int] = []
    held = 0
    for window, length in enumerate(windows.length.tolist()):
        if row and held + length > batch_tokens:
            yield make_batch(store, windows, row, text_only=True)
            row, held = [], 0
        row.append(window)
        held += length
    if row:
        yield make_batch(store, windows, row, text_only=True)


@dataclass(frozen=True)
class BitsPerByte:
    """The result of an evaluation over all documents."""

    bits_per_byte: float
    tokens: int
    bytes: int


def bits_per_byte(store: TokenStore, scored: Iterable[tuple[Batch, torch.Tensor]]) -> BitsPerByte:
    """From (batch, losses (N,) in nats) of all `evaluation_batches` to bits a byte, which no tokenizer flatters."""
    nats, tokens = 0.0, 0
    for batch, losses in scored:
        tokens += batch.trained
        nats += float((losses.double() * batch.loss_mask.double()).sum())
    return BitsPerByte(nats / math.log(2) / max(store.bytes, 1), tokens, store.bytes)
