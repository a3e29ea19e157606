"""Measures membership inference: how well somebody who has a note, the adapter and its base can tell whether it was trained on.

The attack compares two losses: a note that the adapter finds much likelier than the bare base does was probably trained on.
The base is the reference model that calibrates how hard a text is (Carlini et al. 2022, arXiv 2112.03570; Mireshghallah et al.
2022, arXiv 2203.03929). It takes two forward passes. Members are trained notes, non-members held-out ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetune.leaks.reading import ReadWindow

Scores = npt.NDArray[np.float64]

FALSE_POSITIVES = 0.001
"""Rate of false positives (0 to 1) at which true positives are counted: that of Carlini et al. 2022."""
FEWEST_TOKENS = 16
"""Scored tokens below which a note is left out, since its score would be chance; chosen by hand."""
FEWEST_NOTES = 10
"""Members, and non-members, below which membership is not measured; chosen by hand: the interval would span everything."""
_NORMAL_95 = 1.959964
"""The 97.5% quantile of the normal distribution: the ends of a 95% interval lie so many standard errors from its middle."""


@dataclass(frozen=True)
class Membership:
    """The attack on so many members and non-members.

    auc: probability that a trained note scores higher than a held-out one (0.5: chance); low and high: its 95% interval.
    true_positives: share of the members that the attack names while at most `false_positives` of the non-members are named.
    """

    members: int
    non_members: int
    auc: float
    low: float
    high: float
    true_positives: float
    false_positives: float


def membership(members: Scores, non_members: Scores) -> Membership | None:
    """Return how well the scores of members and non-members can be told apart; None where there are too few of either.

    Figures are nan where a score is not finite.
    """
    if min(len(members), len(non_members)) < FEWEST_NOTES:
        return None
    rate = least_rate(len(non_members))
    if not (np.isfinite(members).all() and np.isfinite(non_members).all()):
        return Membership(len(members), len(non_members), math.nan, math.nan, math.nan, math.nan, rate)
    area, error = area_and_error(members, non_members)
    low, high = max(area - _NORMAL_95 * error, 0.0), min(area + _NORMAL_95 * error, 1.0)
    hits = true_positives(members, non_members)
    return Membership(len(members), len(non_members), area, low, high, hits, rate)


def scores_by_document(adapted: Sequence[ReadWindow], bare: Sequence[ReadWindow]) -> Scores:
    """Return the score of each document that both read: log p(adapted) - log p(base), in nats per token; the higher, the
    likelier it is a member."""
    base, gains = {read.window: read.nats for read in bare}, dict[int, tuple[float, int]]()
    for read in adapted:
        if read.window in base:
            gain, tokens = gains.get(read.document, (0.0, 0))
            gains[read.document] = gain + base[read.window] - read.nats, tokens + read.tokens
    return np.array([gain / tokens for _, (gain, tokens) in sorted(gains.items()) if tokens >= FEWEST_TOKENS])


def area_and_error(members: Scores, non_members: Scores) -> tuple[float, float]:
    """Return the area under the ROC curve, in which ties count half, and its standard error (DeLong et al. 1988)."""
    of_members, of_others = _placements(members, non_members), 1 - _placements(non_members, members)
    variance = of_members.var(ddof=1) / len(members) + of_others.var(ddof=1) / len(non_members)
    return float(of_members.mean()), math.sqrt(variance)


def _placements(scores: Scores, others: Scores) -> Scores:
    """Return for each score the share of the others below it; equal ones count half."""
    ordered = np.sort(others)
    below, up_to = np.searchsorted(ordered, scores, side="left"), np.searchsorted(ordered, scores, side="right")
    placements: Scores = (below + up_to) / (2.0 * len(others))
    return placements


def least_rate(non_members: int) -> float:
    """Return FALSE_POSITIVES, or the smallest rate that so few non-members can measure: one in their number."""
    return max(FALSE_POSITIVES, 1 / non_members)


def true_positives(members: Scores, non_members: Scores) -> float:
    """Return the share of the members that score higher than all non-members but FALSE_POSITIVES of them."""
    allowed = math.floor(FALSE_POSITIVES * len(non_members))
    threshold = np.sort(non_members)[len(non_members) - 1 - allowed]
    return float((members > threshold).mean())
