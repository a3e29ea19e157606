"""Remembers, from one adapter to the next, which notes were trained on and which were held out.

An adapter's edgetune.json keeps two marks of each note: a keyed digest of its text and, for a note that is a file of its own,
one of its path. A run that starts from the adapter finds its notes by either, so a renamed note is not new, and an edited one
stays on its side. Notes that are gone leave no mark in the next adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.documents.document import Document
from edgetune.home import keyed_digests
from edgetune.runtime.errors import DataError

KEY = "notes"
"""Key of an adapter's edgetune.json that holds what `Lineage.as_dict` returns."""
MARK_DIGITS = 16
"""Hexadecimal digits of a mark. With a million notes, two have the same one with a probability of 1 in 40 million."""
MOST_MARKS = 200_000
"""Most marks that are read and written, 3.4 MB of the 8 that edgetune.json may have; chosen by hand. Of more notes none are
kept, and the next run then takes all notes as new."""


class NothingNew(DataError):
    """Raised where a run is to learn new notes alone and the adapter that it starts from has learnt them all."""


@dataclass(frozen=True)
class Lineage:
    """The marks that an adapter brings with it. Without an adapter, or with one from elsewhere, there are none."""

    trained: frozenset[str] = frozenset()
    """Marks of the notes that it or the adapters before it have learnt."""
    held_out: frozenset[str] = frozenset()
    cut: frozenset[str] = frozenset()
    """Marks of the notes whose end alone was held out."""
    nights: int = 0
    """Runs that led to the adapter, each from the adapter of the one before."""

    @classmethod
    def of_adapter(cls, about: Mapping[str, Any]) -> Lineage:
        """Return the marks in an adapter's edgetune.json; none where it has none, or not in this form."""
        stored = about.get(KEY)
        if not isinstance(stored, dict):
            return cls()
        sides = [stored.get(name) for name in ("trained", "held_out", "cut")]
        nights = stored.get("nights")
        if not all(isinstance(side, str) for side in sides) or isinstance(nights, bool) or not isinstance(nights, int):
            return cls()
        trained, held_out, cut = (frozenset(str(side).split(maxsplit=MOST_MARKS)[:MOST_MARKS]) for side in sides)
        return cls(trained, held_out, cut, max(nights, 0))

    @classmethod
    def after(cls, documents: Sequence[Document], cuts: Mapping[str, int], before: Lineage) -> Lineage:
        """Return the marks after a run on `documents`, whose held-out parts begin at `cuts` (see heldout.Choice)."""
        sides: dict[str, set[str]] = {"trained": set(), "held_out": set(), "cut": set()}
        for document, marks in zip(documents, marks_of(documents), strict=True):
            cut = cuts.get(document.digest)
            sides["trained" if cut is None else "held_out" if cut == 0 else "cut"].update(marks)
        if sum(map(len, sides.values())) > MOST_MARKS:
            sides = {}
        return cls(**{name: frozenset(marks) for name, marks in sides.items()}, nights=before.nights + 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the marks as edgetune.json holds them: each side as one line."""
        sides = {"trained": self.trained, "held_out": self.held_out, "cut": self.cut}
        return {**{name: " ".join(sorted(marks)) for name, marks in sides.items()}, "nights": self.nights}


def marks_of(documents: Sequence[Document]) -> list[tuple[str, ...]]:
    """Return the marks of each document: of its text and, unless it is one of many chats in a file, of its path."""
    texts = keyed_digests(f"text {document.digest}" for document in documents)
    paths = keyed_digests(f"path {document.path}" for document in documents)
    return [
        (text[:MARK_DIGITS],) if document.is_chat else (text[:MARK_DIGITS], path[:MARK_DIGITS])
        for document, text, path in zip(documents, texts, paths, strict=True)
    ]


@dataclass(frozen=True)
class Known:
    """The documents of a run that an adapter's marks name, as SHA-256 digests of their texts."""

    trained: frozenset[str] = frozenset()
    unchanged: frozenset[str] = frozenset()
    """Documents among `trained` and `cut` that have not changed since."""
    held_out: frozenset[str] = frozenset()
    cut: frozenset[str] = frozenset()

    @classmethod
    def among(cls, documents: Sequence[Document], lineage: Lineage) -> Known:
        """Look up all documents. One that is marked both as trained on and as held out counts as trained on."""
        if not lineage.nights:
            return cls()
        sides: dict[str, set[str]] = {"trained": set(), "unchanged": set(), "held_out": set(), "cut": set()}
        for document, marks in zip(documents, marks_of(documents), strict=True):
            if marks[0] in lineage.trained or marks[0] in lineage.cut:
                sides["unchanged"].add(document.digest)
            for name, known in (("trained", lineage.trained), ("cut", lineage.cut), ("held_out", lineage.held_out)):
                if not known.isdisjoint(marks):
                    sides[name].add(document.digest)
                    break
        return cls(**{name: frozenset(digests) for name, digests in sides.items()})


def new_and_changed(documents: Sequence[Document], lineage: Lineage) -> tuple[int, int]:
    """Return how many documents an adapter with these marks does not know, and how many have another text than it knows."""
    known, new, changed = lineage.trained | lineage.held_out | lineage.cut, 0, 0
    for text, *path in marks_of(documents):
        if text not in known:
            has_changed = not known.isdisjoint(path)
            new, changed = new + (not has_changed), changed + has_changed
    return new, changed


def replayed(documents: Iterable[Document], wanted: float, seed: int, nights: int) -> list[Document]:
    """Return the learnt `documents` to learn again, in their order: the fewest that come to `wanted` bytes.

    Which ones depends on the seed, the number of runs before and their digests alone, so each run takes others.
    """
    documents, chosen, left = list(documents), set[str](), wanted

    def place(document: Document) -> str:
        return hashlib.sha256(f"{seed} {nights} {document.digest}".encode()).hexdigest()

    for document in sorted(documents, key=place):
        if left <= 0:
            break
        chosen.add(document.digest)
        left -= document.size
    return [document for document in documents if document.digest in chosen]
