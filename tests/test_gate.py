"""The gate: a new adapter becomes the current one only if the notes it has not seen speak for it, and nothing against it."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from edgetune.library.gate import (
    CHANCE,
    GENERAL_BOUND,
    LEAST_GAIN,
    REPLIES_BOUND,
    Change,
    Evidence,
    Extracted,
    PairedDocument,
    Recognised,
    Verdict,
    decide,
    gain_and_noise,
    t_quantile,
)

NAN, INF = math.nan, math.inf


def notes(*gains: float, size: float = 1000.0) -> tuple[PairedDocument, ...]:
    """Return documents of `size` bytes that took 2 bits per byte before, and take `gain` less now."""
    return tuple(PairedDocument(size, 2 * size, (2 - gain) * size) for gain in gains)


ALIKE = (0.10, 0.12, 0.08, 0.11, 0.09, 0.10, 0.12, 0.08, 0.11, 0.09)
"""Gains in bits per byte of ten notes that agree."""
MIXED = (0.30, -0.25, 0.20, -0.28, 0.31, -0.22, 0.26, -0.27, 0.24, -0.19)
"""Gains of ten notes that do not agree; their mean is 0.01."""
BETTER, WORSE = notes(*ALIKE), notes(*[-gain for gain in ALIKE])
LONG = PairedDocument(1_000_000, 2_000_000, 1_900_000)
"""A note a thousand times as long as the others, which is read 5% better."""
NO_LEAK = Extracted(400, 0, 0.05)

CASES: dict[str, tuple[Evidence, Verdict]] = {
    "ten notes that agree": (Evidence(BETTER), Verdict.BETTER),
    "ten notes, and everything else measured and sound": (
        Evidence(BETTER, Change(1.5, 1.45), Change(0.2, 0.21), NO_LEAK, Recognised(0.55, 0.5, 0.7)), Verdict.BETTER
    ),
    "a first adapter that is better than the bare base": (Evidence(BETTER, first=True), Verdict.BETTER),
    "a first adapter that is worse than the bare base": (Evidence(WORSE, first=True), Verdict.NOT_BETTER),
    "ten notes that are all read worse": (Evidence(WORSE), Verdict.NOT_BETTER),
    "the same adapter": (Evidence(notes(*[0.0] * 10)), Verdict.NOT_BETTER),
    "a gain of a hundred-thousandth on every note": (Evidence(notes(*[2e-5] * 10)), Verdict.NOT_BETTER),
    "a gain just above the least that counts": (Evidence(notes(*[2 * LEAST_GAIN * 1.01] * 10)), Verdict.BETTER),
    "a gain just below the least that counts": (Evidence(notes(*[2 * LEAST_GAIN * 0.99] * 10)), Verdict.NOT_BETTER),
    "a small gain within noise": (Evidence(notes(*MIXED)), Verdict.NOT_BETTER),
    "the same small gain over forty times as many notes, still within noise": (
        Evidence(notes(*MIXED * 40)), Verdict.NOT_BETTER
    ),
    "a small gain that hundreds of notes agree on": (Evidence(notes(*(0.04, -0.02) * 200)), Verdict.BETTER),
    "one long note that is better, while all others are worse": (
        Evidence((LONG, *notes(*[-0.1] * 12))), Verdict.NOT_BETTER
    ),
    "one long note that is better, as all others are": (Evidence((LONG, *notes(*[0.1] * 12))), Verdict.BETTER),
    "one long note that is worse, while all others are better": (
        Evidence((dataclasses.replace(LONG, bits_after=2_100_000), *notes(*[0.1] * 12))), Verdict.NOT_BETTER
    ),
    "one note of ten that alone is better": (Evidence(notes(1.0, *[0.0] * 9)), Verdict.NOT_BETTER),
    "nine notes": (Evidence(BETTER[:9]), Verdict.TOO_FEW),
    "nine notes that are read worse": (Evidence(WORSE[:9]), Verdict.TOO_FEW),
    "no note": (Evidence(()), Verdict.TOO_FEW),
    "ten notes, one of which holds nothing to score": (
        Evidence((*BETTER[:9], PairedDocument(0, 0, 0))), Verdict.TOO_FEW
    ),
    "ten notes of 79 bytes": (Evidence(notes(*ALIKE, size=79)), Verdict.TOO_FEW),
    "ten notes of 80 bytes": (Evidence(notes(*ALIKE, size=80)), Verdict.BETTER),
    "a first adapter without a held-out note": (Evidence((), first=True), Verdict.FIRST),
    "a first adapter with two notes that are better": (Evidence(BETTER[:2], first=True), Verdict.FIRST),
    "a first adapter with two notes that are worse": (Evidence(WORSE[:2], first=True), Verdict.NOT_BETTER),
    "a first adapter with a note that is the same": (Evidence(notes(0.0), first=True), Verdict.NOT_BETTER),
    "general text just within its bound": (Evidence(BETTER, Change(1.0, 1 + GENERAL_BOUND * 0.99)), Verdict.BETTER),
    "general text just beyond its bound": (Evidence(BETTER, Change(1.0, 1 + GENERAL_BOUND * 1.01)), Verdict.FORGETS),
    "general text of a first adapter beyond its bound": (
        Evidence((), Change(1.0, 1 + GENERAL_BOUND * 1.01), first=True), Verdict.FORGETS
    ),
    "general text beyond its bound, and too few notes": (Evidence((), Change(1.0, 2.0)), Verdict.FORGETS),
    "replies just within their bound": (Evidence(BETTER, None, Change(0.2, 0.2 + 0.2 * REPLIES_BOUND * 0.99)), Verdict.BETTER),
    "replies just beyond their bound": (
        Evidence(BETTER, None, Change(0.2, 0.2 + 0.2 * REPLIES_BOUND * 1.01)), Verdict.REPLIES_WORSE
    ),
    "replies that are better": (Evidence(BETTER, None, Change(0.2, 0.1)), Verdict.BETTER),
    "more passages extracted than allowed": (Evidence(BETTER, extracted=Extracted(100, 6, 0.05)), Verdict.LEAKS),
    "as many passages extracted as allowed": (Evidence(BETTER, extracted=Extracted(100, 5, 0.05)), Verdict.BETTER),
    "two passages of two": (Evidence(BETTER, extracted=Extracted(2, 2, 0.05)), Verdict.BETTER),
    "three passages of three": (Evidence(BETTER, extracted=Extracted(3, 3, 0.05)), Verdict.LEAKS),
    "no passage tried": (Evidence(BETTER, extracted=Extracted(0, 0, 0.05)), Verdict.BETTER),
    "every passage extracted, and any share allowed": (Evidence(BETTER, extracted=Extracted(9, 9, 1.0)), Verdict.BETTER),
    "three passages of a million, and none allowed": (Evidence(BETTER, extracted=Extracted(10**6, 3, 0.0)), Verdict.LEAKS),
    "a leak of a first adapter": (Evidence((), extracted=Extracted(9, 9, 0.05), first=True), Verdict.LEAKS),
    "a leak, and general text beyond its bound": (
        Evidence((), Change(1.0, 2.0), extracted=Extracted(9, 9, 0.05)), Verdict.LEAKS
    ),
    "no leak, and worse": (Evidence(WORSE, extracted=NO_LEAK), Verdict.NOT_BETTER),
    "no leak, and too few notes": (Evidence((), extracted=NO_LEAK), Verdict.TOO_FEW),
    "members told too well": (Evidence(BETTER, recognised=Recognised(0.9, 0.81, 0.8)), Verdict.LEAKS),
    "members told too well, which may be chance": (Evidence(BETTER, recognised=Recognised(0.9, 0.79, 0.8)), Verdict.BETTER),
    "membership that is nan": (Evidence(BETTER, recognised=Recognised(NAN, NAN, 0.8)), Verdict.NOT_BETTER),
    "a note that is nan now": (Evidence((*BETTER, PairedDocument(10, 20, NAN))), Verdict.NOT_BETTER),
    "a note that is infinite now": (Evidence((*BETTER, PairedDocument(10, 20, INF))), Verdict.NOT_BETTER),
    "a note that was infinite before": (Evidence((*BETTER, PairedDocument(10, INF, 20))), Verdict.NOT_BETTER),
    "a first adapter that gives nan on its only note": (Evidence((PairedDocument(0, 0, NAN),), first=True), Verdict.NOT_BETTER),
    "general text that is nan": (Evidence(BETTER, Change(1.5, NAN)), Verdict.NOT_BETTER),
    "general text that is infinite": (Evidence(BETTER, Change(1.5, INF)), Verdict.NOT_BETTER),
    "replies that are nan": (Evidence(BETTER, None, Change(NAN, 0.2)), Verdict.NOT_BETTER),
    "notes that took no bits at all": (Evidence(tuple(PairedDocument(100, 0, 0) for _ in range(10))), Verdict.NOT_BETTER),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_table_of_cases(case: str) -> None:
    evidence, expected = CASES[case]
    decision = decide(evidence)
    assert decision.verdict is expected
    assert decision.promote is (expected in (Verdict.BETTER, Verdict.FIRST))


def test_every_verdict_is_in_the_table() -> None:
    assert {verdict for _, verdict in CASES.values()} == set(Verdict)


@pytest.mark.parametrize("case", CASES)
def test_the_reason_is_one_sentence_and_the_same_each_time(case: str) -> None:
    first, again = (decide(CASES[case][0]) for _ in range(2))
    assert first == again
    assert first.reason[0].isupper()
    assert first.reason.endswith(".")
    assert ". " not in first.reason
    assert "nan" not in first.reason


def test_the_reasons_hold_the_figures() -> None:
    assert decide(Evidence(BETTER)).reason == (
        "The new adapter is 5.0% better than your current adapter over 10 held-out notes, beyond chance."
    )
    assert decide(Evidence(BETTER[:3])).reason == (
        "Judging takes at least 10 held-out notes, of 800 bytes of text in all; 3 were read."
    )
    assert decide(Evidence(WORSE, first=True)).reason == (
        "The new adapter takes 5.00% more bits than the bare base over 10 held-out notes."
    )
    slightly = tuple(PairedDocument(1000, 2000, 1999.8) for _ in range(10))
    assert decide(Evidence(slightly)).reason == (
        "The new adapter takes 0.01% fewer bits than your current adapter over 10 held-out notes; from 0.05% on it counts."
    )
    assert decide(Evidence(WORSE[:1], first=True)).reason == (
        "The new adapter takes 5.00% more bits than the bare base over 1 held-out note."
    )
    assert decide(Evidence(())).reason.endswith("; none was read.")
    assert decide(Evidence(BETTER[:1])).reason.endswith("; 1 was read.")
    short = tuple(PairedDocument(50, 100, 90) for _ in range(12))
    assert decide(Evidence(short)).reason.endswith("; 600 bytes were read.")
    assert decide(Evidence(BETTER, extracted=Extracted(1000, 60, 0.05))).reason == (
        "The new adapter writes 60 of 1,000 passages of your notes word for word (6.0%); 5.0% is allowed."
    )
    assert decide(Evidence(BETTER, recognised=Recognised(0.9, 0.81, 0.8))).reason == (
        "The new adapter tells trained notes from others 90% of the time (chance apart, at least 81%); 80% is allowed."
    )
    assert "15.0% worse than the bare base; 10% is allowed" in decide(Evidence(BETTER, Change(1.0, 1.15))).reason


def test_the_noise_is_the_jackknifes_standard_error_of_a_mean_where_all_notes_are_equally_long() -> None:
    """For notes of one size the jackknife is the textbook's standard error: s / sqrt(n)."""
    mean = sum(ALIKE) / 10
    spread = math.sqrt(sum((gain - mean) ** 2 for gain in ALIKE) / 9)
    gain, noise = gain_and_noise(list(BETTER))
    assert gain == pytest.approx(mean)
    assert noise == pytest.approx(2.8214 * spread / math.sqrt(10), rel=1e-3)


@pytest.mark.parametrize(("freedom", "expected"), [(9, 2.8214), (14, 2.6245), (29, 2.4620), (99, 2.3646), (10**6, 2.3263)])
def test_the_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(0.99, freedom) == pytest.approx(expected, abs=1e-3)


def test_chance_alone_seldom_makes_an_adapter_current() -> None:
    """Adapters that are no better, over notes whose sizes differ a hundredfold: about CHANCE of them may pass."""
    generator, nights, passed = random.Random(0), 4000, 0
    for _ in range(nights):
        sizes = [10 ** generator.uniform(2, 4) for _ in range(20)]
        documents = [PairedDocument(size, 2 * size, size * (2 - generator.gauss(0, 0.1))) for size in sizes]
        passed += decide(Evidence(tuple(documents))).promote
    assert passed / nights < 2 * CHANCE


def test_a_true_gain_of_two_per_cent_is_seen_over_twenty_notes() -> None:
    generator, nights, passed = random.Random(0), 500, 0
    for _ in range(nights):
        sizes = [generator.uniform(500, 4000) for _ in range(20)]
        documents = [PairedDocument(size, 2 * size, size * (2 - generator.gauss(0.04, 0.03))) for size in sizes]
        passed += decide(Evidence(tuple(documents))).promote
    assert passed / nights > 0.95
