"""Finds notes whose texts are nearly the same: MinHash (rensa) proposes pairs, and the exact Jaccard similarity decides.

A text stands for the set of its shingles, runs of SHINGLE_WORDS words. Copies that a model sees twice are learnt twice as hard,
and a held-out note with a near copy in training measures memory.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune.documents.copies import original_path
from edgetune.documents.document import Document, Skipped
from edgetune.documents.reasons import Reason

REPORTED_SIMILARITY = 0.7
"""Jaccard similarity (0 to 1) of two notes from which they are reported. Chosen by hand: most of each is in the other."""
LEFT_OUT_SIMILARITY = 0.95
"""Jaccard similarity from which the shorter of two notes is left out. Chosen by hand: one changed word in 200."""
SHINGLE_WORDS = 5
"""Words of a shingle. Chosen by hand: sentences in common count, and common phrases do not."""
FEWEST_SHINGLES = 50
"""Shingles that a note must have to be compared. Chosen by hand: short lists and logs are alike by nature."""
FEWEST_BYTES = 2 * FEWEST_SHINGLES
"""Size above which a note may have FEWEST_SHINGLES, in bytes: a word and a space are two at least."""
LARGEST_BYTES = 1 << 20
"""Largest note that is compared, in bytes. Chosen by hand: its shingles take about 30 MB of memory."""
_PERMUTATIONS, _BANDS, _SEED = 128, 32, 1
"""Hashes of a MinHash and bands of its index: a pair as alike as REPORTED_SIMILARITY is missed once in 6,000 times."""


@dataclass
class NearDuplicates:
    """The account of notes that are nearly the same."""

    pairs: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Notes that stay: by path, the path of another one and their similarity."""
    skipped: list[Skipped] = field(default_factory=list)
    compared: bool = True


def without_near_duplicates(
    documents: Sequence[Document], before_each: Callable[[], None] = lambda: None
) -> tuple[list[Document], NearDuplicates]:
    """Return the documents without notes that another one repeats almost word for word, and the account of those much alike.

    Of a pair the longer note stays, or the original rather than its copy, or else the first. Chats and long notes are not
    compared. before_each: called before each note, and may raise to end the work.
    """
    found = NearDuplicates()
    if importlib.util.find_spec("rensa") is None:
        found.compared = sum(not document.is_chat and document.size > FEWEST_BYTES for document in documents) < 2
        return list(documents), found
    import rensa

    index = rensa.RMinHashLSH(threshold=REPORTED_SIMILARITY, num_perm=_PERMUTATIONS, num_bands=_BANDS)
    order = sorted(range(len(documents)), key=lambda place: _rank(documents[place], place))
    dropped: set[int] = set()
    for place in order:
        document = documents[place]
        if document.is_chat or document.size > LARGEST_BYTES:
            continue
        before_each()
        shingles = shingles_of(document.text)
        if len(shingles) < FEWEST_SHINGLES:
            continue
        minhash = _minhash(rensa, shingles)
        similarity, other = max(
            ((jaccard(shingles, shingles_of(documents[near].text)), -near) for near in sorted(index.query(minhash))),
            default=(0.0, 0),
        )
        if similarity >= LEFT_OUT_SIMILARITY:
            dropped.add(place)
            found.skipped.append(Skipped(document.path, Reason.NEAR_DUPLICATE, detail=documents[-other].path))
            continue
        if similarity >= REPORTED_SIMILARITY:
            found.pairs[document.path] = (documents[-other].path, round(similarity, 3))
        index.insert(place, minhash)
    return [document for place, document in enumerate(documents) if place not in dropped], found


def shingles_of(text: str) -> frozenset[int]:
    """Return the hashes of all runs of SHINGLE_WORDS words of a text, whatever its capitals and line breaks."""
    words = text.lower().split()
    runs = (" ".join(words[at : at + SHINGLE_WORDS]) for at in range(len(words) - SHINGLE_WORDS + 1))
    return frozenset(int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") for run in runs)


def jaccard(first: frozenset[int], second: frozenset[int]) -> float:
    """Return the share of the shingles of two texts that both have."""
    common = len(first & second)
    return common / max(len(first) + len(second) - common, 1)


def _minhash(rensa: Any, shingles: frozenset[int]) -> Any:
    minhash = rensa.RMinHash(num_perm=_PERMUTATIONS, seed=_SEED)
    minhash.update([str(shingle) for shingle in sorted(shingles)])
    return minhash


def _rank(document: Document, place: int) -> tuple[int, bool, int]:
    """Return a sort key under which the note that stays of a pair comes first."""
    return -document.size, original_path(document.path) != document.path, place
