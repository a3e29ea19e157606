"""One night: wait until the machine is free, read the notes, train from yesterday's adapter, record what came of it.

Each stage is on disk before it begins. A night whose process is killed goes on when it is started again before its end; and
until a better adapter is promoted, which is one atomic rename, yesterday's is the current one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

from edgetune.documents.lineage import NothingNew
from edgetune.documents.reasons import Reason
from edgetune.events import Evaluated, Event, Finished, Interrupted, Started, Stepped
from edgetune.library.gate import Verdict
from edgetune.library.privacy_ledger import BudgetSpent
from edgetune.nights.conditions import Obstacle, Rules, System
from edgetune.nights.job import Job, load_job, path_of_job
from edgetune.nights.record import Kind, NightRecord, Outcome, Stage, tidy
from edgetune.nights.this_system import unknown_conditions
from edgetune.nights.tonight import Tonight, forget_tonight, load_tonight
from edgetune.nights.trainer import Trainer
from edgetune.nights.vault import (
    LEARNT,
    PENDING,
    TRIED,
    Known,
    Looked,
    NotesMissing,
    learnt_and_tried,
    look,
    remember_tonight,
)
from edgetune.nights.watch import LOOKED_EVERY, BeforeStart, End, Watch
from edgetune.nights.window import Deadline, elapsed
from edgetune.progress import Show
from edgetune.runtime.errors import EdgetuneError, ResourceError, UsageError

WAIT_SECONDS = 30.0
"""Seconds between two looks at a machine that is not free yet; chosen by hand."""
CATCH_UP_SECONDS = 90 * 60.0
"""Longest time that a night may work by day, in seconds."""
FINISH_SHARE, FINISH_SECONDS = 0.15, 60.0
"""Share of the time left (0 to 1), and the least seconds, that are kept for the last evaluation, the samples and saving. The
evaluations of a run take at most a tenth of it; the rest is chosen by hand."""
LEAST_SECONDS = 60.0
"""Seconds of training below which it is not worth to begin, since the model must be loaded first; chosen by hand."""
SHORT_SHARE = 0.25
"""Largest share of a night's whole time (0 to 1) that FINISH_SECONDS and LEAST_SECONDS stand for; chosen by hand. It counts for
nights of less than four minutes, which users begin themselves."""
MEASURED_STEPS = 3
"""Steps after the first one over which the speed is measured; chosen by hand."""
FEWEST_STEPS = 10
"""Steps below which a shorter plan is not worth to start over for; the deadline ends the longer one. Chosen by hand."""
TRIAL_STEPS = 2
"""Steps of the tiny night that `install` runs; no adapter comes of it."""


class _Ended(Exception):
    """Raised where the night has ended with this outcome."""

    def __init__(self, outcome: Outcome, reason: str = "") -> None:
        super().__init__(outcome)
        self.outcome, self.reason = outcome, reason


@dataclasses.dataclass(frozen=True)
class Means:
    """Everything outside itself that a night works with: the machine, the trainer, and how to stop and to tell."""

    system: System
    trainer: Trainer
    asked_to_stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    show: Show = lambda event: None
    tell: Callable[[str], object] = lambda sentence: None
    """Receives a sentence whenever the night begins to wait."""
    look_every: float | None = LOOKED_EVERY
    """Seconds between two looks at the machine while it trains; None: at each event alone, as in simulations."""


class Night:
    """One night, begun or resumed. `run` plays it to its end."""

    def __init__(self, job: Job, record: NightRecord, rules: Rules, means: Means, accept_fewer: bool = False) -> None:
        self.job, self.record, self.rules, self.means = job, record, rules, means
        self.system, self.trainer = means.system, means.trainer
        self.accept_fewer = accept_fewer
        self.deadline = Deadline(self.system, record.ends_by)
        found = load_tonight()
        self.tonight = found if found is not None and found.night == record.night else None
        self.was_killed = self.tonight is not None
        self._job_now, self._job_written = job, 0
        self._waits_for_day = record.kind is Kind.CATCH_UP

    def run(self) -> NightRecord:
        """Play the night to its end and return its record, which is on disk. Raises only what nobody expected."""
        try:
            self.record.unknown = unknown_conditions(self.system)
            self.record.save()
            self._report(self._trained())
        except _Ended as end:
            self._end(end.outcome, end.reason)
        except NotesMissing as error:
            self._end(Outcome.NOTES_MISSING, str(error))
        except NothingNew as error:
            self._remember_notes("" if self.record.parent is None else self.record.parent, is_current=True)
            self._end(Outcome.NOTHING_NEW, str(error))
        except BudgetSpent as error:
            self._end(Outcome.PRIVACY_SPENT, str(error))
        except EdgetuneError as error:
            self._end(Outcome.FAILED, str(error))
        except Exception as error:
            self._end(Outcome.FAILED, f"It ended with an error that nobody expected ({type(error).__name__}).")
            raise
        return self.record

    def _trained(self) -> Finished:
        """Wait, read and train until training has finished. Raises _Ended."""
        while True:
            self._wait()
            watch = Watch(self.system, self.rules, self.deadline, self.means.asked_to_stop, self._is_paused)
            began = self.system.monotonic()
            try:
                with watch.alongside(self.means.look_every):
                    finished = self._session(watch)
            except BeforeStart:
                finished = None
            finally:
                self.record.working_seconds += self.system.monotonic() - began
            if finished is not None:
                return finished
            self._after_stop(watch.why)

    def _session(self, watch: Watch) -> Finished | None:
        """Read the notes, unless that was done, and train until training finishes or is stopped."""
        show = watch.shown(self.means.show)
        if self.tonight is None:
            self._read(watch, show)
        self._check_parent(show)
        return self._train(watch, show)

    # -- waiting

    def _wait(self) -> None:
        """Return once the machine is free. Raises _Ended at the deadline, when asked to stop, and when nights are paused."""
        told: Obstacle | None = None
        while True:
            obstacle = self.rules.before_work(self.system)
            self._check_end(obstacle)
            if obstacle is None:
                break
            if obstacle is not told:
                told = obstacle
                self.means.tell(f"Waiting, because {obstacle}.")
                self.record.stage = Stage.WAITING
                self.record.save()
            began = elapsed(self.system)
            self.system.wait(max(min(WAIT_SECONDS, self.deadline.seconds_left()), 0.1), self.means.asked_to_stop)
            waited = self.record.pauses.get(obstacle, 0.0) + elapsed(self.system) - began
            self.record.pauses[str(obstacle)] = waited
        if self._waits_for_day:
            self._waits_for_day = False
            now = self.system.now()
            self.record.ends_by = min(now + CATCH_UP_SECONDS, self.record.ends_by)
            self.deadline = Deadline(self.system, self.record.ends_by)

    def _check_end(self, obstacle: Obstacle | None) -> None:
        """Raise _Ended if the night is over, and say what kept it waiting."""
        if self.means.asked_to_stop.is_set():
            raise _Ended(Outcome.STOPPED)
        if self._is_paused():
            raise _Ended(Outcome.PAUSED)
        if self._seconds_to_train() < min(LEAST_SECONDS, self._short()):
            outcome = Outcome.OUT_OF_TIME if self.tonight is not None and self.tonight.begun else Outcome.NOT_STARTED
            longest = max(self.record.pauses, key=self.record.pauses.__getitem__, default=obstacle)
            raise _Ended(outcome, "There was too little time." if longest is None else f"It waited because {longest}.")

    def _is_paused(self) -> bool:
        """Return True if the user has paused or uninstalled nights, perhaps since this one began."""
        if self.record.kind not in (Kind.NIGHT, Kind.CATCH_UP):
            return False
        try:
            written = path_of_job().stat().st_mtime_ns
            if written != self._job_written:
                self._job_written, self._job_now = written, load_job()
        except (OSError, UsageError):
            return True
        return self._job_now.is_paused(self.system.now())

    def _seconds_to_train(self) -> float:
        """Return the seconds left for steps and evaluations: what is left but for the time that finishing takes."""
        left = self.deadline.seconds_left()
        return left - max(FINISH_SHARE * left, min(FINISH_SECONDS, self._short()))

    def _short(self) -> float:
        """Return the seconds of SHORT_SHARE of the whole night."""
        return SHORT_SHARE * (self.record.ends_by - self.record.began)

    # -- reading

    def _read(self, watch: Watch, show: Show) -> None:
        """Look at the notes and settle what the night does. Raises NotesMissing, and _Ended if there is nothing new."""
        record = self.record
        record.stage = Stage.READING
        record.save()
        config, is_trial = self.job.train_config(), record.kind is Kind.TRIAL

        def current() -> str | None:
            return self.trainer.current(config, show)

        learnt, tried = learnt_and_tried(lambda: _name_of(current()))
        looked = look(self.job.notes, config.data, learnt, tried, self.accept_fewer, watch.check, self.system.now())
        record.notes, record.new_notes, record.changed_notes = looked.notes, looked.new, looked.changed
        record.gone_notes, record.not_downloaded = looked.gone, looked.not_downloaded
        record.deferred_notes, record.conflict_copies = len(looked.deferred), len(looked.conflicts)
        if not is_trial:
            self._end_without_news(looked, learnt, tried)
        parent = current()
        # Of a trial, somebody waits for the end, perhaps with notes that were written just now.
        deferred = () if is_trial else tuple((path, str(Reason.BEING_WRITTEN)) for path in looked.deferred)
        conflicts = tuple((path, str(Reason.CONFLICT_COPY)) for path in looked.conflicts)
        # One step more than a trial takes: it ends before there is an adapter to judge.
        tonight = Tonight(record.night, parent, deferred + conflicts, TRIAL_STEPS + 1 if is_trial else None, not is_trial)
        record.parent = _name_of(parent)
        looked.known.save(PENDING)
        tonight.save()
        self.tonight = tonight

    def _end_without_news(self, looked: Looked, learnt: Known | None, tried: Known | None) -> None:
        """Raise _Ended if no note is new, or none that was not tried already. The notes that are gone are forgotten then."""
        if not looked.new + looked.changed:
            dataclasses.replace(looked.known, adapter="" if learnt is None else learnt.adapter).save(LEARNT)
            raise _Ended(Outcome.NOTHING_NEW)
        if tried is not None and not looked.untried:
            dataclasses.replace(looked.known, adapter=tried.adapter).save(TRIED)
            raise _Ended(Outcome.NOTHING_NEW, "What is new was tried already, and is tried again together with newer notes.")

    def _check_parent(self, show: Show) -> None:
        """Raise _Ended if the current adapter is not the one that the night began with."""
        assert self.tonight is not None
        current = self.trainer.current(self.job.train_config(), show)
        if current == self.tonight.parent:
            return
        if self.was_killed and current is not None and _name_of(current) == self.tonight.run:
            self.record.adapter = self.tonight.run
            self._remember_notes(self.tonight.run, is_current=True)
            raise _Ended(Outcome.BETTER, "Its scores are lost, since its process was ended before they were recorded.")
        raise _Ended(Outcome.STOPPED, "Another adapter was made the current one meanwhile.")

    # -- training

    def _train(self, watch: Watch, show: Show) -> Finished | None:
        """Train or resume; return Finished, or None if training was stopped. Raises NothingNew."""
        tonight, record = self.tonight, self.record
        assert tonight is not None
        config = tonight.config(self.job, max(self._seconds_to_train(), 1.0) / 60)
        fresh, tonight.begun, record.stage = not tonight.begun, True, Stage.TRAINING
        tonight.save()
        record.save()
        finished, measured = None, Speed(self.system, config.evaluation_share) if fresh and tonight.steps is None else None
        # Every event is taken, also after the last that counts: only then has training given up its locks.
        for event in self.trainer.train(config, watch.stop, fresh, show):
            # What stops a night is told by its record; only who stops it by hand is to type the command again.
            if not isinstance(event, Interrupted) or watch.why is End.STOPPED:
                show(event)
            finished = event if isinstance(event, Finished) else finished
            self._note(event, watch)
            fitting = None if measured is None else measured.steps_that_fit(event, self._seconds_to_train())
            if fitting is not None and fitting >= FEWEST_STEPS:
                record.steps_planned, measured = fitting, None
                watch.end(End.REPLAN)
        return finished

    def _note(self, event: Event, watch: Watch) -> None:
        """Keep what an event tells about the night, and end a trial once it has trained its steps."""
        tonight, record = self.tonight, self.record
        assert tonight is not None
        if isinstance(event, Started):
            tonight.run, record.masked = event.run, dict(event.masked)
            if event.new_documents is not None and event.changed_documents is not None:
                record.new_notes, record.changed_notes = event.new_documents, event.changed_documents
            tonight.save()
            record.save()
        if isinstance(event, Stepped) and record.kind is Kind.TRIAL and event.step >= TRIAL_STEPS:
            record.steps = event.step
            watch.end(End.TRIED)

    def _after_stop(self, why: End | Obstacle | None) -> None:
        """Prepare the next session after training was stopped. Raises _Ended where there is none."""
        if why is End.REPLAN:
            assert self.tonight is not None
            self.trainer.discard(self.tonight.config(self.job))
            self.tonight.steps, self.tonight.begun = self.record.steps_planned, False
            self.tonight.save()
        if why is End.DEADLINE:
            raise _Ended(Outcome.OUT_OF_TIME)
        if why is End.TRIED:
            raise _Ended(Outcome.WORKS)
        if why is End.STOPPED:
            raise _Ended(Outcome.STOPPED)
        if why is End.PAUSED:
            raise _Ended(Outcome.PAUSED)
        if isinstance(why, Obstacle):
            self.record.pauses.setdefault(str(why), 0.0)

    # -- the end

    def _report(self, finished: Finished) -> None:
        """Record what training came to, and remember tonight's notes: as learnt, or as tried."""
        record = self.record
        record.stage = Stage.REPORTING
        record.adapter, record.steps = Path(finished.adapter).name, finished.steps
        record.before, record.after = finished.heldout_bits_per_byte_before, finished.heldout_bits_per_byte_after
        decision = finished.decision or {}
        record.verdict = decision.get("verdict")
        record.save()
        self._remember_notes(record.adapter, finished.promoted)
        if finished.promoted:
            outcome = Outcome.FIRST if record.verdict == Verdict.FIRST else Outcome.BETTER
        else:
            outcome = Outcome.TOO_FEW if record.verdict == Verdict.TOO_FEW else Outcome.NOT_BETTER
        self._end(outcome, decision.get("reason", ""))

    def _remember_notes(self, adapter: str, is_current: bool) -> None:
        """Remember the notes that were there tonight, which this adapter was trained on; those of a trial are still new."""
        if self.record.kind is not Kind.TRIAL:
            remember_tonight(adapter, is_current)

    def _end(self, outcome: Outcome, reason: str = "") -> None:
        """Record the end of the night. One that was stopped from outside may still go on until its time is over."""
        record = self.record
        record.outcome, record.reason, record.ended = outcome, self._without_paths(reason), self.system.now()
        resumable = outcome is Outcome.STOPPED and not reason and record.kind in (Kind.NIGHT, Kind.CATCH_UP)
        if not resumable:
            record.stage = Stage.ENDED
            self._discard()
        # On a full disk the record stays as it was, and the next night says that this one ended early.
        with contextlib.suppress(ResourceError):
            record.save()
            tidy()

    def _discard(self) -> None:
        """Delete tonight's interrupted run and choices."""
        if self.tonight is not None and self.tonight.begun:
            with contextlib.suppress(EdgetuneError):
                self.trainer.discard(self.tonight.config(self.job))
        forget_tonight()

    def _without_paths(self, reason: str) -> str:
        """Return a sentence without the places of the notes, which no record names."""
        for path in sorted(self.job.notes, key=len, reverse=True):
            reason = reason.replace(path, "the folder of notes")
        return reason[:1].upper() + reason[1:]


def _name_of(adapter: str | None) -> str | None:
    return None if adapter is None else Path(adapter).name


class Speed:
    """Measures the speed of a run's first steps and evaluation, and says how many steps fit into the time that is left."""

    def __init__(self, system: System, evaluation_share: float) -> None:
        self.system, self.evaluation_share = system, evaluation_share
        self._planned = self._evaluations = 0
        self._evaluation_seconds = 0.0
        self._first: tuple[int, float] | None = None

    def steps_that_fit(self, event: Event, seconds_left: float) -> int | None:
        """Take an event of the run. Return the steps that fit once the speed is known and the plan has more, else None."""
        if isinstance(event, Started):
            steps, published, gate = (event.plan.get(name) for name in ("steps", "published_scores", "gate_scores"))
            self._planned = steps if isinstance(steps, int) else 0
            self._evaluations = 2 + sum(count for count in (published, gate) if isinstance(count, int))
        if isinstance(event, Evaluated) and event.step == 0:
            self._evaluation_seconds = self._evaluations * event.seconds
        if not isinstance(event, Stepped) or not self._planned:
            return None
        if self._first is None:  # the first step also warms the machine up
            self._first = event.step, self.system.monotonic()
        step, since = self._first
        if event.step - step != MEASURED_STEPS:
            return None
        seconds = max(self.system.monotonic() - since, 1e-6) / MEASURED_STEPS
        fitting = int((seconds_left - max(self.evaluation_share * seconds_left, self._evaluation_seconds)) / seconds)
        return fitting if self._planned - event.step > fitting else None
