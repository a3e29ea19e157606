"""The gradient of one private step: per document, clipped, summed, and with noise (DP-SGD; see private_plan.py).

Documents are computed one after another, so the gradient of each stands in the adapter's .grad as a whole, however many
micro-batches its windows take. Ghost norms would find the norms of packed documents without their gradients, but take a second
backward to weigh them; LOG.md, "Private training", has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from edgetune.dataset.privacy_units import UnitPacker
from edgetune.privacy.secret_source import SecretSource
from edgetune.runtime.batch import Batch
from edgetune.runtime.project import FUSED_ROWS
from edgetune.runtime.runner import ROW_MULTIPLE, Runner
from edgetune.training.private_plan import PrivatePlan

FEW_ROWS = FUSED_ROWS
"""Tokens to a multiple of which documents of fewer than ROW_MULTIPLE are padded: the fewest that fused products take. Notes of
80 tokens then train at 638 instead of 437 tokens/s (LOG.md, "Private training")."""
_TINY = 1e-6
"""Added to a norm before dividing by it, as Opacus does, so that rounding leaves no gradient longer than the clip."""


class PrivateGradient:
    """Computes the gradients of private steps into the .grad of an adapter's parameters."""

    def __init__(
        self, plan: PrivatePlan, key: str, packer: UnitPacker, runner: Runner, parameters: Sequence[Tensor], micro_tokens: int
    ) -> None:
        self._plan, self._packer, self._runner, self._parameters = plan, packer, runner, parameters
        self._source, self._micro_tokens = SecretSource(key), micro_tokens
        self._sums = [torch.zeros_like(parameter) for parameter in parameters]

    def batches(self, step: int) -> Iterator[tuple[int, list[Batch]]]:
        """Yield each unit that a step samples, by its number, with the micro-batches of its windows."""
        plan, packer = self._plan, self._packer
        for unit in self._source.sample(step, len(packer.units), plan.sample_rate).tolist():
            chosen = self._source.choose(step, unit, packer.units[unit], plan.most_windows)
            yield unit, packer.of_unit(chosen, self._micro_tokens)

    def compute(self, step: int, dropout_key: Callable[[int], int | None]) -> tuple[float, int]:
        """Put the noisy gradient of a step into .grad; return the mean loss of its units, and its trained tokens.

        A unit's loss is the mean over its trained tokens. Of a step that samples no unit the loss is 0, and the gradient noise
        alone. dropout_key: makes the key of each batch from a number of its own.
        """
        losses, tokens = list[float](), 0
        for total in self._sums:
            total.zero_()
        for unit, batches in self.batches(step):
            trained = sum(batch.trained for batch in batches)
            number = unit * self._plan.most_windows
            loss = 0.0
            for place, batch in enumerate(batches):
                rows = FEW_ROWS if len(batch.input_ids) < ROW_MULTIPLE else ROW_MULTIPLE
                loss += float(self._runner.train(batch, dropout_key(number + place), trained, rows))
            # A step whose loss is not finite is skipped, noise and all, which must not hang on one document.
            if self._add_clipped() and math.isfinite(loss):
                losses.append(loss)
                tokens += trained
        self._release(step)
        return sum(losses) / max(len(losses), 1), tokens

    def _add_clipped(self) -> bool:
        """Add .grad, clipped, to the sums and clear it. Return False for a gradient that is not finite, which adds nothing."""
        gradients = [parameter.grad for parameter in self._parameters]
        assert all(gradient is not None for gradient in gradients)
        norm = float(torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm())
        finite = norm < torch.inf
        for total, gradient in zip(self._sums, gradients, strict=True):
            assert gradient is not None
            if finite:
                total.add_(gradient, alpha=min(1.0, self._plan.clip / (norm + _TINY)))
            gradient.zero_()
        return finite

    def _release(self, step: int) -> None:
        """Put the sums into .grad with noise, divided by the number of units that a step expects."""
        plan = self._plan
        for number, (parameter, total) in enumerate(zip(self._parameters, self._sums, strict=True)):
            noise = torch.from_numpy(self._source.normal(step, number, total.numel())).view(total.shape)
            total.add_((noise * (plan.noise_multiplier * plan.clip)).to(total))
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            torch.div(total, plan.expected_units, out=parameter.grad)
