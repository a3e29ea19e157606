"""Packs windows of documents into batches: the batch of step s is a pure function of (store, settings, seed, s).

A document longer than `seq_len` is cut into windows. Each token is the target of one window only; a later window begins with
`overlap` tokens of context whose loss is masked. Windows are packed side by side without padding, and attention never crosses
from one `segment` to the next. A step's batch is cut into micro-batches, which fit in memory one at a time.

N below is the number of tokens in a batch.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edgetune.dataset.pieces import CONTEXT, TEXT
from edgetune.dataset.token_store import TokenStore
from edgetune.runtime.batch import Batch
from edgetune.runtime.errors import DataError, UsageError
from edgetune.runtime.ops_types import Segment

Int = npt.NDArray[np.int64]

SHUFFLE_STRENGTHS = (1.0, 0.5, 0.25, 0.0)
"""Randomness of each attempt to pack an epoch's windows (0: strictly the longest first); chosen by hand. The first attempt is
the most random; later ones pack more tightly."""


@dataclass(frozen=True)
class Windows:
    """All windows of a store, in its order; each array is (number of windows,) int64.

    Window w reads the `length[w]` tokens from `start[w]` of the store and predicts the token after each of them. The loss of
    its first `context[w]` predictions is masked: an earlier window made the same predictions with more context.
    """

    start: Int
    length: Int
    context: Int

    def __len__(self) -> int:
        return len(self.start)


def cut_windows(store: TokenStore, seq_len: int, overlap: int) -> Windows:
    """Cut every document into windows of at most `seq_len` inputs; leave out windows without a trained target."""
    columns: list[Int] = []
    for document in store.documents:
        # A token is predicted from those before it, so n tokens give n - 1 targets.
        targets = document.tokens - 1
        if targets < 1:
            continue
        # With stride = seq_len - overlap: window 0 predicts tokens 1 to seq_len; window k starts at k * stride, repeats
        # `overlap` tokens as context and predicts the next `stride` tokens. No window starts at targets - overlap or later:
        # it would have no target of its own, since the window before it already reaches the document's end.
        start = np.arange(0, max(targets - overlap, 1), seq_len - overlap, dtype=np.int64)
        length = np.minimum(seq_len, targets - start)
        context = np.where(start == 0, 0, overlap)
        marks = store.trained[document.start : document.start + document.tokens]
        if not marks[1:].all():
            start, length, context = _trim_untrained_ends(np.flatnonzero(marks), start, length, context)
        columns.append(np.stack([start + document.start, length, context]))
    joined = np.concatenate(columns, axis=1) if columns else np.zeros((3, 0), np.int64)
    return Windows(*joined)


def _trim_untrained_ends(trained: Int, start: Int, length: Int, context: Int) -> tuple[Int, Int, Int]:
    """Cut off everything after a window's last trained target (for instance an unanswered question); drop windows without one.

    trained: (n,) the document's trained positions, ascending. All positions count from the document's start.
    """
    # A window's own targets are the positions start + context + 1 to start + length of its document.
    place = np.searchsorted(trained, start + length, side="right")
    last = np.where(place > 0, trained[np.maximum(place, 1) - 1] if len(trained) else 0, 0)
    kept = last > start + context
    return start[kept], (last - start)[kept], context[kept]


def make_batch(store: TokenStore, windows: Windows, chosen: Sequence[int], text_only: bool = False) -> Batch:
    """Pack the windows numbered `chosen` into one batch. With `text_only`, the ends of turns and documents carry no loss."""
    ids, targets, masks, positions, segments = [], [], [], [], []
    end = 0
    for window in chosen:
        start, length, context = (int(column[window]) for column in (windows.start, windows.length, windows.context))
        tokens = np.asarray(store.ids[start : start + length + 1], dtype=np.int64)
        marks = np.asarray(store.trained[start + 1 : start + length + 1])
        mask = (marks == TEXT if text_only else marks != CONTEXT).astype(np.float32)
        mask[:context] = 0
        ids.append(tokens[:-1])
        targets.append(tokens[1:])
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
    """Return the tokens of context that a later window repeats in training: an eighth of `seq_len`.

    This costs at most a seventh more compute, and only on long documents. Measured on base-16m with 24 long chats, a window
    without context loses 0.5 to 1.3 nats per token over its first 64 tokens, and about 0.1 after them.
    """
    return seq_len // 8


class Packer:
    """Packs a store's windows into one batch of at most `batch_tokens` per step, shuffled anew in each epoch.

    Every epoch has `steps_per_epoch` batches that are about equally full. Adam takes a step of the same size from any
    gradient, so a small batch of leftovers would count as much as a full one.
    """

    def __init__(self, store: TokenStore, seq_len: int, batch_tokens: int, seed: int) -> None:
        check_settings(seq_len, batch_tokens)
        self.store = store
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.windows = cut_windows(store, seq_len, training_overlap(seq_len))
        if not len(self.windows):
            raise DataError("Nothing to train on: no document holds a token to train on; expected notes with text in them.")
        self.steps_per_epoch = self._fewest_batches()
        self.plan = functools.lru_cache(maxsize=2)(self._plan)

    def micro_batches(self, step: int, micro_tokens: int) -> list[Batch]:
        """Return the batch of step `step` (counted from 0 over all epochs) as micro-batches of at most `micro_tokens` tokens.

        A window longer than that is a micro-batch of its own. To accumulate gradients exactly, divide each micro-batch's
        summed loss by the sum of `trained` over all of them.
        """
        epoch, number = divmod(step, self.steps_per_epoch)
        chosen = np.asarray(self.plan(epoch)[number])
        bins = split(self.windows.length[chosen], micro_tokens)
        return [make_batch(self.store, self.windows, chosen[members].tolist()) for members in bins]

    def _fewest_batches(self) -> int:
        """Return the number of batches per epoch: the fewest that could hold all tokens, raised until packing succeeds."""
        count = -(-int(self.windows.length.sum()) // self.batch_tokens)
        while self._try_to_pack(0, count) is None:
            count = min(count + max(1, count // 64), len(self.windows))
        return count

    def _plan(self, epoch: int) -> list[list[int]]:
        """Return the windows of each batch of an epoch, in the order of its steps."""
        # The number of batches was settled on epoch 0. Another epoch's shuffle may not fit it; epoch 0's always does.
        batches = self._try_to_pack(epoch, self.steps_per_epoch) or self._try_to_pack(0, self.steps_per_epoch)
        assert batches is not None
        # Packing longest first leaves a pattern in the batches' order, so they are shuffled too.
        order = np.argsort(random_words(self.seed, epoch, 0, len(batches)), kind="stable")
        return [batches[number] for number in order.tolist()]

    def _try_to_pack(self, epoch: int, count: int) -> list[list[int]] | None:
        """Deal an epoch's windows into `count` batches in a random order that favours long windows; None if they do not fit."""
        lengths = self.windows.length
        for attempt, strength in enumerate(SHUFFLE_STRENGTHS, 1):
            chance = random_words(self.seed, epoch, attempt, len(lengths)).astype(np.float64) / 2.0**64
            order = np.lexsort((chance, -lengths * (1 + strength * chance)))
            batches = deal(lengths, order, count, self.batch_tokens)
            if batches is not None:
                return batches
        return None


def split(lengths: Int, micro_tokens: int) -> list[list[int]]:
    """Deal the windows of a step, whose `lengths` are given, into the fewest micro-batches of at most `micro_tokens` tokens.

    Each micro-batch is a list of places in `lengths`. A window longer than that is a micro-batch of its own.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    capacity = max(micro_tokens, int(lengths.max(initial=1)))
    # Begin with the fewest micro-batches that could hold all tokens, and add one until the windows fit.
    for count in range(-(-int(lengths.sum()) // capacity), len(lengths) + 1):
        bins = deal(lengths, longest_first, count, capacity) if count else []
        if bins is not None:
            return [members for members in bins if members]
    raise AssertionError("one window per micro-batch always fits")


def deal(lengths: Int, order: Int, bins: int, capacity: int) -> list[list[int]] | None:
    """Put each window, in `order`, into the least full of the `bins`; return None if a bin would exceed `capacity` tokens."""
    heap = [(0, number) for number in range(bins)]
    members: list[list[int]] = [[] for _ in range(bins)]
    for window in order.tolist():
        tokens, number = heap[0]
        tokens += int(lengths[window])
        if tokens > capacity:
            return None
        heapq.heapreplace(heap, (tokens, number))
        members[number].append(window)
    return members


def random_words(seed: int, epoch: int, stream: int, count: int) -> npt.NDArray[np.uint64]:
    """Return (count,) random uint64 that depend on the arguments alone.

    Philox's raw words are fixed by its paper (Salmon et al. 2011). What numpy derives from them may change between versions.
    """
    generator = np.random.Philox(
        key=np.array([seed % 2**64, epoch], dtype=np.uint64), counter=np.array([0, 0, 0, stream], dtype=np.uint64)
    )
    return generator.random_raw(count)


def check_settings(seq_len: int, batch_tokens: int) -> None:
    """Raise UsageError for lengths that cannot be used."""
    if seq_len < 2:
        raise UsageError(f"The sequence length is {seq_len}; expected at least 2. Type e.g. --seq-len 512.")
    if batch_tokens < seq_len:
        raise UsageError(
            f"A batch of {batch_tokens} tokens cannot hold a sequence of {seq_len}; expected at least as many. "
            f"Type --batch-tokens {seq_len} or --seq-len {batch_tokens}."
        )
