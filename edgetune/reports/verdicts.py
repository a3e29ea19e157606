"""Says in plain words how a run ended: what it learned, and whether the new adapter is in use."""

from __future__ import annotations

import math

from edgetune.events import Finished

BECAUSE = {
    "not better": "the new one is no better on notes it had not seen",
    "forgets": "the new one unlearnt too much else",
    "replies worse": "the new one answers in chats worse than the base model",
    "leaks": "the new one repeats too much of your notes word for word, or tells them too well from others",
}
"""Reasons why a new adapter does not become the current one, by the verdict of the gate (library/gate.py)."""
LEARNED = {
    "better": "better on notes it had not seen; now in use",
    "first": "too few held-out notes were read to judge it; now in use, since no adapter was before",
    "too few": "too few held-out notes were read to judge it; kept beside your current adapter, which stays in use",
}
"""Ends of the sentence about a run that learned something, by the verdict: how it was judged, and which adapter is in use."""


def first_sentence(documents: int | None, finished: Finished) -> str | None:
    """Return one plain sentence about a finished run; None where no decision is known.

    documents: the number of notes that it learned from, if that is known.
    """
    decision = finished.decision or {}
    verdict = str(decision.get("verdict"))
    source = "" if documents is None else f" from {documents:,} {'note' if documents == 1 else 'notes'}"
    if verdict in LEARNED:
        return f"Learned{source}; {LEARNED[verdict]}."
    if verdict in BECAUSE:
        result = "Nothing new learned:" if verdict == "not better" else f"Learned{source}, but"
        in_use = "the bare base model" if decision.get("first") else "your current adapter"
        return f"{result} {in_use} stays in use because {BECAUSE[verdict]}."
    return None


def judgement(verdict: str) -> str:
    """Return how an adapter was judged when it was made; the verdict itself where that is unknown."""
    return {**BECAUSE, **LEARNED}.get(verdict, verdict).partition(";")[0]


def promise(record: object) -> str | None:
    """Return "private: epsilon 8 at delta 1e-05, unit: a document, spent 7.99" for a record of private training.

    Anybody may have written the record: None for one that is not in this form, and for training that is not private.
    """
    if not isinstance(record, dict):
        return None
    epsilon, delta, spent = (record.get(name) for name in ("epsilon", "delta", "spent"))
    numbers = [number for number in (epsilon, delta, spent) if isinstance(number, int | float) and 0 <= number < math.inf]
    if len(numbers) < 3:
        return None
    return f"private: epsilon {epsilon:g} at delta {delta:.2g}, unit: a document, spent {spent:.2f}"
