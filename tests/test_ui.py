"""No text of a model can control the terminal, and the three renderers show the same run."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import threading
import time
import unicodedata
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from edgetune import progress
from edgetune.events import FEWEST_JUDGED, Evaluated, Event, Finished, Sampled, Skipped, Started, Stepped, Working, from_dict
from edgetune.reports import terminal as ui
from edgetune.reports.text import human_bytes, human_time, sanitize


def run_of(steps: int, seconds_per_step: float = 1.0, heldout: bool = True) -> Iterator[Event]:
    """Yield the events of an invented run in which everything happens that can happen."""
    yield Started(
        run="r1", model="demo", device="cpu", backend="cpu", plan={"steps": steps}, documents=48, heldout_documents=2,
        heldout_paths=("a.md", "b.md"), tokens=30_000, trainable_parameters=500_000, parameters=16_000_000,
    )  # fmt: skip
    yield Evaluated(step=0, bits_per_byte=1.732, tokens=900, seconds=0.3)
    yield Sampled(when="before", prompt="a secret of the notes", text="the\x1b[31m boat")
    for step in range(1, steps + 1):
        yield Stepped(
            step=step, loss=4 - step / steps, learning_rate=1e-3, gradient_norm=0.5, tokens=512,
            tokens_per_second=2310.4, memory_bytes=312_000_000, seconds=step * seconds_per_step,
        )  # fmt: skip
    yield Skipped(step=steps, reason="gradient not finite")
    yield Evaluated(step=steps, bits_per_byte=1.558, tokens=900, seconds=0.3)
    yield Finished(
        adapter="notes-1", steps=steps, tokens=512 * steps, tokens_per_second=2310.4,
        heldout_bits_per_byte_before=1.732 if heldout else None, heldout_bits_per_byte_after=1.558 if heldout else None,
        peak_memory_bytes=412_000_000, device="cpu", seconds=steps * seconds_per_step, best_step=steps, skipped_steps=1,
        report="/home/x/report.html",
    )  # fmt: skip


def plain(events: Iterator[Event]) -> list[str]:
    file = io.StringIO()
    with ui.renderer(file=file) as renderer:
        for event in events:
            renderer.show(event)
    return file.getvalue().splitlines()


@given(st.text(st.characters()))
@example("\x1b]0;title\x07\x1b[2J\x9b31m\r\x00\x7f\u202eevil\u2066\u2028")
def test_no_control_character_survives_sanitize(text: str) -> None:
    shown = sanitize(text)
    kinds = {unicodedata.category(char) for char in shown if char not in "\n\t"}
    assert not kinds & {"Cc", "Cs", "Zl", "Zp"}
    assert not {unicodedata.bidirectional(char) for char in shown} & {
        "LRE",
        "RLE",
        "LRO",
        "RLO",
        "PDF",
        "LRI",
        "RLI",
        "PDI",
    }
    shown.encode()


@given(st.text(), st.text())
def test_sanitize_is_the_same_in_a_stream_cut_anywhere(a: str, b: str) -> None:
    assert sanitize(a + b) == sanitize(a) + sanitize(b)


def test_sanitize_shows_what_it_disarms_and_leaves_honest_text_alone() -> None:
    honest = "naïve café\n\t– 日本語 עברית 👩‍🌾 [red]not markup[/red]"
    assert sanitize(honest) == honest
    assert sanitize("\x1b[2Jgone") == "␛[2Jgone"
    assert sanitize("line\r\nline") == "line\nline"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (31_400_000, "31.4 MB"), (999_600_000, "1.00 GB"),
     (412e6, "412 MB"), (2e15, "2000 TB")],
)  # fmt: skip
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (8040, "2 h 14 min"),
     (97_300, "1 d 3 h"), (math.nan, "?"), (-1, "?")],
)  # fmt: skip
def test_time_for_people(seconds: float, text: str) -> None:
    assert human_time(seconds) == text


def test_json_lines_are_every_event_but_the_private_ones() -> None:
    file = io.StringIO()
    with ui.renderer(json=True, file=file) as renderer:
        for event in run_of(3):
            renderer.show(event)
    records = [json.loads(text) for text in file.getvalue().splitlines()]
    assert [record["event"] for record in records] == [event.kind for event in run_of(3) if not event.private]
    assert records[-1]["heldout_bits_per_byte_after"] == 1.558
    assert "secret" not in file.getvalue()


def test_plain_lines_are_few_however_long_the_run() -> None:
    fast, night = plain(run_of(1000, 0.01)), plain(run_of(50_000, 0.6))
    assert len([text for text in fast if text.startswith("step") and "/1000" in text]) == 10
    assert len(night) < 120


def test_plain_lines_tell_the_whole_run() -> None:
    lines = plain(run_of(10))
    text = "\n".join(lines)
    assert lines[0].startswith("Base model demo on cpu: learning from 48 documents, 2 held out to test it; 30,000 tokens")
    assert lines[1] == "step 0: held-out 1.732 bits/byte (lower is better; measured on notes the model has not seen)"
    assert text.count("lower is better") == 1  # explained once, where the figure first appears
    assert "step 5/10, 2,310 tokens/s, loss 3.500, held-out 1.732 bits/byte, 312 MB, 5.0 s left" in lines
    assert "Held-out notes: 1.732 to 1.558 bits per byte (10.0% lower), best at step 10" in lines
    assert "peak memory 412 MB" in text
    assert "Report: /home/x/report.html" in lines
    assert "secret" not in text
    assert "\x1b" not in text


def test_a_held_out_figure_from_few_tokens_is_called_rough() -> None:
    first = Evaluated(step=0, bits_per_byte=1.366, tokens=10, seconds=0.1)
    expected = "lower is better; measured on notes the model has not seen; a rough figure, from 10 tokens"
    assert ui.evaluated_line(first, first=True) == f"step 0: held-out 1.366 bits/byte ({expected})"
    enough = Evaluated(step=0, bits_per_byte=1.366, tokens=FEWEST_JUDGED, seconds=0.1)
    assert "rough" not in ui.evaluated_line(enough, first=True)


def test_without_held_out_notes_no_improvement_is_claimed() -> None:
    text = "\n".join(plain(run_of(3, heldout=False)))
    assert "Nothing was held out" in text
    assert "% lower" not in text


def test_the_live_bar_shows_all_figures_in_a_terminal_of_80_columns() -> None:
    file = io.StringIO()
    with ui.Live(file, Console(file=file, force_terminal=True, width=80, color_system=None)) as live:
        for event in run_of(4):
            live.show(event)
            if isinstance(event, Stepped) and event.step == 3:
                live._live.refresh()
                shown = file.getvalue()
    for figure in ("3/4", "2,310 tokens/s", "loss 3.250", "held-out 1.732", "312 MB", "1.0 s left"):
        assert figure in shown
    assert "Held-out notes: 1.732 to 1.558" in file.getvalue()


def test_the_live_bar_gives_the_terminal_back_after_an_exception() -> None:
    file = io.StringIO()

    def interrupted() -> None:
        with ui.Live(file, Console(file=file, force_terminal=True, width=80)) as live:
            live.show(next(run_of(4)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


def test_an_adapter_that_made_things_worse_is_said_to_be_kept_aside() -> None:
    *events, last = run_of(2)
    assert isinstance(last, Finished)
    worse = dataclasses.replace(last, heldout_bits_per_byte_after=1.905, promoted=False)
    text = "\n".join(plain(iter([*events, worse])))
    assert "1.732 to 1.905 bits per byte (10.0% higher), best at step 2" in text
    assert "Adapter: notes-1 (to try it all the same: --adapter and this folder)" in text


def test_a_hostile_name_of_an_adapter_is_disarmed() -> None:
    *events, last = run_of(2)
    assert isinstance(last, Finished)
    lines = plain(iter([*events, dataclasses.replace(last, adapter="x\x1b[2J\nfake line")]))
    assert "Adapter: x␛[2J fake line" in lines


def test_long_work_is_told_of_after_two_seconds_and_then_rarely() -> None:
    events = [Working("reading", 0, 40, 0.0), Working("reading", 40, 40, 1.9)]
    events += [Working("writing", done, 40, 1.0 * done) for done in range(41)] + [Working("proving", 0, 1, 2.5)]
    assert [from_dict(event.as_dict()) for event in events] == events
    shown = [io.StringIO(), io.StringIO()]
    with ui.Plain(shown[0]) as plain, ui.JsonLines(shown[1]) as lines:
        for event in events:
            plain.show(event)
            lines.show(event)
    seconds = [2, 7, 12, 17, 22, 27, 32, 37]
    written = [f"writing: {second * 100 // 40} % after {human_time(second)}" for second in seconds]
    assert shown[0].getvalue().splitlines() == [*written, "proving: 0 % after 2.5 s"]
    assert [json.loads(text) for text in shown[1].getvalue().splitlines()] == [event.as_dict() for event in events]


def test_a_long_stage_of_one_part_is_told_of_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "TOLD_AFTER_SECONDS", 0.05)
    file = io.StringIO()
    with ui.Plain(file) as plain:
        plain.show(Working("measuring", 0, 1, 0.0))
        plain.show(Working("measuring", 1, 1, 0.01))
        plain.show(Working("proving", 0, 1, 0.0))
        time.sleep(0.3)
    assert file.getvalue() == "proving: 0 % after 0.1 s\n"
    with ui.Plain(file) as plain:
        plain.show(Working("writing", 0, 1, 0.0))
    time.sleep(0.1)
    assert "writing" not in file.getvalue()


def test_the_live_bar_shows_how_far_long_work_is_and_then_the_steps_again() -> None:
    started, _, _, stepped, *_ = run_of(4)
    file = io.StringIO()
    with ui.Live(file, Console(file=file, force_terminal=True, width=80, color_system=None)) as live:
        for event in (started, Working("evaluating", 300, 1200, 4.2)):
            live.show(event)
        live._live.refresh()
        assert "25 %" in file.getvalue()
        assert "evaluating · 4.2 s" in file.getvalue()
        file.truncate(0)
        live.show(stepped)
        live._live.refresh()
        assert "evaluating" not in file.getvalue()
        assert "1/4" in file.getvalue()


def test_stages_tell_after_a_while_each_percent_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("edgetune.progress.time.monotonic", lambda: clock[0])
    told: list[Event] = []
    stages = progress.Stages(told.append, quiet=2.0, pause=0.5)
    short = stages.of("reading")
    short(0, 10)
    clock[0] = 1.0
    short(10, 10)
    assert told == []  # it took less than two seconds
    long = stages.of("tokenizing")
    for second in range(20):
        clock[0] += 1.0
        long(second // 8 * 100, 400)
    clock[0] += 0.1
    long(400, 400)
    # Seconds 2 to 20: at first, with each percent, five seconds after the last event, and at the end.
    assert [(event.done, round(event.seconds, 1)) for event in told if isinstance(event, Working)] == [
        (0, 2.0), (0, 7.0), (100, 9.0), (100, 14.0), (200, 17.0), (400, 20.1)
    ]  # fmt: skip


def test_whoever_asks_a_stage_to_stop_is_heard_at_its_next_report() -> None:
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise InterruptedError

    reports = progress.Stages(lambda event: None, check).of("reading")
    reports(0, 10)
    stop.set()
    with pytest.raises(InterruptedError):
        reports(1, 10)


def test_one_document_and_one_step_are_no_plural() -> None:
    events = list(run_of(1))
    started, end = events[0], events[-1]
    assert isinstance(started, Started)
    assert isinstance(end, Finished)
    assert "learning from 1 document, " in ui.started_line(dataclasses.replace(started, documents=1, heldout_documents=1))
    assert any(line.startswith("1 step, ") for line in ui.finished_lines(dataclasses.replace(end, steps=1)))


def test_rows_that_were_cut_and_the_form_of_the_base_are_said() -> None:
    started = next(run_of(1))
    assert isinstance(started, Started)
    plan = {"steps": 1, "seq_len": 256, "settings": {"data": {"seq_len": 512}}}
    assert "; rows of 256 tokens, as many as the model has positions;" in ui.started_line(
        dataclasses.replace(started, plan=plan)
    )
    kept = {**plan, "weights": "bf16", "base_bytes": 270_000_000}
    assert ui.started_line(dataclasses.replace(started, plan=kept)).startswith("Base model demo in bf16 (270 MB) on cpu: ")
    same = {**plan, "settings": {"data": {"seq_len": 256}}}
    assert "rows of" not in ui.started_line(dataclasses.replace(started, plan=same))
