"""Training measures for the gate: yesterday's adapter on the very tokens of the new one, and general text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import random_adapter
from short_notes import write_short_notes

from edgetune.config import DataConfig, TrainConfig
from edgetune.dataset.evaluation_set import EvaluationSet
from edgetune.events import Finished
from edgetune.library import adapter_registry as registry
from edgetune.library.gate import Change, Decision, Evidence, Verdict
from edgetune.library.kept_adapters import describe
from edgetune.library.loading import load_base, open_base
from edgetune.runtime import adapter as adapters
from edgetune.runtime import peft_folder
from edgetune.runtime.runner import Runner
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.training import evaluation, gate_evidence, run_end
from edgetune.training.train import train


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return write_short_notes(tmp_path / "notes")


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny.save_trainable(tmp_path / "model")
    return str(tmp_path / "model")


def config(notes: Path, model: str, **changes: Any) -> TrainConfig:
    data = DataConfig(notes=(str(notes),), seq_len=64, batch_tokens=256)
    quick = {"steps": 6, "evaluations": 1, "evaluation_share": 1.0, "rank": 2, "lr": 0.01}
    return TrainConfig(**{"data": data, "model": model, **quick, **changes})


def whole(notes: Path, model: str, seed: int = 0, **changes: Any) -> TrainConfig:
    """Return the settings of a run that is long enough to read all held-out notes in each evaluation."""
    data = DataConfig(notes=(str(notes),), seq_len=64, batch_tokens=512, seed=seed)
    return config(notes, model, data=data, steps=12, **changes)


def trained(config: TrainConfig) -> Finished:
    *_, last = train(config)
    assert isinstance(last, Finished)
    return last


def seen_by_gate(monkeypatch: pytest.MonkeyPatch, verdict: Verdict = Verdict.BETTER) -> list[Evidence]:
    """Return a list that receives the evidence of every run; each is promoted, unless `verdict` says otherwise."""
    seen: list[Evidence] = []

    def decide(evidence: Evidence) -> Decision:
        seen.append(evidence)
        return Decision(verdict in (Verdict.BETTER, Verdict.FIRST), verdict, "Because.")

    monkeypatch.setattr(run_end, "decide", decide)
    return seen


def test_a_first_adapter_is_compared_with_the_bare_base(notes: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_by_gate(monkeypatch)
    end = trained(whole(notes, model))
    (evidence,) = seen
    assert evidence.first
    assert len(evidence.heldout) >= 10
    size = sum(document.bytes for document in evidence.heldout)
    before = sum(document.bits_before for document in evidence.heldout) / size
    after = sum(document.bits_after for document in evidence.heldout) / size
    assert before == pytest.approx(end.heldout_bits_per_byte_before)
    assert after == pytest.approx(end.heldout_bits_per_byte_after)
    assert end.decision is not None
    assert end.decision["verdict"] == "better"
    assert end.decision["new_bits_per_byte"] == pytest.approx(after)


def test_a_run_from_scratch_is_compared_with_yesterdays_adapter(
    notes: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The score before is the one that yesterday's run gave its adapter, not that of step 0; the same tokens are read."""
    seen = seen_by_gate(monkeypatch)
    first = trained(whole(notes, model))
    second = trained(whole(notes, model, seed=1, rank=3))
    evidence = seen[1]
    assert not evidence.first
    size = sum(document.bytes for document in evidence.heldout)
    yesterday = sum(document.bits_before for document in evidence.heldout) / size
    assert yesterday == pytest.approx(first.heldout_bits_per_byte_after, rel=1e-5)
    assert second.heldout_bits_per_byte_before == pytest.approx(first.heldout_bits_per_byte_before, rel=1e-5)
    record = json.loads((Path(second.adapter) / peft_folder.EDGETUNE_FILE).read_text())
    assert record["compared_with"] == Path(first.adapter).name
    assert (record["parent"], record["verdict"], record["reason"]) == (None, "better", "Because.")


def test_the_adapter_that_is_saved_is_the_trained_one_although_yesterdays_was_on_the_model(
    notes: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a current adapter, and with one, the same plan gives the same weights."""
    seen_by_gate(monkeypatch, Verdict.TOO_FEW)
    alone = trained(config(notes, model))
    choice, base = open_base(model)
    yesterday = registry.adapters_folder(base.digest) / "yesterday"
    peft_folder.save(random_adapter(base.config, rank=5), yesterday, "tiny")
    registry.set_current(registry.Current(yesterday, choice.name, base.digest))
    beside = trained(config(notes, model))
    one, other = (peft_folder.load(Path(end.adapter)).tensors for end in (alone, beside))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_from_yesterdays_adapter_takes_its_step_0_for_it(
    notes: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_by_gate(monkeypatch)
    first = trained(config(notes, model))

    def never(self: object, batches: int) -> None:
        raise AssertionError("yesterday's adapter was scored twice")

    monkeypatch.setattr(gate_evidence.GateEvidence, "_score_of_rival", never)
    second = trained(config(notes, model, from_adapter=first.adapter))
    size = sum(document.bytes for document in seen[1].heldout)
    before = sum(document.bits_before for document in seen[1].heldout) / size
    assert before == pytest.approx(second.heldout_bits_per_byte_before)
    record = describe(Path(second.adapter))
    assert (record.parent, record.compared_with) == (Path(first.adapter).name,) * 2
    assert record.configuration == describe(Path(first.adapter)).configuration  # --from is no part of the settings' digest


def test_a_second_adapter_with_too_few_held_out_notes_is_kept_beside_the_first(notes: Path, model: str, tmp_path: Path) -> None:
    for path in list(notes.iterdir())[40:]:
        path.unlink()
    first = trained(config(notes, model))
    assert (first.promoted, first.decision is not None and first.decision["verdict"]) == (True, "first")
    second = trained(config(notes, model, steps=8))
    assert not second.promoted
    assert second.decision is not None
    assert second.decision["verdict"] == "too few"
    current = registry.get_current()
    assert current is not None
    assert current.adapter == Path(first.adapter).resolve()
    assert (Path(second.adapter) / peft_folder.CONFIG_FILE).is_file()


def test_a_current_adapter_that_cannot_be_read_counts_as_none(notes: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_by_gate(monkeypatch)
    first = trained(config(notes, model))
    (Path(first.adapter) / peft_folder.WEIGHTS_FILE).write_bytes(b"torn")
    trained(config(notes, model))
    assert seen[1].first


def test_general_text_is_read_with_the_bare_base_and_with_the_new_adapter(
    notes: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_by_gate(monkeypatch)
    monkeypatch.setattr(gate_evidence, "FEWEST_GENERAL_TOKENS", 50)
    trained(config(notes, model))
    found = registry.get_current()
    assert found is not None
    loaded = load_base(open_base(model), "cpu")
    loaded.model.set_dtype(torch.float32)
    general = seen[0].general
    assert isinstance(general, Change)
    tokenizer = Tokenizer.load(Path(model))
    batches = gate_evidence.general_batches(tokenizer, 64, 128, 10**6)
    assert sum(batch.trained for batch, _ in batches) > 500
    runner = Runner(loaded.model)
    bare = evaluation.score_batches(runner, batches, math.inf).bits_per_byte
    assert general.before == pytest.approx(bare, rel=0.2)  # the run's plan read a part of these
    assert general.after != general.before


def test_the_general_texts_bytes_are_all_counted_when_all_of_it_is_read(model: str) -> None:
    from edgetune.texts import measuring_text

    batches = gate_evidence.general_batches(Tokenizer.load(Path(model)), 32, 32, 10**6)
    size = sum(len(text.encode()) for text in measuring_text())
    assert sum(bytes_ for _, bytes_ in batches) == pytest.approx(size, rel=0.02)
    assert max(len(batch.input_ids) for batch, _ in batches) <= 32
    few = gate_evidence.general_batches(Tokenizer.load(Path(model)), 32, 32, 100)
    assert 68 < sum(batch.trained for batch, _ in few) <= 100


def test_pieces_of_general_text_are_scored_side_by_side_as_they_are_one_by_one(model: str) -> None:
    tokenizer, loaded = Tokenizer.load(Path(model)), load_base(open_base(model), "cpu")
    loaded.model.set_dtype(torch.float32)
    alone, packed = (gate_evidence.general_batches(tokenizer, 32, rows, 400) for rows in (32, 128))
    assert len(packed) < len(alone) / 3
    assert max(len(batch.input_ids) for batch, _ in packed) <= 128
    assert sum(size for _, size in packed) == pytest.approx(sum(size for _, size in alone))
    found, wanted = (torch.cat([Runner(loaded.model).score(batch) for batch, _ in batches]) for batches in (packed, alone))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_replacing_an_adapter_gives_the_same_modules_back_even_after_an_error(model: str) -> None:
    loaded = load_base(open_base(model), "cpu").model
    adapters.attach(loaded, random_adapter(loaded.config, rank=2))
    before = [block.linears() for block in loaded.blocks]
    other = random_adapter(loaded.config, rank=7)

    def inside(adapter: adapters.Adapter | None) -> None:
        with adapters.replaced(loaded, adapter):
            found = adapters.live_tensors(loaded)
            assert bool(found) is (adapter is not None)
            raise KeyboardInterrupt

    for adapter in (other, None):
        with pytest.raises(KeyboardInterrupt):
            inside(adapter)
        after = [block.linears() for block in loaded.blocks]
        assert all(after[layer][name] is linear for layer, linears in enumerate(before) for name, linear in linears.items())


def test_a_score_by_document_holds_all_bits_and_all_bytes(notes: Path, model: str) -> None:
    from edgetune.dataset.token_store import tokenize
    from edgetune.documents.reading import read_notes

    loaded = load_base(open_base(model), "cpu")
    documents = read_notes((str(notes),)).documents[:9]
    store = tokenize(documents, loaded.tokenizer, notes.parent / "tokens")
    scored = EvaluationSet.of(store, 16)
    score = evaluation.score(Runner(loaded.model), scored, 48)
    by_document = score.by_document()
    assert sorted(by_document) == list(range(9))
    assert [round(by_document[number][0]) for number in range(9)] == [document.bytes for document in store.documents]
    assert sum(bits for _, bits in by_document.values()) == pytest.approx(sum(score.nats) / math.log(2))
    alone: Callable[[int], float] = lambda number: sum(  # noqa: E731
        nats for windows in score.windows for document, _, nats in windows if document == number
    )
    assert by_document[3][1] == pytest.approx(alone(3) / math.log(2))
