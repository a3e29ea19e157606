"""Plans private training, before step 1, and settles what it has spent, before its adapter is saved.

DP-SGD (Abadi et al. 2016, arXiv 1607.00133): a step samples each unit (a document with its copies) with the same probability,
clips the gradient of each to the same norm, adds Gaussian noise to their sum once, and divides by the number that it expects.
The plan holds the noise that keeps a lineage of adapters (library/privacy_ledger.py) within its epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgetune.config import TrainConfig
from edgetune.dataset.packing import Packer
from edgetune.dataset.privacy_units import UnitPacker
from edgetune.dataset.token_store import TokenStore
from edgetune.library import privacy_ledger as ledger
from edgetune.parsing import parse_privacy
from edgetune.privacy.accounting import Mechanism, noise_for, spent
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.errors import TrainingError, UsageError

KEY = "private"
"""Key of an adapter's edgetune.json that holds what `settle` returns."""
CLIP = 0.1
"""Norm to which a document's gradient is clipped: Li et al.'s (arXiv 2110.05679). Adam undoes its scale."""
BATCHES = 4.0
"""Batches of --batch-tokens that a step samples on average (LOG.md, "Private training")."""
RATE = 3.0
"""Factor on the default learning rate (LOG.md, "Private training")."""
MOST_WINDOWS = 8
"""Most windows of a document that a step reads; chosen by hand."""
NIGHTS = 30
"""Runs among which nights divide an epsilon, by default; chosen by hand."""
SPENT = 0.98
"""Share of an epsilon from which all of it counts as spent: what is left would be noise alone. Chosen by hand."""
DELTA_SHARE = 0.1
"""Default delta, times the number of documents; below 1, so that no one document may be given away whole. Chosen by hand."""


@dataclass(frozen=True)
class PrivatePlan:
    """The mechanism of a private run, and the goal that it keeps to."""

    epsilon: float
    """Largest epsilon of the lineage, this run included."""
    delta: float
    units: int
    """Documents, each counted with its copies: what the guarantee is about."""
    sample_rate: float
    """Probability with which a step samples each unit (0 to 1)."""
    noise_multiplier: float
    """Standard deviation of the noise on a sum of gradients, as a multiple of `clip`."""
    clip: float
    """Norm to which the gradient of each unit is clipped."""
    most_windows: int
    """Most windows of a unit that a step reads."""
    lineage: str
    """First run of the lineage; this run itself where it starts from the bare base."""

    @property
    def expected_units(self) -> float:
        """Return the number of units that a step samples on average."""
        return self.units * self.sample_rate


def packer_for(config: TrainConfig, store: TokenStore, seq_len: int) -> Packer:
    """Return what makes the batches of a run."""
    data = config.data
    if config.private is None:
        return Packer(store, seq_len, data.batch_tokens, data.seed)
    return UnitPacker(store, seq_len, round(BATCHES * data.batch_tokens), data.seed, MOST_WINDOWS)


def peak_rate(config: TrainConfig, hidden_size: int) -> float:
    """Return the peak learning rate of a run on a model of this hidden size."""
    rate = config.learning_rate(hidden_size)
    return rate if config.private is None or config.lr is not None else RATE * rate


def check_parent(config: TrainConfig, adapter: Adapter | None, processes: int) -> None:
    """Raise UsageError where private training cannot start from this adapter, or not with so many processes."""
    if config.private is None:
        return
    if processes > 1:
        raise UsageError("--private trains in one process, and torchrun started more; type the command without torchrun.")
    if adapter is not None and _lineage(adapter) is None:
        raise UsageError(
            "The adapter to start from was trained without --private, or its ledger is not on this machine, so no guarantee "
            "would cover what it has learnt; start from the bare base (`edgetune adapters rollback` goes back to it), or "
            "leave --private out."
        )


def plan_private(config: TrainConfig, packer: Packer, steps: int, adapter: Adapter | None, run: str) -> PrivatePlan | None:
    """Return the private part of a run's plan; None for a run that is not private.

    Raises BudgetSpent where the lineage of `adapter` has nothing left, and UsageError without dp-accounting.
    """
    if config.private is None:
        return None
    assert isinstance(packer, UnitPacker)
    goal = parse_privacy(config.private)
    lineage = run if adapter is None else (_lineage(adapter) or run)
    before, units = ledger.others_of(lineage, run), len(packer.units)
    delta = DELTA_SHARE / units if goal.delta is None else goal.delta
    runs = goal.runs or (NIGHTS if config.only_new else 1)
    left = max(runs - len(before), 1)
    already = spent(before, delta)
    noise = noise_for(goal.epsilon, delta, packer.sample_rate, left * steps, before) if already < goal.epsilon * SPENT else None
    if noise is None:
        more = "give `edgetune nightly install` a larger --private" if config.only_new else "type a larger --private"
        raise ledger.BudgetSpent(
            f"The adapter and those that it was trained from have spent epsilon {already:.2f} at delta {delta:.2g}, and "
            f"--private allows {goal.epsilon:g}, so nothing more can be learnt within it; start from the bare base (`edgetune "
            f"adapters rollback` goes back to it), or {more}."
        )
    return PrivatePlan(goal.epsilon, delta, units, packer.sample_rate, noise, CLIP, packer.most_windows, lineage)


def in_words(plan: PrivatePlan) -> str:
    """Return the sentence that tells the user what a private run promises."""
    return (
        f"Private training: epsilon {plan.epsilon:g} at delta {plan.delta:.2g}; unit: a document with its copies "
        f"({plan.units:,} of them). Each step samples {plan.sample_rate:.1%} of them and adds noise of "
        f"{plan.noise_multiplier:.2f} times the norm to which it clips each."
    )


def settle(plan: PrivatePlan | None, run: str, base: str, steps: int) -> dict[str, Any] | None:
    """Enter a run's `steps` steps in the ledger, and return the record of them for its adapter; None without a plan.

    Raises TrainingError where other runs of the lineage have spent so much meanwhile that no adapter may come of this one.
    """
    if plan is None:
        return None
    # A run whose last checkpoint was damaged may end again after fewer steps than its earlier adapter had seen.
    spent_steps = max(steps, ledger.steps_of(run, plan.noise_multiplier, plan.sample_rate))
    mechanism = Mechanism(plan.noise_multiplier, plan.sample_rate, spent_steps)
    total = spent([*ledger.others_of(plan.lineage, run), mechanism], plan.delta)
    if total > plan.epsilon:
        raise TrainingError(
            f"Another run has spent of the same --private meanwhile: with this one, epsilon would be {total:.2f} and not "
            f"{plan.epsilon:g}. No adapter is saved. Type the same command again, and train one adapter at a time."
        )
    ledger.record(ledger.Entry(run, plan.lineage, base, plan.noise_multiplier, plan.sample_rate, spent_steps, plan.units))
    return {
        "epsilon": plan.epsilon,
        "delta": plan.delta,
        "spent": total,
        "unit": "document",
        "units": plan.units,
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "clip": plan.clip,
        "steps": steps,
        "run": run,
        "lineage": plan.lineage,
    }


def _lineage(adapter: Adapter) -> str | None:
    """Return the lineage of an adapter that was trained privately on this machine; None for any other."""
    record = adapter.about.get(KEY)
    run = record.get("run") if isinstance(record, dict) else None
    return ledger.lineage_of(run) if isinstance(run, str) else None
