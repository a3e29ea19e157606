"""Scores a masker on the labelled corpus: recall by kind of what was planted, precision by kind of what was masked."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from privacy_corpus import IDENTIFIERS, SECRETS, Note

from edgetune.privacy.kinds import Kind
from edgetune.privacy.masking import Masker


@dataclass
class Score:
    """Counts by kind. A planted item is found if all of its characters are masked, as whatever kind; what is masked is right if
    it overlaps a planted item. `seconds` is CPU time, for `bytes` of text."""

    planted: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    masked: Counter[Kind] = field(default_factory=Counter)
    right: Counter[Kind] = field(default_factory=Counter)
    harmless: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def recall(self, kinds: Sequence[str]) -> float:
        """Return the share of planted items of these kinds that were found, from 0 to 1."""
        return sum(self.found[kind] for kind in kinds) / sum(self.planted[kind] for kind in kinds)

    def precision(self, group: str) -> float:
        """Return the share of what was masked as a kind of this group that was planted, from 0 to 1."""
        kinds = [kind for kind in Kind if kind.group == group]
        return sum(self.right[kind] for kind in kinds) / sum(self.masked[kind] for kind in kinds)


def score(notes: Sequence[Note], masker: Masker) -> Score:
    """Mask every note and count."""
    result = Score()
    masker.spans("warm up: +43 664 1234567, 9aXk2LmQ7vTz4RbN8cYw1PdF")
    for note in notes:
        start = time.process_time()
        spans = masker.spans(note.text)
        result.seconds += time.process_time() - start
        result.bytes += len(note.text.encode())
        result.harmless += len(note.harmless)
        hidden = {place for span in spans for place in range(span.start, span.end)}
        for item in note.planted:
            result.planted[item.kind] += 1
            result.found[item.kind] += hidden.issuperset(range(item.start, item.end))
        for span in spans:
            result.masked[span.kind] += 1
            result.right[span.kind] += any(span.start < item.end and item.start < span.end for item in note.planted)
    return result


def table(result: Score) -> str:
    """Return the figures as two Markdown tables."""
    lines = ["| planted | items | found | recall |", "| --- | ---: | ---: | ---: |"]
    for kind in (*SECRETS, *IDENTIFIERS):
        planted, found = result.planted[kind], result.found[kind]
        lines.append(f"| {kind} | {planted:,} | {found:,} | {found / planted:.1%} |")
    for name, kinds in (("all secrets", SECRETS), ("all identifiers", IDENTIFIERS)):
        planted, found = (sum(counts[kind] for kind in kinds) for counts in (result.planted, result.found))
        lines.append(f"| **{name}** | {planted:,} | {found:,} | **{found / planted:.2%}** |")
    lines += ["", "| masked as | places | planted ones | precision |", "| --- | ---: | ---: | ---: |"]
    for kind in Kind:
        if result.masked[kind]:
            masked, right = result.masked[kind], result.right[kind]
            lines.append(f"| {kind.one} | {masked:,} | {right:,} | {right / masked:.1%} |")
    for group in ("secrets", "identifiers"):
        lines.append(f"| **all {group}** | | | **{result.precision(group):.2%}** |")
    return "\n".join(lines)
