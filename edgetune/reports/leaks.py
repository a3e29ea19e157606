"""Says in plain words how much of the notes an adapter gives away, one sentence for each measure, from its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune.reports.text import counted


def leak_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each measure that is among the figures of a run's decision, of an adapter or of an audit."""
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    sentences = (_extraction(numbers), _membership(numbers), _canaries(numbers))
    return [sentence for sentence in sentences if sentence is not None]


def _extraction(numbers: Mapping[str, float]) -> str | None:
    passages, extracted = numbers.get("passages"), numbers.get("passages_extracted")
    if passages is None or extracted is None:
        return None
    if not passages:
        return "Extraction: the notes that were read are too short to try."
    share = f"{extracted / passages:.1%} ({extracted:,.0f} of {passages:,.0f} passages of the notes)"
    notes = counted(int(numbers.get("passage_notes", 0)), "note")
    where = f", in {numbers.get('passage_notes_extracted', 0):,.0f} of {notes}" if extracted else ""
    return f"Extraction: {share} can be read out word for word by typing the words before them{where}."


def _membership(numbers: Mapping[str, float]) -> str | None:
    names = ("auc", "low", "high", "true_positives", "false_positives", "members", "non_members")
    found = [numbers.get(f"membership_{name}") for name in names]
    area, low, high, hits, rate, members, others = (value if value is not None else -1.0 for value in found)
    if min(area, low, high, hits, rate, members, others) < 0:
        return None
    limit = f"at {rate:.1%} false positives" if others * rate > 1 else f"with none of the {others:,.0f} named falsely"
    return (
        f"Membership: a trained note is told from a held-out one {area:.0%} of the time (95% interval {low:.0%} to {high:.0%}; "
        f"50% is chance); {hits:.1%} of {counted(int(members), 'trained note')} are named {limit}."
    )


def _canaries(numbers: Mapping[str, float]) -> str | None:
    prefix = "canary_bits_"
    bits = {int(name[len(prefix) :]): value for name, value in numbers.items() if name[len(prefix) :].isdecimal()}
    largest = numbers.get("canary_largest_bits")
    if 1 not in bits or largest is None:
        return None
    often = [f"{value:.1f} if {times} times" for times, value in sorted(bits.items()) if times > 1]
    chance = f"; {bits[0]:.1f} if never, by chance" if 0 in bits else ""
    steps, planned = numbers.get("shadow_steps", 0), numbers.get("shadow_steps_planned", 0)
    short = f" (the shadow training ended after {steps:,.0f} of {planned:,.0f} steps)" if steps < planned else ""
    return (
        f"Canaries: {bits[1]:.1f} of {largest:.1f} bits of an invented secret are exposed if it stands in the notes once "
        f"({', '.join(often)}{chance}){short}."
    )
