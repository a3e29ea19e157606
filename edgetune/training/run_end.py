"""Ends a run: judges the best adapter, which is on the model, saves it, and makes it the current one if the gate says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.dataset.evaluation_set import Score
from edgetune.events import Event, Finished, Saved
from edgetune.library import adapter_registry as registry
from edgetune.library import training_log
from edgetune.library.gate import Decision, Evidence, decide
from edgetune.library.ledger import Cut
from edgetune.library.promotion import promote
from edgetune.progress import Stages
from edgetune.reports.latest import REPORT_FILE
from edgetune.runtime import adapter as adapters
from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.heap import trim
from edgetune.runtime.memory_meter import Meter
from edgetune.training import evaluation, published
from edgetune.training.adapter_record import adapter_record
from edgetune.training.checkpoints import TrainingState
from edgetune.training.gate_evidence import GateEvidence, decision_record
from edgetune.training.prepared_run import PreparedRun
from edgetune.training.private_plan import settle
from edgetune.training.recorded import finish_entry
from edgetune.training.sample_writer import write_samples


@dataclass(frozen=True)
class ChosenAdapter:
    """The best adapter of a run, which is on the model."""

    step: int
    score: Score | None
    """Its held-out score; None if nothing is held out."""
    batches: int
    """Number of batches that both its score and the one before training cover."""
    cut: str | None
    """What ended the run before its plan did; None if nothing did."""
    last_batches: int | None
    """Number of batches that the evaluation after a deadline scored; None if there was none."""

    @property
    def judged(self) -> Score | None:
        """Return the part of its score that is compared with the score before training."""
        return None if self.score is None else self.score.first(self.batches)


@dataclass(frozen=True)
class RunEnd:
    """Everything that happens after the last step and the last evaluation of a run, as a stream of events."""

    run: PreparedRun
    state: TrainingState
    chosen: ChosenAdapter
    stages: Stages
    meter: Meter
    evaluation_seconds: float
    """Seconds that the last evaluation took."""
    session_seconds: float
    """Seconds since this session of the run began."""
    elapsed: Callable[[], float]
    """Returns the run's duration in seconds, earlier sessions included."""

    def events(self) -> Iterator[Event]:
        """Judge the chosen adapter, save it, promote it if the gate says so, and yield the last events of the run."""
        run, state, chosen = self.run, self.state, self.chosen
        compared = self._compare_with_published()
        most_seconds = math.inf if chosen.cut is None or run.recorded is not None else self.evaluation_seconds
        gate = GateEvidence(run, most_seconds, self.elapsed(), self.stages)
        evidence = gate.measure(state.score_before, chosen.score)
        decision = decide(evidence)
        trim(run.loaded.model.device)
        yield from write_samples("after", run, self.stages)
        before, after = evaluation.both_bits(state.score_before, chosen.score)
        private = settle(run.plan.private, run.record.run, run.plan.base, state.step)
        about = adapter_record(run, before, after, chosen.step, decision, gate.rival, gate.leaks, private)
        folder = run.adapter_folder
        adapter = Adapter(run.lora, adapters.live_tensors(run.loaded.model), about)
        peft_folder.save(adapter, folder, run.loaded.choice.public_name)
        self._enter_ledger(gate.rival, decision.promote)
        if decision.promote and run.recorded is None:
            promote(folder, run.loaded.choice.name, run.plan.base)
        yield Saved(chosen.step, str(folder), after)
        yield self._finished(before, after, decision, evidence, gate, private, compared)

    def _finished(
        self,
        before: float | None,
        after: float | None,
        decision: Decision,
        evidence: Evidence,
        gate: GateEvidence,
        private: dict[str, Any] | None,
        compared: dict[str, Any],
    ) -> Finished:
        """Return the run's last event. before, after: held-out bits per byte. compared: the fields about the published base."""
        run, state, chosen = self.run, self.state, self.chosen
        peak = max(state.peak_memory_bytes, self.meter.peak())
        trim(run.loaded.model.device)
        return Finished(
            adapter=str(run.adapter_folder),
            steps=state.step,
            tokens=state.tokens,
            tokens_per_second=state.tokens / max(state.training_seconds, 1e-9),
            heldout_bits_per_byte_before=before,
            heldout_bits_per_byte_after=after,
            peak_memory_bytes=peak,
            device=str(run.loaded.model.device),
            seconds=self.elapsed(),
            best_step=chosen.step,
            skipped_steps=state.skipped,
            report=str(registry.run_folder(run.record.run) / REPORT_FILE),
            cut=chosen.cut,
            promoted=decision.promote,
            decision=decision_record(decision, evidence, gate.rival, gate.leaks),
            heldout_tokens=None if chosen.judged is None else sum(chosen.judged.tokens),
            privacy=private,
            **compared,
        )

    def _enter_ledger(self, rival: Path | None, promoted: bool) -> None:
        """Add the run to the ledger and to the log of what was trained."""
        run = self.run
        ended = None if run.recorded is None else run.recorded.ended
        entry = finish_entry(run.folder, run.adapter_folder, self._cut(), rival, promoted, self.elapsed(), ended)
        training_log.trained(run.record.run, run.plan.base, entry, promoted, repeated=run.recorded is not None)

    def _cut(self) -> Cut | None:
        """Return where a deadline ended the run, for one that repeats it; None if the run did its whole plan."""
        run, state = self.run, self.state
        if self.chosen.cut is None:
            return None
        if run.held_out is None:
            return Cut(state.step)
        whole = sum(1 for _ in run.held_out.groups(run.plan.setting.row_tokens))
        counts = (None if state.score_before is None else len(state.score_before), self.chosen.last_batches)
        return Cut(state.step, *(None if count in (None, whole) else count for count in counts))

    def _compare_with_published(self) -> dict[str, Any]:
        """Return what tells learning from repair, if the time that is left allows to measure it (see published.compare)."""
        run, chosen = self.run, self.chosen
        allowed = run.config.evaluation_share * self.session_seconds
        in_time = chosen.cut is None or run.plan.published_scores * self.evaluation_seconds <= allowed
        judged = chosen.judged is None or chosen.judged.judges
        progress = self.stages.of("published base")
        compared = published.compare(run.loaded, run.runner, run.held_out, run.plan, chosen.batches, judged, in_time, progress)
        trim(run.loaded.model.device)
        return compared
