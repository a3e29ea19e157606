"""The events of training runs, exports and other long work: the only schema, rendered by the terminal, as JSON and in HTML.

A line of a run's log is `{"event": kind, ...fields in this file's order}`. Units: seconds, bytes, held-out bits per byte of
text (lower is better), and nats per trained token for losses. A number that is not finite is written as null and read back as
nan, so that every line is strict JSON.
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
from edgetune.runtime.files import explain_full_disk, open_log, open_own

FEWEST_JUDGED = 200
"""Fewest held-out tokens that must have been scored for a figure to say anything, and for one adapter to be called better than
another: of fewer, which a run of few steps reads, a single odd sentence decides. Chosen by hand."""


def judges(tokens: int) -> bool:
    """Return True if a score on so many tokens is enough to judge by."""
    return tokens >= FEWEST_JUDGED


@dataclasses.dataclass(frozen=True)
class Event:
    """The base of all events. Private ones hold text: they go to the run's own log and report, never to standard output."""

    kind: ClassVar[str]
    private: ClassVar[bool] = False

    def as_dict(self) -> dict[str, Any]:
        """Return the event, JSON-ready: its kind first, then its fields in order."""
        fields = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"event": self.kind, **fields}


@dataclasses.dataclass(frozen=True)
class Started(Event):
    """The plan of a run, yielded before step 1, and again when the run is resumed.

    `documents` and `tokens` count what is trained on; held-out documents are counted apart. Each notice is a sentence for the
    user about what was not read as it is. `masked` counts, by kind, the secrets and personal identifiers that placeholders
    replaced. `new_documents` and `changed_documents` count, held-out ones included, those that the adapter to start from does
    not know, and those that have another text than it knows.
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
    notices: tuple[str, ...] = ()
    masked: dict[str, int] = dataclasses.field(default_factory=dict)
    new_documents: int | None = None
    changed_documents: int | None = None


@dataclasses.dataclass(frozen=True)
class Resumed(Event):
    """An interrupted run of the same command continues after its `step`. Each notice is a sentence for the user."""

    kind: ClassVar[str] = "resumed"
    step: int
    notices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Evaluated(Event):
    """An evaluation of the held-out documents with the adapter after `step` steps (0: before training).

    `seconds` is the duration of the evaluation.
    """

    kind: ClassVar[str] = "evaluated"
    step: int
    bits_per_byte: float
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Stepped(Event):
    """One optimizer step, counted from 1. `tokens` were trained in this step; `seconds` have passed since the run began."""

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
    """A step whose loss or gradient was not finite, so the adapter did not change."""

    kind: ClassVar[str] = "skipped"
    step: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Sampled(Event):
    """A text that the model wrote as a continuation of `prompt`. Private, since both may repeat a note."""

    kind: ClassVar[str] = "sampled"
    private: ClassVar[bool] = True
    when: str  # "before" or "after"
    prompt: str
    text: str


@dataclasses.dataclass(frozen=True)
class Saved(Event):
    """An adapter or a checkpoint that is now completely on disk."""

    kind: ClassVar[str] = "saved"
    step: int
    path: str
    bits_per_byte: float | None = None


@dataclasses.dataclass(frozen=True)
class Finished(Event):
    """The end of a run. The nine fields without a default are the command line's contract. Scores are None if nothing is held
    out.

    `published` says what is known of the base as it was published, over the same held-out text: "same" if it is what the run
    trained on; "measured"; "unknown" if the model folder has it in fewer bits; "adapter" if the run started from one, which had
    learnt and mended before; "memory" or "time" if those allowed did not suffice. Its score alone is
    `heldout_bits_per_byte_published`, with the adapter `heldout_bits_per_byte_on_published`, and `base_bits` are those of each
    number of the base in the run, None if it is not quantised.

    `decision` says whether the adapter became the current one: the `verdict` (library/gate.py), the `reason` as a sentence, and
    the figures behind both. Its bits per byte are those of the adapter in use until then (`first`: of the bare base) and of the
    new one, on the documents that both read.

    All scores rest on `heldout_tokens` tokens. `published` is "few" if those are too few to judge by, where it would be
    "measured".
    """

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
    promoted: bool = True  # True if the adapter became the current one (library/gate.py decides)
    cut: str | None = None  # "deadline" if the run ended before its plan
    published: str | None = None
    base_bits: int | None = None
    heldout_bits_per_byte_published: float | None = None
    heldout_bits_per_byte_on_published: float | None = None
    decision: dict[str, Any] | None = None
    heldout_tokens: int | None = None
    privacy: dict[str, Any] | None = None  # of private training: epsilon, delta, what is spent, the unit, the mechanism

    @property
    def judged(self) -> bool:
        """Return True unless the scores rest on too few tokens to say which of them is better."""
        return self.heldout_tokens is None or judges(self.heldout_tokens)


@dataclasses.dataclass(frozen=True)
class Interrupted(Event):
    """The end of a run that the user stopped. Nothing is lost: the same command continues after `step`."""

    kind: ClassVar[str] = "interrupted"
    step: int
    steps: int
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Converted(Event):
    """A GGUF model was converted into a model folder in edgetune's own, where it is kept for the next time.

    `source_bytes` is the size of the GGUF file, `bytes` that of the folder's weights, whose number format is `form`. Each
    notice is a sentence for the user about what was not taken over.
    """

    kind: ClassVar[str] = "converted"
    model: str
    quantisation: str
    source_bytes: int
    form: str
    bytes: int
    seconds: float
    notices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Working(Event):
    """The progress of one stage of a long piece of work: `done` of `total` parts. `seconds` count from the stage's start.

    The parts are bytes, tokens, layers or whatever the stage counts. A run's log does not keep these events, and training
    has none for a stage that takes less than two seconds. The stages:
    reading     notes are read
    tokenizing  notes become tokens
    loading     the model's layers are loaded, and quantised where they are not yet
    answering   the untrained base answers built-in questions; `predicting` then notes how likely it found each word
    evaluating  held-out notes, or those of `edgetune eval`, are scored
    published base  held-out notes are scored by the base as it was published, layer by layer
    judging     the new adapter is compared with yesterday's: on the held-out notes and on general text
    auditing    trained notes are read to tell how much of them the new adapter gives away
    first step  the first step of a run or of its continuation: each block of the model, forward and backward
    preparing   a model of random weights is made, to be measured
    timing      `edgetune plan` and `edgetune bench` measure this machine
    calibrating `edgetune quantize --calibrate` rounds linear after linear so that outputs are kept
    quantising  `edgetune quantize` writes a model in 4 bits; `measuring` then says what that costs
    inspecting  `edgetune models` looks at what is here
    converting  a GGUF model becomes a model folder in edgetune's own
    waiting     another process converts a GGUF model

    Training has `sampling` too. An export goes through some of these, in this order:
    sampling    the model writes texts: before and after training, and for an export that measures its rounding without texts
    laying out  the graph of a Core ML package is built
    writing     the weights are written
    comparing   each weight in a Core ML package is compared with its source
    measuring   the cost of rounding, or of a Q4_K_M base; then, as a stage of its own, the output that the export must match
    proving     the target's own reader runs the export
    """

    kind: ClassVar[str] = "working"
    stage: str
    done: int
    total: int
    seconds: float


KINDS: dict[str, type[Event]] = {
    event.kind: event
    for event in (Started, Resumed, Evaluated, Stepped, Skipped, Sampled, Saved, Finished, Interrupted, Converted, Working)
}


def from_dict(record: dict[str, Any]) -> Event:
    """Return the event that `as_dict` wrote. Raises DataError for an unknown kind or key, a missing key, or a wrong type."""
    kind = record.get("event") if isinstance(record, dict) else None
    event = KINDS.get(kind) if isinstance(kind, str) else None
    if event is None:
        raise DataError(
            f"Found an event of unknown kind; expected one of {', '.join(KINDS)}. Check that edgetune wrote this log."
        )
    values = {key: value for key, value in record.items() if key != "event"}
    wanted = _types(event)
    required = {f.name for f in dataclasses.fields(event) if f.default is dataclasses.MISSING}
    wrong = [f"no {name}" for name in sorted(required - set(values))]
    wrong += [f"{len(set(values) - set(wanted))} unknown keys"] if set(values) - set(wanted) else []
    wrong += [f"{name} of the wrong type" for name in wanted if name in values and not _fits(values[name], wanted[name])]
    if wrong:
        raise DataError(f"A {kind} event does not have the expected fields: {', '.join(wrong)}.")
    return event(**{name: _typed(value, wanted[name]) for name, value in values.items()})


class EventLog:
    """The log of one run: JSON lines in a private file (0600). Each event is flushed to the system as it happens.

    Opening an existing log keeps its first `kept_bytes` bytes (-1: all), cuts off a half-written last line, and continues
    there.
    """

    def __init__(self, path: Path | str, kept_bytes: int = -1) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = open_log(self.path, kept_bytes)

    def append(self, event: Event) -> None:
        """Add one event as a line. Raises ResourceError when the disk is full."""
        with explain_full_disk(self.path):
            self._file.write(line(event).encode() + b"\n")
            self._file.flush()

    def sync(self) -> int:
        """Write the log to the disk and return its size in bytes."""
        with explain_full_disk(self.path):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Write the log to the disk and close it. Closing twice is harmless."""
        if not self._file.closed:
            with self._file, explain_full_disk(self.path):
                os.fsync(self._file.fileno())

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def line(event: Event) -> str:
    """Return the event as one line of strict JSON, ASCII only, without a newline."""
    return json.dumps(event.as_dict(), allow_nan=False)


def read_events(path: Path | str) -> Iterator[Event]:
    """Yield the events of a log in order. A last line without a newline was left by a crash and is skipped.

    Raises DataError, naming the file and the line, for a complete line that is not an event.
    """
    with open_own(path) as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                yield from_dict(json.loads(raw))
            except (ValueError, RecursionError) as error:
                raise DataError(f"Line {number} of {path} is not JSON, so this event log is damaged.") from error
            except DataError as error:
                raise DataError(f"Line {number} of {path}: {error}") from error


def final_history(events: Iterable[Event]) -> list[Event]:
    """Return the events without repeated steps. A resumed run repeats those since its last checkpoint; the later ones count."""
    history: list[Event] = []
    resumed = False
    for event in events:
        if isinstance(event, Started):
            resumed = bool(history)
            history = [old for old in history if not isinstance(old, Started | Finished | Interrupted)]
        elif resumed and isinstance(event, Stepped | Skipped):
            first = event.step
            history = [old for old in history if getattr(old, "step", -1) < first]
            resumed = False
        history.append(event)
    return history


def _plain(value: Any) -> Any:
    """Return `value` as strict JSON can hold it: tuples as lists, non-finite floats as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _types(event: type[Event]) -> dict[str, Any]:
    """Return the declared type of each field."""
    hints = typing.get_type_hints(event)
    return {field.name: hints[field.name] for field in dataclasses.fields(event)}


def _fits(value: Any, hint: Any) -> bool:
    """Return True if a value read from JSON is allowed where `hint` is declared."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is types.NoneType:
        return value is None
    if hint is float:  # nan is written as null
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, typing.get_origin(hint) or hint)


def _typed(value: Any, hint: Any) -> Any:
    """Return a value read from JSON as the type that `hint` declares."""
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    if hint is float:
        return math.nan if value is None else float(value)
    return value
