"""Says in plain words how a run ended: what it learned, and whether the new adapter is in use."""

from __future__ import annotations

from edgetune.events import Finished

JUDGED = {
    "better": "better on notes it had not seen",
    "first": "too few held-out notes were read to judge it",
    "too few": "too few held-out notes were read to judge it",
    "not better": "no better on notes it had not seen",
    "forgets": "it unlearnt too much else",
    "replies worse": "it answers in chats worse than the base model",
    "leaks": "it failed the leak audit",
}
"""How a new adapter was judged, by the verdict of the gate (library/gate.py)."""
IN_USE = {
    "better": "now in use",
    "first": "now in use, since no adapter was before",
    "too few": "kept beside your current adapter, which stays in use",
}
"""Which adapter is in use from then on, by the verdict; after any other verdict, the one that was before."""


def first_sentence(documents: int | None, finished: Finished) -> str | None:
    """Return one plain sentence about a finished run; None where no decision is known.

    documents: the number of notes that it learned from, if that is known.
    """
    decision = finished.decision or {}
    verdict = decision.get("verdict")
    if not isinstance(verdict, str) or verdict not in JUDGED:
        return None
    source = "" if documents is None else f" from {documents:,} {'note' if documents == 1 else 'notes'}"
    if verdict in IN_USE:
        return f"Learned{source}; {JUDGED[verdict]}; {IN_USE[verdict]}."
    result = "Nothing new learned" if verdict == "not better" else f"Learned{source}, but not put to use"
    in_use = "the bare base model" if decision.get("first") else "your current adapter"
    return f"{result}: {JUDGED[verdict]}; {in_use} stays in use."
