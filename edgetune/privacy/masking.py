"""Replaces secrets and personal identifiers by placeholders, and counts them by kind. It keeps and shows nothing of them."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from edgetune.privacy.credentials import find_secrets
from edgetune.privacy.identifiers import find_identifiers
from edgetune.privacy.kinds import SECRETS, Kind
from edgetune.privacy.randomness import CountTokens, builtin_cost
from edgetune.privacy.rules import rules
from edgetune.privacy.spans import Span, merged

TAIL = 1 << 17
"""Characters at the end of a block that wait for the next one, so that what spans two blocks is found. It is twice the longest
block of a private key."""
_SPACES = r"\s{1,8}"


class Masker:
    """Masks texts. `counts` says how many of each kind it has replaced so far.

    mask: "all", "secrets" or "none". regions: countries whose own way of writing phone numbers is recognised; None for those of
    rules.toml. own: the user's own words, which are masked wherever they stand. count_tokens: judges random strings; None for
    the built-in model's tokenizer.
    """

    def __init__(
        self,
        mask: str = "all",
        own: Sequence[str] = (),
        regions: Sequence[str] | None = None,
        count_tokens: CountTokens | None = None,
    ) -> None:
        self.level = mask
        self.counts: Counter[str] = Counter()
        self._own = [OwnEntry(entry) for entry in own]
        self._regions = rules().regions if regions is None else tuple(regions)
        self._count_tokens = count_tokens

    def mask(self, text: str) -> str:
        """Return `text` with placeholders, and count what they stand for."""
        return self._replaced(text, self.spans(text))

    def mask_named(self, name: str, value: str) -> str:
        """Return a value that stands under a name, masked: the name may say that it is a password or a key."""
        before = f"{name}: "
        spans = [span for span in self.spans(before + value) if span.end > len(before)] if name else self.spans(value)
        start = len(before) if name else 0
        return self._replaced(value, [Span(max(span.start - start, 0), span.end - start, span.kind) for span in spans])

    def without_counting(self) -> Masker:
        """Return a masker that masks alike and counts for itself."""
        other = copy.copy(self)
        other.counts = Counter()
        return other

    def spans(self, text: str) -> list[Span]:
        """Return what is to be masked in `text`, in its order and without overlaps."""
        if self.level == "none" or not text:
            return []
        lowered = lower(text)
        found = list(find_secrets(text, lowered, rules(), self._count_tokens or _builtin))
        if self.level != SECRETS:
            found += find_identifiers(text, lowered, rules(), self._regions)
            for entry in self._own:
                found += entry.spans(text, lowered)
        return merged(span for span in found if span.end > span.start)

    def blocks(self, blocks: Iterable[str]) -> Iterator[str]:
        """Yield the masked text of a long note that comes in blocks; a secret may begin in one and end in the next."""
        if self.level == "none":
            yield from blocks
            return
        waiting = ""
        for block in blocks:
            waiting += block
            if len(waiting) <= 2 * TAIL:
                continue
            spans = self.spans(waiting)
            cut = safe_cut(waiting, spans)
            yield self._replaced(waiting[:cut], [span for span in spans if span.start < cut])
            waiting = waiting[cut:]
        if waiting:
            yield self.mask(waiting)

    def _replaced(self, text: str, spans: list[Span]) -> str:
        pieces, at = [], 0
        for span in spans:
            pieces += [text[at : span.start], span.kind.placeholder]
            at = span.end
            self.counts[span.kind.one] += 1
        return "".join([*pieces, text[at:]]) if spans else text


def safe_cut(text: str, spans: Sequence[Span]) -> int:
    """Return where a text may be cut: at a line's end before its last TAIL characters, outside of all spans.

    A line that ends with a colon stays with the next one, which may be its password. A text without such a place is cut after a
    space, or else anywhere outside of the spans.
    """
    limit = len(text) - TAIL
    cut = text.rfind("\n", limit // 2, limit) + 1
    while cut and text[:cut].endswith((":\n", "=\n")):
        cut = text.rfind("\n", limit // 2, cut - 1) + 1
    cut = cut or text.rfind(" ", limit // 2, limit) + 1 or limit
    for span in reversed(spans):
        if span.start < cut < span.end:
            cut = span.start or span.end  # a span that fills the text goes as a whole
    return cut


class OwnEntry:
    """An entry of the user's own list, found whatever its capitals and white space, but not within a longer word."""

    def __init__(self, entry: str) -> None:
        words = lower(entry).split()
        self._first = words[0]
        self._pattern = re.compile(rf"(?<!\w){_SPACES.join(map(re.escape, words))}(?!\w)")

    def spans(self, text: str, lowered: str) -> Iterator[Span]:
        """Yield the entry's places in a text."""
        if self._first in lowered:
            yield from (Span(*found.span(), Kind.OWN) for found in self._pattern.finditer(lowered))


def lower(text: str) -> str:
    """Return `text` in lower case, every letter at its place: the one letter whose lower case has two is replaced before."""
    return text.replace("\u0130", "I").lower()


def _builtin(text: str) -> int:
    return builtin_cost()(text)
