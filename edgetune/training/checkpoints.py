"""What is kept of a run until it is finished, so that a kill costs two minutes and the same command goes on.

unfinished/<key>.lock                 held while a process is at the run
unfinished/<key>/run.json             the plan and what else was settled before step 1; without it the folder is no run
unfinished/<key>/tokens, held-out     the notes as tokens
unfinished/<key>/checkpoint-<n>.safetensors   the last two, each one file that ends with its own checksum
unfinished/<key>/best.safetensors     the best adapter since, likewise; a checkpoint has the one of its own moment

<key> stands for the settings, the model, the output and the notes' paths: for the command. All of it is private
(0600/0700), and deleted when the run is finished, started over, or left alone for 30 days.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.config import TrainConfig
from edgetune.home import expand, home, private_folder
from edgetune.lock import Lock
from edgetune.runtime.errors import BusyError, EdgetuneError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec

FORMAT = 4
KEPT = 2
FORGOTTEN_AFTER_DAYS = 30
_RUN, _CHECKSUM = "run.json", "checksum"
_CHECKSUM_BYTES = 8


@dataclass
class State:
    """Where a run stands, tensors apart. Figures are of the whole run, however often it was gone on with."""

    step: int = 0
    read_at: int | None = None
    """The step after which the held-out notes were last read; at a step that is due and not read, that comes first."""
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    training_seconds: float = 0.0
    seconds: float = 0.0
    before: float | None = None
    best_score: float | None = None
    best_step: int | None = None
    peak_memory_bytes: int = 0
    log_bytes: int = 0
    """The event log's size: what it holds beyond that will happen again."""


@dataclass
class Restored:
    """A checkpoint read back; without tensors, the run stands before its first step."""

    state: State = field(default_factory=State)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named `prefix`.something, by that something."""
        return {name.removeprefix(prefix + "."): t for name, t in self.tensors.items() if name.startswith(prefix + ".")}


class Damaged(Exception):
    """What was kept is not what was written."""


class OtherVersion(Damaged):
    """What was kept is another version's."""


class Unfinished:
    """One unfinished run's folder, of which this process holds the lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        """Whether there is a run to go on with."""
        return (self.folder / _RUN).is_file()

    def begin(self, record: Mapping[str, Any]) -> None:
        """Write run.json, after everything else that the run needs: from here on there is a run."""
        atomic_write(self.folder / _RUN, _sealed(record))

    def record(self) -> dict[str, Any]:
        """What `begin` was given. Raises Damaged."""
        return _unsealed(self.folder / _RUN)

    def discard(self) -> None:
        """Delete all of it; after a crash in the middle of this it is no run any more, and the next run deletes the rest."""
        (self.folder / _RUN).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self, state: State, tensors: Mapping[str, Tensor]) -> Path:
        """Write a checkpoint and drop all but the last two. Raises ResourceError on a full disk; the others then stay."""
        number = max((int(path.stem.rpartition("-")[2]) for path in self._checkpoints()), default=0) + 1
        path = self.folder / f"checkpoint-{number:06}.safetensors"
        write_sealed(path, tensors, {"state": json.dumps(dataclasses.asdict(state))})
        for old in self._checkpoints()[:-KEPT]:
            _drop(old)
        return path

    def restore(self) -> Restored:
        """The last checkpoint that is whole; what is damaged, or was never finished, is deleted."""
        for left in (*self.folder.glob(".checkpoint-*"), *self.folder.glob(".best.*")):  # a kill ended their writing
            _drop(left)
        damaged = 0
        for path in reversed(self._checkpoints()):
            try:
                restored = _read(path)
            except Damaged:
                _drop(path)
                damaged += 1
                continue
            if damaged:
                restored.notices.append(
                    f"The last checkpoint is damaged, so the one before it is used (step {restored.state.step})."
                )
            return restored
        return Restored(notices=["Every checkpoint is damaged, so the same plan starts again at step 0."] if damaged else [])

    def _checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("checkpoint-*.safetensors"))


@contextlib.contextmanager
def hold(config: TrainConfig, base: str) -> Iterator[Unfinished]:
    """The place of this command's run, locked, and its output too. Raises BusyError where another process is at either."""
    folder, name = private_folder(home() / "unfinished"), key(config, base)
    with contextlib.ExitStack() as locks:
        locks.enter_context(Lock(folder / f"{name}.lock", "this run"))
        if config.out is not None:
            locks.enter_context(output_lock(expand(config.out)))
        _forget_others(folder)
        yield Unfinished(folder / name)


def output_lock(out: Path) -> Lock:
    """For whoever writes the folder `out`. Raises BusyError where another process is at it."""
    out = out.resolve()
    return Lock(private_folder(home() / "unfinished") / f"out-{_digest(str(out))[:16]}.lock", f"a run that writes {out}")


@contextlib.contextmanager
def hold_beside(config: TrainConfig, base: str, rank: int) -> Iterator[Path]:
    """A private folder for a process that follows another; it is gone afterwards, and after a crash with the next run."""
    folder, name = private_folder(home() / "unfinished"), f"{key(config, base)}-{rank}"
    with Lock(folder / f"{name}.lock", "this run"):
        _forget_others(folder)
        path = folder / name
        shutil.rmtree(path, ignore_errors=True)
        try:
            yield private_folder(path)
        finally:
            shutil.rmtree(path, ignore_errors=True)


def key(config: TrainConfig, base: str) -> str:
    """What makes two commands the same run. A deadline does not: it only says how much of the plan is done now."""
    settings = {name: value for name, value in config.as_dict().items() if name not in ("model", "out", "minutes", "until")}
    notes = sorted(os.path.abspath(expand(path)) for path in config.data.notes)
    out = None if config.out is None else str(expand(config.out).resolve())
    return _digest(json.dumps([settings, base, notes, out], sort_keys=True))[:16]


def _forget_others(folder: Path) -> None:
    """Delete what nobody is at and nobody will go on with: never begun or half deleted, or a month old."""
    for path in [entry for entry in folder.iterdir() if entry.is_dir()]:
        with contextlib.suppress(BusyError, OSError), Lock(folder / f"{path.name}.lock", ""):
            newest = max((entry.stat().st_mtime for entry in path.iterdir()), default=0.0)
            if not (path / _RUN).is_file() or time.time() - newest > FORGOTTEN_AFTER_DAYS * 86400:
                Unfinished(path).discard()


def _drop(path: Path) -> None:
    """Delete a checkpoint; Windows refuses while it is mapped, and then a later one does it."""
    with contextlib.suppress(OSError):
        path.unlink()


def _read(path: Path) -> Restored:
    """A checkpoint, its tensors mapped. Raises Damaged."""
    tensors, metadata = read_sealed(path)
    try:
        return Restored(State(**json.loads(metadata["state"])), tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(path) from error


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file whose last tensor is a checksum of all before it. Raises ResourceError on a full disk."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    specs.append(TensorSpec(_CHECKSUM, torch.int64, (1,)))
    with SafetensorsWriter(path, specs, metadata) as writer:
        checksum = zlib.crc32(writer.header)
        for name, tensor in tensors.items():
            values = tensor.detach().cpu().contiguous()
            # CRC-32, twice as quick as SHA-256: what it guards against is a bad disk and no enemy.
            checksum = zlib.crc32(values.view(-1).view(torch.uint8).numpy().data, checksum)
            writer.write(name, values)
        writer.write(_CHECKSUM, torch.tensor([checksum]))


def read_sealed(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """What `write_sealed` wrote, mapped, and its metadata. Raises Damaged."""
    try:
        file = SafetensorsFile.open(path)
        found = int(file.tensor(_CHECKSUM))
        if zlib.crc32(memoryview(file.mapping)[:-_CHECKSUM_BYTES]) != found:
            raise Damaged(path)
        return {name: file.tensor(name) for name in file.tensors if name != _CHECKSUM}, file.metadata
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError, EdgetuneError) as error:
        raise Damaged(path) from error


def _sealed(record: Mapping[str, Any]) -> str:
    """JSON that carries its own digest."""
    text = json.dumps(record, sort_keys=True)
    return json.dumps({"format": FORMAT, "sha256": _digest(text), "record": record}, indent=2, sort_keys=True) + "\n"


def _unsealed(path: Path) -> dict[str, Any]:
    """What `_sealed` wrote. Raises Damaged."""
    try:
        sealed = json.loads(path.read_bytes())
        record, version = sealed["record"], sealed["format"]
        whole = sealed["sha256"] == _digest(json.dumps(record, sort_keys=True))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(path) from error
    if not whole or not isinstance(record, dict):
        raise Damaged(path)
    if version != FORMAT:
        raise OtherVersion(path)
    return record


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
