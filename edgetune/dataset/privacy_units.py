"""The units of private training: each is a document with its copies, and consists of some windows of a token store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgetune.dataset.packing import Packer, make_batch, split
from edgetune.dataset.token_store import TokenStore
from edgetune.documents.copies import groups_of_copies
from edgetune.runtime.batch import Batch


class UnitPacker(Packer):
    """Cuts a store into windows and groups them into `units`, which private steps sample. It packs no unit with another.

    A step reads at most `most_windows` windows of a unit. An epoch has as many steps as batches of `batch_tokens` tokens would
    hold that much of every unit; each step samples each unit with the probability `sample_rate`, one in so many.
    """

    def __init__(self, store: TokenStore, seq_len: int, batch_tokens: int, seed: int, most_windows: int) -> None:
        self.most_windows = most_windows
        self.units: tuple[tuple[int, ...], ...] = ()
        """For each unit the numbers of its windows, ascending. Every unit has one at least."""
        super().__init__(store, seq_len, batch_tokens, seed)

    @property
    def sample_rate(self) -> float:
        """Return the probability with which a step samples a unit (0 to 1)."""
        return 1 / self.steps_per_epoch

    def of_unit(self, windows: Sequence[int], micro_tokens: int) -> list[Batch]:
        """Return windows of one unit as batches of at most `micro_tokens` tokens; a longer window is a batch of its own."""
        chosen = np.asarray(windows)
        bins = split(self.windows.length[chosen], micro_tokens)
        return [make_batch(self.store, self.windows, chosen[members].tolist()) for members in bins]

    def _fewest_batches(self) -> int:
        """Group the windows into units, and return the number of steps of an epoch."""
        documents = self.store.documents
        starts = np.array([document.start for document in documents], dtype=np.int64)
        unit_of = {document.start: unit for unit, group in enumerate(groups_of_copies(documents)) for document in group}
        members: dict[int, list[int]] = {}
        for window, place in enumerate((np.searchsorted(starts, self.windows.start, side="right") - 1).tolist()):
            members.setdefault(unit_of[documents[place].start], []).append(window)
        self.units = tuple(map(tuple, members.values()))
        lengths = self.windows.length
        tokens = sum(sum(sorted(lengths[list(unit)].tolist())[-self.most_windows :]) for unit in self.units)
        return -(-tokens // self.batch_tokens)
