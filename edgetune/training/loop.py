"""One run from its first event to its last: steps, readings, samples, checkpoints, and the adapter at the end.

The same plan gives the same bits, in one piece or gone on with after a stop or a crash: runstate.py keeps what that takes.
The adapter that is kept is the one with the best reading of the held-out notes.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

import edgetune
from edgetune.events import (
    Evaluated,
    Event,
    EventLog,
    Finished,
    Interrupted,
    Resumed,
    Sampled,
    Saved,
    Skipped,
    Started,
    Stepped,
)
from edgetune.home import expand
from edgetune.library import adapter_registry as registry
from edgetune.library.adapter_registry import Current
from edgetune.runtime import adapter as adapters
from edgetune.runtime import budget, peft_folder
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.errors import LinkError, TrainingError
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.heap import trim_device, trim_memory
from edgetune.runtime.memory_meter import Meter
from edgetune.training import checkpoints as runstate
from edgetune.training.best_adapter import BestAdapter
from edgetune.training.checkpoints import Restored, Unfinished
from edgetune.training.distributed import World
from edgetune.training.evaluation import evaluate_store
from edgetune.training.setup import Prepared
from edgetune.training.step import Stepper

REPORT_FILE = "report.html"
MOST_SKIPPED = 5
"""Non-finite steps in a row after which a run ends: more of them never came back."""
KEEP_SECONDS = 100.0
"""Work that a kill may cost; what is ahead is counted in, so that a long step does not make it more than two minutes."""
KEEP_SHARE = 0.003
"""Of a run's time, what the checkpoints after readings may take."""
_KEEP_SPEED = 500e6
"""Bytes of a checkpoint written a second, as guessed before the first one."""
_SAMPLE_TOKENS = 80


def adapter_folder(prepared: Prepared) -> Path:
    """Where the run's adapter goes: fixed from its beginning, so that one that is gone on with writes no second one."""
    if prepared.config.out is not None:
        return expand(prepared.config.out)
    return registry.adapters_folder(prepared.plan.base) / prepared.record.run


class _Stopped(Exception):
    """The run was told to stop; its state is that of the last whole step."""


class Keeper:
    """When a checkpoint is due. The clock decides that, and nothing else: the run's bits do not depend on it."""

    def __init__(self, place: Unfinished, log: EventLog, nbytes: int) -> None:
        self.place, self.log = place, log
        self.last, self.cost = time.monotonic(), nbytes / _KEEP_SPEED

    def is_due(self, ahead: float) -> bool:
        """Whether another `ahead` seconds of work would be too much to lose."""
        return time.monotonic() - self.last + ahead >= KEEP_SECONDS

    def is_cheap(self) -> bool:
        """Whether one now would take no share of the time worth speaking of."""
        return self.cost <= KEEP_SHARE * (time.monotonic() - self.last)

    def keep(self, state: runstate.State, tensors: Mapping[str, Tensor]) -> Path:
        """Write one. Raises ResourceError when the disk is full."""
        start = time.monotonic()
        state.log_bytes = self.log.sync()
        path = self.place.save(state, tensors)
        self.last = time.monotonic()
        self.cost = self.last - start
        return path


class Run:
    """One run's state while it lasts."""

    def __init__(
        self,
        prepared: Prepared,
        restored: Restored,
        world: World,
        keeper: Keeper,
        stop: threading.Event,
        deadline: float | None,
        meter: Meter,
    ) -> None:
        self.prepared, self.plan, self.config = prepared, prepared.plan, prepared.config
        self.model, self.runner = prepared.loaded.model, prepared.runner
        self.keeper, self.stop, self.deadline, self.meter = keeper, stop, deadline, meter
        self.stepper, self.world = Stepper(prepared, world), world
        self.parameters, self.optimizer = self.stepper.parameters, self.stepper.optimizer
        self.state = restored.state
        self.best = BestAdapter(prepared.folder, prepared.lora)
        begun = bool(restored.tensors)
        if begun:
            self._restore(restored)
        self.stepper.align(begun)
        self.started = time.monotonic() - self.state.seconds
        self.step_seconds = self.reading_seconds = 0.0
        self.kept: tuple[int, int | None] | None = None  # the step and reading of the last checkpoint

    def events(self, resumed: Resumed | None) -> Iterator[Event]:
        yield self._started()
        if resumed is not None:
            yield resumed
        try:
            yield from self._train()
            self.world.announce(None)
            yield from self._finish()
        except LinkError:
            yield self._keep()  # the last whole step: a step moves nothing before all have done their part
            raise
        except _Stopped:
            if self.kept != (self.state.step, self.state.read_at):
                yield self._keep()
            with contextlib.suppress(LinkError):  # torchrun stops us because another process died
                self.world.announce(None)
            yield Interrupted(self.state.step, self.plan.steps, self.state.tokens, self._seconds())

    def _train(self) -> Iterator[Event]:
        """The steps of the plan that are not done yet, or as many as the deadline allows, but at least one."""
        if self.state.step == 0 and self.state.read_at is None:
            yield from self._samples("before")
        yield from self._read()
        first = self.state.step
        while self.state.step < self.plan.steps and not (self.state.step > first and self._is_late()):
            if self.keeper.is_due(self.step_seconds):
                yield self._keep()
            yield self._step()
            if self.state.skipped_in_a_row >= MOST_SKIPPED:
                self.world.announce(None)
                raise TrainingError(
                    f"{MOST_SKIPPED} steps in a row gave a loss or gradient that is not finite, up to step {self.state.step}; "
                    f"the adapter was left as it was. Type a lower --lr than {self.plan.learning_rate:g}."
                )
            yield from self._read()

    def _read(self) -> Iterator[Event]:
        """A reading of the held-out notes, where the plan has one here and it was not taken yet."""
        step, last = self.state.step, self.plan.steps
        if self.prepared.held_out is None or self.state.read_at == step or (step % self.plan.evaluate_every and step < last):
            return
        if self.keeper.is_due(self.reading_seconds):
            yield self._keep()
        reading = self._evaluate()
        self.reading_seconds, self.state.read_at = reading.seconds, step
        if step == 0:
            self.state.before = reading.bits_per_byte
        elif self._is_best(reading):
            self.state.best_score, self.state.best_step = reading.bits_per_byte, step
            self.best.keep_live(adapters.live_tensors(self.model))
        yield reading
        if self.keeper.is_cheap():
            yield self._keep()

    def _started(self) -> Started:
        prepared, record = self.prepared, self.prepared.record
        return Started(
            run=record.run,
            model=prepared.loaded.choice.name,
            device=str(self.model.device),
            backend=self.plan.backend,
            plan=self.plan.as_dict(),
            documents=record.documents,
            heldout_documents=len(record.heldout_paths),
            heldout_paths=record.heldout_paths,
            tokens=prepared.packer.store.trained_tokens,
            trainable_parameters=budget.adapter_parameters(self.model.config, prepared.lora),
            parameters=self.model.config.parameters,
        )

    def _is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _go_on(self) -> None:
        """Called where a run can be left."""
        if self.stop.is_set():
            raise _Stopped

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    def _keep(self) -> Saved:
        """Write a checkpoint."""
        state = self.state
        state.seconds, state.peak_memory_bytes = self._seconds(), max(state.peak_memory_bytes, self.meter.peak())
        tensors = {f"adapter.{number}": parameter.detach() for number, parameter in enumerate(self.parameters)}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.tensors().items()}
        path = self.keeper.keep(state, tensors)
        self.kept = state.step, state.read_at
        return Saved(state.step, str(path))

    def _restore(self, restored: Restored) -> None:
        """What `_keep` wrote."""
        for name, tensor in restored.group("adapter").items():
            self.parameters[int(name)].data.copy_(tensor)
        self.optimizer.load(restored.group("optimizer"))
        if best := restored.group("best"):
            self.best.keep(best)
        restored.tensors.clear()  # whoever holds the checkpoint need not hold these for the rest of the run

    def _step(self) -> Stepped | Skipped:
        """The next step of the plan."""
        start, state = time.monotonic(), self.state
        if self.world.size == 1:
            outcome = self.stepper.step(state.step, self._go_on)
        else:  # the others would wait for one that leaves in the middle of a step
            self._go_on()
            self.world.announce(state.step)
            outcome = self.stepper.step(state.step)
        state.step += 1
        self.step_seconds = time.monotonic() - start
        if not outcome.finite:
            state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
            return Skipped(state.step, f"{'gradient' if math.isfinite(outcome.loss) else 'loss'} not finite")
        state.skipped_in_a_row = 0
        state.tokens += outcome.tokens
        state.training_seconds += self.step_seconds
        return Stepped(
            step=state.step,
            loss=outcome.loss,
            learning_rate=outcome.learning_rate,
            gradient_norm=outcome.gradient_norm,
            tokens=outcome.tokens,
            tokens_per_second=outcome.tokens / self.step_seconds,
            memory_bytes=self.meter.now,
            seconds=self._seconds(),
        )

    def _evaluate(self) -> Evaluated:
        start = time.monotonic()
        assert self.prepared.held_out is not None
        self._trim()
        result = evaluate_store(
            self.runner, self.prepared.held_out, self.plan.seq_len, self.plan.setting.row_tokens, self._go_on
        )
        self._trim()
        self.meter.peak()  # counts the weights' pages, which `now` adds to what it samples
        return Evaluated(self.state.step, result.bits_per_byte, result.tokens, time.monotonic() - start)

    def _trim(self) -> None:
        """Give back what lies free: rows of steps, of readings and of texts have other shapes, and their holes would add up."""
        trim_memory()
        trim_device(self.model.device)

    def _is_best(self, reading: Evaluated) -> bool:
        score, best = reading.bits_per_byte, self.state.best_score
        return math.isfinite(score) and (best is None or score < best)

    def _samples(self, when: str) -> Iterator[Event]:
        """What the model writes after the beginnings of some notes, held out where there are any."""
        tokenizer = self.prepared.loaded.tokenizer
        sampling = Sampling(seed=self.config.data.seed)
        prompts, tokens = self.prepared.record.prompts, _SAMPLE_TOKENS
        if not self.model.whole:  # every token reads again what is in files
            prompts, tokens = prompts[:1], _SAMPLE_TOKENS // 2
        for prompt in prompts:
            self._go_on()
            ids = [*tokenizer.start_ids, *tokenizer.encode(prompt)]
            generator = Generator(self.runner, min(len(ids) + tokens, self.model.config.max_positions))
            written = generator.generate(ids, tokens, sampling, tokenizer.eos_ids)
            yield Sampled(when, prompt, tokenizer.decode(written, continuing=True))
        self._trim()

    def _finish(self) -> Iterator[Event]:
        """Save the best adapter, by the plan's readings and, where the deadline cut the run, by one more.

        That one is not the plan's: the checkpoint comes before it, so that the rest of the plan gives what it would have.
        """
        state, cut = self.state, None if self.state.step >= self.plan.steps else "deadline"
        score, best_step = state.best_score, state.best_step
        if cut is not None:
            yield self._keep()
            if self.prepared.held_out is not None and state.read_at != state.step:
                reading = self._evaluate()
                yield reading
                if self._is_best(reading):
                    score, best_step = reading.bits_per_byte, state.step
        if best_step is None:
            best_step = state.step
        if best_step != state.step:
            if self.kept != (state.step, state.read_at):
                yield self._keep()  # while the trained values are still here
            adapters.copy_into(self.model, self.best.adapter())
        yield from self._samples("after")
        promoted = score is None or state.before is None or score < state.before
        best = Adapter(self.prepared.lora, adapters.live_tensors(self.model), self._about(score, best_step))
        folder = self._save(best, promoted)
        yield Saved(best_step, str(folder), score)
        peak = max(state.peak_memory_bytes, self.meter.peak())
        self._trim()
        yield Finished(
            adapter=str(folder),
            steps=state.step,
            tokens=state.tokens,
            tokens_per_second=state.tokens / max(state.training_seconds, 1e-9),
            heldout_bits_per_byte_before=state.before,
            heldout_bits_per_byte_after=score,
            peak_memory_bytes=peak,
            device=str(self.model.device),
            seconds=self._seconds(),
            best_step=best_step,
            skipped_steps=state.skipped,
            report=str(registry.run_folder(self.prepared.record.run) / REPORT_FILE),
            cut=cut,
            promoted=promoted,
        )

    def _about(self, score: float | None, best_step: int) -> dict[str, object]:
        """edgetune.json: what made this adapter, without paths, host names or text."""
        settings = {name: value for name, value in self.plan.settings.items() if name not in ("out", "model", "from_adapter")}
        settings["data"] = {name: value for name, value in settings["data"].items() if name != "exclude"}
        return {
            "edgetune": edgetune.__version__,
            "torch": torch.__version__,
            "base": self.plan.base,
            "data": self.plan.data_digest,
            "heldout_bits_per_byte_before": self.state.before,
            "heldout_bits_per_byte_after": score,
            "best_step": best_step,
            "steps": self.plan.steps,
            "compute_dtype": self.plan.compute_dtype,
            "int8": self.plan.int8,
            "optimizer_bits": self.plan.setting.optimizer_bits,
            "settings": settings,
        }

    def _save(self, adapter: Adapter, promoted: bool) -> Path:
        """Write the adapter and, unless the held-out notes say that it is worse than nothing, make it current."""
        choice, base, folder = self.prepared.loaded.choice, self.plan.base, adapter_folder(self.prepared)
        peft_folder.save(adapter, folder, choice.name)
        if promoted:
            registry.set_current(Current(folder.resolve(), choice.name, base))
        return folder
