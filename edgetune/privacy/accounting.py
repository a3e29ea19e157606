"""Accounts for the privacy that noisy training spends, with Google's dp-accounting (the extra `private`).

A run of DP-SGD (Abadi et al. 2016, arXiv 1607.00133) is a Mechanism: so many steps of the Gaussian mechanism, each on a Poisson
sample of the documents. Mechanisms on the same documents compose: their epsilon is computed together, which gives less than the
sum. The accountant follows the distribution of the privacy loss (Koskela et al. 2020, arXiv 1906.03049), rounded upwards, for
neighbours that differ by one document more or less.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.runtime.errors import UsageError

LOSS_INTERVAL = 1e-3
"""Width of the steps in which the accountant rounds privacy losses up. Chosen by hand: against 1e-4, epsilons between 4 and 28
differ by less than 0.001, and take a tenth of the time (0.2 s)."""
LEAST_NOISE, MOST_NOISE = 0.3, 500.0
"""Smallest and largest noise multiplier that a run is given; chosen by hand. Below it the accountant takes minutes; beyond it
nothing could be learnt."""
NOISE_TOLERANCE = 2e-3
"""Largest excess of a noise multiplier over the smallest one that would do; chosen by hand."""


@dataclass(frozen=True)
class Mechanism:
    """Some steps of DP-SGD.

    noise_multiplier: standard deviation of the noise, as a multiple of the norm to which a document's gradient is clipped.
    sample_rate: probability with which each document is in a step (0 to 1).
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


def spent(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """Return the epsilon of mechanisms that all saw the same documents. Raises UsageError without dp-accounting."""
    accountant = _accountant()
    for mechanism in mechanisms:
        if mechanism.steps:
            accountant.compose(_event(mechanism))
    return float(accountant.get_epsilon(delta))


def noise_for(epsilon: float, delta: float, sample_rate: float, steps: int, before: Sequence[Mechanism] = ()) -> float | None:
    """Return the noise multiplier with which `steps` steps after the mechanisms `before` keep to `epsilon`.

    It is the smallest up to NOISE_TOLERANCE, and at least LEAST_NOISE; None where even MOST_NOISE is too little.
    """
    past = _accountant()
    for mechanism in before:
        past.compose(_event(mechanism))

    def is_enough(noise: float) -> bool:
        accountant = copy.deepcopy(past)
        accountant.compose(_event(Mechanism(noise, sample_rate, steps)))
        return bool(accountant.get_epsilon(delta) <= epsilon)

    # Upwards from 1, since little noise is what takes the accountant long; so the start of the search is cheap.
    high = 1.0
    while not is_enough(high):
        if high >= MOST_NOISE:
            return None
        high = min(2 * high, MOST_NOISE)
    low = high / 2
    while high <= 1.0 and low > LEAST_NOISE and is_enough(low):
        low, high = low / 2, low
    low = max(low, LEAST_NOISE)
    while high - low > NOISE_TOLERANCE * max(high, 1.0):
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def check_installed() -> None:
    """Raise UsageError unless dp-accounting is installed."""
    _accountant()


def _accountant() -> Any:
    try:
        from dp_accounting.pld import PLDAccountant
    except ImportError as error:
        raise UsageError(
            "--private needs dp-accounting, which is not installed; type pip install 'edgetune[private]'."
        ) from error
    logging.getLogger("absl").setLevel(logging.ERROR)  # absl tells of orders and tails that its own bounds leave out
    return PLDAccountant(value_discretization_interval=LOSS_INTERVAL)


def _event(mechanism: Mechanism) -> Any:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    sampled = PoissonSampledDpEvent(mechanism.sample_rate, GaussianDpEvent(mechanism.noise_multiplier))
    return SelfComposedDpEvent(sampled, mechanism.steps)
