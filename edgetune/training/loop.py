"""The training loop of one run: steps, evaluations and checkpoints.

The same plan gives the same bits, whether the run is uninterrupted or resumed after a stop or a crash. The adapter with the
lowest held-out score goes to run_end.py, not the last one.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Generator, Iterator

from edgetune.dataset.evaluation_set import Score
from edgetune.events import Evaluated, Event, Interrupted, Resumed, Saved, Skipped, Started, Stepped
from edgetune.progress import Show, Stages
from edgetune.runtime import adapter as adapters
from edgetune.runtime import budget
from edgetune.runtime.errors import LinkError, TrainingError
from edgetune.runtime.heap import trim
from edgetune.runtime.memory_meter import Meter
from edgetune.training import evaluation
from edgetune.training.best_adapter import BestAdapter
from edgetune.training.checkpoints import CheckpointWriter, RestoredCheckpoint
from edgetune.training.deadline import Deadline
from edgetune.training.distributed import World
from edgetune.training.prepared_run import PreparedRun
from edgetune.training.run_end import ChosenAdapter, RunEnd
from edgetune.training.sample_writer import write_samples
from edgetune.training.step import StepResult, TrainStep

MOST_SKIPPED = 5
"""Consecutive steps without a finite loss or gradient after which a run ends: no run was seen to recover from more."""


class _Stopped(Exception):
    """Raised where the user asked the run to stop; its state is that of the last completed step."""


class TrainingLoop:
    """The steps of one run and everything that happens between them, as a stream of events."""

    def __init__(
        self,
        run: PreparedRun,
        restored: RestoredCheckpoint,
        world: World,
        writer: CheckpointWriter,
        stop: threading.Event,
        deadline: Deadline,
        meter: Meter,
        show: Show = lambda event: None,
    ) -> None:
        self.run, self.plan, self.config = run, run.plan, run.config
        self.model, self.runner = run.loaded.model, run.runner
        self.writer, self.stop, self.deadline, self.meter = writer, stop, deadline, meter
        self.train_step, self.world = TrainStep(run, world), world
        self.parameters, self.optimizer = self.train_step.parameters, self.train_step.optimizer
        self.state = restored.state
        self.best = BestAdapter(run.folder, run.lora)
        # Restore before the followers copy: they take their values from this process.
        has_steps = restored.has_steps
        if has_steps:
            self._restore(restored)
        self.train_step.sync_with_leader(optimizer_state=has_steps)
        self.began = time.monotonic()
        self.started = self.began - self.state.seconds
        self.cut = None if run.recorded is None else run.recorded.cut
        self.step_seconds = self.evaluation_seconds = self.all_evaluations_seconds = 0.0
        self.stages = Stages(show, self._check_stop)
        # With followers, stop only between steps: in the middle of one they would wait for this process's share.
        if world.size == 1:
            self.runner.check = self._check_stop
        self.saved_at: tuple[int, int | None] | None = None  # step and evaluated_step of the last checkpoint

    def events(self, resumed: Resumed | None) -> Iterator[Event]:
        """Yield the run's events from Started to Finished or Interrupted. Raises TrainingError, LinkError or ResourceError."""
        yield self._started_event()
        if resumed is not None:
            yield resumed
        try:
            yield from self._train()
            self.world.announce_step(None)
            chosen = yield from self._choose_best()
            yield from self._ending(chosen).events()
        except (_Stopped, LinkError) as error:
            # torchrun passes a stop on to every process. A follower that ends first breaks the step this one is in, and a step
            # changes nothing before every process has done its part, so the state is that of the last whole step.
            if isinstance(error, LinkError) and not self.stop.is_set():
                yield self._save_checkpoint()
                raise
            if not self._is_saved():
                yield self._save_checkpoint()
            # torchrun stops this process when another one dies, and then nobody may be left to listen.
            with contextlib.suppress(LinkError):
                self.world.announce_step(None)
            yield Interrupted(self.state.step, self.plan.steps, self.state.tokens, self._seconds())

    def _train(self) -> Iterator[Event]:
        """Run the remaining steps of the plan; at a deadline stop early, but after at least one step."""
        if self.state.step == 0 and self.state.evaluated_step is None:
            yield from write_samples("before", self.run, self.stages)
        # A run may have been interrupted after its last step but before the evaluation that was due then.
        yield from self._evaluate_if_due()
        first = self.state.step
        while self.state.step < self.plan.steps and not self._ends_early(first):
            if self.writer.is_due(self.step_seconds):
                yield self._save_checkpoint()
            yield self._step()
            if self.state.skipped_in_a_row >= MOST_SKIPPED:
                self.world.announce_step(None)
                raise TrainingError(
                    f"{MOST_SKIPPED} steps in a row, up to step {self.state.step}, gave a loss or gradient that is not "
                    f"finite. Your current adapter has not changed. Type a lower --lr than {self.plan.learning_rate:g}."
                )
            yield from self._evaluate_if_due()

    def _evaluate_if_due(self) -> Iterator[Event]:
        """Evaluate the held-out notes if the plan says so at this step and it was not done yet; remember the best adapter."""
        step, last = self.state.step, self.plan.steps
        is_planned = step % self.plan.evaluate_every == 0 or step >= last
        if self.run.held_out is None or self.state.evaluated_step == step or not is_planned:
            return
        # An evaluation can take minutes: save the steps before it if losing them as well would be too much.
        if self.writer.is_due(self.evaluation_seconds):
            yield self._save_checkpoint()
        # A deadline may come long before the end of the plan, which this evaluation is made for.
        share = evaluation.largest_share(self.config) / (2 + self.plan.published_scores + self.plan.gate_scores)
        first = None if self.cut is None else self.cut.before
        score = self._score(share * self.deadline.seconds_left(), first) if step == 0 else self._score()
        self.state.evaluated_step = step
        if step == 0:
            self.state.score_before = score
        elif score.is_better_than(self.state.best_score):
            self.state.best_score, self.state.best_step = score, step
            self.best.save_from_model(adapters.live_tensors(self.model))
        yield self._evaluated(score)
        if self.writer.is_cheap():
            yield self._save_checkpoint()

    def _started_event(self) -> Started:
        run, record = self.run, self.run.record
        return Started(
            run=record.run,
            model=run.loaded.choice.name,
            device=str(self.model.device),
            backend=self.plan.backend,
            plan=self.plan.as_dict(),
            documents=record.documents,
            heldout_documents=len(record.heldout_paths),
            heldout_paths=record.heldout_paths,
            tokens=run.packer.store.trained_tokens,
            trainable_parameters=budget.adapter_parameters(self.model.config, run.lora),
            parameters=self.model.config.parameters,
            notices=record.notices,
            masked=record.masked,
            new_documents=record.new_documents,
            changed_documents=record.changed_documents,
        )

    def _ends_early(self, first: int) -> bool:
        """Return True if the run must end before its plan: at a deadline, but after a step more than the `first` ones that an
        earlier session did; or where the run ended that this one repeats."""
        if self.run.recorded is not None:
            return self.cut is not None and self.state.step >= self.cut.steps
        return self.state.step > first and self.deadline.has_passed()

    def _check_stop(self) -> None:
        """Raise _Stopped if the user asked to stop. Called wherever the run can be left without losing a consistent state."""
        if self.stop.is_set():
            raise _Stopped

    def _seconds(self) -> float:
        """Return the run's duration in seconds, earlier sessions included."""
        return time.monotonic() - self.started

    def _is_saved(self) -> bool:
        """Return True if the last checkpoint holds the present state."""
        return self.saved_at == (self.state.step, self.state.evaluated_step)

    def _save_checkpoint(self) -> Saved:
        state = self.state
        state.seconds, state.peak_memory_bytes = self._seconds(), max(state.peak_memory_bytes, self.meter.peak())
        tensors = {f"adapter.{number}": parameter.detach() for number, parameter in enumerate(self.parameters)}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        # The best adapter goes in too: its own file may already be a later one when an older checkpoint is restored.
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.tensors().items()}
        path = self.writer.write(state, tensors)
        self.saved_at = state.step, state.evaluated_step
        return Saved(state.step, str(path))

    def _restore(self, restored: RestoredCheckpoint) -> None:
        """Take the values that `_save_checkpoint` wrote."""
        for name, tensor in restored.group("adapter").items():
            self.parameters[int(name)].data.copy_(tensor)
        self.optimizer.load(restored.group("optimizer"))
        if best := restored.group("best"):
            self.best.save(best)
        # The caller keeps `restored` for the whole run; without this, the mapped checkpoint would stay in memory with it.
        restored.tensors.clear()

    def _step(self) -> Stepped | Skipped:
        """Run the next step of the plan."""
        start, state = time.monotonic(), self.state
        self._check_stop()
        if self.world.size > 1:
            self.world.announce_step(state.step)
        is_first = self.world.size == 1 and not self.step_seconds
        result = self._first_step() if is_first else self.train_step.run(state.step)
        state.step += 1
        self.step_seconds = time.monotonic() - start
        if not result.finite:
            state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
            return Skipped(state.step, f"{'gradient' if math.isfinite(result.loss) else 'loss'} not finite")
        state.skipped_in_a_row = 0
        state.tokens += result.tokens
        state.training_seconds += self.step_seconds
        return Stepped(
            step=state.step,
            loss=result.loss,
            learning_rate=result.learning_rate,
            gradient_norm=result.gradient_norm,
            tokens=result.tokens,
            tokens_per_second=result.tokens / self.step_seconds,
            memory_bytes=self.meter.now,
            seconds=self._seconds(),
        )

    def _first_step(self) -> StepResult:
        """Run a step and report its progress, block by block: it can take minutes, and none has shown yet how many."""
        batches = len(self.train_step.micro_batches(self.state.step))
        progress, done, total = self.stages.of("first step"), itertools.count(), 2 * len(self.model.blocks) * batches
        self.runner.between_blocks = lambda: progress(next(done), total)
        result = self.train_step.run(self.state.step)
        self.runner.between_blocks = lambda: None
        return result

    def _score(self, most_seconds: float = math.inf, most_batches: int | None = None) -> Score:
        """Score the held-out notes with the adapter as it is now, as far as these limits allow (see evaluation.score)."""
        start = time.monotonic()
        assert self.run.held_out is not None
        trim(self.model.device)
        progress = self.stages.of("evaluating")
        score = evaluation.score(
            self.runner, self.run.held_out, self.plan.setting.row_tokens, progress, most_seconds, most_batches
        )
        trim(self.model.device)
        self.meter.peak()  # counts the weights' resident pages anew; `now` adds that count to every later sample
        self.evaluation_seconds = time.monotonic() - start
        self.all_evaluations_seconds += self.evaluation_seconds
        return score

    def _evaluated(self, score: Score) -> Evaluated:
        """Return the event of a score that was just measured, over the text that the first evaluation scored too."""
        shown = score if self.state.score_before is None else score.first(len(self.state.score_before))
        return Evaluated(self.state.step, shown.bits_per_byte, sum(shown.tokens), self.evaluation_seconds)

    def _choose_best(self) -> Generator[Event, None, ChosenAdapter]:
        """Put the best adapter on the model: by the plan's evaluations and, after a deadline, by one more evaluation."""
        state, cut = self.state, None if self.state.step >= self.plan.steps else "deadline"
        score, step = state.best_score, state.step if state.best_step is None else state.best_step
        last = None
        if cut is not None:
            last = yield from self._evaluate_after_deadline()
            if last is not None and last.is_better_than(score):
                score, step = last, state.step
        if step != state.step:
            # The best adapter is about to overwrite the trained values on the model: save those first.
            if not self._is_saved():
                yield self._save_checkpoint()
            adapters.copy_into(self.model, self.best.adapter())
        common = evaluation.common_batches(state.score_before, score)
        return ChosenAdapter(step, score, common, cut, None if last is None else len(last))

    def _evaluate_after_deadline(self) -> Generator[Event, None, Score | None]:
        """Evaluate the adapter as the deadline left it; None if nothing is held out, or if that was evaluated already.

        This evaluation is not in the plan. A checkpoint is written before it, and its result stays out of `state`, so that a
        resumed run gives the same bits as one without a deadline.
        """
        state = self.state
        yield self._save_checkpoint()
        if self.run.held_out is None or state.evaluated_step == state.step:
            return None
        allowed = evaluation.seconds_after_deadline(self.config, time.monotonic() - self.began)
        comparable = None if state.score_before is None else len(state.score_before)
        left = (allowed - self.all_evaluations_seconds) / (1 + self.plan.published_scores + self.plan.gate_scores)
        if self.run.recorded is not None:
            left, last = math.inf, None if self.cut is None else self.cut.last
            comparable = min((each for each in (comparable, last) if each is not None), default=None)
        score = self._score(left, comparable)
        yield self._evaluated(score)
        return score

    def _ending(self, chosen: ChosenAdapter) -> RunEnd:
        return RunEnd(
            run=self.run,
            state=self.state,
            chosen=chosen,
            stages=self.stages,
            meter=self.meter,
            evaluation_seconds=self.evaluation_seconds,
            session_seconds=time.monotonic() - self.began,
            elapsed=self._seconds,
        )
