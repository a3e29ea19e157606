"""The one schema of what happens in a run. `train` yields these events, an export tells of its own; ui.py and report.py only
render them.

A line of the log is `{"event": kind, ...fields in this file's order}`. Units: seconds, bytes, bits per byte of text,
nats a trained token. A number that is not finite is written as null and read back as nan: every line is strict JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from edgetune.runtime.errors import DataError
from edgetune.runtime.files import PRIVATE_FILE, explain_full_disk


@dataclasses.dataclass(frozen=True)
class Event:
    """Base of all events. `private` ones hold text: for the run's own log and report, never for standard output."""

    kind: ClassVar[str]
    private: ClassVar[bool] = False

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, in field order, the kind first."""
        fields = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"event": self.kind, **fields}


@dataclasses.dataclass(frozen=True)
class Started(Event):
    """The plan, written before step 1 (and again by a run that is continued).

    `documents` and `tokens` are those trained on; the held-out ones are counted apart.
    """

    kind: ClassVar[str] = "started"
    run: str
    model: str
    device: str
    backend: str
    plan: dict[str, Any]
    documents: int
    heldout_documents: int
    heldout_paths: tuple[str, ...]
    tokens: int
    trainable_parameters: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class Resumed(Event):
    """An earlier run of the same command is gone on with, after its `step`; each notice is a sentence for the person."""

    kind: ClassVar[str] = "resumed"
    step: int
    notices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Evaluated(Event):
    """A reading of the held-out documents with the adapter as it stands after `step` steps (0: the bare base).

    `seconds` is what the reading took.
    """

    kind: ClassVar[str] = "evaluated"
    step: int
    bits_per_byte: float
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Stepped(Event):
    """One optimizer step, counted from 1. `tokens` are those trained in this step, `seconds` those since the start."""

    kind: ClassVar[str] = "stepped"
    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    memory_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Skipped(Event):
    """A step whose loss or gradient was not finite: the adapter was left as it was."""

    kind: ClassVar[str] = "skipped"
    step: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Sampled(Event):
    """What the model writes after `prompt`, before or after training. Prompt and text may repeat a note: private."""

    kind: ClassVar[str] = "sampled"
    private: ClassVar[bool] = True
    when: str  # "before" or "after"
    prompt: str
    text: str


@dataclasses.dataclass(frozen=True)
class Saved(Event):
    """An adapter, or a checkpoint to continue from, that is now whole on disk."""

    kind: ClassVar[str] = "saved"
    step: int
    path: str
    bits_per_byte: float | None = None


@dataclasses.dataclass(frozen=True)
class Finished(Event):
    """The end of a run. Nine fields are the command line's contract; with nothing held out the scores are None."""

    kind: ClassVar[str] = "finished"
    adapter: str
    steps: int
    tokens: int
    tokens_per_second: float
    heldout_bits_per_byte_before: float | None
    heldout_bits_per_byte_after: float | None
    peak_memory_bytes: int
    device: str
    seconds: float
    best_step: int = 0
    skipped_steps: int = 0
    report: str | None = None
    promoted: bool = True  # whether it became the current adapter: not where the held-out notes read worse with it
    cut: str | None = None  # why the run ended before its plan did: "deadline"


@dataclasses.dataclass(frozen=True)
class Interrupted(Event):
    """The end of a run that was told to stop: all of it is kept, and the same command goes on after `step`."""

    kind: ClassVar[str] = "interrupted"
    step: int
    steps: int
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Exporting(Event):
    """How far a stage of an export is: `done` of `total` pieces, 0 at its beginning, `seconds` since the export began.

    The stages, of which an export has some, in this order:
    sampling    the adapted model writes texts, to round by and to measure on, where none are given
    laying out  Core ML's graph
    writing     the weights
    comparing   each weight in a Core ML package with the one it was made of
    measuring   what rounding costs, or a Q4_K_M base; after that, as a stage of its own, what the export has to agree with
    proving     what the target's own reader makes of it
    """

    kind: ClassVar[str] = "exporting"
    stage: str
    done: int
    total: int
    seconds: float


KINDS: dict[str, type[Event]] = {
    event.kind: event
    for event in (Started, Resumed, Evaluated, Stepped, Skipped, Sampled, Saved, Finished, Interrupted, Exporting)
}


def from_dict(record: dict[str, Any]) -> Event:
    """What `as_dict` wrote. Raises DataError at an unknown kind, a missing or unknown key, or a wrong type."""
    kind = record.get("event") if isinstance(record, dict) else None
    event = KINDS.get(kind) if isinstance(kind, str) else None
    if event is None:
        raise DataError(f"An event's kind is unknown: expected one of {', '.join(KINDS)}; is this a log of edgetune's?")
    values = {key: value for key, value in record.items() if key != "event"}
    wanted = _types(event)
    required = {f.name for f in dataclasses.fields(event) if f.default is dataclasses.MISSING}
    wrong = [f"no {name}" for name in sorted(required - set(values))]
    wrong += [f"{len(set(values) - set(wanted))} unknown keys"] if set(values) - set(wanted) else []
    wrong += [f"{name} of a wrong type" for name in wanted if name in values and not _fits(values[name], wanted[name])]
    if wrong:
        raise DataError(f"A {kind} event does not have its schema's fields: {', '.join(wrong)}.")
    return event(**{name: _typed(value, wanted[name]) for name, value in values.items()})


class EventLog:
    """A run's own log: JSON lines, private (0600), each event flushed to the system as it happens.

    Opening an existing log continues it after its first `most` bytes (-1: all); a half-written last line is cut off.
    """

    def __init__(self, path: Path | str, most: int = -1) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), PRIVATE_FILE)
        self._file = os.fdopen(descriptor, "r+b")
        self._file.seek(0)
        self._file.seek(self._file.read(most).rfind(b"\n") + 1)
        self._file.truncate()

    def append(self, event: Event) -> None:
        """Add one line. Raises ResourceError when the disk is full."""
        with explain_full_disk(self.path):
            self._file.write(line(event).encode() + b"\n")
            self._file.flush()

    def sync(self) -> int:
        """Make the log durable; returns its size in bytes."""
        with explain_full_disk(self.path):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Make the log durable and let it go; closing twice is harmless."""
        if not self._file.closed:
            with self._file, explain_full_disk(self.path):
                os.fsync(self._file.fileno())

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def line(event: Event) -> str:
    """One line of strict JSON, ASCII only, without its newline."""
    return json.dumps(event.as_dict(), allow_nan=False)


def read_events(path: Path | str) -> Iterator[Event]:
    """The events of a log, in order. A last line without its newline is what a crash left, and is not read.

    Raises DataError that names the file and the line where a whole line is not an event.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                yield from_dict(json.loads(raw))
            except (ValueError, RecursionError) as error:
                raise DataError(f"Line {number} of {path} is not JSON; this is not a whole event log.") from error
            except DataError as error:
                raise DataError(f"Line {number} of {path}: {error}") from error


def final_history(events: Iterable[Event]) -> list[Event]:
    """The run as it counts. A continued one repeats the steps since its last checkpoint: the later telling wins."""
    history: list[Event] = []
    continued = False
    for event in events:
        if isinstance(event, Started):
            continued = bool(history)
            history = [old for old in history if not isinstance(old, Started | Finished | Interrupted)]
        elif continued and isinstance(event, Stepped | Skipped):
            first = event.step
            history = [old for old in history if getattr(old, "step", -1) < first]
            continued = False
        history.append(event)
    return history


def _plain(value: Any) -> Any:
    """`value` as strict JSON has it: tuples as lists, non-finite floats as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _types(event: type[Event]) -> dict[str, Any]:
    hints = typing.get_type_hints(event)
    return {field.name: hints[field.name] for field in dataclasses.fields(event)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON may stand where `hint` is declared."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is types.NoneType:
        return value is None
    if hint is float:  # null is how nan is written
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, typing.get_origin(hint) or hint)


def _typed(value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    if hint is float:
        return math.nan if value is None else float(value)
    return value
