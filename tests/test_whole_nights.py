"""Nights that truly train: each starts from yesterday's adapter, replays, is judged, and never learns from half a vault."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner, Result
from simulated_system import SimulatedSystem

from edgetune.cli.main import cli
from edgetune.config import NightlyConfig
from edgetune.events import Event, Started
from edgetune.home import unfinished_folder
from edgetune.library import adapter_registry as registry
from edgetune.library import privacy_ledger as ledger
from edgetune.library.kept_adapters import describe
from edgetune.nights.begin import manual_night, run_due
from edgetune.nights.job import Job
from edgetune.nights.night import Means
from edgetune.nights.record import NightRecord, Outcome
from edgetune.nights.trainer import EdgetuneTrainer

WORDS = ["harbour", "allotment", "bicycle", "spoke", "kettle", "ledger", "orchard", "gasket"]


class Nights:
    """A vault of short notes, and a machine on which nothing but training takes time."""

    def __init__(self, folder: Path, **settings: object) -> None:
        tiny.save_trainable(folder / "model")
        self.vault, self.system, self.started = folder / "notes", SimulatedSystem(time.time()), list[Started]()
        self.vault.mkdir()
        chosen = {"model": str(folder / "model"), "seq_len": 64, "batch_tokens": 512, "rank": 2, "lr": 0.01, "epochs": 2.0}
        self.job = Job((str(self.vault),), NightlyConfig(), "cron", self.system.now(), {**chosen, **settings})
        self.job.save()

    def write(self, number: int, text: str = "was mended") -> None:
        first, second = WORDS[number % 8], WORDS[number // 8 % 8]
        path = self.vault / f"{number}.md"
        path.write_text(f"Note {number}: the {first} by the {second} {text} on day {number}. Anna {number} helped. " * 3)
        os.utime(path, (self.system.now() - 3600,) * 2)

    def night(self) -> NightRecord:
        self.system.advance(86400)
        means = Means(self.system, EdgetuneTrainer(), show=self._keep, look_every=None)
        return run_due(self.job, manual_night(self.system.now()), means)

    def _keep(self, event: Event) -> None:
        if isinstance(event, Started):
            self.started.append(event)


@pytest.mark.slow
def test_nights_learn_from_yesterdays_adapter_what_is_new_and_stop_where_notes_are_lost(tmp_path: Path) -> None:
    nights = Nights(tmp_path)
    for number in range(240):
        nights.write(number)
    (nights.vault / "mail.md").write_text("Write to anna@example.org about the harbour. " * 3)
    os.utime(nights.vault / "mail.md", (nights.system.now() - 3600,) * 2)
    first = nights.night()
    assert (first.outcome, first.verdict, first.new_notes, first.parent) == (Outcome.BETTER, "better", 241, None)
    assert sum(first.masked.values()) == 3
    later = nights.system.now() + 60
    os.utime(nights.vault / "7.md", (later, later))  # touched, with the text that it had
    touched = nights.night()
    assert (touched.outcome, touched.changed_notes, touched.reason[:40]) == (
        Outcome.NOTHING_NEW, 1, "The notes that changed read as before, o"
    )  # fmt: skip
    assert nights.night().changed_notes == 0

    for number in range(240, 246):
        nights.write(number, "was painted")
    nights.write(0, "was sold")
    (nights.vault / "9.md").rename(nights.vault / "renamed.md")
    for name in ("8.md", "renamed.md"):  # the text that they had, at another time
        os.utime(nights.vault / name, (later + 60, later + 60))
    second = nights.night()
    assert (second.new_notes, second.changed_notes, second.parent) == (6, 1, first.adapter)
    assert second.verdict != "too few", "a short night still reads enough held-out notes"
    assert second.adapter is not None
    assert "new or changed notes and on" in "".join(nights.started[-1].notices), "and replays some of the older ones"
    base = str(nights.started[-1].plan["base"])
    assert describe(registry.adapters_folder(base) / second.adapter).parent == first.adapter
    now_current = second.adapter if second.outcome is Outcome.BETTER else first.adapter
    current = registry.get_current(base)
    assert current is not None
    assert current.adapter.name == now_current

    for number in range(100):
        (nights.vault / f"{number}.md").unlink(missing_ok=True)
    assert nights.night().outcome is Outcome.NOTES_MISSING
    assert len(nights.started) == 2
    assert registry.get_current(base) == current


def edgetune(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


@pytest.mark.slow
def test_private_nights_share_one_budget_and_the_night_that_finds_it_spent_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dp_accounting")
    nights = Nights(tmp_path, private="8,runs=2", batch_tokens=64)
    nights.system.advance(-3 * 86400)  # the third night is that of the real clock
    for number in range(24):
        nights.write(number)
    first = nights.night()
    assert (first.outcome, first.new_notes) == (Outcome.FIRST, 24)
    nights.write(24)
    second = nights.night()
    assert (second.outcome, second.new_notes, second.parent) == (Outcome.TOO_FEW, 1, first.adapter)
    entries = ledger.entries()
    assert [entry.run for entry in entries] == [first.adapter, second.adapter]
    assert {entry.lineage for entry in entries} == {first.adapter}
    base = str(nights.started[-1].plan["base"])
    promise = describe(registry.adapters_folder(base) / str(second.adapter)).private
    assert promise is not None
    assert 7.8 < float(promise.rpartition("spent ")[2]) <= 8
    current = registry.get_current(base)

    nights.system.true = time.time()
    nights.write(25)
    installed = {name: value for name, value in nights.job.settings.items() if name != "epochs"}  # which install does not take
    dataclasses.replace(nights.job, settings=installed).save()
    monkeypatch.setattr("edgetune.nights.this_system.ThisSystem", lambda: nights.system)
    result = edgetune("nightly", "run", "--minutes", "5")
    assert result.exit_code == 1
    assert (
        ": no privacy left; nothing changed. The adapter and those that it was trained from have spent epsilon" in result.stdout
    )
    assert result.stdout.endswith("or give `edgetune nightly install` a larger --private.\n")
    assert result.stdout.strip() in edgetune("nightly", "status").stdout
    assert f"Since then: {result.stdout}" in edgetune("report").stdout
    assert (registry.get_current(base), ledger.entries()) == (current, entries)
    assert list(unfinished_folder().glob("*/run.json")) == []
