"""The anchor of a run: texts on which the adapted model must stay close to its base, with what the base predicts there.

In each step a share of the tokens comes from the anchor, in micro-batches of their own. Their loss is the divergence from the
base's predictions (runtime/loss.py), of which the SOFT_TOKENS likeliest are kept for each trained token of the anchor.

M below is the number of the anchor's trained tokens, in the order of its token store.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from edgetune.dataset.packing import Int, Windows, cut_windows, make_batch, random_words, split, training_overlap
from edgetune.dataset.pieces import CONTEXT
from edgetune.dataset.token_store import TokenStore, mapped
from edgetune.runtime.batch import Batch, SoftTargets
from edgetune.runtime.errors import DataError
from edgetune.runtime.files import explain_full_disk, private_file

SOFT_TOKENS = 32
"""Likeliest tokens of the base that are kept for each trained token of the anchor; all others count as one. Chosen by hand."""
_IDS, _PROBABILITIES = "soft-ids.bin", "soft-probabilities.bin"
_STREAM = 100
"""Number of the random stream that shuffles the anchor's windows; the Packer's streams have lower ones."""


class AnchorSet:
    """The anchor's windows and the base's predictions, in batches that are pure functions of (store, settings, seed, step)."""

    def __init__(self, store: TokenStore, ids: npt.NDArray[np.int32], probabilities: npt.NDArray[np.float32], seq_len: int):
        self.store, self.seq_len = store, seq_len
        self.windows = anchor_windows(store, seq_len)
        self._ids, self._probabilities = ids, probabilities
        self._row_of = row_numbers(store)

    @classmethod
    def open(cls, folder: Path, seq_len: int) -> AnchorSet:
        """Map the anchor that `write_predictions` completed. Raises DataError if it is damaged."""
        store = TokenStore.open(folder)
        try:
            ids = mapped(folder / _IDS, np.int32).reshape(store.trained_tokens, -1)
            probabilities = mapped(folder / _PROBABILITIES, np.float32).reshape(ids.shape)
        except (OSError, ValueError) as error:
            raise DataError(f"The anchor in {folder} is damaged. Type the same command with --fresh.") from error
        return cls(store, ids, probabilities, seq_len)

    def micro_batches(self, step: int, tokens: int, micro_tokens: int, seed: int) -> list[Batch]:
        """Return the anchor's part of step `step`: about `tokens` tokens, in micro-batches of at most `micro_tokens`.

        Windows follow each other in an endless row, shuffled anew each time all have come. A step has those that begin in its
        stretch of `tokens` tokens, so a short one may have none.
        """
        total, chosen = int(self.windows.length.sum()), list[int]()
        first, end = step * tokens, (step + 1) * tokens
        for cycle in range(first // total, -(-end // total)):
            order = np.argsort(random_words(seed, cycle, _STREAM, len(self.windows)), kind="stable")
            starts = cycle * total + np.cumsum(self.windows.length[order]) - self.windows.length[order]
            chosen += order[(starts >= first) & (starts < end)].tolist()
        numbers = np.array(chosen, dtype=np.int64)
        return [self.batch(numbers[members].tolist()) for members in split(self.windows.length[numbers], micro_tokens)]

    def batch(self, chosen: list[int]) -> Batch:
        """Pack the windows numbered `chosen` into one batch with the base's predictions as soft targets."""
        rows = target_rows(self._row_of, self.windows, chosen)
        ids = torch.from_numpy(self._ids[rows].astype(np.int64))
        soft = SoftTargets(ids, torch.from_numpy(np.array(self._probabilities[rows])))
        return dataclasses.replace(make_batch(self.store, self.windows, chosen), soft=soft)


def anchor_windows(store: TokenStore, seq_len: int) -> Windows:
    """Cut the anchor's texts into windows as notes are cut for training: each trained token is a target once."""
    return cut_windows(store, seq_len, training_overlap(seq_len))


def row_numbers(store: TokenStore) -> Int:
    """Return the number of the last trained token up to each token of the store, (n,): of a trained one, its own number."""
    return np.maximum(np.cumsum(np.asarray(store.trained) != CONTEXT) - 1, 0)


def target_rows(row_of: Int, windows: Windows, chosen: list[int]) -> Int:
    """Return the numbers of the predictions for each target of the batch of the windows `chosen`, (N,)."""
    parts = [row_of[windows.start[w] + 1 : windows.start[w] + windows.length[w] + 1] for w in chosen]
    return np.concatenate(parts)


def write_predictions(folder: Path, ids: npt.NDArray[np.int32], probabilities: npt.NDArray[np.float32]) -> None:
    """Write the base's predictions, (M, SOFT_TOKENS) each, beside the anchor's tokens in `folder` (files 0600)."""
    with explain_full_disk(folder):
        for name, values in ((_IDS, ids), (_PROBABILITIES, probabilities)):
            with private_file(folder / name) as file:
                file.write(values.tobytes())
