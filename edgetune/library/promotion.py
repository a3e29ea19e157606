"""Decides whether a newly trained adapter becomes the current one, and makes it so."""

from __future__ import annotations

from pathlib import Path

from edgetune.library import adapter_registry as registry
from edgetune.library.adapter_registry import Current
from edgetune.library.base_models import DEMO, best_here


def should_promote(before: float | None, after: float | None) -> bool:
    """Return True unless the held-out notes say that the new adapter made the model worse, or no better.

    before, after: held-out bits per byte (lower is better) without and with the new adapter. None means not measured:
    with fewer than ten notes none is held out, and an adapter that cannot be judged is promoted.
    """
    return after is None or before is None or after < before


def promote(adapter: Path, model: str, base: str) -> None:
    """Make the adapter folder `adapter` the current one, for the model of this name and base digest."""
    registry.set_current(Current(adapter.resolve(), model, base, demo_alone=model == DEMO and best_here() is None))
