"""One optimizer step, the same for every process of a run: alone, leader or follower."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from edgetune.dataset.privacy_units import UnitPacker
from edgetune.runtime import adapter as adapters
from edgetune.runtime.batch import Batch
from edgetune.runtime.heap import trim_memory
from edgetune.runtime.loss import warm_up_head
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.runner import warm_up_autograd
from edgetune.training.distributed import World
from edgetune.training.plan import Plan
from edgetune.training.prepared_run import PreparedRun
from edgetune.training.private_step import PrivateGradient

TRIM_STEPS = 16
"""Steps between two returns of free heap pages to the system; chosen by hand. Micro-batches of different lengths leave
different holes in the heap, which would add up."""


ANCHOR_WEIGHT = 20.0
"""Weight of the divergence at a token of the anchor, relative to the loss at a token of the notes (LOG.md, "keeping the
chat")."""


def trim_after_step(step: int) -> None:
    """Return free heap pages to the system after every TRIM_STEPS steps. Steps count from 0."""
    if (step + 1) % TRIM_STEPS == 0:
        trim_memory()


def learning_rate(plan: Plan, step: int, final: float) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then linear decay to `final` times the peak."""
    if step < plan.warmup_steps:
        return plan.learning_rate * (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(plan.steps - plan.warmup_steps, 1)
    return plan.learning_rate * (1 - (1 - final) * done)


@dataclass(frozen=True)
class StepResult:
    """The result of one step over all processes. Where it is not finite, the adapter has not changed."""

    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int

    @property
    def finite(self) -> bool:
        """Return True if loss and gradient are finite, and so the adapter has changed."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class TrainStep:
    """The adapter's parameters, their optimizer, and the step that updates them."""

    def __init__(self, run: PreparedRun, world: World) -> None:
        self._run, self._config, self._world = run, run.config, world
        self.parameters = adapters.parameters(run.loaded.model)
        betas, setting = (self._config.beta1, self._config.beta2), run.plan.setting
        pages = run.folder if setting.paged_optimizer else None
        decay, bits = self._config.weight_decay, setting.optimizer_bits
        self.optimizer = PagedAdamW(self.parameters, betas, weight_decay=decay, bits=bits, pages=pages)
        self._private: PrivateGradient | None = None
        if run.plan.private is not None and isinstance(run.packer, UnitPacker):
            key, rows = run.record.noise_key, setting.row_tokens
            self._private = PrivateGradient(run.plan.private, key, run.packer, run.runner, self.parameters, rows)
        warm_up_head(run.loaded.model, setting.loss_rows)
        warm_up_autograd()

    def run(self, step: int) -> StepResult:
        """Run step `step` of the plan, counted from 0.

        Every token of the notes has the same weight in the gradient, whichever micro-batch and process it is in, and every
        token of the anchor has ANCHOR_WEIGHT times that; in private training, every document has the same weight. The loss that
        is returned is the notes' alone.
        """
        run = self._run
        # Processes are brought together before anything changes: if one has died, no work of this step is lost.
        if step % run.plan.evaluate_every == 0:
            self.sync_with_leader()
        if self._private is None:
            loss, trained = self._notes_and_anchor(step)
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self._config.clip))
        else:
            loss, trained = self._private.compute(step, lambda number: self._dropout_key(step, number))
            self._add_public_anchor(step)
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        rate = learning_rate(run.plan, step, self._config.final_lr)
        result = StepResult(loss, norm, rate, trained)
        if result.finite:
            self.optimizer.step(rate)
        self.optimizer.zero_grad()
        trim_after_step(step)
        return result

    def _notes_and_anchor(self, step: int) -> tuple[float, int]:
        """Add the gradients of a step over all processes to .grad; return the loss of its notes, and their trained tokens."""
        run, world, loss = self._run, self._world, 0.0
        micro_batches = self.micro_batches(step)
        trained = sum(batch.trained for batch in micro_batches if batch.soft is None)
        for number in range(world.rank, len(micro_batches), world.size):
            batch = micro_batches[number]
            if batch.soft is None:
                loss += float(run.runner.train(batch, self._dropout_key(step, number), trained))
            else:  # without dropout, as the base predicted
                run.runner.train(batch, None, trained / ANCHOR_WEIGHT)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return world.sum_over_processes(gradients, loss), trained

    def _add_public_anchor(self, step: int) -> None:
        """Add the anchor's gradient to a private one, after the noise. It depends on no note, and its scale is the clip's."""
        assert self._run.plan.private is not None
        weight = ANCHOR_WEIGHT * self._run.plan.private.clip
        for batch in self._anchor_batches(step):
            self._run.runner.train(batch, None, self._run.plan.batch_tokens / weight)

    def micro_batches(self, step: int) -> list[Batch]:
        """Return all micro-batches of step `step`: those of the notes, and then those of the anchor, with soft targets."""
        if self._private is None:
            notes = self._run.packer.micro_batches(step, self._run.plan.setting.row_tokens)
        else:
            notes = [batch for _, batches in self._private.batches(step) for batch in batches]
        return notes + self._anchor_batches(step)

    def _anchor_batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of the anchor in step `step`; none without an anchor."""
        plan, anchor = self._run.plan, self._run.anchor
        if plan.anchor is None or anchor is None:
            return []
        tokens = plan.anchor.tokens_a_step(plan.batch_tokens)
        return anchor.micro_batches(step, tokens, plan.setting.row_tokens, self._config.data.seed)

    def sync_with_leader(self, optimizer_state: bool = False) -> None:
        """Give every process the leader's adapter and, if asked, its optimizer state.

        Machines whose arithmetic rounds differently would drift apart without this. The optimizer state is sent when a run
        resumes, because only the leader has the checkpoint.
        """
        self._world.copy_from_leader([parameter.data for parameter in self.parameters])
        if optimizer_state:
            values = self.optimizer.state()
            self._world.copy_from_leader(list(values.values()))
            self.optimizer.load(values)

    def _dropout_key(self, step: int, micro_batch: int) -> int | None:
        """Return the key of a micro-batch's dropout masks: a function of seed, step and number alone. None without dropout."""
        if self._run.lora.dropout == 0.0:
            return None
        return (self._config.data.seed * 0x85EBCA6B + step * 0xC2B2AE35 + micro_batch * 0x27D4EB2F + 1) & 0xFFFFFFFF
