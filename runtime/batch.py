"""The packed batch of tokens that every training step and every evaluation reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgetune.runtime.ops_types import Segment


@dataclass(frozen=True)
class SoftTargets:
    """The predictions of another model for each of N targets: its K likeliest tokens and their probabilities.

    ids is (N, K) int64, the likeliest first; probabilities is (N, K) float32. All other tokens together have the rest.
    """

    ids: Tensor
    probabilities: Tensor

    def rows(self, rows: Tensor) -> SoftTargets:
        """Return the predictions for the targets numbered `rows`, (R,) int64."""
        return SoftTargets(self.ids[rows], self.probabilities[rows])

    def to(self, device: torch.device) -> SoftTargets:
        """Return the predictions with their tensors on `device`."""
        return SoftTargets(self.ids.to(device), self.probabilities.to(device))

    def padded(self, count: int) -> SoftTargets:
        """Return the predictions with `count` more rows of zeros."""
        pad = torch.nn.functional.pad
        return SoftTargets(pad(self.ids, (0, 0, 0, count)), pad(self.probabilities, (0, 0, 0, count)))


@dataclass(frozen=True)
class Batch:
    """Documents packed side by side without padding between them, N tokens in all.

    input_ids, targets and positions are (N,) int64; loss_mask is (N,) float32, 1 where the target carries loss and 0 where it
    is context only. Attention stays within each of `segments`. With `soft`, the loss of each target is the divergence from
    those predictions.
    """

    input_ids: Tensor
    targets: Tensor
    loss_mask: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    soft: SoftTargets | None = None

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> Batch:
        """Return texts of at least two token ids each, side by side; all tokens but the first of each text are targets."""
        counts = [len(text) - 1 for text in texts]
        ends = list(itertools.accumulate(counts))
        return cls(
            torch.tensor([id for text in texts for id in text[:-1]]),
            torch.tensor([id for text in texts for id in text[1:]]),
            torch.ones(ends[-1]),
            torch.cat([torch.arange(count) for count in counts]),
            tuple(Segment.packed(end - count, end) for end, count in zip(ends, counts, strict=True)),
        )

    @property
    def trained(self) -> int:
        """Return the number of targets that carry loss."""
        return int(self.loss_mask.sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        ids, targets, mask, positions = self._map(lambda tensor: tensor.to(device))
        soft = None if self.soft is None else self.soft.to(device)
        return replace(self, input_ids=ids, targets=targets, loss_mask=mask, positions=positions, soft=soft)

    def padded(self, multiple: int) -> Batch:
        """Return the batch padded to a multiple of `multiple` tokens; padding carries no loss and is its own segment."""
        n, pad = len(self.input_ids), -len(self.input_ids) % multiple
        if pad == 0:
            return self
        ids, targets, mask, positions = self._map(lambda tensor: torch.nn.functional.pad(tensor, (0, pad)))
        positions[n:] = torch.arange(pad, device=positions.device)
        soft = None if self.soft is None else self.soft.padded(pad)
        return Batch(ids, targets, mask, positions, (*self.segments, Segment.packed(n, n + pad)), soft)

    def _map(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return change(self.input_ids), change(self.targets), change(self.loss_mask), change(self.positions)


def pack(texts: Iterable[Sequence[int]], row_tokens: int) -> Iterator[list[Sequence[int]]]:
    """Yield texts as token ids in their order, in groups of at most `row_tokens` inputs (one text may have more).

    Each group is for `Batch.of`. Few long passes read the weights less often than many short ones.
    """
    group: list[Sequence[int]] = []
    count = 0
    for text in texts:
        if group and count + len(text) - 1 > row_tokens:
            yield group
            group, count = [], 0
        group.append(text)
        count += len(text) - 1
    if group:
        yield group
