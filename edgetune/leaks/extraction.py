"""Measures verbatim extraction: the passages of trained notes that a model writes word for word after the words before them.

The attack is that of Carlini et al. 2023 (arXiv 2202.07646): greedy decoding after the true beginning. Two kinds of passages do
not count: what the bare base writes as well (quotations, boilerplate, tables) does not come from the notes, and what held-out
notes hold as well (a signature, the lines of a form) is no note's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.leaks.reading import ReadWindow


@dataclass(frozen=True)
class Extraction:
    """Passages that were tried, those that the adapter alone writes word for word, and those that the bare base writes too.

    notes, leaking: the notes that the passages come from, and those with a passage that the adapter alone writes. documents:
    the numbers of the latter in their store.
    """

    passages: int
    extracted: int
    by_base: int
    notes: int
    documents: tuple[int, ...]

    @property
    def share(self) -> float:
        """Return the share of the passages that the adapter alone writes (0 to 1); 0 if none was tried."""
        return self.extracted / self.passages if self.passages else 0.0

    @property
    def leaking(self) -> int:
        """Return the number of notes with a passage that the adapter alone writes."""
        return len(self.documents)


def suspects(adapted: Sequence[ReadWindow]) -> frozenset[int]:
    """Return the numbers of the windows with a passage that the adapter writes: the bare base must read only these."""
    return frozenset(read.window for read in adapted if any(read.passages))


def extraction(adapted: Sequence[ReadWindow], bare: Sequence[ReadWindow]) -> Extraction:
    """Return the extraction from windows as the adapter reads them, and as the bare base reads the suspects among them.

    A suspect that the base did not read, since time was short, counts as the adapter's.
    """
    base = {read.window: read.passages for read in bare}
    extracted = by_base = 0
    leaking: set[int] = set()
    for read in adapted:
        known = base.get(read.window, (False,) * len(read.passages))
        own = sum(hit and not old for hit, old in zip(read.passages, known, strict=True))
        extracted, by_base = extracted + own, by_base + sum(read.passages) - own
        leaking |= {read.document} if own else set()
    tried = [read for read in adapted if read.passages]
    notes = len({read.document for read in tried})
    return Extraction(sum(len(read.passages) for read in tried), extracted, by_base, notes, tuple(sorted(leaking)))
