"""Decides whether a newly trained adapter becomes the current one: the gate that every night passes through.

The rule, in the order in which it is applied:
1. An adapter that gives away more of the trained notes than the limits allow, or whose figures are no numbers, stays aside.
2. So does one that writes general text, or the base's own chat replies, worse than the bare base by more than a bound.
3. With fewer than ten held-out notes, or hardly any text in them, nothing can be judged: the new adapter is kept beside the old
   one. Only a first adapter, which replaces nothing, is used then, unless it reads those few notes no better than the base.
4. Otherwise the held-out notes decide: they must take fewer bits per byte than with yesterday's adapter, beyond noise.

Noise is measured by leaving out one note at a time (the jackknife): the gain must be so much larger than its standard error
that chance alone would produce it in one night of a hundred. Both adapters read the same tokens, so that the difficulty of a
note cancels out, and bits are summed before they are divided, so that a note weighs as much as it has bytes. A bootstrap would
need random numbers, and with ten notes it is too sure of itself; a sign test would count a shopping list as much as an essay.
One long note cannot decide alone: the gain changes when it is left out, so the standard error grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

FEWEST_NOTES = 10
"""Fewest held-out notes by which an adapter is judged. Chosen by hand: with fewer the standard error is itself a guess."""
FEWEST_BYTES = 800
"""Fewest bytes of held-out text by which an adapter is judged, about 200 tokens of four bytes. Chosen by hand."""
CHANCE = 0.01
"""Largest probability that an adapter which is no better passes for a better one. Chosen by hand."""
LEAST_GAIN = 0.0005
"""Smallest gain in bits per byte that counts, as a share of the score before. Chosen by hand: products in bfloat16 alone move a
score by about a tenth of it."""
GENERAL_BOUND = 0.10
"""Largest loss on general text that is accepted, as a share of the bare base's bits per byte. Chosen by hand: what an adapter
loses that no longer writes the language, not one for notes, which loses nothing (LOG.md, "learning rate of a chat model")."""
REPLIES_BOUND = 0.20
"""Largest loss on the base's own chat replies that is accepted, as a share of the bare base's bits per byte. Chosen by hand
between adapters that lost 17% and still answered 9 of 12 questions, and one that lost 53% and answered 6 (LOG.md, "learning
rate of a chat model")."""

FEWEST_EXTRACTED = 3
"""Passages below which a share of extracted ones is not held against an adapter: one or two may be set phrases that the base
alone just misses. Chosen by hand."""


class Verdict(StrEnum):
    """The outcomes of the gate. BETTER and FIRST make the new adapter the current one."""

    BETTER = "better"
    FIRST = "first"
    TOO_FEW = "too few"
    NOT_BETTER = "not better"
    FORGETS = "forgets"
    REPLIES_WORSE = "replies worse"
    LEAKS = "leaks"


@dataclass(frozen=True)
class PairedDocument:
    """A held-out document, scored over the same tokens with yesterday's adapter and with the new one: its bytes, and bits."""

    bytes: float
    bits_before: float
    bits_after: float


@dataclass(frozen=True)
class Change:
    """The bits per byte of a text with the bare base model, and with the new adapter."""

    before: float
    after: float

    @property
    def loss(self) -> float:
        """Return the loss as a share of the score before; negative for a gain, nan or infinite where it cannot be told."""
        return self.after / self.before - 1 if self.before > 0 else math.nan


@dataclass(frozen=True)
class Extracted:
    """Passages of the trained notes that were tried, and those that the new adapter writes word for word but the bare base does
    not (leaks/extraction.py). most: the largest share of them that is allowed (0 to 1)."""

    tried: int
    extracted: int
    most: float

    @property
    def share(self) -> float:
        """Return the share of the passages that are extracted (0 to 1)."""
        return self.extracted / self.tried if self.tried else 0.0

    @property
    def too_many(self) -> bool:
        """Return True if more passages are extracted than is allowed."""
        return self.extracted >= FEWEST_EXTRACTED and self.share > self.most


@dataclass(frozen=True)
class Recognised:
    """The success of membership inference (leaks/membership.py): the area under its ROC curve, and the lower end of that area's
    95% interval. most: the largest area that is allowed; one that chance may explain is not held against the adapter."""

    area: float
    low: float
    most: float


@dataclass(frozen=True)
class Evidence:
    """Everything that was measured of a new adapter. None: not measured, which counts neither for nor against the adapter.

    heldout: the held-out documents, read with yesterday's adapter and the new one; where the base has no adapter yet, with the
    bare base and the new one. general, replies: general text, and the base's own chat replies, compared with the bare base, so
    that small losses do not add up over the nights. extracted, recognised: what the new adapter gives away of the notes that it
    was trained on. first: True if the base has no current adapter.
    """

    heldout: tuple[PairedDocument, ...]
    general: Change | None = None
    replies: Change | None = None
    extracted: Extracted | None = None
    recognised: Recognised | None = None
    first: bool = False


@dataclass(frozen=True)
class Decision:
    """The decision about a new adapter: the verdict, and the reason for it as one plain sentence."""

    promote: bool
    verdict: Verdict
    reason: str


def decide(evidence: Evidence) -> Decision:
    """Decide whether a new adapter becomes the current one. Pure: the same evidence gives the same decision."""
    if (leak := _leak(evidence)) is not None:
        return leak
    if not _is_sound(evidence):
        return Decision(False, Verdict.NOT_BETTER, "The new adapter predicts values that are not numbers.")
    return _harm(evidence) or (_first_or_none(evidence) if _too_few(evidence.heldout) else _judged(evidence))


def _is_sound(evidence: Evidence) -> bool:
    """Return True if every figure is a number that can be measured."""
    changes = [change for change in (evidence.general, evidence.replies) if change is not None]
    figures = [figure for document in evidence.heldout for figure in (document.bits_before, document.bits_after)]
    figures += [] if evidence.recognised is None else [evidence.recognised.area]
    return all(math.isfinite(change.loss) for change in changes) and all(map(math.isfinite, figures))


def _leak(evidence: Evidence) -> Decision | None:
    """Return the decision about an adapter that gives away more of the notes than is allowed; None for any other."""
    extracted, recognised = evidence.extracted, evidence.recognised
    if extracted is not None and extracted.too_many:
        reason = (
            f"The new adapter writes {extracted.extracted:,} of {extracted.tried:,} passages of your notes word for word "
            f"({extracted.share:.1%}); {extracted.most:.1%} is allowed."
        )
        return Decision(False, Verdict.LEAKS, reason)
    if recognised is not None and recognised.low > recognised.most:
        reason = (
            f"The new adapter tells trained notes from others {recognised.area:.0%} of the time (chance apart, at least "
            f"{recognised.low:.0%}); {recognised.most:.0%} is allowed."
        )
        return Decision(False, Verdict.LEAKS, reason)
    return None


def _harm(evidence: Evidence) -> Decision | None:
    """Return the decision about an adapter that does harm outside the notes; None where nothing was measured to be worse."""
    general, replies = evidence.general, evidence.replies
    if general is not None and general.loss > GENERAL_BOUND:
        reason = (
            f"The new adapter reads general text {general.loss:.1%} worse than the bare base; {GENERAL_BOUND:.0%} is allowed."
        )
        return Decision(False, Verdict.FORGETS, reason)
    if replies is not None and replies.loss > REPLIES_BOUND:
        reason = f"The new adapter unlearns the base's chat replies by {replies.loss:.1%}; {REPLIES_BOUND:.0%} is allowed."
        return Decision(False, Verdict.REPLIES_WORSE, reason)
    return None


def _too_few(heldout: tuple[PairedDocument, ...]) -> bool:
    scored = [document for document in heldout if document.bytes > 0]
    return len(scored) < FEWEST_NOTES or math.fsum(document.bytes for document in scored) < FEWEST_BYTES


def _first_or_none(evidence: Evidence) -> Decision:
    """Decide where too little is held out to judge by: a first adapter is used unless it was measured to be no better."""
    count = sum(document.bytes > 0 for document in evidence.heldout)
    size = math.fsum(document.bytes for document in evidence.heldout)
    read = f"{count or 'none'} {'was' if count < 2 else 'were'} read" if count < FEWEST_NOTES else f"{size:.0f} bytes were read"
    reason = f"Judging takes at least {FEWEST_NOTES} held-out notes, of {FEWEST_BYTES} bytes of text in all; {read}."
    if not evidence.first:
        return Decision(False, Verdict.TOO_FEW, reason)
    before, after = _bits(evidence.heldout, after=False), _bits(evidence.heldout, after=True)
    if count and after >= before:
        return Decision(False, Verdict.NOT_BETTER, _compared(before, after, "the bare base", count))
    return Decision(True, Verdict.FIRST, reason)


def _judged(evidence: Evidence) -> Decision:
    """Decide by the held-out notes."""
    scored = [document for document in evidence.heldout if document.bytes > 0]
    gain, noise = gain_and_noise(scored)
    before = _bits(scored, after=False) / math.fsum(document.bytes for document in scored)
    rival = "the bare base" if evidence.first else "your current adapter"
    share, over = gain / before if before > 0 else 0.0, f"over {len(scored)} held-out notes"
    if share < LEAST_GAIN:
        return Decision(False, Verdict.NOT_BETTER, _compared(before, before - gain, rival, len(scored)))
    if gain <= noise:
        reason = f"The new adapter is {share:.2%} better than {rival} {over}, which may be chance (up to {noise / before:.2%})."
        return Decision(False, Verdict.NOT_BETTER, reason)
    return Decision(True, Verdict.BETTER, f"The new adapter is {share:.1%} better than {rival} {over}, beyond chance.")


def _compared(before: float, after: float, rival: str, notes: int) -> str:
    """Return the sentence about an adapter whose gain over its rival is none, or too small to count. before, after: bits."""
    share = after / before - 1 if before > 0 else 0.0
    more, counts = ("fewer", f"; from {LEAST_GAIN:.2%} on it counts") if share < 0 else ("more", "")
    over = f"{notes} held-out {'note' if notes == 1 else 'notes'}"
    return f"The new adapter takes {abs(share):.2%} {more} bits than {rival} over {over}{counts}."


def gain_and_noise(scored: list[PairedDocument]) -> tuple[float, float]:
    """Return the gain over two or more documents in bits per byte, and the largest gain that chance would explain.

    The latter is the jackknife's standard error (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 11) times
    the (1 - CHANCE) quantile of Student's t. Its degrees of freedom are one less than the notes would be if they were equally
    long and weighed as much together (Kish, Survey Sampling, 1965): a few long notes among short ones count as few.
    """
    count = len(scored)
    gains = [document.bits_before - document.bits_after for document in scored]
    bits, size = math.fsum(gains), math.fsum(document.bytes for document in scored)
    without = [(bits - gain) / (size - document.bytes) for gain, document in zip(gains, scored, strict=True)]
    middle = math.fsum(without) / count
    variance = (count - 1) / count * math.fsum((left - middle) ** 2 for left in without)
    equally_long = size**2 / math.fsum(document.bytes**2 for document in scored)
    return bits / size, t_quantile(1 - CHANCE, max(equally_long - 1, 1.0)) * math.sqrt(variance)


def t_quantile(probability: float, freedom: float) -> float:
    """Return a quantile of Student's t with `freedom` degrees of freedom, to three digits from nine of them on.

    An expansion in 1 / freedom around the normal quantile (Abramowitz and Stegun, 26.7.5).
    """
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _bits(documents: tuple[PairedDocument, ...] | list[PairedDocument], after: bool) -> float:
    return math.fsum(document.bits_after if after else document.bits_before for document in documents)
