"""Measures what a run's new adapter gives away of the notes that it was trained on, for the gate (library/gate.py).

Windows of the trained notes are read with the adapter, and those in which it writes a passage word for word with the bare base
too. Where membership inference is limited, the base reads all of them, and both read as many windows of held-out notes. Which
windows is a function of the plan alone, and all reading together takes at most AUDIT_SHARE of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgetune.config import TrainConfig
from edgetune.dataset.evaluation_set import EvaluationSet
from edgetune.leaks.extraction import Extraction, extraction, suspects
from edgetune.leaks.membership import Membership, membership, scores_by_document
from edgetune.leaks.reading import ReadWindow, only, read_windows
from edgetune.library.gate import Extracted, Recognised
from edgetune.progress import Progress, ignore
from edgetune.runtime import adapter as adapters
from edgetune.training.evaluation import TOKEN_COST, TOKEN_COST_INT8
from edgetune.training.prepared_run import PreparedRun

AUDIT_SHARE = 0.045
"""Largest share of a run's work that the audit takes (0 to 1); chosen by hand below the 5% of a night that it may take."""
MOST_TOKENS = 1 << 16
"""Tokens of either side beyond which more tell nothing new: about 2,700 passages. Chosen by hand."""


@dataclass(frozen=True)
class Leaks:
    """The leaks that were measured; None for a measure that was not taken, or for which there were too few notes."""

    extraction: Extraction | None = None
    membership: Membership | None = None

    def figures(self) -> dict[str, Any]:
        """Return the figures, JSON-ready: counts and numbers alone."""
        return {**_extraction_figures(self.extraction), **_membership_figures(self.membership)}


def _extraction_figures(found: Extraction | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {
        "passages": found.passages,
        "passages_extracted": found.extracted,
        "passages_by_base": found.by_base,
        "passage_notes": found.notes,
        "passage_notes_extracted": found.leaking,
    }


def _membership_figures(found: Membership | None) -> dict[str, Any]:
    values = {} if found is None else dataclasses.asdict(found)
    return {f"membership_{name}": value if math.isfinite(value) else None for name, value in values.items()}


def planned_tokens(config: TrainConfig, trained_tokens: float, int8: bool) -> int:
    """Return the most tokens of either side that the audit of a run reads, so that all of it takes AUDIT_SHARE of the work.

    trained_tokens: those of notes that the whole run reads in training.
    """
    cost = TOKEN_COST_INT8 if int8 else TOKEN_COST
    return max(min(int(AUDIT_SHARE * trained_tokens / cost / _readings(config)), MOST_TOKENS), 1)


def _readings(config: TrainConfig) -> int:
    """Return the most times that the audit of a run reads `planned_tokens` tokens."""
    return 2 if config.most_recognised is None else 4


def measure(run: PreparedRun, seconds: float, progress: Progress = ignore) -> Leaks:
    """Measure the adapter that is on the model of a run. seconds: those that all of it may take."""
    plan, store = run.plan, run.packer.store
    trained = EvaluationSet.of(store, plan.seq_len)
    if not len(trained.order):
        return Leaks()
    members = trained.limited(plan.leak_tokens)
    read = _reader(run, seconds / _readings(run.config), progress)
    if run.config.most_recognised is None or run.held_out is None:
        adapted = read(members, False)
        bare = read(only(members, suspects(adapted)), True)
        return Leaks(extraction(adapted, bare))
    adapted, bare = read(members, False), read(members, True)
    others = run.held_out.limited(plan.leak_tokens)
    other_scores = scores_by_document(read(others, False), read(others, True))
    return Leaks(extraction(adapted, bare), membership(scores_by_document(adapted, bare), other_scores))


def _reader(run: PreparedRun, seconds: float, progress: Progress) -> Callable[[EvaluationSet, bool], list[ReadWindow]]:
    """Return a function that reads windows with the bare base, if its second argument is True, or else with the adapter."""
    rows = run.plan.setting.row_tokens
    held_out = None if run.held_out is None else run.held_out.store

    def read(windows: EvaluationSet, bare: bool) -> list[ReadWindow]:
        with adapters.replaced(run.loaded.model, None) if bare else contextlib.nullcontext():
            return read_windows(run.runner, windows, rows, progress, seconds, held_out)

    return read


def as_evidence(leaks: Leaks, config: TrainConfig) -> tuple[Extracted | None, Recognised | None]:
    """Return what the gate decides by."""
    found, told = leaks.extraction, leaks.membership
    extracted = None if found is None else Extracted(found.passages, found.extracted, config.most_extracted)
    most = config.most_recognised
    recognised = None if told is None or most is None else Recognised(told.auc, told.low, most)
    return extracted, recognised
