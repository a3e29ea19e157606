"""Defines a place in a text that is to be masked, and merges places that overlap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgetune.privacy.kinds import Kind

_RANK = {kind: rank for rank, kind in enumerate(Kind)}


@dataclass(frozen=True)
class Span:
    """The characters `start` to `end` of a text, which are of a kind that is masked."""

    start: int
    end: int
    kind: Kind


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the spans in the order of the text, those that overlap as one, of the kind that comes first in Kind."""
    result: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if result and span.start < result[-1].end:
            last = result[-1]
            kind = min(last.kind, span.kind, key=_RANK.__getitem__)
            result[-1] = Span(last.start, max(last.end, span.end), kind)
        else:
            result.append(span)
    return result
