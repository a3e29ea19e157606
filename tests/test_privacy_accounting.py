"""What private training spends equals what dp-accounting and Opacus compute, and the ledger adds up all runs of a lineage."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from edgetune.config import TrainConfig
from edgetune.library import privacy_ledger as ledger
from edgetune.parsing import PrivacyGoal, parse_privacy
from edgetune.privacy.accounting import LEAST_NOISE, MOST_NOISE, NOISE_TOLERANCE, Mechanism, noise_for, spent
from edgetune.reports.verdicts import promise
from edgetune.runtime.errors import SettingError, TrainingError, UsageError
from edgetune.training.private_plan import PrivatePlan, settle

dp_accounting = pytest.importorskip("dp_accounting", reason="the extra `private` is not installed")

GRID = [
    (1.0, 1.0, 1, 1e-6),
    (4.0, 1.0, 24, 1e-3),
    (1.0, 0.1, 100, 1e-3),
    (1.5, 0.3, 100, 1e-4),
    (0.9, 0.01, 1000, 1e-5),
    (3.0, 0.05, 3000, 1e-3),
]
"""Noise multiplier, sample rate, steps and delta."""


@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), GRID)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:Optimal order")
def test_the_epsilon_equals_opacuss_and_dp_accountings(noise: float, rate: float, steps: int, delta: float) -> None:
    accountants = pytest.importorskip("opacus.accountants")
    from dp_accounting.rdp import RdpAccountant

    logging.getLogger("absl").setLevel(logging.ERROR)
    ours = spent([Mechanism(noise, rate, steps)], delta)
    prv, rdp = accountants.PRVAccountant(), accountants.RDPAccountant()
    prv.history = rdp.history = [(noise, rate, steps)]
    # Opacus's PRV accountant bounds the true epsilon from above by at most 0.01, its default error.
    assert prv.get_epsilon(delta) - 0.012 <= ours <= prv.get_epsilon(delta) + 0.002
    # Renyi accountants give looser bounds; over the same orders, the two are the same formula.
    orders = [float(order) for order in range(2, 64)]
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps
    )
    renyi = RdpAccountant(orders).compose(event).get_epsilon(delta)
    assert rdp.get_epsilon(delta, alphas=orders) == pytest.approx(renyi, rel=1e-6)
    assert ours <= renyi


def test_without_sampling_the_epsilon_is_that_of_the_gaussian_mechanism() -> None:
    """Balle & Wang 2018 (arXiv 1805.06530), theorem 8, for a sensitivity of 1; k steps are one with noise / sqrt(k)."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    noise, steps = 4.0, 24
    sigma = noise / math.sqrt(steps)
    epsilon = spent([Mechanism(noise, 1.0, steps)], 1e-3)
    delta = phi(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * phi(-0.5 / sigma - epsilon * sigma)
    assert delta == pytest.approx(1e-3, rel=2e-3)


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(8.0, 0.25, 100), (1.0, 1.0, 24)])
def test_the_noise_keeps_to_the_goal_and_less_would_not(epsilon: float, rate: float, steps: int) -> None:
    noise = noise_for(epsilon, 1e-3, rate, steps)
    assert noise is not None
    less = noise - 2 * NOISE_TOLERANCE * max(noise, 1.0)
    assert spent([Mechanism(noise, rate, steps)], 1e-3) <= epsilon < spent([Mechanism(less, rate, steps)], 1e-3)


def test_a_goal_that_hardly_any_noise_meets_gets_the_least_noise() -> None:
    assert noise_for(100.0, 1e-2, 1.0, 1) == pytest.approx(LEAST_NOISE, abs=NOISE_TOLERANCE)


def test_earlier_runs_count_and_a_goal_that_is_spent_allows_nothing() -> None:
    first = noise_for(8.0, 1e-3, 0.25, 100)
    assert first is not None
    once = [Mechanism(first, 0.25, 100)]
    assert noise_for(spent(once, 1e-3), 1e-3, 0.25, 100, once) is None
    more = noise_for(10.0, 1e-3, 0.25, 100, once)
    assert more is not None
    assert first < more < MOST_NOISE
    assert 9.9 < spent([*once, Mechanism(more, 0.25, 100)], 1e-3) <= 10.0


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("8", PrivacyGoal(8.0)),
        ("epsilon=0.5", PrivacyGoal(0.5)),
        ("epsilon=8,delta=1e-6", PrivacyGoal(8.0, 1e-6)),
        ("epsilon=8, delta=1e-6, runs=30", PrivacyGoal(8.0, 1e-6, 30)),
        ("8,runs=5", PrivacyGoal(8.0, None, 5)),
    ],
)
def test_a_goal_is_read(text: str, goal: PrivacyGoal) -> None:
    assert parse_privacy(text) == goal
    assert TrainConfig(private=text).private == text


@pytest.mark.parametrize(
    "text", ["0", "-1", "101", "nan", "inf", "8,delta=1", "8,delta=0", "8,runs=0", "delta=1e-5", "eight", ""]
)
def test_a_goal_that_makes_no_sense_is_one_sentence(text: str) -> None:
    with pytest.raises(SettingError, match=r"epsilon from 0\.01 to 100"):
        TrainConfig(private=text)


PLAN = PrivatePlan(8.0, 1e-3, 50, 0.25, 2.0, 0.1, 8, "first")


def test_a_lineage_spends_what_all_its_runs_spend_together(private_home: Path) -> None:
    first = settle(PLAN, "first", "base", 100)
    second = settle(PLAN, "second", "base", 50)
    other = settle(PrivatePlan(8.0, 1e-3, 50, 0.25, 2.0, 0.1, 8, "other"), "other", "base", 50)
    assert first is not None
    assert second is not None
    assert other is not None
    assert first["spent"] == pytest.approx(spent([Mechanism(2.0, 0.25, 100)], 1e-3))
    assert second["spent"] == pytest.approx(spent([Mechanism(2.0, 0.25, 150)], 1e-3), abs=2e-3)
    assert other["spent"] == pytest.approx(spent([Mechanism(2.0, 0.25, 50)], 1e-3))
    assert promise(second) == f"private: epsilon 8 at delta 0.001, unit: a document, spent {second['spent']:.2f}"
    assert {path.stat().st_mode & 0o777 for path in (private_home / ledger.FOLDER).iterdir()} == {0o600}


def test_a_run_that_goes_on_is_counted_once() -> None:
    settle(PLAN, "first", "base", 40)
    assert settle(PLAN, "first", "base", 100) == settle(PLAN, "first", "base", 100)
    assert [(entry.run, entry.steps) for entry in ledger.entries()] == [("first", 100)]


def test_a_run_that_ends_again_after_fewer_steps_has_spent_what_its_earlier_adapter_did() -> None:
    before = settle(PLAN, "first", "base", 100)
    after = settle(PLAN, "first", "base", 40)
    assert before is not None
    assert after is not None
    assert (after["spent"], after["steps"]) == (before["spent"], 40)
    assert [(entry.run, entry.steps) for entry in ledger.entries()] == [("first", 100)]


def test_no_adapter_comes_of_a_run_whose_budget_another_has_spent() -> None:
    plan = PrivatePlan(6.0, 1e-3, 50, 0.25, 2.0, 0.1, 8, "first")
    assert settle(plan, "first", "base", 100) is not None
    with pytest.raises(TrainingError, match="Another run has spent"):
        settle(plan, "second", "base", 100)
    assert [entry.run for entry in ledger.entries()] == ["first"]


@pytest.mark.parametrize("change", [{"steps": -1}, {"steps": "5"}, {"noise_multiplier": 0}, {"sample_rate": 2}, {"format": 2}])
def test_a_damaged_ledger_is_one_sentence_and_never_counts_as_empty(change: dict[str, object], private_home: Path) -> None:
    settle(PLAN, "first", "base", 40)
    path = private_home / ledger.FOLDER / "first.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match="restore it from a backup"):
        ledger.others_of("first", "second")


@pytest.mark.parametrize("record", [None, 8, {}, {"epsilon": "8", "delta": 1e-5, "spent": 1}, {"epsilon": 1, "delta": 1e999}])
def test_a_record_in_another_form_promises_nothing(record: object) -> None:
    assert promise(record) is None
