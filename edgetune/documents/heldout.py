"""Which documents are held out: a pure function of their digests, so a note stays on its side night after night."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgetune.documents.document import Document

ONE_IN = 20
MOST = 0.1
FEWEST_DOCUMENTS = 10


@dataclass(frozen=True)
class Split:
    """The two sides; no text is on both."""

    train: list[Document]
    held_out: list[Document]


def split(documents: Iterable[Document]) -> Split:
    """Part `documents`, keeping their order."""
    documents = list(documents)
    chosen = held_out_digests(document.digest for document in documents)
    return Split(
        [document for document in documents if document.digest not in chosen],
        [document for document in documents if document.digest in chosen],
    )


def held_out_digests(digests: Iterable[str]) -> frozenset[str]:
    """The digests (SHA-256 in hex) to hold out: those that are 0 modulo 20, which is one document in twenty.

    Fewer than 10 documents are all trained on. From 10 on at least one is held out (the smallest digest, where none
    qualifies) and never more than a tenth (the smallest of those that qualify).
    """
    ordered = sorted(set(digests))  # hex of one length sorts as its number does
    if len(ordered) < FEWEST_DOCUMENTS:
        return frozenset()
    qualified = [digest for digest in ordered if int(digest, 16) % ONE_IN == 0]
    return frozenset(qualified[: int(len(ordered) * MOST)] or ordered[:1])
