"""Finds the report of the latest run, and what its events say."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.events import Finished, Started, read_events
from edgetune.home import home
from edgetune.reports.run import Run
from edgetune.reports.verdicts import first_sentence
from edgetune.runtime.errors import DataError

LOG_FILE, REPORT_FILE = "events.jsonl", "report.html"
"""Files of a run's folder that `edgetune report` reads: its events, and the page made of them."""


@dataclass(frozen=True)
class Latest:
    """The latest run that has a report. What its events do not say is None."""

    run: str
    path: str
    sentence: str | None
    adapter: str | None
    promoted: bool | None
    decision: dict[str, Any] | None


def latest_report() -> Latest | None:
    """Return the report that was written last; None if no run has one yet."""
    reports = list((home() / "runs").glob(f"*/{REPORT_FILE}"))
    if not reports:
        return None
    path = max(reports, key=lambda report: (report.stat().st_mtime, report.parent.name))
    finished, started = _ends(path.parent / LOG_FILE)
    if finished is None:
        return Latest(path.parent.name, str(path), None, None, None, None)
    sentence = first_sentence(started.documents if started else None, finished)
    return Latest(path.parent.name, str(path), sentence, finished.adapter, finished.promoted, finished.decision)


def _ends(log: Path) -> tuple[Finished | None, Started | None]:
    """Return the last and the first event of a run; None for those that are not in a readable log."""
    with contextlib.suppress(DataError, OSError):
        run = Run.of(read_events(log))
        return run.finished, run.started
    return None, None
