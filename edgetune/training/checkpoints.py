"""Checkpoints: what they hold, when one is due, and how the last intact one is read back.

A checkpoint is one sealed file, `checkpoint-<n>.safetensors`, in the folder of the unfinished run: the adapter, the
optimizer's state, the best adapter so far, and the TrainingState as JSON in the metadata.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from edgetune.dataset.evaluation_set import Score
from edgetune.events import EventLog
from edgetune.training.sealed_files import DamagedError, read_sealed, write_sealed

CHECKPOINTS_KEPT = 2
"""Checkpoints that stay on disk: the last one, and the one before it in case the last is damaged."""
KEEP_SECONDS = 100.0
"""Seconds of work that a kill may cost; chosen by hand. The work ahead is counted in, so a long step does not push the loss
beyond two minutes."""
KEEP_SHARE = 0.003
"""Upper bound on the share of run time spent on the checkpoints that follow evaluations (0 to 1); chosen by hand."""
ASSUMED_WRITE_SPEED = 500e6
"""Bytes per second at which the first checkpoint is assumed to be written; a guess, replaced by the time that one took."""
_STORED_NAMES = {"evaluated_step": "read_at", "score_before": "before"}
"""Names in the file of the TrainingState fields whose names differ from the file's."""


@dataclass
class TrainingState:
    """Everything that a checkpoint holds besides tensors. Counts and times cover the whole run, interruptions included."""

    step: int = 0
    """Steps done."""
    evaluated_step: int | None = None
    """The step after which the held-out notes were last evaluated. Where an evaluation is due at `step` and this is another
    step, a resumed run evaluates before it trains."""
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    training_seconds: float = 0.0
    seconds: float = 0.0
    score_before: Score | None = None
    """Score of the held-out notes before step 1. A deadline may have cut it short."""
    best_score: Score | None = None
    """Lowest score of the held-out notes after step 1."""
    best_step: int | None = None
    peak_memory_bytes: int = 0
    log_bytes: int = 0
    """Size of the event log. Events beyond it happen again after a resume, so they are cut off."""

    def to_json(self) -> str:
        """Return the state as the file holds it."""
        return json.dumps({_STORED_NAMES.get(name, name): value for name, value in dataclasses.asdict(self).items()})

    @classmethod
    def from_json(cls, text: str) -> TrainingState:
        """Return the state that `to_json` wrote. Raises ValueError or TypeError for anything else."""
        fields = {stored: name for name, stored in _STORED_NAMES.items()}
        state = cls(**{fields.get(name, name): value for name, value in json.loads(text).items()})
        for name in ("score_before", "best_score"):
            if (stored := getattr(state, name)) is not None:
                setattr(state, name, Score(**{part: _tuples(values) for part, values in stored.items()}))
        return state


def _tuples(values: Any) -> Any:
    """Return lists as tuples, and the lists in them too: JSON has lists alone."""
    return tuple(map(_tuples, values)) if isinstance(values, list) else values


@dataclass
class RestoredCheckpoint:
    """A checkpoint read back from disk. Without tensors, the run stands before its first step."""

    state: TrainingState = field(default_factory=TrainingState)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    """Sentences for the user about what was lost."""

    @property
    def has_steps(self) -> bool:
        """Return True if the checkpoint brings values of the adapter with it."""
        return bool(self.tensors)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `prefix` and a dot, under the rest of their names."""
        return {name.removeprefix(prefix + "."): t for name, t in self.tensors.items() if name.startswith(prefix + ".")}


class CheckpointWriter:
    """Writes checkpoints and knows when one is due. Only the clock decides that, so the run's bits do not depend on it."""

    def __init__(self, folder: Path, log: EventLog, expected_bytes: int) -> None:
        self.folder, self.log = folder, log
        self.last_written = time.monotonic()
        self.write_seconds = expected_bytes / ASSUMED_WRITE_SPEED

    def is_due(self, ahead: float) -> bool:
        """Return True if working `ahead` more seconds without a checkpoint would risk losing more than KEEP_SECONDS of work."""
        return time.monotonic() - self.last_written + ahead >= KEEP_SECONDS

    def is_cheap(self) -> bool:
        """Return True if a checkpoint now would take at most KEEP_SHARE of the time since the last one."""
        return self.write_seconds <= KEEP_SHARE * (time.monotonic() - self.last_written)

    def write(self, state: TrainingState, tensors: Mapping[str, Tensor]) -> Path:
        """Write a checkpoint and return its path. Raises ResourceError when the disk is full."""
        start = time.monotonic()
        # The log first: a checkpoint must never be ahead of the events that it says have happened.
        state.log_bytes = self.log.sync()
        path = save_checkpoint(self.folder, state, tensors)
        self.last_written = time.monotonic()
        self.write_seconds = self.last_written - start
        return path


def save_checkpoint(folder: Path, state: TrainingState, tensors: Mapping[str, Tensor]) -> Path:
    """Write the next checkpoint and delete all but the last two. On a full disk raises ResourceError and deletes nothing."""
    number = max((int(path.stem.rpartition("-")[2]) for path in _checkpoints(folder)), default=0) + 1
    path = folder / f"checkpoint-{number:06}.safetensors"
    write_sealed(path, tensors, {"state": state.to_json()})
    for old in _checkpoints(folder)[:-CHECKPOINTS_KEPT]:
        _delete(old)
    return path


def restore_checkpoint(folder: Path) -> RestoredCheckpoint:
    """Read the last intact checkpoint; delete damaged ones, and files that a kill left half written."""
    for partial in (*folder.glob(".checkpoint-*"), *folder.glob(".best.*")):
        _delete(partial)
    damaged = 0
    for path in reversed(_checkpoints(folder)):
        try:
            restored = _read(path)
        except DamagedError:
            _delete(path)
            damaged += 1
            continue
        if damaged:
            restored.notices.append(
                f"The last checkpoint is damaged. The run resumes from the one before it (step {restored.state.step})."
            )
        return restored
    notices = ["Every checkpoint is damaged. The run starts again at step 0 with the same plan."] if damaged else []
    return RestoredCheckpoint(notices=notices)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the paths of the checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-*.safetensors"))


def _delete(path: Path) -> None:
    """Delete a checkpoint if possible: Windows refuses while it is mapped, and then a later call deletes it."""
    with contextlib.suppress(OSError):
        path.unlink()


def _read(path: Path) -> RestoredCheckpoint:
    """Return a checkpoint, its tensors memory-mapped. Raises DamagedError."""
    tensors, metadata = read_sealed(path)
    try:
        return RestoredCheckpoint(TrainingState.from_json(metadata["state"]), tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(path) from error
