"""Random weeks of nights, in which whatever can happen to a machine happens, keep every promise that nights make."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from simulated_system import Killed, SimulatedSystem, SimulatedTrainer, full_disk

from edgetune.config import NightlyConfig
from edgetune.nights.begin import due_night, manual_night, run_due
from edgetune.nights.conditions import Level
from edgetune.nights.job import Job
from edgetune.nights.night import Means
from edgetune.nights.record import Kind, Outcome, Stage, all_records, record_of
from edgetune.nights.window import next_start
from edgetune.runtime.errors import BusyError
from edgetune.runtime.files import atomic_write

pytestmark = pytest.mark.skipif(not hasattr(time, "tzset"), reason="Windows cannot change a process's time zone")

AT, UNTIL = "01:00", "07:00"
ZONES = {
    "Europe/Berlin": ("2026-03-26", "2026-10-22", "2026-06-01"),
    "America/New_York": ("2026-03-05", "2026-10-29", "2026-06-01"),
    "UTC": ("2026-06-01",),
}
"""Time zones, and days shortly before their clocks change or far from it."""
WRITERS = ("record", "tonight", "vault", "job", "begin")
"""The modules of nights that write files."""


class Week:
    """A week of a machine on which everything happens at random times, all of it drawn from one seed."""

    def __init__(self, seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.random = random.Random(seed)
        zone = self.random.choice(list(ZONES))
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        day = datetime.fromisoformat(self.random.choice(ZONES[zone])) + timedelta(hours=self.random.uniform(8, 24))
        self.system = SimulatedSystem(day.timestamp())
        self.trainer = SimulatedTrainer(
            self.system,
            next_gain=lambda: self.random.uniform(-0.02, 0.04),
            step_seconds=self.random.choice([20.0, 60.0, 400.0]),
            steps=self.random.choice([15, 60]),
            before_anything=self.passes,
        )
        self.fuse = 0
        self.disk_is_full = self.was_full = False
        self.busy = 0
        for module in WRITERS:
            monkeypatch.setattr(f"edgetune.nights.{module}.atomic_write", self.writes)
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here ends by a loss of power
        self.vault = folder / "notes"
        self.away = folder / "away"
        self.vault.mkdir()
        self.notes = 0
        for _ in range(4):
            self.write_note()
        battery = self.random.choice([None, 50])
        self.job = Job((str(self.vault),), NightlyConfig(AT, UNTIL, battery), "cron", self.system.now())
        self.job.save()

    # -- what can happen

    def passes(self, where: str) -> None:
        """Be a point at which the process may be killed, and at which another night may try to begin."""
        if self.fuse:
            self.fuse -= 1
            if not self.fuse:
                raise Killed
        if where == "step":
            if self.disk_is_full:
                raise full_disk()
            if self.random.random() < 0.02:
                self.busy += 1
                with pytest.raises(BusyError):
                    run_due(self.job, manual_night(self.system.now()), self.means())

    def writes(self, path: Path | str, data: bytes | str) -> None:
        self.passes("before a write")
        if self.disk_is_full:
            self.was_full = True
            raise full_disk()
        atomic_write(path, data)
        self.passes("after a write")

    def write_note(self) -> None:
        folder = self.vault if self.vault.exists() else self.away
        path = folder / f"{self.notes}.md"
        self.notes += 1
        path.write_text(f"note {self.notes} {self.random.random()}")
        age = self.random.choice([5.0, 3600.0])  # perhaps it is still being written
        os.utime(path, (self.system.now() - age,) * 2)

    def lose_notes(self) -> None:
        for path in sorted((self.vault if self.vault.exists() else self.away).glob("*.md"))[:2]:
            path.unlink()

    def fill_disk(self, full: bool) -> None:
        self.disk_is_full, self.was_full = full, self.was_full or full
        self.system.free = 1 << 20 if full else 100 << 30

    def mount(self, there: bool) -> None:
        source, target = (self.away, self.vault) if there else (self.vault, self.away)
        if source.exists() and not target.exists():
            source.rename(target)

    def light_fuse(self) -> None:
        self.fuse = self.random.randint(1, 80)

    def wake_darkly(self) -> None:
        """Sleep for hours, but for some seconds every quarter of an hour."""
        for number in range(self.random.randint(4, 20)):
            self.system.at(self.system.true + 30 + number, lambda: self.system.sleep(900))

    def for_a_while(self, name: str, during: object, after: object) -> None:
        setattr(self.system, name, during)
        self.system.at(self.system.true + self.random.uniform(60, 6 * 3600), lambda: setattr(self.system, name, after))

    def between(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        begin()
        self.system.at(self.system.true + self.random.uniform(60, 12 * 3600), end)

    def happenings(self) -> list[Callable[[], object]]:
        system, draw = self.system, self.random.uniform
        return [
            lambda: self.for_a_while("mains", False, True),
            lambda: self.for_a_while("charge", draw(5, 100), 80.0),
            lambda: self.for_a_while("hot", self.random.choice(list(Level)), Level.LOW),
            lambda: self.for_a_while("short_of_memory", self.random.choice(list(Level)), Level.LOW),
            lambda: setattr(system, "last_input", system.true),
            lambda: system.sleep(draw(10, 10 * 3600)),
            self.wake_darkly,
            lambda: setattr(system, "wall_offset", system.wall_offset + draw(-5400, 5400)),
            lambda: self.between(lambda: self.fill_disk(True), lambda: self.fill_disk(False)),
            lambda: self.between(lambda: self.mount(False), lambda: self.mount(True)),
            self.light_fuse,
            self.light_fuse,
            self.write_note,
            self.write_note,
            self.lose_notes,
            lambda: setattr(self.trainer, "step_seconds", draw(10, 600)),
        ]

    # -- the week

    def means(self) -> Means:
        return Means(self.system, self.trainer, look_every=None)

    def play(self) -> None:
        end = self.system.true + 7 * 86400
        calls_hourly = self.random.random() < 0.5
        while self.system.true < end:
            ahead = next_start(self.system.now(), AT) - self.system.now()
            for _ in range(self.random.randint(0, 3)):
                # Half of them while a night trains, if it begins in time.
                within = self.random.choice([(0.0, 30 * 3600.0), (ahead, ahead + 7200)])
                self.system.at(self.system.true + self.random.uniform(*within), self.random.choice(self.happenings()))
            self.system.advance(min(ahead, 3600.0 if calls_hourly else ahead) + 1)
            self.call(self.random.random() < 0.3)
        self.recover()

    def call(self, accept_fewer: bool = False) -> None:
        """Let the scheduler call, and check what came of it. accept_fewer: the user says that they deleted notes."""
        system, had = self.system, self.trainer.now_current
        due = due_night(self.job, system.now())
        if due is None:
            return
        self.was_full = self.disk_is_full
        earlier = record_of(due.night)
        worked = 0.0 if earlier is None else earlier.working_seconds
        ends = system.true + due.ends_by - system.now()
        try:
            record = run_due(self.job, due, self.means(), accept_fewer)
        except Killed:
            self.fuse = 0
            system.advance(self.random.choice([10.0, 7200.0]))  # until the machine is there again
        except type(full_disk()):
            assert self.was_full
        else:
            assert record.outcome is not None
            if not self.was_full:
                assert record_of(due.night) == record
            if due.kind is Kind.CATCH_UP:
                assert record.working_seconds - worked <= 90 * 60 + 60
            assert system.awake_since(ends) <= 60
        assert had is None or self.trainer.now_current is not None

    def recover(self) -> None:
        """Let a night begin in which nothing happens: it must end well, whatever was before."""
        self.system.happenings.clear()
        self.fuse = 0
        self.fill_disk(False)
        self.mount(True)
        self.system.mains, self.system.charge = True, 80.0
        self.system.hot = self.system.short_of_memory = Level.LOW
        self.write_note()
        self.system.advance(next_start(self.system.now(), AT) - self.system.now() + 100)
        self.call(accept_fewer=True)
        assert all_records()[-1].outcome in (Outcome.BETTER, Outcome.NOT_BETTER)
        assert all(record.outcome is not None for record in all_records())
        assert all(record.stage is Stage.ENDED for record in all_records())
        assert self.trainer.runs == {}
        worse = [(before, after) for before, after in self.trainer.promotions if before is not None and after >= before]
        assert worse == []


@pytest.fixture
def own_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with monkeypatch.context() as context:
        yield context
    time.tzset()


def play(seeds: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Play one week for each seed, each with a home of its own; return the outcomes of all nights."""
    outcomes = []
    for seed in seeds:
        with monkeypatch.context() as context:
            folder = tmp_path / str(seed)
            folder.mkdir()
            context.setenv("EDGETUNE_HOME", str(folder / "home"))
            try:
                Week(seed, folder, context).play()
            except BaseException as error:
                error.add_note(f"in the week of seed {seed}")
                raise
            outcomes += [record.outcome for record in all_records()]
    return outcomes


def test_random_weeks_keep_every_promise(tmp_path: Path, own_zone: pytest.MonkeyPatch) -> None:
    assert {Outcome.BETTER, Outcome.NOT_BETTER, Outcome.NOTHING_NEW} <= set(play(range(10), tmp_path, own_zone))


@pytest.mark.slow
def test_a_thousand_random_weeks_keep_every_promise(tmp_path: Path, own_zone: pytest.MonkeyPatch) -> None:
    outcomes = play(range(1000), tmp_path, own_zone)
    # The weeks are worth playing: nights ended in nearly every way there is.
    unusual = {Outcome.NOT_STARTED, Outcome.CRASHED, Outcome.OUT_OF_TIME, Outcome.NOTES_MISSING, Outcome.NOTHING_NEW}
    assert {Outcome.BETTER, Outcome.NOT_BETTER} | unusual <= set(outcomes)
    assert outcomes.count(Outcome.BETTER) > 1000
