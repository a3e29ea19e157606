"""Keeps the folder of a run until it is finished, so that the same command can resume it after an interruption.

unfinished/<key>.lock                 held while a process works on the run
unfinished/<key>/run.json             the plan and everything else that was settled before step 1; without it there is no run
unfinished/<key>/tokens, held-out     the notes as tokens
unfinished/<key>/anchor               the base's own answers as tokens, and its predictions (training/anchor.py)
unfinished/<key>/replies              those of the base's answers that the gate judges by, as tokens
unfinished/<key>/checkpoint-<n>.safetensors   the last two checkpoints (training/checkpoints.py)
unfinished/<key>/best.safetensors     the best adapter so far (training/best_adapter.py)

<key> is a digest of the settings, the model, the output folder and the notes' paths: it stands for the command. Everything
is private (0600/0700) and is deleted when the run is finished or started over, or after 30 days without a change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgetune.config import TrainConfig
from edgetune.home import expand, private_folder, unfinished_folder
from edgetune.lock import Lock, lock_output
from edgetune.runtime.errors import BusyError
from edgetune.runtime.files import atomic_write, read_own
from edgetune.scratch import delete_leftovers
from edgetune.training.sealed_files import DamagedError

FORMAT = 8
"""Version of run.json and of everything beside it. A run of another version is started over."""
ABANDONED_AFTER_DAYS = 30
"""Days without a change after which an interrupted run is deleted; chosen by hand."""
_RUN_FILE = "run.json"


class OtherVersionError(DamagedError):
    """Raised where an interrupted run was begun by another version of edgetune."""


class UnfinishedRun:
    """The folder of one unfinished run. Whoever holds this object holds the run's lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        """Return True if there is a run to resume."""
        return (self.folder / _RUN_FILE).is_file()

    def begin(self, record: Mapping[str, Any]) -> None:
        """Write run.json. Call this when everything else that the run needs is on disk: from then on it can be resumed."""
        atomic_write(self.folder / _RUN_FILE, _sealed_json(record))

    def record(self) -> dict[str, Any]:
        """Return what was given to `begin`. Raises DamagedError or OtherVersionError."""
        return _read_sealed_json(self.folder / _RUN_FILE)

    def discard(self) -> None:
        """Delete the folder, run.json first: after a crash halfway there is no run, and the next command deletes the rest."""
        (self.folder / _RUN_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def lock_run(config: TrainConfig, base: str, key: str | None = None) -> Iterator[UnfinishedRun]:
    """Lock this command's run and its output folder, and yield the run's folder, which need not exist yet.

    base: digest of the base model. key: stands for the command in place of `run_key`. Raises BusyError where another process
    holds either lock.
    """
    folder, key = unfinished_folder(), key or run_key(config, base)
    delete_leftovers()
    with contextlib.ExitStack() as locks:
        locks.enter_context(Lock(folder / f"{key}.lock", "this run"))
        if config.out is not None:
            locks.enter_context(lock_output(expand(config.out)))
        _delete_abandoned(folder)
        yield UnfinishedRun(folder / key)


@contextlib.contextmanager
def follower_folder(config: TrainConfig, base: str, rank: int) -> Iterator[Path]:
    """Yield a private folder for a follower process. It is deleted afterwards; after a crash, the next run deletes it."""
    folder, name = unfinished_folder(), f"{run_key(config, base)}-{rank}"
    with Lock(folder / f"{name}.lock", "this run"):
        _delete_abandoned(folder)
        path = folder / name
        shutil.rmtree(path, ignore_errors=True)
        try:
            yield private_folder(path)
        finally:
            shutil.rmtree(path, ignore_errors=True)


def run_key(config: TrainConfig, base: str) -> str:
    """Return 16 hex digits that are equal for two commands exactly when the second resumes the first.

    A deadline is left out: it only limits how much of the plan is done now.
    """
    settings = {name: value for name, value in config.as_dict().items() if name not in ("model", "out", "minutes", "until")}
    notes = sorted(os.path.abspath(expand(path)) for path in config.data.notes)
    out = None if config.out is None else str(expand(config.out).resolve())
    return _digest(json.dumps([settings, base, notes, out, config.data.me], sort_keys=True))[:16]


def _delete_abandoned(folder: Path) -> None:
    """Delete the runs below `folder` that nobody works on and nobody will resume: never begun, half deleted, or too old."""
    for path in [entry for entry in folder.iterdir() if entry.is_dir()]:
        with contextlib.suppress(BusyError, OSError), Lock(folder / f"{path.name}.lock", ""):
            newest = max((entry.stat().st_mtime for entry in path.iterdir()), default=0.0)
            if not (path / _RUN_FILE).is_file() or time.time() - newest > ABANDONED_AFTER_DAYS * 86400:
                UnfinishedRun(path).discard()


def _sealed_json(record: Mapping[str, Any]) -> str:
    """Return `record` as JSON that carries its own digest and the format's version."""
    text = json.dumps(record, sort_keys=True)
    return json.dumps({"format": FORMAT, "sha256": _digest(text), "record": record}, indent=2, sort_keys=True) + "\n"


def _read_sealed_json(path: Path) -> dict[str, Any]:
    """Return the record that `_sealed_json` wrote. Raises DamagedError or OtherVersionError."""
    try:
        sealed = json.loads(read_own(path))
        record, version = sealed["record"], sealed["format"]
        intact = sealed["sha256"] == _digest(json.dumps(record, sort_keys=True))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(path) from error
    if not intact or not isinstance(record, dict):
        raise DamagedError(path)
    if version != FORMAT:
        raise OtherVersionError(path)
    return record


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
