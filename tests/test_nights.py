"""A night waits, pauses, resumes and ends as promised, whatever the machine does, and records what it did."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from simulated_system import Killed, SimulatedSystem, SimulatedTrainer, full_disk

from edgetune.config import NightlyConfig
from edgetune.events import Evaluated, Event, Interrupted, Started, Stepped
from edgetune.home import home
from edgetune.library.privacy_ledger import BudgetSpent
from edgetune.nights.begin import due_night, manual_night, run_due
from edgetune.nights.conditions import Level
from edgetune.nights.install import status_of
from edgetune.nights.job import FOR_EVER, Job
from edgetune.nights.night import MEASURED_STEPS, Means, Speed
from edgetune.nights.record import KEPT, Kind, NightRecord, Outcome, Stage, all_records, record_of
from edgetune.nights.vault import load_known
from edgetune.nights.window import last_window, next_start

pytestmark = pytest.mark.skipif(not hasattr(time, "tzset"), reason="Windows cannot change a process's time zone")


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


class Place:
    """A vault, a job and a machine in Berlin, shortly before one o'clock at night."""

    def __init__(self, folder: Path, start: str = "2026-11-28 00:55", battery: int | None = None) -> None:
        self.system = SimulatedSystem(moment(start))
        self.trainer = SimulatedTrainer(self.system)
        self.vault = folder / "notes"
        self.vault.mkdir()
        times = NightlyConfig(at="01:00", until="07:00", battery=battery)
        self.job = Job((str(self.vault),), times, "systemd", self.system.now() - 86400)
        self.job.save()
        for number in range(10):
            self.write(f"note {number}.md")

    def write(self, name: str, text: str = "a note", age: float = 3600.0) -> Path:
        path = self.vault / name
        path.write_text(text + name)
        os.utime(path, (self.system.now() - age,) * 2)
        return path

    def night(self, **means: object) -> NightRecord:
        """Let the scheduler call at the present time, and return what came of it."""
        due = due_night(self.job, self.system.now())
        assert due is not None
        return run_due(self.job, due, Means(self.system, self.trainer, look_every=None, **means))  # type: ignore[arg-type]

    def tomorrow(self) -> None:
        """Let the machine be idle until a minute past the next beginning of a night."""
        self.system.advance(next_start(self.system.now(), "01:00") + 60 - self.system.now())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    place.system.advance(360)
    return place


def test_a_night_learns_from_new_notes_and_the_next_one_from_yesterdays_adapter(place: Place) -> None:
    record = place.night()
    assert (record.outcome, record.new_notes, record.notes, record.stage) == (Outcome.BETTER, 10, 10, Stage.ENDED)
    assert "learned from 10 new notes" in record.sentence
    assert record_of("2026-11-28") == record
    place.tomorrow()
    place.write("new.md")
    second = place.night()
    assert (second.night, second.outcome, second.new_notes) == ("2026-11-29", Outcome.BETTER, 1)
    assert (second.parent, second.adapter) == ("adapter-0", "adapter-1")
    assert [config.from_adapter for config in place.trainer.trained] == [None, "adapter-0"]


def test_nothing_new_trains_nothing(place: Place) -> None:
    place.night()
    place.tomorrow()
    assert place.night().outcome is Outcome.NOTHING_NEW
    assert len(place.trainer.trained) == 1


def test_a_second_call_in_the_same_night_does_nothing(place: Place) -> None:
    place.night()
    assert due_night(place.job, place.system.now()) is None


def test_an_adapter_that_is_no_better_changes_nothing(place: Place) -> None:
    place.trainer.now_current, place.trainer.scores = "mine", {"mine": 1.5}
    place.trainer.next_gain = lambda: -0.1
    record = place.night()
    assert (record.outcome, record.verdict, record.reason) == (Outcome.NOT_BETTER, "not better", "It was simulated.")
    assert place.trainer.now_current == "mine"
    assert record.sentence == (
        "Night 2026-11-28: tried 10 new notes, but nothing changed because the new one is no better on notes it had not seen; "
        "they will be tried again with newer ones. It was simulated."
    )


def test_notes_that_were_tried_in_vain_are_learnt_with_newer_ones_and_not_tried_alone_again(place: Place) -> None:
    place.trainer.now_current, place.trainer.scores = "mine", {"mine": 1.5}
    place.trainer.next_gain = lambda: -0.1
    assert place.night().outcome is Outcome.NOT_BETTER
    place.tomorrow()
    (place.vault / "note 3.md").unlink()
    same = place.night()
    assert (same.outcome, len(place.trainer.trained)) == (Outcome.NOTHING_NEW, 1)
    assert same.reason == "What is new was tried already, and is tried again together with newer notes."
    place.tomorrow()
    place.write("new.md")
    place.trainer.next_gain = lambda: 0.1
    third = place.night()
    assert (third.outcome, third.new_notes, place.trainer.trained[-1].from_adapter) == (Outcome.BETTER, 10, "mine")
    place.tomorrow()
    place.write("newer.md")
    assert place.night().new_notes == 1


def test_notes_count_as_learnt_once_the_user_promotes_the_adapter_that_was_set_aside(place: Place) -> None:
    place.trainer.now_current, place.trainer.scores = "mine", {"mine": 1.5}
    place.trainer.next_gain = lambda: -0.1
    assert place.night().adapter == "adapter-1"
    place.tomorrow()
    place.trainer.now_current = "adapter-1"
    assert place.night().outcome is Outcome.NOTHING_NEW
    place.tomorrow()
    place.write("new.md")
    assert place.night().new_notes == 1


def test_many_notes_lost_after_a_night_in_vain_stop_the_next_one(place: Place) -> None:
    place.trainer.now_current, place.trainer.scores = "mine", {"mine": 1.5}
    place.trainer.next_gain = lambda: -0.1
    place.night()
    place.tomorrow()
    place.write("new.md")
    for number in range(4):
        (place.vault / f"note {number}.md").unlink()
    assert place.night().outcome is Outcome.NOTES_MISSING
    assert len(place.trainer.trained) == 1


def test_a_night_on_battery_waits_for_mains(place: Place) -> None:
    place.system.mains = False
    plugged_in = place.system.true + 3600
    place.system.at(plugged_in, lambda: setattr(place.system, "mains", True))
    record = place.night()
    assert record.outcome is Outcome.BETTER
    assert record.pauses == {"the machine was on battery": pytest.approx(3600, abs=60)}


def test_a_night_on_battery_until_the_end_says_so(place: Place) -> None:
    place.system.mains = False
    record = place.night()
    assert (record.outcome, record.reason) == (Outcome.NOT_STARTED, "It waited because the machine was on battery.")
    assert place.system.now() <= moment("2026-11-28 07:00")


def test_a_charged_battery_will_do_where_the_user_said_so(tmp_path: Path) -> None:
    place = Place(tmp_path, battery=60)
    place.system.advance(360)
    place.system.mains, place.system.charge = False, 90.0
    place.system.at(place.system.true + 600, lambda: setattr(place.system, "charge", 59.0))
    place.system.at(place.system.true + 1200, lambda: setattr(place.system, "charge", 62.0))
    place.system.at(place.system.true + 1800, lambda: setattr(place.system, "charge", 65.0))
    record = place.night()
    assert record.outcome is Outcome.BETTER
    assert record.pauses["the machine was on battery"] == pytest.approx(1200, abs=90)


def test_a_returning_user_pauses_the_night_and_it_resumes_the_same_run(place: Place) -> None:
    back = place.system.true + 900
    place.system.at(back, lambda: setattr(place.system, "last_input", back))
    record = place.night()
    assert record.outcome is Outcome.BETTER
    assert 500 < record.pauses["somebody was using the machine"] < 700
    assert record.steps == 100
    assert record.working_seconds == pytest.approx(100 * 30 + 20 + 2 * 20, abs=60)


@pytest.mark.parametrize(("name", "cause"), [("hot", "the machine was hot"), ("short_of_memory", "needed the memory")])
def test_heat_and_lack_of_memory_pause_the_night_until_they_are_well_over(place: Place, name: str, cause: str) -> None:
    start = place.system.true
    place.system.at(start + 500, lambda: setattr(place.system, name, Level.RAISED))  # not enough to pause
    place.system.at(start + 1000, lambda: setattr(place.system, name, Level.HIGH))
    place.system.at(start + 1500, lambda: setattr(place.system, name, Level.RAISED))  # not enough to go on
    place.system.at(start + 2000, lambda: setattr(place.system, name, Level.LOW))
    record = place.night()
    ((reason, seconds),) = record.pauses.items()
    assert cause in reason
    assert seconds == pytest.approx(1000, abs=60)
    assert record.outcome is Outcome.BETTER


def test_conditions_that_the_machine_does_not_tell_are_recorded_and_stop_nothing(place: Place) -> None:
    place.system.mains = place.system.hot = place.system.short_of_memory = place.system.last_input = None
    record = place.night()
    assert record.outcome is Outcome.BETTER
    assert record.unknown == ["power", "heat", "memory", "whether somebody is using the machine"]


def test_a_plan_that_is_too_long_is_made_anew_from_the_measured_speed(place: Place) -> None:
    place.trainer.steps, place.trainer.step_seconds = 2000, 60.0
    record = place.night()
    assert record.outcome is Outcome.BETTER
    assert 250 < record.steps == record.steps_planned < 310  # 6 hours, less 15% to finish and 10% for evaluations
    assert place.system.now() <= moment("2026-11-28 07:00")
    assert place.trainer.runs == {}


def test_a_night_leaves_time_for_evaluations_that_take_more_than_their_share(place: Place) -> None:
    speed = Speed(place.system, 0.1)
    plan = {"steps": 500, "published_scores": 0, "gate_scores": 5}
    events: list[Event] = [Started("adapter", "demo", "cpu", "cpu", plan, 1, 0, (), 1, 1, 1), Evaluated(0, 1.0, 100, 60.0)]
    events += [Stepped(step, 1.0, 1e-3, 1.0, 100, 10.0, 1000, 0.0) for step in range(1, 2 + MEASURED_STEPS)]
    fitting = []
    for event in events:
        place.system.advance(10.0 if isinstance(event, Stepped) else 0.0)
        fitting.append(speed.steps_that_fit(event, 1000.0))
    assert fitting == [None] * (len(events) - 1) + [58]  # 1,000 s less 7 evaluations of 60 s, for steps of 10 s


def test_only_who_stops_a_night_by_hand_is_told_to_type_the_command_again(place: Place) -> None:
    place.trainer.steps, place.trainer.step_seconds = 2000, 60.0
    shown: list[Event] = []
    assert place.night(show=shown.append).steps_planned is not None
    assert sum(isinstance(event, Started) for event in shown) == 2
    assert not any(isinstance(event, Interrupted) for event in shown)

    place.tomorrow()
    (place.vault / "tomorrow.md").write_text("A note of tomorrow.")
    os.utime(place.vault / "tomorrow.md", (place.system.now() - 3600,) * 2)
    stop = threading.Event()
    place.system.at(place.system.true + 600, stop.set)
    place.night(show=shown.append, asked_to_stop=stop)
    assert isinstance(shown[-1], Interrupted)


def test_a_training_slower_than_it_was_measured_ends_by_the_deadline(place: Place) -> None:
    place.trainer.steps = 400
    place.system.at(place.system.true + 3600, lambda: setattr(place.trainer, "step_seconds", 300.0))
    record = place.night()
    assert record.outcome is Outcome.BETTER
    assert record.steps < 400
    assert moment("2026-11-28 05:30") < place.system.now() <= moment("2026-11-28 07:00")


def test_a_lid_that_is_closed_makes_the_night_plan_anew_and_keep_its_deadline(place: Place) -> None:
    place.trainer.steps = 700
    place.system.at(place.system.true + 3600, lambda: place.system.sleep(2 * 3600))
    record = place.night()
    assert record.outcome is Outcome.BETTER
    assert "the machine slept" in record.pauses
    assert place.system.now() <= moment("2026-11-28 07:00")


def test_a_machine_that_sleeps_past_the_end_stops_when_it_wakes(place: Place) -> None:
    place.system.at(place.system.true + 600, lambda: place.system.sleep(10 * 3600))
    record = place.night()
    assert record.outcome is Outcome.OUT_OF_TIME
    assert place.system.awake_since(moment("2026-11-28 07:00")) < 10 * 60 + 60
    assert place.trainer.now_current is None
    assert place.trainer.runs == {}


def test_a_clock_that_is_set_back_does_not_lengthen_the_night(place: Place) -> None:
    place.trainer.steps = 100000
    place.system.at(place.system.true + 3600, lambda: setattr(place.system, "wall_offset", -5 * 3600.0))
    place.night()
    assert place.system.true <= moment("2026-11-28 07:00") + 60


def test_a_machine_asleep_all_night_catches_up_by_day_when_it_is_idle_on_mains(place: Place) -> None:
    place.trainer.steps = 100000
    place.system.sleep(9 * 3600)
    place.system.last_input, place.system.mains = place.system.true, False
    place.system.at(place.system.true + 1200, lambda: setattr(place.system, "mains", True))
    record = place.night()
    assert (record.kind, record.outcome) == (Kind.CATCH_UP, Outcome.BETTER)
    began = record.ends_by - 90 * 60
    assert began == pytest.approx(moment("2026-11-28 10:21"), abs=60)
    assert place.system.now() <= record.ends_by


def test_a_catch_up_that_finds_no_idle_time_ends_before_the_next_night(place: Place) -> None:
    place.system.sleep(9 * 3600)
    place.system.mains = False
    record = place.night()
    assert record.outcome is Outcome.NOT_STARTED
    assert place.system.now() <= moment("2026-11-29 01:00")


def test_a_night_before_the_installation_is_not_made_up_for(place: Place) -> None:
    place.job = Job(place.job.notes, place.job.times, "cron", moment("2026-11-28 12:00"))
    assert due_night(place.job, moment("2026-11-28 13:00")) is None
    assert due_night(place.job, moment("2026-11-29 02:00")) is not None


def test_a_killed_night_goes_on_when_it_is_started_again(place: Place) -> None:
    def kill(where: str) -> None:
        if place.system.true > moment("2026-11-28 01:30"):
            raise Killed

    place.trainer.before_anything = kill
    with pytest.raises(Killed):
        place.night()
    place.trainer.before_anything = lambda where: None
    place.system.advance(600)
    record = place.night()
    assert (record.outcome, record.resumed, record.steps) == (Outcome.BETTER, 1, 100)
    assert record.working_seconds < 100 * 30 * 0.8  # of this process
    assert load_known() is not None


def test_a_night_killed_after_its_promotion_is_not_trained_twice(place: Place) -> None:
    def kill(where: str) -> None:
        if where == "promoted":
            raise Killed

    place.trainer.before_anything = kill
    with pytest.raises(Killed):
        place.night()
    assert place.trainer.now_current == "adapter-0"
    record = place.night()
    assert (record.outcome, record.adapter) == (Outcome.BETTER, "adapter-0")
    assert len(place.trainer.trained) == 1
    place.tomorrow()
    assert place.night().outcome is Outcome.NOTHING_NEW


def test_the_night_after_a_crash_says_so_and_starts_from_the_adapter_that_was_there(place: Place) -> None:
    def kill(where: str) -> None:
        raise Killed

    place.trainer.before_anything = kill
    with pytest.raises(Killed):
        place.night()
    place.trainer.before_anything = lambda where: None
    place.tomorrow()
    assert place.night().outcome is Outcome.BETTER
    crashed = record_of("2026-11-28")
    assert crashed is not None
    assert (crashed.outcome, crashed.stage) == (Outcome.CRASHED, Stage.ENDED)
    assert "while it was training" in crashed.reason


def test_an_adapter_that_the_user_chose_meanwhile_is_not_replaced(place: Place) -> None:
    place.trainer.scores["mine"] = 1.0

    def choose() -> None:
        place.system.last_input, place.trainer.now_current = place.system.true, "mine"

    place.system.at(place.system.true + 900, choose)
    record = place.night()
    assert (record.outcome, place.trainer.now_current) == (Outcome.STOPPED, "mine")
    assert "Another adapter was made the current one" in record.reason
    assert record.stage is Stage.ENDED


def test_a_full_disk_waits_and_one_that_fills_up_ends_the_night_unchanged(place: Place) -> None:
    place.system.free = 1 << 20
    place.system.at(place.system.true + 1800, lambda: setattr(place.system, "free", 100 << 30))

    def fail(where: str) -> None:
        if where == "step":
            raise full_disk()

    place.trainer.before_anything = fail
    record = place.night()
    assert record.pauses == {"the disk was nearly full": pytest.approx(1800, abs=60)}
    assert (record.outcome, record.reason[:17]) == (Outcome.FAILED, "The disk is full:")
    place.trainer.before_anything = lambda where: None
    place.tomorrow()
    assert place.night().outcome is Outcome.BETTER


def test_a_night_without_privacy_left_trains_nothing_and_says_so(place: Place) -> None:
    def refuse(where: str) -> None:
        raise BudgetSpent("They have spent epsilon 7.99 of the 8 that --private allows.")

    place.trainer.before_anything = refuse
    record = place.night()
    assert (record.outcome, place.trainer.now_current, record.stage) == (Outcome.PRIVACY_SPENT, None, Stage.ENDED)
    assert "no privacy left; nothing changed. They have spent epsilon 7.99 of the 8" in record.sentence


def test_an_unmounted_vault_stops_the_night_unchanged_and_names_no_path(place: Place) -> None:
    place.night()
    place.tomorrow()
    place.vault.rename(place.vault.with_name("elsewhere"))
    record = place.night()
    assert record.outcome is Outcome.NOTES_MISSING
    assert "The folder of notes is not there: perhaps a disk is not connected." in record.reason
    assert str(place.vault) not in record.path.read_text()
    place.vault.with_name("elsewhere").rename(place.vault)
    place.tomorrow()
    assert place.night().outcome is Outcome.NOTHING_NEW


def test_a_paused_job_ends_a_night_that_is_under_way(place: Place) -> None:
    paused = Job(place.job.notes, place.job.times, "systemd", place.job.installed, paused_until=FOR_EVER)
    place.system.at(place.system.true + 600, paused.save)
    record = place.night()
    assert record.outcome is Outcome.PAUSED
    assert place.system.true < moment("2026-11-28 01:15")


def test_a_manual_night_ignores_its_user_and_ends_in_time(place: Place) -> None:
    place.system.last_input, place.trainer.steps = place.system.true, 100000
    due = manual_night(place.system.now(), 30)
    record = run_due(place.job, due, Means(place.system, place.trainer, look_every=None))
    assert (record.kind, record.outcome, record.pauses) == (Kind.MANUAL, Outcome.BETTER, {})
    assert place.system.now() <= due.ends_by


def test_a_night_of_one_minute_trains_too(place: Place) -> None:
    place.trainer.load_seconds, place.trainer.step_seconds, place.trainer.steps = 2.0, 1.0, 10
    due = manual_night(place.system.now(), 1)
    record = run_due(place.job, due, Means(place.system, place.trainer, look_every=None))
    assert (record.outcome, record.steps) == (Outcome.BETTER, 10)
    assert place.system.now() <= due.ends_by


def test_the_status_after_a_kill_does_not_say_that_the_night_is_under_way(place: Place) -> None:
    def kill(where: str) -> None:
        raise Killed

    place.trainer.before_anything = kill
    with pytest.raises(Killed):
        place.night()
    last = status_of(place.job, place.system.now()).last
    assert last is not None
    assert "crashed; nothing changed. Its process ended early, while it was training" in last.sentence


def test_records_are_private_and_thirty_are_kept(place: Place) -> None:
    for _ in range(KEPT + 3):
        place.night()
        place.tomorrow()
    records = all_records()
    assert len(records) == KEPT
    assert records[-1].night > records[0].night > "2026-11-28"
    if os.name != "nt":
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (home() / "nights").iterdir()}
        assert modes == {0o600}


@pytest.mark.parametrize(
    ("now", "start", "end"),
    [
        ("2026-11-28 03:00", "2026-11-28 01:00", "2026-11-28 07:00"),
        ("2026-11-28 00:59", "2026-11-27 01:00", "2026-11-27 07:00"),
        ("2026-11-28 23:00", "2026-11-28 01:00", "2026-11-28 07:00"),
    ],
)
def test_the_window_is_the_one_that_began_last(now: str, start: str, end: str) -> None:
    window = last_window(moment(now), "01:00", "07:00")
    assert (window.start, window.end, window.night) == (moment(start), moment(end), start[:10])


def test_a_window_may_cross_midnight() -> None:
    window = last_window(moment("2026-11-28 02:00"), "22:30", "05:00")
    assert (window.night, window.start, window.end) == ("2026-11-27", moment("2026-11-27 22:30"), moment("2026-11-28 05:00"))


def test_the_night_of_a_change_of_clocks_is_an_hour_shorter_or_longer() -> None:
    spring, autumn = (last_window(moment(f"{day} 05:00"), "01:00", "07:00") for day in ("2026-03-29", "2026-10-25"))
    assert (spring.end - spring.start, autumn.end - autumn.start) == (5 * 3600, 7 * 3600)


def test_a_beginning_that_the_clock_leaves_out_or_shows_twice_happens_once() -> None:
    left_out = last_window(moment("2026-03-29 12:00"), "02:30", "07:00")
    assert left_out.start == moment("2026-03-29 03:30")
    first = moment("2026-10-25 02:30")
    for hours in (0, 0.5, 1, 1.5):
        assert last_window(first + hours * 3600, "02:30", "07:00").start == first
