"""Events survive a round trip through JSON, and their log survives a crash."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path

import pytest

from edgetune import events
from edgetune.events import (
    Converted,
    Evaluated,
    EventLog,
    Finished,
    Interrupted,
    Resumed,
    Sampled,
    Saved,
    Skipped,
    Started,
    Stepped,
    Working,
)
from edgetune.runtime.errors import DataError

STARTED = Started(
    run="r1", model="demo", device="cpu", backend="cpu", plan={"steps": 3, "lr": 1e-3, "targets": ["q_proj"]},
    documents=48, heldout_documents=2, heldout_paths=("garden/leeks.md", "boat/oars.md"), tokens=30_000,
    trainable_parameters=500_000, parameters=16_000_000,
)  # fmt: skip
FINISHED = Finished(
    adapter="notes-1", steps=3, tokens=1200, tokens_per_second=2000.0, heldout_bits_per_byte_before=1.7,
    heldout_bits_per_byte_after=None, peak_memory_bytes=300_000_000, device="cpu", seconds=61.5, best_step=2,
)  # fmt: skip


def stepped(step: int, loss: float = 3.0) -> Stepped:
    return Stepped(
        step=step, loss=loss, learning_rate=1e-3, gradient_norm=0.5, tokens=400, tokens_per_second=2000.0,
        memory_bytes=300_000_000, seconds=0.2 * step,
    )  # fmt: skip


EVERY_KIND = [
    STARTED,
    Resumed(step=40, notices=("The notes have changed.",)),
    Evaluated(step=0, bits_per_byte=1.7, tokens=900, seconds=0.3),
    stepped(1),
    Skipped(step=2, reason="gradient not finite"),
    Sampled(when="after", prompt="The boat", text="is up on\nthe hard\x1b[2J"),
    Saved(step=2, path="adapters/notes-1", bits_per_byte=1.6),
    FINISHED,
    Interrupted(step=2, steps=3, tokens=800, seconds=41.5),
    Converted("tiny:1b", "Q4_1", 98_362_432, "bf16", 269_030_016, 3.2, ("Its system prompt is ignored.",)),
    Working(stage="writing", done=3, total=57, seconds=0.4),
]


def test_every_event_survives_a_line_of_json() -> None:
    assert {event.kind for event in EVERY_KIND} == set(events.KINDS)
    for event in EVERY_KIND:
        text = events.line(event)
        assert "\n" not in text
        assert text.isascii()
        assert events.from_dict(json.loads(text)) == event


def test_the_kind_comes_first_and_the_fields_follow_in_order() -> None:
    assert list(Saved(1, "a", None).as_dict()) == ["event", "step", "path", "bits_per_byte"]


def test_finished_has_the_keys_of_the_command_lines_contract() -> None:
    assert " ".join(list(FINISHED.as_dict())[1:10]) == (
        "adapter steps tokens tokens_per_second heldout_bits_per_byte_before heldout_bits_per_byte_after "
        "peak_memory_bytes device seconds"
    )


def test_only_generated_text_is_private() -> None:
    assert [event.kind for event in EVERY_KIND if event.private] == ["sampled"]


def test_a_number_that_is_not_finite_is_null_and_comes_back_as_nan() -> None:
    record = json.loads(events.line(stepped(1, loss=math.inf)))
    assert record["loss"] is None
    back = events.from_dict(record)
    assert isinstance(back, Stepped)
    assert math.isnan(back.loss)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"event": "exploded"}, "unknown kind"),
        ({"event": ["saved"]}, "unknown kind"),
        ({"step": "1"}, "step of the wrong type"),
        ({"step": True}, "step of the wrong type"),
        ({"step": None}, "step of the wrong type"),
        ({"bits_per_byte": "low"}, "bits_per_byte of the wrong type"),
        ({"a secret sentence": 1}, "1 unknown keys"),
    ],
)
def test_reading_is_strict(change: dict, found: str) -> None:
    with pytest.raises(DataError, match=found) as caught:
        events.from_dict({**Saved(1, "a").as_dict(), **change})
    assert "secret" not in str(caught.value)


def test_a_missing_field_is_named_and_an_optional_one_is_not_missed() -> None:
    record = Saved(1, "a").as_dict()
    del record["bits_per_byte"]
    assert events.from_dict(record) == Saved(1, "a")
    del record["path"]
    with pytest.raises(DataError, match="no path"):
        events.from_dict(record)


def test_a_log_is_private_and_each_event_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    with EventLog(path) as log:
        for count, event in enumerate(EVERY_KIND, 1):
            log.append(event)
            assert len(list(events.read_events(path))) == count
    assert list(events.read_events(path)) == EVERY_KIND
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_log_continues_after_a_crash_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append(stepped(1))
    with path.open("ab") as file:
        file.write(b'{"event": "stepped", "st')
    assert list(events.read_events(path)) == [stepped(1)]
    with EventLog(path) as log:
        log.append(stepped(2))
    assert list(events.read_events(path)) == [stepped(1), stepped(2)]


def test_a_damaged_line_is_named_by_its_number_and_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(events.line(stepped(1)) + "\nmy diary\n")
    with pytest.raises(DataError, match=r"Line 2 of .*events\.jsonl") as caught:
        list(events.read_events(path))
    assert "diary" not in str(caught.value)


def test_a_continued_run_counts_each_step_once() -> None:
    first = [STARTED, Evaluated(0, 1.7, 9, 0.1), stepped(1), stepped(2, 3.0), Evaluated(2, 1.6, 9, 0.5), stepped(3)]
    second = [STARTED, stepped(2, 2.9), stepped(3, 2.8), FINISHED]
    history = events.final_history(first + second)
    steps = [(event.step, event.loss) for event in history if isinstance(event, Stepped)]
    assert steps == [(1, 3.0), (2, 2.9), (3, 2.8)]
    assert [event.step for event in history if isinstance(event, Evaluated)] == [0]
    assert sum(isinstance(event, Started) for event in history) == 1
