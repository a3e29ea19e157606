"""One optimizer step: what every process of a run does, whether it is alone, leads or follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgetune.runtime import adapter as adapters
from edgetune.runtime.heap import trim_memory
from edgetune.runtime.loss import meet_head
from edgetune.runtime.optim import PagedAdamW
from edgetune.training.distributed import World
from edgetune.training.setup import Plan, Prepared

TRIM_STEPS = 16
"""Steps after which free pages of the heap go back: rows of other lengths leave other holes, which would add up."""


def give_back(step: int) -> None:
    """What is to be given back to the system after step `step`, counted from 0."""
    if (step + 1) % TRIM_STEPS == 0:
        trim_memory()


def learning_rate(plan: Plan, step: int, final: float) -> float:
    """Linear warm-up, then linear decay to `final` of the peak; steps count from 0."""
    if step < plan.warmup_steps:
        return plan.learning_rate * (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(plan.steps - plan.warmup_steps, 1)
    return plan.learning_rate * (1 - (1 - final) * done)


@dataclass(frozen=True)
class Outcome:
    """What a step came to, over all processes; where it was not finite the adapter was left as it was."""

    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int

    @property
    def finite(self) -> bool:
        """Whether the adapter moved."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class Stepper:
    """The adapter's parameters, their optimizer, and the step of a plan that moves them."""

    def __init__(self, prepared: Prepared, world: World) -> None:
        self._prepared, self._config, self._world = prepared, prepared.config, world
        self.parameters = adapters.parameters(prepared.loaded.model)
        betas, setting = (self._config.beta1, self._config.beta2), prepared.plan.setting
        pages = prepared.folder if setting.paged_optimizer else None
        decay, bits = self._config.weight_decay, setting.optimizer_bits
        self.optimizer = PagedAdamW(self.parameters, betas, weight_decay=decay, bits=bits, pages=pages)
        meet_head(prepared.loaded.model, setting.loss_rows)

    def step(self, step: int, go_on: Callable[[], None] = lambda: None) -> Outcome:
        """Step `step` of the plan, counted from 0, over all micro-batches of its batch; `go_on` may raise between them.

        Each token weighs the same, whichever row and process it is in.
        """
        prepared, world = self._prepared, self._world
        if step % prepared.plan.evaluate_every == 0:  # before anything moves: a death here costs no whole step
            self.align()
        rows = prepared.packer.micro_batches(step, prepared.plan.setting.row_tokens)
        trained = sum(row.trained for row in rows)
        loss = 0.0
        for number in range(world.rank, len(rows), world.size):
            go_on()
            loss += float(prepared.runner.train(rows[number], self._dropout_key(step, number), trained))
        loss = world.add_up([parameter.grad for parameter in self.parameters if parameter.grad is not None], loss)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self._config.clip))
        rate = learning_rate(prepared.plan, step, self._config.final_lr)
        outcome = Outcome(loss, norm, rate, trained)
        if outcome.finite:
            self.optimizer.step(rate)
        self.optimizer.zero_grad()
        give_back(step)
        return outcome

    def align(self, states: bool = False) -> None:
        """Give every process the leader's adapter, and the optimizer's states where asked: those that round differently
        would drift apart, and a run that is gone on with is kept by the leader alone."""
        self._world.copy([parameter.data for parameter in self.parameters])
        if states:
            values = self.optimizer.state()
            self._world.copy(list(values.values()))
            self.optimizer.load(values)

    def _dropout_key(self, step: int, row: int) -> int | None:
        if self._prepared.lora.dropout == 0.0:
            return None
        return (self._config.data.seed * 0x85EBCA6B + step * 0xC2B2AE35 + row * 0x27D4EB2F + 1) & 0xFFFFFFFF
