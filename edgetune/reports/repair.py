"""Words for how much of a run's gain is learning, and how much only mends what quantising the base broke."""

from __future__ import annotations

from edgetune.events import Finished
from edgetune.reports.text import counted

NOT_MEASURED = {
    "memory": "reading the base as published needs more memory than this run may use",
    "time": "the deadline left no time to read the base as published",
    "unknown": "the model folder holds the base in {bits} bits alone",
    "adapter": "the run started from an adapter, which had learnt and mended before",
    "few": "too few tokens of the held-out notes were read",
}
"""Reasons why the base as published has no score, by the value of Finished.published."""


def rough_figures(event: Finished) -> str | None:
    """Return that the held-out figures of a finished run rest on few tokens, for the end of a sentence; None if they do not."""
    if event.heldout_tokens is None or event.judged:
        return None
    return f"rough figures, from {counted(event.heldout_tokens, 'token')} alone"


def learning_lines(event: Finished, unknown: bool) -> list[str]:
    """Return the sentences about learning and repair of a finished run, without a full stop.

    unknown: also say so where this run could not be compared with a published base at all.
    """
    bits, before, after = event.base_bits, event.heldout_bits_per_byte_before, event.heldout_bits_per_byte_after
    if event.published in NOT_MEASURED and (unknown or event.published in ("memory", "time")):
        reason = NOT_MEASURED[event.published].format(bits=bits)
        return [f"How much of this is learning, and how much mends what {bits} bits broke, was not measured: {reason}"]
    published = event.heldout_bits_per_byte_published
    if published is None or before is None or after is None:
        return []
    return [_learning(before, after, published, bits), *_best_base(event, after, bits)]


def _learning(before: float, after: float, published: float, bits: int | None) -> str:
    """Return the sentence that divides the gain into learning and repair."""
    reads = f"The base as published reads these notes at {published:.3f}"
    if after >= before:
        return f"{reads}, and in {bits} bits at {before:.3f}"
    if published >= before:
        return f"{reads}, so {bits} bits broke nothing here and all of this is learning"
    if after >= published:
        return f"{reads}, so the adapter only mends what {bits} bits broke"
    return f"{reads}: {1 - after / published:.1%} is learning, the rest mends what {bits} bits broke"


def _best_base(event: Finished, after: float, bits: int | None) -> list[str]:
    """Return the sentence about the base over which the adapter reads best, where that was measured."""
    adapted = event.heldout_bits_per_byte_on_published
    if adapted is None:
        return []
    over = f"Over the base as published the adapter reads them at {adapted:.3f}"
    if adapted < after:
        return [f"{over}, better than over {bits} bits: where memory allows, write with --weights bf16"]
    return [f"{over}, no better than over {bits} bits, which take less memory"]
