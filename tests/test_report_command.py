"""The morning report: one sentence in plain words first, for every verdict; `edgetune report` finds the latest."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgetune.cli.main import cli
from edgetune.events import EventLog, Finished, Started
from edgetune.home import home
from edgetune.library.gate import Change, Evidence, Extracted, PairedDocument, Verdict, decide
from edgetune.library.promotion import promote, rollback
from edgetune.nights.record import Kind, NightRecord, Outcome
from edgetune.reports import desktop
from edgetune.reports.html import render, write_report
from edgetune.reports.terminal import finished_lines
from edgetune.reports.verdicts import BECAUSE, LEARNED, first_sentence, judgement
from edgetune.runtime.errors import UsageError

STARTED = Started(
    run="r", model="demo", device="cpu", backend="cpu", plan={"steps": 3}, documents=7, heldout_documents=12, heldout_paths=(),
    tokens=900, trainable_parameters=5, parameters=50, notices=("3 files were skipped: 2 empty, 1 binary.",),
)  # fmt: skip


def finished(verdict: str, first: bool = False, reason: str = "Because it is so.") -> Finished:
    return Finished(
        adapter="night", steps=3, tokens=1200, tokens_per_second=2000.0, heldout_bits_per_byte_before=1.7,
        heldout_bits_per_byte_after=1.6, peak_memory_bytes=10**8, device="cpu", seconds=61.5,
        promoted=verdict in LEARNED and verdict != "too few", decision={"verdict": verdict, "reason": reason, "first": first},
    )  # fmt: skip


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def write_run(name: str, *events: Any, at: float) -> Path:
    folder = home() / "runs" / name
    with EventLog(folder / "events.jsonl") as log:
        for event in events:
            log.append(event)
    write_report(folder / "report.html", events)
    os.utime(folder / "report.html", (at, at))
    return folder / "report.html"


STAYS = "your current adapter stays in use because the new one"
SENTENCES = {
    ("better", False): "Learned from 7 notes; better on notes it had not seen; now in use.",
    ("better", True): "Learned from 7 notes; better on notes it had not seen; now in use.",
    ("first", True): "Learned from 7 notes; too few held-out notes were read to judge it; now in use, since no adapter was "
    "before.",
    ("too few", False): "Learned from 7 notes; too few held-out notes were read to judge it; kept beside your current adapter, "
    "which stays in use.",
    ("not better", False): f"Nothing new learned: {STAYS} is no better on notes it had not seen.",
    ("not better", True): "Nothing new learned: the bare base model stays in use because the new one is no better on notes it "
    "had not seen.",
    ("forgets", False): f"Learned from 7 notes, but {STAYS} unlearnt too much else.",
    ("replies worse", False): f"Learned from 7 notes, but {STAYS} answers in chats worse than the base model.",
    ("leaks", False): f"Learned from 7 notes, but {STAYS} repeats too much of your "
    "notes word for word, or tells them too well from others.",
}


@pytest.mark.parametrize(("verdict", "first"), SENTENCES)
def test_the_first_sentence_of_every_verdict(verdict: str, first: bool) -> None:
    end, expected = finished(verdict, first), SENTENCES[verdict, first]
    assert first_sentence(7, end) == expected
    assert finished_lines(end, 7)[:2] == [expected, "Because it is so."]
    page = render([STARTED, end])
    assert f"<h1>{expected}</h1>" in page
    assert "Because it is so." in page
    assert "3 files were skipped: 2 empty, 1 binary." in page


def test_every_verdict_of_the_gate_has_its_words() -> None:
    assert {*BECAUSE, *LEARNED} == set(Verdict)
    assert judgement("too few") == "too few held-out notes were read to judge it"
    assert judgement("exploded") == "exploded"
    assert {verdict for verdict, _ in SENTENCES} == set(Verdict)


HELD_OUT = tuple(PairedDocument(1000, 2000, 1900 + each) for each in range(12))
"""Held-out documents on which the new adapter is better, by the gate."""
WORSE = tuple(dataclasses.replace(document, bits_after=2100) for document in HELD_OUT)
ENDS = {
    Verdict.BETTER: Evidence(HELD_OUT),
    Verdict.FIRST: Evidence(HELD_OUT[:1], first=True),
    Verdict.TOO_FEW: Evidence(HELD_OUT[:1]),
    Verdict.NOT_BETTER: Evidence(WORSE),
    Verdict.FORGETS: Evidence(HELD_OUT, Change(1.0, 1.5)),
    Verdict.REPLIES_WORSE: Evidence(HELD_OUT, None, Change(1.0, 1.5)),
    Verdict.LEAKS: Evidence(HELD_OUT, extracted=Extracted(9, 9, 0.05)),
}
"""What the gate decides by, for each of its verdicts."""


def test_the_last_lines_tell_one_story_for_every_verdict_of_the_gate() -> None:
    """The claim stands in the first sentence alone: the reason below it has the figures, and the adapter's line its folder."""
    for verdict, evidence in ENDS.items():
        decision = decide(evidence)
        assert decision.verdict is verdict
        end = dataclasses.replace(finished(str(verdict), evidence.first, decision.reason), heldout_tokens=90)
        sentence, reason, *rest = finished_lines(end, 7)
        claims = ("too few", "in use", "judge it", "no better", "on notes it had not seen", "unlearnt", "current adapter stays")
        repeated = [claim for claim in claims if claim in sentence and claim in " ".join([reason, *rest])]
        assert repeated == [], verdict
        assert rest[0] == "Held-out notes: 1.700 to 1.600 bits per byte (rough figures, from 90 tokens alone)"
        assert rest[-1] == "Adapter: night" + ("" if end.promoted else " (to try it all the same: --adapter and this folder)")


def test_a_run_that_beat_its_beginning_but_not_the_current_adapter_shows_all_three_scores() -> None:
    end = finished("not better")
    scores = {"current_bits_per_byte": 1.55, "new_bits_per_byte": 1.6}
    worse = dataclasses.replace(end, best_step=3, decision={**(end.decision or {}), **scores})
    expected = "Held-out notes: 1.700 to 1.600 bits per byte (5.9% lower), best at step 3"
    assert finished_lines(worse)[2] == f"{expected}; 1.550 with your current adapter"
    better = dataclasses.replace(worse, promoted=True, decision={**scores, "verdict": "better", "current_bits_per_byte": 1.65})
    assert finished_lines(better)[1] == f"{expected}; 1.650 with the adapter before it"
    for unlike in (
        {"new_bits_per_byte": 1.4},
        {"current_bits_per_byte": 1.7},
        {"first": True},
        {"current_bits_per_byte": None},
    ):
        assert finished_lines(dataclasses.replace(worse, decision={**(worse.decision or {}), **unlike}))[2] == expected


def test_one_note_is_not_called_notes_and_an_unknown_verdict_has_no_sentence() -> None:
    assert first_sentence(1, finished("better")) == "Learned from 1 note; better on notes it had not seen; now in use."
    assert first_sentence(None, finished("better")) == "Learned; better on notes it had not seen; now in use."
    assert first_sentence(7, finished("exploded")) is None
    assert first_sentence(7, dataclasses.replace(finished("better"), decision=None)) is None


def test_a_hostile_reason_is_disarmed() -> None:
    end = finished("better", reason="x\x1b[2J<script>")
    assert finished_lines(end, 7)[1] == "x␛[2J<script>"
    assert "<script>" not in render([STARTED, end])


def test_the_command_finds_the_latest_report() -> None:
    write_run("2026-11-27-010000", STARTED, finished("first", True), at=1000.0)
    latest = write_run("2026-11-28-010000", STARTED, finished("better"), at=2000.0)
    write_run("2026-11-28-020000", STARTED, finished("forgets"), at=1500.0)
    said = run("report").stdout.splitlines()
    assert (said[0], said[-1]) == (SENTENCES["better", False], f"Report: {latest}")
    assert run("report", "--path").stdout == f"{latest}\n"
    record = json.loads(run("report", "--json").stdout)
    assert record == {
        "run": "2026-11-28-010000", "path": str(latest), "sentence": SENTENCES["better", False], "adapter": "night",
        "promoted": True, "decision": {"verdict": "better", "reason": "Because it is so.", "first": False},
        "in_use": False, "encrypted": False, "later_night": None,
    }  # fmt: skip


def test_a_later_night_that_trained_nothing_is_told_too() -> None:
    write_run("2026-11-27-010000", STARTED, finished("better"), at=1000.0)
    NightRecord("2026-11-26", Kind.NIGHT, 900.0, 2000.0, outcome=Outcome.NOTHING_NEW).save()
    assert "Since then:" not in run("report").stdout
    NightRecord("2026-11-28", Kind.NIGHT, 1100.0, 2000.0, outcome=Outcome.PRIVACY_SPENT, reason="All is spent.").save()
    sentence = "Night 2026-11-28: no privacy left; nothing changed. All is spent."
    assert run("report").stdout.splitlines()[-2] == f"Since then: {sentence}"
    assert json.loads(run("report", "--json").stdout)["later_night"] == sentence
    NightRecord("2026-11-29", Kind.NIGHT, 1200.0, 2000.0, outcome=Outcome.NOT_BETTER, adapter="it").save()
    assert "Since then:" not in run("report").stdout


def test_an_adapter_that_was_rolled_back_is_not_said_to_be_in_use(tmp_path: Path) -> None:
    folder = tmp_path / "night"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    write_run("2026-11-28-010000", STARTED, dataclasses.replace(finished("better"), adapter=str(folder)), at=1000.0)
    promote(folder, "demo", "ab" * 32)
    assert "Since then" not in run("report").stdout
    assert json.loads(run("report", "--json").stdout)["in_use"] is True
    rollback("ab" * 32)
    assert run("report").stdout.splitlines()[:2] == [
        SENTENCES["better", False],
        "Since then another adapter was made current, or none: `edgetune adapters list` marks those in use.",
    ]
    assert json.loads(run("report", "--json").stdout)["in_use"] is False


def test_a_damaged_log_still_leads_to_its_report() -> None:
    path = write_run("2026-11-28-010000", STARTED, finished("better"), at=1000.0)
    (path.parent / "events.jsonl").write_text("my diary\n")
    said = run("report")
    assert said.exit_code == 0, said.output
    assert said.stdout.endswith(f"Report: {path}\n")
    assert "diary" not in said.output


def test_without_a_run_there_is_one_sentence() -> None:
    assert isinstance(run("report").exception, UsageError)
    assert "every run writes one" in str(run("report").exception)


def test_opening_and_naming_exclude_each_other() -> None:
    for flag in ("--path", "--json"):
        assert "leave one of them out" in run("report", "--open", flag).output


def test_it_is_opened_on_a_desktop_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(desktop, "open_file", lambda path: opened.append(path) is None)
    path = write_run("2026-11-28-010000", STARTED, finished("better"), at=1000.0)
    run("report")  # standard output is no terminal here
    assert opened == []
    assert f"Report (opened): {path}" in run("report", "--open").stdout
    assert opened == [path]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list of the commands that the desktop is asked to run; each is here, and ends well."""
    commands: list[list[str]] = []

    def record(words: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        commands.append(words)
        assert options["timeout"] <= 5
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", record)
    return commands


def test_a_notification_is_passed_as_arguments_and_never_as_a_script(
    ran: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '" & (do shell script "rm -rf /") & "'
    monkeypatch.setattr("sys.platform", "linux")
    assert desktop.notify("--edgetune", text)
    monkeypatch.setattr("sys.platform", "darwin")
    assert desktop.notify("--edgetune", text)
    assert ran[0] == ["notify-send", "--app-name=edgetune", "--", "--edgetune", text]
    assert ran[1][0] == "osascript"
    assert ran[1][-2:] == ["--edgetune", text]
    assert [word for word in ran[1][1:-2] if text in word] == []


def test_without_a_desktop_nothing_happens(ran: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not desktop.open_file(Path("report.html"))
    monkeypatch.setenv("DISPLAY", ":0")
    assert desktop.open_file(Path("report.html"))
    assert ran == [["xdg-open", "report.html"]]
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not desktop.notify("edgetune", "Done.")
    assert len(ran) == 1


def test_a_desktop_that_hangs_or_fails_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name)

    def hangs(words: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(words, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    assert not desktop.notify("edgetune", "Done.")
    monkeypatch.setattr(subprocess, "run", lambda words, **options: subprocess.CompletedProcess(words, 1))
    assert not desktop.notify("edgetune", "Done.")
