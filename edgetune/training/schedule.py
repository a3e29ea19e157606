"""Decides how often a run evaluates, over how many tokens, and what it scores besides at its end."""

from __future__ import annotations

from dataclasses import dataclass

from edgetune.config import TrainConfig
from edgetune.dataset.evaluation_set import EvaluationSet
from edgetune.dataset.packing import Packer
from edgetune.dataset.token_store import TokenStore
from edgetune.library.loading import Loaded
from edgetune.memory_settings import Choice
from edgetune.training import published
from edgetune.training.evaluation import plan_evaluations
from edgetune.training.gate_evidence import planned_scores
from edgetune.training.recorded import Recorded


@dataclass(frozen=True)
class Schedule:
    """The evaluations of a run, as its Plan has them."""

    every: int
    tokens: int
    published_scores: int
    gate_scores: int


def evaluation_schedule(
    config: TrainConfig,
    packer: Packer,
    steps: int,
    held_out: TokenStore | None,
    int8: bool,
    loaded: Loaded,
    chosen: Choice,
    memory: int,
    has_replies: bool,
    recorded: Recorded | None,
) -> Schedule:
    """Return the evaluations that fit in their share of the run, those of the published base also in `memory` bytes.

    has_replies: the gate will score answers of the base's own. recorded: the run that this one repeats.
    """
    trained = trained_tokens(packer, steps)
    set_tokens = 0 if held_out is None else EvaluationSet.of(held_out, config.data.seq_len).tokens
    rows = chosen.setting.row_tokens
    # An adapter to start from has learnt and mended before, so this run's share of either could not be told.
    gate = planned_scores(has_replies)
    compares = set_tokens > 0 and config.from_adapter is None and published.has_published(loaded)
    most = published.SCORES if recorded is None else recorded.published_scores
    for scores in range(most if compares else 0, 0, -1):
        every, tokens = plan_evaluations(config, steps, trained, set_tokens, int8, scores + gate)
        if recorded is not None or published.fits(loaded, scores, min(tokens, set_tokens), rows, chosen.parts, memory):
            return Schedule(every, tokens, scores, gate)
    return Schedule(*plan_evaluations(config, steps, trained, set_tokens, int8, gate), 0, gate)


def trained_tokens(packer: Packer, steps: int) -> float:
    """Return the tokens of notes that a run of so many steps reads in training."""
    return int(packer.windows.length.sum()) * steps / packer.steps_per_epoch
