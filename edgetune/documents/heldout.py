"""Chooses what is held out by digests and sizes alone, so that a note stays on the same side night after night.

One note in twenty is held out, and of every long note its last twentieth, so that one diary does not decide alone. The choice
for a note does not depend on the other notes, unless that would hold out far too little text or too much, or fewer notes than
an adapter can be judged by. A run that starts from an adapter leaves every note on the side on which that adapter had it
(lineage.py), whatever notes came or went since.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from edgetune.documents.copies import groups_of_copies
from edgetune.documents.document import Document
from edgetune.documents.lineage import Known

NOTHING_KNOWN = Known()
"""The knowledge of a run that starts from no adapter."""
ONE_IN = 20
"""One short document in this many is held out, and this fraction of each long note; chosen by hand."""
LARGEST_SHARE = 0.1
"""Largest share of the text that may be held out, in bytes (0 to 1); chosen by hand."""
LEAST_SHARE, ENOUGH_SHARE = 0.01, 0.025
"""Share of the text, in bytes, below which more is held out if there is any that fits, and the share at which that ends; chosen
by hand."""
ENOUGH_TO_JUDGE = 10
"""Held-out documents by which the gate judges a new adapter (library/gate.py, FEWEST_NOTES)."""
SHARE_TO_JUDGE = 0.15
"""Largest share of the documents, and of the text in bytes, that is held out in order to have so many; chosen by hand. From 67
notes on there are ten."""
FEWEST_BYTES = 100
"""With less text than this on the held-out side, nothing is held out: it would measure chance. Chosen by hand."""
FEWEST_DOCUMENTS = 10
"""With fewer documents than this, none is held out as a whole; chosen by hand."""
LONG_BYTES = 20_000
"""Size from which a note gives its last twentieth instead of the whole, in bytes; chosen by hand."""
SHORTEST_CUT_BYTES = 4_000
"""Size from which a note may be cut where too little is held out otherwise, in bytes; chosen by hand."""

END = "#end"
"""Stands behind the path of a note's held-out end."""


@dataclass(frozen=True)
class HeldOutSplit:
    """Documents to train on, and held-out documents to evaluate on. No text is in both."""

    train: list[Document]
    held_out: list[Document]
    cuts: dict[str, int] = field(default_factory=dict)
    """The first held-out byte of each document that has one, by its digest (0: all of it is held out)."""


def split_held_out(documents: Iterable[Document], known: Known = NOTHING_KNOWN) -> HeldOutSplit:
    """Split `documents` into those to train on and those held out, each in the order given.

    A long note is in both, cut in two: its end is held out. known: the side of documents that earlier runs had.
    """
    documents = list(documents)
    cuts = Choice(documents, known).made()
    train, held_out = [], []
    for document in documents:
        cut = cuts.get(document.digest)
        if cut is None:
            train.append(document)
        elif cut == 0:
            held_out.append(document)
        else:
            train.append(document.part(0, cut, document.path))
            held_out.append(document.part(cut, document.size, f"{document.path}{END}"))
    return HeldOutSplit(train, held_out, cuts)


class Choice:
    """Chooses what to hold out of some documents: for each digest, the first byte that is held out (0: the whole document)."""

    def __init__(self, documents: list[Document], known: Known) -> None:
        self.documents, self.known = documents, known
        self.cuts: dict[str, int] = {}
        self.bytes = 0
        self.total = sum(document.size for document in documents)

    def made(self) -> dict[str, int]:
        """Return the choice."""
        groups = groups_of_copies(self.documents)
        known = self.known
        for document in [group[0] for group in groups if can_be_cut(group, LONG_BYTES)]:
            self._hold_out_end(document)
        for document in [group[0] for group in groups if can_be_cut(group, SHORTEST_CUT_BYTES)]:
            if document.digest in known.cut and document.digest not in self.cuts:
                self._hold_out_end(document)
        fixed = [group for group in groups if _any_in(group, known.held_out) and not _any_in(group, known.trained)]
        self._hold_out_all([group for group in fixed if group[0].digest not in self.cuts])
        settled = known.trained | known.held_out | known.cut
        short = [group for group in groups if group[0].digest not in self.cuts and not _any_in(group, settled)]
        self._hold_out([group for group in short if int(group[0].digest, 16) % ONE_IN == 0], LARGEST_SHARE)
        if self.bytes < LEAST_SHARE * self.total:
            self._hold_out_more([group for group in short if group[0].digest not in self.cuts])
        self._hold_out_enough_to_judge([group for group in short if group[0].digest not in self.cuts])
        return self.cuts if self.bytes >= FEWEST_BYTES else {}

    def _hold_out_more(self, groups: list[list[Document]]) -> None:
        """Hold out more where the rule of one in twenty gave too little: ends of the longest notes, or else whole notes."""
        cuttable = [group[0] for group in groups if can_be_cut(group, SHORTEST_CUT_BYTES)]
        for document in sorted(cuttable, key=lambda document: -document.size):
            if self.bytes < ENOUGH_SHARE * self.total:
                self._hold_out_end(document)
        self._hold_out([group for group in groups if group[0].digest not in self.cuts], ENOUGH_SHARE)

    def _hold_out_enough_to_judge(self, groups: list[list[Document]]) -> None:
        """Hold out further groups in their order, until an adapter can be judged, if there are notes enough for that."""
        most, most_bytes = SHARE_TO_JUDGE * len(self.documents), SHARE_TO_JUDGE * self.total
        for group in groups if most >= ENOUGH_TO_JUDGE else ():
            count, size = len(self.cuts) + len(group), self.bytes + sum(document.size for document in group)
            if len(self.cuts) < ENOUGH_TO_JUDGE and count <= most and size <= most_bytes:
                self._hold_out_all([group])

    def _hold_out_end(self, document: Document) -> None:
        cut = cut_before_end(document)
        self.cuts[document.digest] = cut
        self.bytes += document.size - cut

    def _hold_out_all(self, groups: list[list[Document]]) -> None:
        for group in groups:
            self.cuts |= {document.digest: 0 for document in group}
            self.bytes += sum(document.size for document in group)

    def _hold_out(self, groups: list[list[Document]], share: float) -> None:
        """Hold out whole groups in their order until `share` of all bytes is reached, but never more than LARGEST_SHARE."""
        if len(self.documents) < FEWEST_DOCUMENTS:
            return
        for group in groups:
            size = sum(document.size for document in group)
            if self.bytes < share * self.total and self.bytes + size <= LARGEST_SHARE * self.total:
                self._hold_out_all([group])


def _any_in(group: list[Document], digests: AbstractSet[str]) -> bool:
    """Return True if one of the documents in a group is among those with `digests`."""
    return any(document.digest in digests for document in group)


def can_be_cut(group: list[Document], least: int) -> bool:
    """Return True for a note of at least `least` bytes without copies, which would give its end away."""
    return len(group) == 1 and group[0].size >= least and not group[0].is_chat


def cut_before_end(document: Document) -> int:
    """Return where the held-out end of a note begins, in bytes: between two paragraphs, or else lines, words or letters.

    The end is a twentieth of the note, or up to a tenth where that leaves a paragraph whole.
    """
    first, last = document.size - document.size // (ONE_IN // 2), document.size - document.size // ONE_IN
    data = document.spool.read(document.start + first, document.start + last)
    for mark in (b"\n\n", b"\n", b" "):
        at = data.rfind(mark)
        if at >= 0:
            return first + at + len(mark)
    while data and data[-1] & 0xC0 == 0x80:  # within a letter of several bytes
        data = data[:-1]
    return first + max(len(data) - 1, 0)
