"""Leaks are measured in every run and by `edgetune audit`: figures alone are kept, and too large ones keep an adapter aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner, Result
from short_notes import WORDS, write_short_notes

from edgetune.auditing import as_trained, audit
from edgetune.cli.main import cli
from edgetune.config import MOST_EXTRACTED, DataConfig, TrainConfig
from edgetune.documents.lineage import KEY as LINEAGE
from edgetune.events import Finished, Started
from edgetune.leaks import canaries
from edgetune.leaks.extraction import Extraction
from edgetune.library import adapter_registry as registry
from edgetune.library import privacy_ledger
from edgetune.library.kept_adapters import describe
from edgetune.reports.leaks import leak_lines
from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.errors import AdapterError, DataError
from edgetune.training import leak_evidence
from edgetune.training.leak_evidence import AUDIT_SHARE, MOST_TOKENS, Leaks, planned_tokens
from edgetune.training.private_plan import PrivatePlan
from edgetune.training.private_step import PrivateGradient
from edgetune.training.train import train


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return write_short_notes(tmp_path / "notes")


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny.save_trainable(tmp_path / "model")
    return str(tmp_path / "model")


def config(notes: Path, model: str, **changes: Any) -> TrainConfig:
    data = DataConfig(notes=(str(notes),), seq_len=64, batch_tokens=512)
    quick = {"steps": 4, "evaluations": 1, "evaluation_share": 1.0, "rank": 2, "lr": 0.01}
    return TrainConfig(**{"data": data, "model": model, **quick, **changes})


def finished(config: TrainConfig) -> Finished:
    *_, last = train(config)
    assert isinstance(last, Finished)
    return last


def record_of(end: Finished) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(end.adapter) / peft_folder.EDGETUNE_FILE).read_text())
    return found


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def holds_no_text(text: str) -> bool:
    return not any(word in text for word in [*WORDS, "mended", "log1", "notes/"])


# -- within a run


@pytest.mark.parametrize("tokens", [100, 5000, 300_000, 10**9])
@pytest.mark.parametrize("recognised", [None, 0.8])
@pytest.mark.parametrize("int8", [False, True])
def test_a_runs_audit_takes_less_than_a_twentieth_of_its_work(tokens: int, recognised: float | None, int8: bool) -> None:
    read = planned_tokens(TrainConfig(most_recognised=recognised), tokens, int8)
    readings, cost = (2 if recognised is None else 4), (1.0 if int8 else 0.6)
    assert readings * cost * read <= max(AUDIT_SHARE * tokens, readings * cost) < max(0.05 * tokens, 5)
    assert 1 <= read <= MOST_TOKENS


@pytest.mark.slow
def test_a_run_keeps_the_same_figures_each_time_and_no_text(notes: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leak_evidence, "AUDIT_SHARE", 2.0)  # so that so short a run reads some notes
    settings = config(notes, model, most_recognised=1.0)
    events = list(train(settings))
    end, started = events[-1], events[0]
    assert isinstance(end, Finished)
    assert isinstance(started, Started)
    assert end.decision is not None
    again = finished(settings)
    leaks = record_of(end)["leaks"]
    assert leaks == record_of(again)["leaks"]
    assert leaks.items() <= end.decision.items()
    assert started.plan["leak_tokens"] > 500
    assert (leaks["passages_extracted"], leaks["passages_by_base"]) == (0, 0)
    assert leaks["passages"] >= 1
    assert holds_no_text(json.dumps(leaks) + json.dumps(end.decision))


def test_an_adapter_that_repeats_its_notes_stays_aside(notes: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaking = Leaks(Extraction(passages=100, extracted=6, by_base=1, notes=40, documents=(3, 5)))
    monkeypatch.setattr(leak_evidence, "measure", lambda *_: leaking)
    end = finished(config(notes, model))
    assert end.decision is not None
    assert (end.promoted, end.decision["verdict"]) == (False, "leaks")
    assert registry.get_current() is None
    assert describe(Path(end.adapter)).leaks == {
        "passages": 100, "passages_extracted": 6, "passages_by_base": 1, "passage_notes": 40, "passage_notes_extracted": 2
    }  # fmt: skip
    allowed = finished(config(notes, model, most_extracted=0.06))
    assert allowed.decision is not None
    assert allowed.decision["verdict"] != "leaks"
    shown = run("adapters", "show", Path(end.adapter).name, "--model", model).output
    assert "Extraction: 6.0% (6 of 100 passages of the notes)" in shown
    assert "in 2 of 40 notes" in shown


def test_without_a_limit_on_membership_it_is_not_measured(notes: Path, model: str) -> None:
    leaks = record_of(finished(config(notes, model)))["leaks"]
    assert "passages" in leaks
    assert not any(name.startswith("membership") for name in leaks)
    assert 0 < MOST_EXTRACTED < 1


# -- the command


@pytest.mark.slow
def test_an_audit_measures_all_three_keeps_its_figures_and_leaves_nothing_else(
    notes: Path, model: str, private_home: Path
) -> None:
    end = finished(config(notes, model))
    before = {path.relative_to(private_home) for path in private_home.rglob("*")}
    result = run("audit", str(notes), "--adapter", Path(end.adapter).name, "--model", model, "--minutes", "0.000001", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    figures = found["figures"]
    assert found["kept"]
    assert found["trained"] + found["held_out"] == 240
    assert found["held_out"] >= 10
    assert (figures["membership_members"], figures["membership_non_members"]) == (found["trained"], found["held_out"])
    assert 0 <= figures["membership_low"] <= figures["membership_auc"] <= figures["membership_high"] <= 1
    assert figures["membership_false_positives"] == pytest.approx(1 / found["held_out"])
    assert (figures["shadow_steps"], figures["canaries"]) == (1, 16)
    assert figures["shadow_steps_planned"] == 4
    assert all(0 <= figures[f"canary_bits_{times}"] <= figures["canary_largest_bits"] for times in (0, 1, 4, 16))
    assert figures["canary_bits_1"] < 12, "one step exposes nothing"
    assert describe(Path(end.adapter)).audit == {name: value for name, value in figures.items() if value is not None}
    assert holds_no_text(result.stdout + (Path(end.adapter) / peft_folder.EDGETUNE_FILE).read_text())
    after = {path.relative_to(private_home) for path in private_home.rglob("*")}
    assert {path for path in after ^ before if path.parts[0] != "scratch"} == set()
    assert not [path for path in (private_home / "scratch").iterdir() if path.is_dir()]
    assert registry.load_for(Path(end.adapter), registry_base(model)).about["audit"] == figures


def registry_base(model: str) -> Any:
    from edgetune.library.loading import open_base

    return open_base(model)[1]


def test_an_audit_without_canaries_trains_nothing_and_says_a_sentence_for_each(
    notes: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = finished(config(notes, model))
    name = Path(end.adapter).name
    result = run("audit", str(notes), "--adapter", name, "--model", model, "--no-canaries")
    assert result.exit_code == 0, result.output
    assert f"adapter {name}." in result.stdout
    assert "Extraction: 0.0% (0 of" in result.stdout
    assert "Membership: a trained note is told from a held-out one" in result.stdout
    assert "Canaries" not in result.stdout
    assert "Extraction: 0.0%" in run("adapters", "show", name, "--model", model).output
    monkeypatch.setattr("edgetune.leaks.membership.FEWEST_NOTES", 1000)
    few = run("audit", str(notes), "--adapter", name, "--model", model, "--no-canaries").stdout
    assert "Membership: not measured, since it takes at least 1000 trained and 1000 held-out notes of 16 tokens or more" in few


def test_an_audit_that_cannot_be_made_says_why(notes: Path, model: str, tmp_path: Path) -> None:
    asked = run("audit", "--model", model)
    assert asked.exit_code != 0
    assert "Which notes?" in str(asked.exception)
    settings = config(notes, model)
    with pytest.raises(AdapterError, match="There is no adapter to audit"):
        audit(settings)
    end = finished(settings)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.md").write_text("A text that no adapter was trained on. " * 20)
    name = Path(end.adapter).name
    with pytest.raises(DataError, match="trained on none of the 1 notes"):
        audit(config(other, model), name, None)
    path = Path(end.adapter) / peft_folder.EDGETUNE_FILE
    path.write_text(json.dumps({key: value for key, value in record_of(end).items() if key != LINEAGE}))
    with pytest.raises(AdapterError, match="does not say which notes"):
        audit(settings, name, None)


def test_a_shadow_is_trained_as_the_adapter_was() -> None:
    trained = TrainConfig(DataConfig(mask="none", seq_len=64, seed=3, exclude=("x",)), epochs=5.0, lr=0.003, rank=3, out="o")
    about = {"settings": json.loads(json.dumps(trained.as_dict()))}
    asked = TrainConfig(DataConfig(notes=("n",), me=("Ann",)), model="m", device="cpu", rank=9)
    found = as_trained(asked, Adapter(LoraConfig(4, 8.0), {}, about), "a")
    assert (found.epochs, found.lr, found.rank, found.out, found.model, found.device) == (5.0, 0.003, 3, None, "m", "cpu")
    data = found.data
    assert (data.mask, data.seq_len, data.seed, data.notes, data.me, data.exclude) == ("none", 64, 3, ("n",), ("Ann",), ())
    for wrong in ({"rank": "many"}, {"data": {"seq_len": -1}}, ["rank"], {"targets": 7}):
        with pytest.raises(AdapterError, match="settings of training that cannot be used"):
            as_trained(asked, Adapter(LoraConfig(4, 8.0), {}, {"settings": wrong}), "a")


# -- the words


@pytest.mark.slow
def test_the_shadow_of_a_private_adapter_is_trained_privately_and_spends_nothing(
    notes: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = finished(config(notes, model, private="epsilon=8,runs=3"))
    record, entries = record_of(end)["private"], privacy_ledger.entries()
    plans, compute = list[PrivatePlan](), PrivateGradient.compute

    def noted(self: PrivateGradient, *arguments: Any) -> Any:
        plans.append(self._plan)
        return compute(self, *arguments)

    monkeypatch.setattr(PrivateGradient, "compute", noted)
    found = audit(config(notes, model), Path(end.adapter).name)
    assert len(plans) == found.figures["shadow_steps"] == 4
    inserted = sum(canary.repetitions for canary in canaries.make_canaries(0))
    assert plans[0].units == found.trained + inserted, "each time that a canary is inserted is a document of its own"
    assert plans[0].epsilon == pytest.approx(record["spent"], rel=1e-3), "what was spent, and not what three runs may spend"
    assert plans[0].delta == pytest.approx(record["delta"], rel=1e-3)
    assert privacy_ledger.entries() == entries


def test_each_measure_is_one_sentence() -> None:
    figures = {
        "passages": 400, "passages_extracted": 3, "passage_notes": 96, "passage_notes_extracted": 2,
        "membership_members": 96, "membership_non_members": 31, "membership_auc": 0.712, "membership_low": 0.65,
        "membership_high": 0.77, "membership_true_positives": 0.031, "membership_false_positives": 1 / 31,
        "canary_bits_0": 1.4, "canary_bits_1": 2.13, "canary_bits_4": 6.0, "canary_bits_16": 19.9,
        "canary_largest_bits": 19.93, "shadow_steps": 9, "shadow_steps_planned": 12,
    }  # fmt: skip
    assert leak_lines(figures) == [
        "Extraction: 0.8% (3 of 400 passages of the notes) can be read out word for word by typing the words before them, in 2 "
        "of 96 notes.",
        "Membership: a trained note is told from a held-out one 71% of the time (95% interval 65% to 77%; 50% is chance); 3.1% "
        "of 96 trained notes are named with none of the 31 named falsely.",
        "Canaries: 2.1 of 19.9 bits of an invented secret are exposed if it stands in the notes once (6.0 if 4 times, 19.9 if "
        "16 times; 1.4 if never, by chance) (the shadow training ended after 9 of 12 steps).",
    ]
    assert leak_lines({}) == leak_lines({"passages": "many", "verdict": "better"}) == []
    many = {**figures, "membership_non_members": 5000, "membership_false_positives": 0.001}
    assert leak_lines(many)[1].endswith("3.1% of 96 trained notes are named at 0.1% false positives.")
