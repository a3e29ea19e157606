"""An evaluation scores the same text each time, in packed rows, and takes no more than its share of a run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from test_batches import chain_targets, document_of, lengths, make_store, notes, stores

from edgetune.cli.main import cli
from edgetune.config import DataConfig, TrainConfig
from edgetune.dataset.evaluation_set import EvaluationSet, Score
from edgetune.dataset.pieces import CONTEXT, TEXT
from edgetune.dataset.token_store import TokenStore
from edgetune.events import Evaluated, Finished, Started, Stepped
from edgetune.library.loading import load_base, open_base
from edgetune.runtime.batch import Batch
from edgetune.runtime.errors import UsageError
from edgetune.runtime.runner import Runner
from edgetune.training import evaluation
from edgetune.training.evaluation import (
    TOKEN_COST,
    TOKEN_COST_INT8,
    evaluate,
    largest_share,
    plan_evaluations,
    score,
    seconds_after_deadline,
)
from edgetune.training.step import StepResult, TrainStep
from edgetune.training.train import train


@given(stores(), lengths)
def test_every_text_token_is_scored_once_and_every_byte_counted(store: TokenStore, shape: tuple[int, int]) -> None:
    seq_len, row_tokens = shape
    whole = EvaluationSet.of(store, seq_len)
    batches, sizes = zip(*whole.batches(row_tokens), strict=True)
    scored = chain_targets(batches, lambda batch: batch.loss_mask > 0)
    later = [place for place in np.flatnonzero(store.trained == TEXT).tolist() if place not in starts(store)]
    assert sorted(scored) == later
    assert all(len(batch.input_ids) <= row_tokens for batch in batches)
    assert sum(len(batch.input_ids) for batch in batches) == whole.tokens
    owners = document_of(store)
    heard = {int(owners[target]) for target in scored}
    assert math.fsum(sizes) == pytest.approx(sum(store.documents[number].bytes for number in heard))


def starts(store: TokenStore) -> set[int]:
    """Return the places of the documents' first tokens, which nothing predicts."""
    return {document.start for document in store.documents}


def test_bits_per_byte_are_over_all_documents() -> None:
    store = notes(50, 5, 20)
    owners, parts = torch.tensor(document_of(store)), []
    for batch, size in EvaluationSet.of(store, 16).batches(32):
        # These are the losses of a model whose loss is exactly d+1 bits on each token of document d.
        losses = (owners[batch.targets] + 1.0) * math.log(2) * batch.loss_mask
        parts.append((float(losses.sum()), batch.trained, size))
    result = Score(*map(tuple, zip(*parts, strict=True)))
    assert result.bits_per_byte == pytest.approx((50 + 10 + 60) / 75, rel=1e-6)
    assert sum(result.tokens) == 75
    assert math.fsum(result.bytes) == pytest.approx(75)


def test_a_part_of_a_document_counts_its_own_bytes() -> None:
    store = notes(100)
    store = dataclasses.replace(store, documents=(dataclasses.replace(store.documents[0], bytes=400),))
    part = EvaluationSet.of(store, 16).limited(40)
    ((batch, size),) = part.batches(1000)
    assert 16 <= part.tokens <= 40
    assert size == pytest.approx(4.0 * batch.trained)  # the document has four bytes a token


@given(stores(), st.integers(2, 40), st.integers(1, 400))
def test_a_limited_set_is_the_beginning_of_the_whole_one(store: TokenStore, seq_len: int, limit: int) -> None:
    whole = EvaluationSet.of(store, seq_len)
    part, again = whole.limited(limit), EvaluationSet.of(store, seq_len).limited(limit)
    assert part.order.tolist() == again.order.tolist()
    if whole.windows.length[whole.order[0]] <= limit:
        assert part.order.tolist() == whole.order[: len(part.order)].tolist()
        assert part.tokens <= limit
    else:
        assert len(part.order) == 1
        assert part.tokens == whole.windows.length[whole.order].min()


def test_a_limited_set_has_windows_of_many_documents() -> None:
    store = notes(*[60] * 50)
    part = EvaluationSet.of(store, 64).limited(600)
    owners = {int(document_of(store)[start]) for start in part.windows.start[part.order]}
    assert len(owners) >= 9
    assert max(owners) > 25


def test_nothing_to_score_is_an_empty_set() -> None:
    assert EvaluationSet.of(make_store([[CONTEXT] * 5, [TEXT]]), 16).tokens == 0


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save_trainable(folder)
    return Runner(load_base(open_base(str(folder)), "cpu").model)


def test_packed_rows_score_what_documents_score_one_by_one(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    store = notes(*range(1, 60, 3), 300)
    whole = EvaluationSet.of(store, 64)
    rows: list[Batch] = []
    original = Runner.score

    def counted(self: Runner, batch: Batch) -> torch.Tensor:
        rows.append(batch)
        return original(self, batch)

    monkeypatch.setattr(Runner, "score", counted)
    packed = score(runner, whole, 512)
    assert len(rows) == math.ceil(whole.tokens / 512)  # several documents are in one row
    assert max(len(row.segments) for row in rows) > 5
    one_by_one = score(runner, whole, 1)
    assert len(one_by_one) == len(whole.order)
    assert sum(packed.tokens) == sum(one_by_one.tokens) == int((store.trained == TEXT).sum())
    assert packed.bits_per_byte == pytest.approx(one_by_one.bits_per_byte, rel=1e-5)


def test_scoring_tells_how_far_it_is_and_ends_when_its_time_is_over(runner: Runner) -> None:
    whole, told = EvaluationSet.of(notes(*[60] * 10), 64), []
    score(runner, whole, 128, lambda done, total: told.append((done, total)))
    assert told == [(done, whole.tokens) for done in range(0, whole.tokens + 1, 2 * 61)]
    cut = score(runner, whole, 128, seconds=0.0)
    assert len(cut) == 1
    assert cut == score(runner, whole, 128).first(1)


@given(
    st.integers(1, 5000), st.integers(1, 4096), st.integers(0, 10**6), st.integers(1, 40), st.floats(0.01, 1.0), st.booleans()
)
def test_evaluations_never_have_had_more_than_their_share_of_the_work(
    steps: int, step_tokens: int, set_tokens: int, wanted: int, share: float, int8: bool
) -> None:
    config = TrainConfig(evaluations=wanted, evaluation_share=share)
    every, tokens = plan_evaluations(config, steps, steps * step_tokens, set_tokens, int8)
    cost = tokens * (TOKEN_COST_INT8 if int8 else TOKEN_COST)
    done = cost
    for step in [*range(every, steps, every), steps]:
        done += cost
        if tokens > 1:  # one token at least
            assert done <= share * step * step_tokens * (1 + 1e-9)
    assert math.ceil(steps / every) <= wanted


def test_a_usual_run_has_five_evaluations_and_a_short_one_fewer() -> None:
    every = {steps: plan_evaluations(TrainConfig(), steps, steps * 2048, 40_000, False)[0] for steps in (100, 20, 1)}
    assert every == {100: 20, 20: 20, 1: 1}
    assert plan_evaluations(TrainConfig(), 60, 60 * 2048, 500, False)[0] == 12  # few notes are scored often


@pytest.fixture
def small(tmp_path: Path) -> TrainConfig:
    """Return a run on a tiny model with more held-out text than it can afford to score."""
    tiny.save_trainable(tmp_path / "model")
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(60):
        text = "".join(f"Day {number * line}: the beans by the tarred shed want water, said Marra.\n" for line in range(20))
        (folder / f"{number:02}.md").write_text(text)
    data = DataConfig(notes=(str(folder),), seq_len=64, batch_tokens=256)
    return TrainConfig(data=data, model=str(tmp_path / "model"), steps=40, rank=2)


def test_a_runs_evaluations_score_the_same_tokens_within_their_share(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []
    original = evaluation.score

    def noted(runner: Runner, scored: EvaluationSet, *arguments: object) -> Score:
        read.append(scored.order.tolist())
        return original(runner, scored, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "score", noted)
    events = list(train(small))
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert (evaluated[0].step, evaluated[-1].step) == (0, 40)
    assert len(evaluated) >= 2
    assert all(order == read[0] for order in read)
    assert {event.tokens for event in evaluated} == {evaluated[0].tokens}
    started = events[0]
    assert isinstance(started, Started)
    trained = sum(event.tokens for event in events if isinstance(event, Stepped))
    assert len(evaluated) * started.plan["evaluate_tokens"] * TOKEN_COST <= 0.1 * 1.2 * trained  # the rows' context is read too


def test_a_deadline_cuts_the_first_evaluation_and_the_last_scores_the_same_text(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    original = Runner.score

    def slow(self: Runner, batch: Batch) -> torch.Tensor:
        now[0] += 10.0  # seconds a row
        return original(self, batch)

    def long_step(self: TrainStep, step: int) -> StepResult:
        now[0] += 60.0
        return trained(self, step)

    trained = TrainStep.run
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(Runner, "score", slow)
    monkeypatch.setattr(TrainStep, "run", long_step)
    events = list(train(dataclasses.replace(small, steps=4000, minutes=20.0, weights="nf4")))
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    # Seven scores share a tenth of twenty minutes, these two, two of the base as published and three of the gate: for each, 17
    # seconds are two rows of ten seconds. The plan's evaluations have many more.
    assert [(event.step, event.seconds) for event in evaluated] == [(0, 20.0), (20, 20.0)]
    assert evaluated[0].tokens == evaluated[1].tokens
    end = events[-1]
    assert isinstance(end, Finished)
    assert (end.cut, end.published) == ("deadline", "measured")
    assert end.heldout_bits_per_byte_before == evaluated[0].bits_per_byte
    assert end.heldout_bits_per_byte_after == evaluated[1].bits_per_byte


def test_eval_says_what_it_did_not_read(tmp_path: Path) -> None:
    tiny.save_trainable(tmp_path / "model")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.md").write_text("The beans want water, said Marra.")
    (notes / "b.md").write_bytes("Привет, мир".encode("cp1251"))
    (notes / "c.jsonl").write_text("{oops\n")
    result = CliRunner().invoke(cli, ["eval", str(notes), "--model", str(tmp_path / "model"), "--adapter", "none"])
    assert result.exit_code == 0
    assert "over 1 document," in result.stdout
    assert result.stderr.count("Not read: 1 encoding not recognised") == 1
    assert "c.jsonl: 1 line that is not JSON, no. 1; expected one JSON object a line" in result.stderr


def model_of(folder: Path, **changes: object) -> str:
    """Write a tiny model whose config has these changes; return its folder."""
    import json

    tiny.save_trainable(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def with_rows(config: TrainConfig, model: str, seq_len: int) -> TrainConfig:
    data = dataclasses.replace(config.data, seq_len=seq_len, batch_tokens=2048)
    return dataclasses.replace(config, model=model, data=data, steps=1)


def test_rows_longer_than_the_models_positions_are_refused(small: TrainConfig, tmp_path: Path) -> None:
    from edgetune.machine.forecast import forecast

    model = model_of(tmp_path / "short", max_position_embeddings=256)
    for command in (lambda config: list(train(config)), forecast):
        with pytest.raises(UsageError, match=r"--seq-len is 1024, and this model has 256 positions\. Type --seq-len 256"):
            command(with_rows(small, model, 1024))


def test_the_default_row_is_cut_to_the_models_positions(small: TrainConfig, tmp_path: Path) -> None:
    model = model_of(tmp_path / "short", max_position_embeddings=128)
    events = list(train(with_rows(small, model, DataConfig.seq_len)))
    assert isinstance(events[0], Started)
    assert events[0].plan["seq_len"] == 128
    assert isinstance(events[-1], Finished)
    # `eval` cuts its windows in the same way: the score is finite and every byte is counted.
    result = evaluate([str(Path(small.data.notes[0]) / "00.md")], model, "none", "cpu")
    assert math.isfinite(result.bits_per_byte)
    assert result.bytes == (Path(small.data.notes[0]) / "00.md").stat().st_size


def test_positions_that_rope_scaling_adds_count(small: TrainConfig, tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "factor": 4.0}
    model = model_of(tmp_path / "long", max_position_embeddings=256, rope_scaling=linear)
    events = list(train(with_rows(small, model, 1024)))
    assert isinstance(events[0], Started)
    assert events[0].plan["seq_len"] == 1024
    with pytest.raises(UsageError, match="1024 positions"):
        list(train(with_rows(small, model, 1025)))


def test_a_night_may_evaluate_for_longer_than_other_runs() -> None:
    assert largest_share(TrainConfig()) == 0.1
    assert largest_share(TrainConfig(only_new=True)) == 0.35
    assert largest_share(TrainConfig(only_new=True, evaluation_share=0.5)) == 0.5


def test_a_night_that_its_deadline_cuts_short_has_time_to_be_judged() -> None:
    assert seconds_after_deadline(TrainConfig(), 200.0) == 20.0
    assert seconds_after_deadline(TrainConfig(only_new=True), 200.0) == 40.0
    assert seconds_after_deadline(TrainConfig(only_new=True), 400.0) == 45.0
    assert seconds_after_deadline(TrainConfig(only_new=True), 6 * 3600.0) == 2160.0
