"""The first sentence of a run's report: what was learned, and which adapter is in use."""

from __future__ import annotations

from edgetune.events import Finished

BECAUSE = {
    "not better": "the new one is no better on notes it had not seen",
    "forgets": "the new one reads general text worse",
    "replies worse": "the new one answers in chats worse",
    "leaks": "the new one would give away too much of your notes",
}
"""Reasons why a new adapter does not become the current one, by the verdict of the gate (library/gate.py)."""
LEARNED = {
    "better": "better on notes it had not seen; now in use",
    "first": "too few notes were held out to judge it; now in use, since no adapter was before",
    "too few": "too few notes were held out to judge it, so it is kept beside your current adapter, which stays in use",
}
"""Ends of the sentence about a run that learned something, by the verdict."""


def first_sentence(documents: int | None, finished: Finished) -> str | None:
    """Return one plain sentence about a finished run; None where no decision is known.

    documents: the number of notes that it learned from, if that is known.
    """
    decision = finished.decision or {}
    verdict = decision.get("verdict")
    if verdict in LEARNED:
        source = "" if documents is None else f" from {documents:,} {'note' if documents == 1 else 'notes'}"
        return f"Learned{source}; {LEARNED[verdict]}."
    if verdict in BECAUSE:
        in_use = "the bare base model" if decision.get("first") else "your current adapter"
        return f"Nothing new learned: {in_use} stays in use because {BECAUSE[verdict]}."
    return None
