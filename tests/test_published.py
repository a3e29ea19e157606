"""A run tells learning from repair: the base as it was published scores the same tokens, alone and with the adapter."""

from __future__ import annotations

import dataclasses
import io
import itertools
import threading
import weakref
from pathlib import Path

import pytest
import tiny
import torch

from edgetune.config import DataConfig, TrainConfig
from edgetune.dataset.evaluation_set import EvaluationSet, Score
from edgetune.dataset.token_store import TokenStore
from edgetune.events import Event, Finished, Interrupted, Started, Working
from edgetune.library.loading import open_base
from edgetune.memory_settings import memory_allowed
from edgetune.reports.html import render
from edgetune.reports.repair import learning_lines
from edgetune.reports.terminal import Plain
from edgetune.runtime import adapter as adapters
from edgetune.runtime import peft_folder
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.loader import dense_layer, load_llama
from edgetune.runtime.ops_types import Weight
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.runner import Runner
from edgetune.training import published
from edgetune.training.evaluation import plan_evaluations, score
from edgetune.training.plan import HELD_OUT
from edgetune.training.setup import prepare_new
from edgetune.training.train import train

FIGURES = ("heldout_bits_per_byte_published", "heldout_bits_per_byte_on_published")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Return a run on a tiny model, stored dense, so that training quantises it."""
    monkeypatch.setattr("edgetune.training.sample_writer.SAMPLE_TOKENS", 1)
    monkeypatch.setattr("edgetune.events.FEWEST_JUDGED", 1)
    tiny.save_trainable(tmp_path / "model", dtype=torch.bfloat16)
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(40):
        text = "".join(f"Day {number * line}: the beans by the tarred shed want water, said Marra.\n" for line in range(9))
        (folder / f"{number:02}.md").write_text(text)
    data = DataConfig(notes=(str(folder),), seq_len=64, batch_tokens=256)
    return TrainConfig(data=data, model=str(tmp_path / "model"), weights="nf4", steps=3, rank=2, evaluation_share=1.0)


def end_of(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def figures(end: Finished) -> list[float]:
    return [getattr(end, name) for name in FIGURES]


def test_the_published_figures_are_an_independent_evaluation_of_the_dense_base(small: TrainConfig, tmp_path: Path) -> None:
    small = dataclasses.replace(small, steps=8, compute="fp32")
    prepared = prepare_new(small, open_base(small.model), tmp_path / "prepared")
    events = list(train(small))
    started, end = events[0], end_of(events)
    assert isinstance(started, Started)
    assert (end.published, end.base_bits, started.plan["published_scores"]) == ("measured", 4, 2)

    dense = load_llama(open_model(small.model), getattr(torch, started.plan["compute_dtype"]))
    whole = EvaluationSet.of(TokenStore.open(tmp_path / "prepared" / HELD_OUT), started.plan["seq_len"])
    scored, rows = whole.limited(started.plan["evaluate_tokens"]), started.plan["setting"]["row_tokens"]
    assert len(list(scored.batches(rows))) > 1
    assert end.heldout_bits_per_byte_published == score(Runner(dense), scored, rows).bits_per_byte
    adapters.attach(dense, peft_folder.load(Path(end.adapter)))
    assert end.heldout_bits_per_byte_on_published == score(Runner(dense), scored, rows).bits_per_byte
    # NF4 and an adapter change what is read, so each figure is another.
    all_figures = [end.heldout_bits_per_byte_before, end.heldout_bits_per_byte_after, *figures(end)]
    assert len(set(all_figures)) == 4
    assert prepared.plan.evaluate_tokens == started.plan["evaluate_tokens"]


def test_only_one_layer_of_the_published_base_is_in_memory_at_a_time(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_trainable(tmp_path / "deep", layers=5)  # in fp32, so that each layer is copied to the compute dtype
    small = dataclasses.replace(small, model=str(tmp_path / "deep"))
    run = prepare_new(small, open_base(small.model), tmp_path / "prepared")
    assert run.held_out is not None
    read: list[weakref.ref[torch.Tensor]] = []
    others_alive: list[int] = []

    def noted(*arguments: object) -> dict[str, Weight]:
        others_alive.append(sum(tensor() is not None for tensor in read))
        tensors = dense_layer(*arguments)  # type: ignore[arg-type]
        read.extend(weakref.ref(tensor) for tensor in tensors.values())
        return tensors

    told: list[tuple[int, int]] = []
    monkeypatch.setattr(published, "dense_layer", noted)
    rows = run.plan.setting.row_tokens
    published.score_published(run.loaded, run.runner, run.held_out, rows, 2, 2, lambda *done: told.append(done))
    assert others_alive == [0] * 5
    assert told == [(done, 5) for done in range(6)]


def test_an_interrupted_comparison_is_made_again_and_gives_the_same_figures(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = figures(end_of(list(train(small))))
    stop, original = threading.Event(), published._layers

    def stopped(*arguments: object) -> object:
        for blocks in original(*arguments):  # type: ignore[arg-type]
            yield blocks
            stop.set()  # while the first layer is done and the second is not

    monkeypatch.setattr(published, "_layers", stopped)
    events = list(train(small, stop))
    assert isinstance(events[-1], Interrupted)
    assert events[-1].step == small.steps
    monkeypatch.setattr(published, "_layers", original)
    assert figures(end_of(list(train(small)))) == uninterrupted


def test_a_base_stored_in_4_bits_has_no_published_form_here(small: TrainConfig, tmp_path: Path) -> None:
    quantize_folder(Path(str(small.model)), tmp_path / "nf4")
    end = end_of(list(train(dataclasses.replace(small, model=str(tmp_path / "nf4")))))
    assert (end.published, end.base_bits, figures(end)) == ("unknown", 4, [None, None])
    assert learning_lines(end, unknown=False) == []
    assert "the model folder holds the base in 4 bits alone" in render([end])


def test_without_memory_for_it_the_run_trains_and_says_that_nothing_was_measured(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "fits", lambda *arguments: False)
    end = end_of(list(train(small)))
    assert (end.published, figures(end)) == ("memory", [None, None])
    assert end.heldout_bits_per_byte_after is not None
    printed = io.StringIO()
    Plain(printed).show(end)
    assert "was not measured: reading the base as published needs more memory than this run may use" in printed.getvalue()


def test_memory_decides_how_many_scores_there_are(small: TrainConfig, tmp_path: Path) -> None:
    run = prepare_new(small, open_base(small.model), tmp_path / "prepared")
    from edgetune.memory_settings import choose_or_refuse
    from edgetune.runtime.budget import Stored

    config, tokens = run.loaded.model.config, 100_000
    chosen = choose_or_refuse(config, run.lora, [Stored.of(run.loaded.checkpoint)], small, run.loaded.model.dtype, "cpu")
    parts, rows = chosen.parts, chosen.setting.row_tokens

    def needed(scores: int) -> int:
        """Return the least memory that is enough, by bisection."""
        low, high = 0, memory_allowed(small)
        while high - low > 1:
            middle = (low + high) // 2
            fits = published.fits(run.loaded, scores, tokens, rows, parts, middle)
            low, high = (low, middle) if fits else (middle, high)
        return high

    state = tokens * config.hidden_size * run.loaded.model.dtype.itemsize
    assert state <= needed(2) - needed(1) <= 3 * state
    layer = config.linear_parameters // config.num_layers * run.loaded.model.dtype.itemsize
    assert needed(1) >= parts.total - parts.activations + layer + state


def test_the_scores_of_the_published_base_fit_in_the_evaluations_share() -> None:
    for steps, tokens in itertools.product((1, 7, 40, 400), (1000, 50_000, 10**7)):
        config = TrainConfig()
        for more in (0, 1, 2):
            every, read = plan_evaluations(config, steps, tokens, 40_000, False, more)
            evaluations = -(-steps // every) + 1 + more
            assert read == 1 or evaluations * read * 0.6 <= config.evaluation_share * tokens * (1 + 1e-9)
    assert plan_evaluations(TrainConfig(), 100, 200_000, 40_000, False, 2) == plan_evaluations(
        TrainConfig(), 100, 200_000, 40_000, False
    )  # a usual run has room for them without reading less


def test_training_on_the_published_weights_has_nothing_to_repair(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "bits_of_base", lambda loaded: None)
    end = end_of(list(train(small)))
    assert (end.published, end.base_bits, figures(end)) == ("same", None, [None, None])
    assert learning_lines(end, unknown=True) == []


def test_a_run_that_starts_from_an_adapter_is_not_compared(small: TrainConfig) -> None:
    first = end_of(list(train(dataclasses.replace(small, steps=1))))
    end = end_of(list(train(dataclasses.replace(small, steps=1, from_adapter=first.adapter))))
    assert (first.published, end.published, figures(end)) == ("measured", "adapter", [None, None])
    assert learning_lines(end, unknown=False) == []
    assert "the run started from an adapter, which had learnt and mended before" in learning_lines(end, unknown=True)[0]


def test_nothing_held_out_is_nothing_to_compare(small: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.md").write_text("The beans want water, said Marra. " * 30)
    data = dataclasses.replace(small.data, notes=(str(tmp_path / "one"),))
    end = end_of(list(train(dataclasses.replace(small, steps=1, data=data))))
    assert (end.published, figures(end)) == (None, [None, None])


def test_the_comparison_tells_how_far_it_is(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import functools

    from edgetune.progress import Stages

    monkeypatch.setattr("edgetune.training.loop.Stages", functools.partial(Stages, quiet=0.0, pause=0.0))
    told: list[Event] = []
    list(train(small, show=told.append))
    done = [event.done for event in told if isinstance(event, Working) and event.stage == "published base"]
    assert done == [0, 1, 2]


def finished(before: float, after: float, base: float | None, adapted: float | None, **changes: object) -> Finished:
    fields: dict = {
        "adapter": "notes-1", "steps": 20, "tokens": 10_240, "tokens_per_second": 2310.0,
        "heldout_bits_per_byte_before": before, "heldout_bits_per_byte_after": after, "peak_memory_bytes": 412_000_000,
        "device": "cpu", "seconds": 61.0, "published": "measured", "base_bits": 4,
        "heldout_bits_per_byte_published": base, "heldout_bits_per_byte_on_published": adapted,
    }  # fmt: skip
    return Finished(**{**fields, **changes})


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (
            (1.123, 0.956, 1.060, 0.945),
            "The base as published reads these notes at 1.060: 9.8% is learning, the rest mends what 4 bits broke|"
            "Over the base as published the adapter reads them at 0.945, better than over 4 bits: where memory allows, write "
            "with --weights bf16",
        ),
        (
            (1.123, 0.956, 1.060, 0.960),
            "The base as published reads these notes at 1.060: 9.8% is learning, the rest mends what 4 bits broke|"
            "Over the base as published the adapter reads them at 0.960, no better than over 4 bits, which take less memory",
        ),
        (
            (1.1, 1.0, 1.1, None),
            "The base as published reads these notes at 1.100, so 4 bits broke nothing here and all of this is learning",
        ),
        (
            (1.1, 1.06, 1.05, None),
            "The base as published reads these notes at 1.050, so the adapter only mends what 4 bits broke",
        ),
        ((1.1, 1.2, 1.05, None), "The base as published reads these notes at 1.050, and in 4 bits at 1.100"),
        ((1.1, 1.0, None, None), ""),
    ],
)  # fmt: skip
def test_the_sentences_say_what_was_learnt_and_what_was_mended(scores: tuple, said: str) -> None:
    lines = learning_lines(finished(*scores), unknown=True)
    assert "|".join(lines) == said


def test_the_last_lines_and_the_report_have_both_gains() -> None:
    end = finished(1.123, 0.956, 1.060, 0.945)
    printed = io.StringIO()
    Plain(printed).show(end)
    lines = printed.getvalue().splitlines()
    assert lines[0] == "Held-out notes: 1.123 to 0.956 bits per byte (14.9% lower), best at step 0"
    assert lines[1].endswith("at 1.060: 9.8% is learning, the rest mends what 4 bits broke")
    page = render([end])
    assert '<th scope="col">Base as published</th><th scope="col">Adapter over it</th>' in page
    assert '<td class="number">1.060</td><td class="number">0.945</td>' in page
    assert "9.8% is learning, the rest mends what 4 bits broke." in page


def test_a_deadline_that_leaves_no_time_says_so() -> None:
    (line,) = learning_lines(finished(1.1, 1.0, None, None, published="time"), unknown=False)
    assert line.endswith("was not measured: the deadline left no time to read the base as published")


def test_too_few_tokens_are_not_judged_by(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.events.FEWEST_JUDGED", 10_000)
    end = end_of(list(train(small)))
    assert (end.judged, end.published, end.base_bits, figures(end)) == (False, "few", 4, [None, None])
    assert end.heldout_tokens is not None
    assert 0 < end.heldout_tokens < 10_000
    printed = io.StringIO()
    Plain(printed).show(end)
    sentence, reason, first, *others = printed.getvalue().splitlines()
    assert sentence == "Learned; too few held-out notes were read to judge it; now in use, since no adapter was before."
    assert reason.startswith("Judging takes at least 10 held-out notes")
    before, after = end.heldout_bits_per_byte_before, end.heldout_bits_per_byte_after
    rough = f"ough figures, from {end.heldout_tokens:,} tokens alone"
    assert first == f"Held-out notes: {before:.3f} to {after:.3f} bits per byte (r{rough})"
    page = render([end])
    assert f"<h1>{sentence}</h1>" in page
    assert f"<p>R{rough}.</p>" in page
    for said in ("lower", "higher", "fewer bits", "No better", "no better", "only mends", "% is learning"):
        assert said not in page.replace("lower is better", "") + "".join([first, *others]), said


@pytest.mark.parametrize(("tokens", "judges"), [((150, 49), False), ((150, 50), True)])
def test_two_hundred_tokens_are_enough_to_judge_by(tokens: tuple[int, ...], judges: bool) -> None:
    assert Score((1.0, 1.0), tokens, (9.0, 9.0)).judges is judges
