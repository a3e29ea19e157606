"""The training loop: yields events, prints nothing.

for event in edgetune.train(TrainConfig(data=DataConfig(notes=("notes/",)))): ...

The plan is written before step 1 and the same plan gives the same bits. A deadline or an interruption cuts the run at a
step, and the cut is recorded. The adapter that is kept is the one with the best reading of the held-out notes.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import edgetune
from edgetune import registry
from edgetune.config import TrainConfig, expand, seconds_until
from edgetune.documents import Document
from edgetune.evaluate import as_row, evaluate_store
from edgetune.events import Evaluated, Event, EventLog, Finished, Sampled, Saved, Skipped, Started, Stepped, read_events
from edgetune.meter import MemoryMeter
from edgetune.prepare import Plan, Prepared, prepare
from edgetune.registry import Current
from edgetune.report import write_report
from edgetune.runtime import adapter as adapters
from edgetune.runtime import budget
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.device import trim_memory
from edgetune.runtime.errors import TrainingError
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.optim import PagedAdamW
from edgetune.state import home, private_folder

LOG_FILE, REPORT_FILE = "events.jsonl", "report.html"
MOST_SKIPPED = 5
"""Non-finite steps in a row after which a run ends: more of them never came back."""
_SAMPLES, _SAMPLE_TOKENS = 3, 80
_PROMPT_FROM, _PROMPT_CHARS = 4000, 60


def train(config: TrainConfig, stop: threading.Event | None = None) -> Iterator[Event]:
    """Run a training, yielding its events; the last is Finished.

    `stop`, once set, ends the run after the step it is at, with the best adapter so far kept. Raises EdgetuneError's
    children, each a sentence for the user; nothing that was there before is lost.
    """
    runs = private_folder(home() / "runs")
    folder = private_folder(runs / registry.new_name(runs))
    deadline = _deadline(config)
    try:
        prepared = prepare(config, folder)
        with EventLog(folder / LOG_FILE) as log, MemoryMeter(prepared.loaded.checkpoint.files) as meter:
            for event in _Run(prepared, stop or threading.Event(), deadline, meter).events():
                log.append(event)
                if isinstance(event, Finished):
                    write_report(folder / REPORT_FILE, read_events(folder / LOG_FILE))
                yield event
    finally:
        for name in ("tokens", "held-out"):  # a person's words are kept no longer than the run
            shutil.rmtree(folder / name, ignore_errors=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def learning_rate(plan: Plan, step: int, final: float) -> float:
    """Linear warm-up, then linear decay to `final` of the peak; steps count from 0."""
    if step < plan.warmup_steps:
        return plan.learning_rate * (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(plan.steps - plan.warmup_steps, 1)
    return plan.learning_rate * (1 - (1 - final) * done)


def beginning(document: Document) -> str:
    """The first words of a note's first paragraph, its heading and tags left out: a prompt that invites the note's voice."""
    lines = (line.strip() for line in document.text[:_PROMPT_FROM].splitlines())
    body = next((line for line in lines if line and not line.startswith(("#", "Tags:"))), document.text[:_PROMPT_CHARS])
    return body if len(body) <= _PROMPT_CHARS else body[:_PROMPT_CHARS].rsplit(" ", 1)[0]


def _deadline(config: TrainConfig) -> float | None:
    """When the run must stop, on time.monotonic's clock."""
    limits = [config.minutes * 60] if config.minutes is not None else []
    limits += [seconds_until(config.until)] if config.until is not None else []
    return time.monotonic() + min(limits) if limits else None


class _Run:
    """One run's state while it lasts."""

    def __init__(self, prepared: Prepared, stop: threading.Event, deadline: float | None, meter: MemoryMeter) -> None:
        self.prepared, self.plan, self.config = prepared, prepared.plan, prepared.config
        self.model, self.runner = prepared.loaded.model, prepared.runner
        self.stop, self.deadline, self.meter = stop, deadline, meter
        self.parameters = adapters.parameters(self.model)
        betas = (self.config.beta1, self.config.beta2)
        self.optimizer = PagedAdamW(self.parameters, betas, weight_decay=self.config.weight_decay)
        self.started = time.monotonic()
        self.tokens = self.steps = self.skipped = self.skipped_in_a_row = 0
        self.training_seconds = 0.0
        self.before: float | None = None
        self.best: tuple[float, int, Adapter] | None = None

    def events(self) -> Iterator[Event]:
        yield self._started()
        yield from self._samples("before")
        if self.prepared.held_out is not None:
            reading = self._evaluate()
            self.before = reading.bits_per_byte
            yield reading
        cut = None
        while self.steps < self.plan.steps and cut is None:
            yield self._step()
            if self.skipped_in_a_row >= MOST_SKIPPED:
                raise TrainingError(
                    f"{MOST_SKIPPED} steps in a row gave a loss or gradient that is not finite, up to step {self.steps}; "
                    f"the adapter was left as it was. Type a lower --lr than {self.plan.learning_rate:g}."
                )
            cut = self._cut()
            if self.prepared.held_out is not None and (self.steps % self.plan.evaluate_every == 0 or self._is_last(cut)):
                reading = self._evaluate()
                self._keep_if_best(reading)
                yield reading
        yield from self._finish(cut)

    def _started(self) -> Started:
        prepared, parted = self.prepared, self.prepared.parted
        return Started(
            run=prepared.folder.name,
            model=prepared.loaded.choice.name,
            device=str(self.model.device),
            backend=self.plan.backend,
            plan=self.plan.as_dict(),
            documents=len(parted.train),
            heldout_documents=len(parted.held_out),
            heldout_paths=tuple(document.path for document in parted.held_out),
            tokens=prepared.packer.store.trained_tokens,
            trainable_parameters=budget.adapter_parameters(self.model.config, prepared.lora),
            parameters=self.model.config.parameters,
        )

    def _cut(self) -> str | None:
        if self.steps >= self.plan.steps:
            return None
        if self.stop.is_set():
            return "interrupted"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "deadline"
        return None

    def _is_last(self, cut: str | None) -> bool:
        return cut is not None or self.steps >= self.plan.steps

    def _step(self) -> Stepped | Skipped:
        """One optimizer step over all micro-batches of a batch; each token weighs the same, whichever row it is in."""
        start = time.monotonic()
        step = self.steps
        rows = self.prepared.packer.micro_batches(step, self.plan.row_tokens)
        trained = sum(row.trained for row in rows)
        loss = 0.0
        for number, row in enumerate(rows):
            loss += float(self.runner.train(as_row(row, trained), self._dropout_key(step, number)))
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip))
        self.steps += 1
        rate = learning_rate(self.plan, step, self.config.final_lr)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step(rate)
        self.optimizer.zero_grad()
        if not finite:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            return Skipped(self.steps, "loss not finite" if not math.isfinite(loss) else "gradient not finite")
        self.skipped_in_a_row = 0
        seconds = time.monotonic() - start
        self.tokens += trained
        self.training_seconds += seconds
        return Stepped(
            step=self.steps,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=trained,
            tokens_per_second=trained / seconds,
            memory_bytes=self.meter.now,
            seconds=time.monotonic() - self.started,
        )

    def _dropout_key(self, step: int, row: int) -> int | None:
        if self.prepared.lora.dropout == 0.0:
            return None
        return (self.config.data.seed * 0x85EBCA6B + step * 0xC2B2AE35 + row * 0x27D4EB2F + 1) & 0xFFFFFFFF

    def _evaluate(self) -> Evaluated:
        start = time.monotonic()
        assert self.prepared.held_out is not None
        result = evaluate_store(self.runner, self.prepared.held_out, self.plan.seq_len, self.plan.row_tokens)
        return Evaluated(self.steps, result.bits_per_byte, result.tokens, time.monotonic() - start)

    def _keep_if_best(self, reading: Evaluated) -> None:
        if math.isfinite(reading.bits_per_byte) and (self.best is None or reading.bits_per_byte < self.best[0]):
            self.best = reading.bits_per_byte, reading.step, adapters.snapshot(self.model, self.prepared.lora)

    def _samples(self, when: str) -> Iterator[Event]:
        """What the model writes after the beginnings of some notes, held out where there are any."""
        tokenizer, parted = self.prepared.loaded.tokenizer, self.prepared.parted
        sampling = Sampling(seed=self.config.data.seed)
        for document in (parted.held_out or parted.train)[:_SAMPLES]:
            prompt = beginning(document)
            ids = [*tokenizer.start_ids, *tokenizer.encode(prompt)]
            generator = Generator(self.runner, min(len(ids) + _SAMPLE_TOKENS, self.model.config.max_positions))
            written = generator.generate(ids, _SAMPLE_TOKENS, sampling, tokenizer.eos_ids)
            yield Sampled(when, prompt, tokenizer.decode(written, continuing=True))

    def _finish(self, cut: str | None) -> Iterator[Event]:
        score, best_step, best = self.best or (None, self.steps, adapters.snapshot(self.model, self.prepared.lora))
        if best_step != self.steps:
            adapters.attach(self.model, best)
        yield from self._samples("after")
        promoted = score is None or self.before is None or score < self.before
        folder = self._save(Adapter(best.config, best.tensors, self._about(score, best_step)), promoted)
        yield Saved(best_step, str(folder), score)
        peak = self.meter.peak()
        trim_memory()
        yield Finished(
            adapter=str(folder),
            steps=self.steps,
            tokens=self.tokens,
            tokens_per_second=self.tokens / max(self.training_seconds, 1e-9),
            heldout_bits_per_byte_before=self.before,
            heldout_bits_per_byte_after=score,
            peak_memory_bytes=peak,
            device=str(self.model.device),
            seconds=time.monotonic() - self.started,
            best_step=best_step,
            skipped_steps=self.skipped,
            report=str(self.prepared.folder / REPORT_FILE),
            cut=cut,
            promoted=promoted,
        )

    def _about(self, score: float | None, best_step: int) -> dict[str, object]:
        """edgetune.json: what made this adapter, without paths, host names or text."""
        return {
            "edgetune": edgetune.__version__,
            "torch": torch.__version__,
            "base": self.plan.base,
            "data": self.plan.data_digest,
            "heldout_bits_per_byte_before": self.before,
            "heldout_bits_per_byte_after": score,
            "best_step": best_step,
            "steps": self.plan.steps,
            "settings": {
                name: value for name, value in self.plan.settings.items() if name not in ("out", "model", "from_adapter")
            },
        }

    def _save(self, adapter: Adapter, promoted: bool) -> Path:
        """Write the adapter and, unless the held-out notes say that it is worse than nothing, make it current."""
        choice, base = self.prepared.loaded.choice, self.plan.base
        if self.config.out is not None:
            folder = expand(self.config.out)
        else:
            kept = registry.adapters_folder(base)
            folder = kept / registry.new_name(kept)
        adapters.save(adapter, folder, choice.name)
        if promoted:
            registry.set_current(Current(folder.resolve(), choice.name, base))
        return folder
