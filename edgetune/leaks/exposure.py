"""Computes the exposure of a canary, in bits: how much likelier it became than the other texts of its form that were possible.

Carlini et al. 2019, The Secret Sharer (arXiv 1802.08232): exposure = log2 |R| - log2 rank, where R are all texts of the form
and the rank is the canary's among them by likelihood. R is too large to score, so the rank is estimated from random texts of
the same form: by its rank among them or, for a canary that is likelier than all of them, from a skew-normal distribution with
their mean, variance and skewness (section 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

LARGEST_SKEWNESS = 0.95
"""Largest skewness of the fitted distribution: a skew-normal one has less than 0.9953. Chosen by hand."""
_TAIL, _POINTS = 15.0, 8001
"""Standard deviations below the point, or below the middle, from which the density is integrated, and the points at which it is
taken. Chosen by hand: probabilities of 1e-9 are exact to four digits."""


def exposure(canary: float, references: Sequence[float], size: int) -> float:
    """Return the exposure in bits of a canary whose loss is `canary` nats, between 0 and log2(size);
    nan for a loss that is not finite.

    references: the losses of random texts of the same form, at least 3. size: number of all texts of that form.
    """
    if not math.isfinite(canary):
        return math.nan
    below = sum(reference <= canary for reference in references)
    if below:
        return math.log2((len(references) + 1) / (below + 1))
    probability = skew_normal_cdf(canary, *skew_normal_fit(references))
    return min(-math.log2(max(probability, 1 / size)), math.log2(size))


def skew_normal_fit(values: Sequence[float]) -> tuple[float, float, float]:
    """Return location, scale and shape of the skew-normal distribution with these values' first three moments."""
    array = np.asarray(values, dtype=np.float64)
    mean, deviation = float(array.mean()), max(float(array.std()), 1e-9)
    skewness = float((((array - mean) / deviation) ** 3).mean())
    skewness = max(min(skewness, LARGEST_SKEWNESS), -LARGEST_SKEWNESS)
    # Azzalini 1985: skewness = (4 - pi) / 2 * (b delta)^3 / (1 - (b delta)^2)^(3/2), with b = sqrt(2 / pi).
    ratio = math.copysign((2 * abs(skewness) / (4 - math.pi)) ** (1 / 3), skewness)
    b_delta = ratio / math.sqrt(1 + ratio**2)
    delta = b_delta * math.sqrt(math.pi / 2)
    scale = deviation / math.sqrt(1 - b_delta**2)
    return mean - scale * b_delta, scale, delta / math.sqrt(1 - delta**2)


def skew_normal_cdf(value: float, location: float, scale: float, shape: float) -> float:
    """Return the probability of at most `value` under a skew-normal distribution, by integrating its density."""
    z = (value - location) / scale
    points = torch.linspace(min(z, 0.0) - _TAIL, z, _POINTS, dtype=torch.float64)
    log_density = math.log(2 / math.sqrt(2 * math.pi)) - points**2 / 2 + torch.special.log_ndtr(shape * points)
    return min(float(torch.trapezoid(log_density.exp(), points)), 1.0)
