"""Chooses the held-out documents by their digests alone, so that a note stays on the same side night after night."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgetune.documents.document import Document

ONE_IN = 20
"""One document in this many is held out; chosen by hand."""
LARGEST_SHARE = 0.1
"""Largest share of the documents that may be held out (0 to 1); chosen by hand."""
FEWEST_DOCUMENTS = 10
"""With fewer documents than this, all are trained on and none is held out; chosen by hand."""


@dataclass(frozen=True)
class HeldOutSplit:
    """Documents to train on, and held-out documents to evaluate on. No text is in both."""

    train: list[Document]
    held_out: list[Document]


def split_held_out(documents: Iterable[Document]) -> HeldOutSplit:
    """Split `documents` into those to train on and those held out, each in the order given."""
    documents = list(documents)
    chosen = held_out_digests(document.digest for document in documents)
    return HeldOutSplit(
        [document for document in documents if document.digest not in chosen],
        [document for document in documents if document.digest in chosen],
    )


def held_out_digests(digests: Iterable[str]) -> frozenset[str]:
    """Return the digests (SHA-256 in hex) to hold out: those divisible by 20, which is one document in twenty.

    Fewer than 10 documents are all trained on. From 10 on, at least one is held out (the smallest digest, where none is
    divisible) and never more than a tenth (the smallest of the divisible ones).
    """
    ordered = sorted(set(digests))  # hex strings of equal length sort as the numbers do
    if len(ordered) < FEWEST_DOCUMENTS:
        return frozenset()
    divisible = [digest for digest in ordered if int(digest, 16) % ONE_IN == 0]
    return frozenset(divisible[: int(len(ordered) * LARGEST_SHARE)] or ordered[:1])
