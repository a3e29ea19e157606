"""Sorts the events of one run by kind, for its report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from edgetune.events import Evaluated, Event, Finished, Interrupted, Sampled, Skipped, Started, Stepped, final_history


@dataclasses.dataclass(frozen=True)
class Run:
    """The events of a run, by kind. Steps that a resumed run repeated are counted once."""

    started: Started | None
    finished: Finished | None
    interrupted: Interrupted | None
    evaluated: Sequence[Evaluated]
    stepped: Sequence[Stepped]
    skipped: Sequence[Skipped]
    samples: dict[str, dict[str, str]]  # prompt -> when -> text

    @classmethod
    def of(cls, events: Iterable[Event]) -> Run:
        """Sort the events of one run by kind."""
        history = final_history(events)
        samples: dict[str, dict[str, str]] = {}
        for event in history:
            if isinstance(event, Sampled):
                samples.setdefault(event.prompt, {})[event.when] = event.text
        return cls(
            started=next((event for event in history if isinstance(event, Started)), None),
            finished=next((event for event in reversed(history) if isinstance(event, Finished)), None),
            interrupted=next((event for event in reversed(history) if isinstance(event, Interrupted)), None),
            evaluated=list({event.step: event for event in history if isinstance(event, Evaluated)}.values()),
            stepped=[event for event in history if isinstance(event, Stepped)],
            skipped=[event for event in history if isinstance(event, Skipped)],
            samples=samples,
        )

    @property
    def before(self) -> float | None:
        """Return the held-out bits per byte before training; None if nothing was held out."""
        if self.finished is not None:
            return self.finished.heldout_bits_per_byte_before
        return self.evaluated[0].bits_per_byte if self.evaluated else None

    @property
    def best(self) -> Evaluated | None:
        """Return the evaluation of the adapter that was kept; in an unfinished run, the best one so far."""
        kept = self.finished.best_step if self.finished else None
        named = next((event for event in self.evaluated if event.step == kept), None)
        return named or min(self.evaluated, key=lambda event: event.bits_per_byte, default=None)

    @property
    def after(self) -> float | None:
        """Return the held-out bits per byte of the adapter that was kept; None if nothing was held out."""
        if self.finished is not None:
            return self.finished.heldout_bits_per_byte_after
        return self.best.bits_per_byte if self.best else None
