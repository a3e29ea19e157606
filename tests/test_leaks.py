"""The measures of the audit: extraction, membership inference and exposure have the values that their definitions give."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from edgetune.dataset.evaluation_set import EvaluationSet
from edgetune.dataset.token_store import TokenStore, tokenize
from edgetune.documents.document import Document
from edgetune.leaks import canaries, membership
from edgetune.leaks.exposure import exposure, skew_normal_cdf, skew_normal_fit
from edgetune.leaks.extraction import extraction, suspects
from edgetune.leaks.reading import PASSAGE_TOKENS, PREFIX_TOKENS, ReadWindow, only, passages_of, read_windows, stands_in
from edgetune.library.loading import Loaded, load_base, open_base
from edgetune.runtime import adapter as adapters
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.runner import Runner

WORDS = [
    "harbour", "allotment", "bicycle", "spoke", "kettle", "ledger", "orchard", "gasket", "lantern", "copper", "willow",
    "barley", "mortar", "saddle", "anchor", "basket", "candle", "danger", "engine", "feather", "ginger", "hammer", "island",
    "jacket", "kitchen", "ladder", "meadow", "needle",
]  # fmt: skip


def note(seed: int, words: int = len(WORDS)) -> str:
    """Return a note of random words, which nothing but learning it by heart could complete; with few words, each comes once."""
    generator = random.Random(seed)
    return " ".join(generator.sample(WORDS, words) if words <= len(WORDS) else generator.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("models") / "model"
    tiny.save_trainable(folder, 128, 128)  # in a narrower one some tokens are never the likeliest
    found = load_base(open_base(str(folder)), "cpu")
    found.model.set_dtype(torch.float32)
    return found


def stored(loaded: Loaded, folder: Path, *texts: str) -> TokenStore:
    documents = [Document.of(f"{number}.md", text) for number, text in enumerate(texts)]
    return tokenize(documents, loaded.tokenizer, folder / "tokens")


def overfit(loaded: Loaded, store: TokenStore, steps: int = 60) -> Runner:
    """Attach an adapter that has learnt the store's only window by heart, or with few steps a part of it."""
    adapters.attach_new(loaded.model, LoraConfig(16, 32.0, 0.0), 0)
    runner, windows = Runner(loaded.model), EvaluationSet.of(store, 512)
    parameters = adapters.parameters(loaded.model)
    optimizer = PagedAdamW(parameters)
    batch, _ = windows.batch(windows.order.tolist())
    for step in range(steps):
        runner.train(batch)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(0.01 * min(1.0, (step + 1) / 10) * (1 - step / steps))
        optimizer.zero_grad()
    return runner


# -- extraction


def test_a_note_learnt_by_heart_is_extracted_and_the_untouched_base_extracts_nothing(loaded: Loaded, tmp_path: Path) -> None:
    store = stored(loaded, tmp_path, note(0))
    windows = EvaluationSet.of(store, 256)
    bare = read_windows(Runner(loaded.model), windows, 256)
    try:
        adapted = read_windows(overfit(loaded, store), windows, 256)
    finally:
        adapters.detach(loaded.model)
    found = extraction(adapted, bare)
    tokens = store.documents[0].tokens - 2  # without start and end
    passages = (tokens - PREFIX_TOKENS + 1) // PASSAGE_TOKENS
    assert passages >= 2
    assert (found.passages, found.extracted, found.by_base, found.notes) == (passages, passages, 0, 1)
    assert (found.share, found.leaking, found.documents) == (1.0, 1, (0,))
    untouched = extraction(bare, bare)
    assert (untouched.passages, untouched.extracted, untouched.by_base, untouched.documents) == (passages, 0, 0, ())


def test_a_passage_counts_exactly_where_greedy_decoding_writes_it(loaded: Loaded, tmp_path: Path) -> None:
    """Half-learnt, so that some passages are written word for word and some are not; each is generated to compare."""
    store = stored(loaded, tmp_path, note(1, 90))
    windows = EvaluationSet.of(store, 512)
    try:
        runner = overfit(loaded, store, 25)
        (read,) = read_windows(runner, windows, 512)
        ids = store.ids.tolist()
        written = []
        for start in range(PREFIX_TOKENS, len(ids) - 1, PASSAGE_TOKENS)[: len(read.passages)]:
            generator = Generator(runner, 512)
            made = list(generator.generate(ids[:start], PASSAGE_TOKENS, Sampling(temperature=0.0)))
            written.append(made == ids[start : start + PASSAGE_TOKENS])
    finally:
        adapters.detach(loaded.model)
    assert list(read.passages) == written
    assert 0 < sum(written) < len(written)


def test_what_the_bare_base_writes_as_well_does_not_count() -> None:
    adapted = [
        ReadWindow(0, 0, 60, 1.0, (True, True, False)),
        ReadWindow(1, 1, 60, 1.0, (False,)),
        ReadWindow(2, 2, 9, 1.0, ()),
    ]
    bare = [ReadWindow(0, 0, 60, 2.0, (True, False, False))]
    found = extraction(adapted, bare)
    assert suspects(adapted) == {0}
    assert (found.passages, found.extracted, found.by_base, found.notes, found.documents) == (4, 1, 1, 2, (0,))
    assert found.share == 0.25
    assert extraction(adapted, []).extracted == 2  # unread by the base: the adapter's
    assert extraction([], []).share == 0.0


def test_only_some_windows_are_read_again(loaded: Loaded, tmp_path: Path) -> None:
    store = stored(loaded, tmp_path, *map(note, range(6)))
    windows = EvaluationSet.of(store, 64)
    every = read_windows(Runner(loaded.model), windows, 128)
    wanted = {every[2].window, every[5].window}
    again = read_windows(Runner(loaded.model), only(windows, wanted), 128)
    assert [read.window for read in again] == [read.window for read in every if read.window in wanted]
    for read in again:
        (first,) = [other for other in every if other.window == read.window]
        assert (read.document, read.tokens, read.passages) == (first.document, first.tokens, first.passages)
        assert read.nats == pytest.approx(first.nats, rel=1e-4)
    assert read_windows(Runner(loaded.model), only(windows, set()), 128) == []


def test_reading_stops_when_its_time_is_over_but_reads_one_batch(loaded: Loaded, tmp_path: Path) -> None:
    store = stored(loaded, tmp_path, *map(note, range(6)))
    windows = EvaluationSet.of(store, 64)
    told: list[tuple[int, int]] = []
    read = read_windows(Runner(loaded.model), windows, 64, lambda done, total: told.append((done, total)), seconds=0.0)
    assert len(read) == len(next(windows.groups(64)))
    assert told[0] == (0, windows.tokens)


# -- membership


def by_hand(members: list[float], others: list[float]) -> float:
    """Return the area under the ROC curve by counting all pairs."""
    pairs = [(member > other) + 0.5 * (member == other) for member in members for other in others]
    return sum(pairs) / len(pairs)


def test_the_area_and_the_true_positives_are_those_of_counting() -> None:
    generator = random.Random(0)
    members = [round(generator.gauss(0.6, 1.0), 1) for _ in range(300)]  # rounded, so that there are ties
    others = [round(generator.gauss(0.0, 1.0), 1) for _ in range(2500)]
    found = membership.membership(np.array(members), np.array(others))
    assert found is not None
    assert found.auc == pytest.approx(by_hand(members, others), abs=1e-12)
    best = max(
        sum(member > threshold for member in members) / 300
        for threshold in others
        if sum(other > threshold for other in others) <= 2  # 0.1% of 2,500, rounded down
    )
    assert found.true_positives == pytest.approx(best)
    assert found.false_positives == 0.001
    assert (found.members, found.non_members) == (300, 2500)


def test_the_interval_is_delongs() -> None:
    """The standard error by DeLong's definition, over all pairs."""
    members, others = [0.3, 0.9, 1.4, 0.2, 0.8], [0.1, 0.5, 0.2, 0.9]
    area, error = membership.area_and_error(np.array(members), np.array(others))
    rows = [by_hand([member], others) for member in members]
    columns = [by_hand(members, [other]) for other in others]
    assert area == pytest.approx(by_hand(members, others))
    assert error == pytest.approx(math.sqrt(np.var(rows, ddof=1) / 5 + np.var(columns, ddof=1) / 4))


def test_chance_lies_within_the_interval_as_often_as_it_says() -> None:
    generator, inside = np.random.default_rng(0), 0
    for _ in range(400):
        found = membership.membership(generator.normal(size=60), generator.normal(size=40))
        assert found is not None
        inside += found.low <= 0.5 <= found.high
    assert 0.92 < inside / 400 < 0.98


def test_few_held_out_notes_say_the_smallest_rate_that_they_measure() -> None:
    found = membership.membership(np.arange(50.0), np.arange(20.0))
    assert found is not None
    assert found.false_positives == 1 / 20
    assert found.true_positives == 30 / 50  # those above all of the twenty
    assert membership.membership(np.arange(9.0), np.arange(50.0)) is None
    odd = membership.membership(np.array([math.nan] * 10), np.arange(20.0))
    assert odd is not None
    assert math.isnan(odd.auc)


def test_a_documents_score_is_its_gain_over_the_base_by_token() -> None:
    adapted = [
        ReadWindow(0, 0, 20, 30.0, ()),
        ReadWindow(1, 0, 20, 10.0, ()),
        ReadWindow(2, 1, 8, 1.0, ()),
        ReadWindow(3, 2, 16, 8.0, ()),
    ]
    bare = [
        ReadWindow(0, 0, 20, 50.0, ()),
        ReadWindow(1, 0, 20, 30.0, ()),
        ReadWindow(2, 1, 8, 90.0, ()),
        ReadWindow(3, 2, 16, 4.0, ()),
    ]
    assert membership.scores_by_document(adapted, bare).tolist() == [1.0, -0.25]  # the note of 8 tokens is left out


# -- exposure


def test_the_exposure_by_rank_is_that_of_the_secret_sharer() -> None:
    """A table of seven scores: log2 |R| - log2 rank, where the canary itself is one of eight."""
    table = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert exposure(1.5, table, 8) == pytest.approx(math.log2(8) - math.log2(2))
    assert exposure(3.5, table, 8) == pytest.approx(math.log2(8) - math.log2(4))
    assert exposure(9.0, table, 8) == 0.0


def test_beyond_the_references_the_exposure_is_the_fitted_tails() -> None:
    """5.2 standard deviations below a normal distribution: the probability is 9.96e-8, capped at one code of a million."""
    generator = random.Random(0)
    references = [generator.gauss(20.0, 1.5) for _ in range(4000)]
    assert exposure(20.0 - 4.2 * 1.5, references, 10**9) == pytest.approx(-math.log2(1.335e-5), abs=1.2)
    assert exposure(-500.0, references, 10**6) == pytest.approx(math.log2(10**6))
    assert math.isnan(exposure(math.nan, references, 10**6))


@pytest.mark.parametrize(
    ("value", "shape", "expected"), [(-3.0, 0.0, 0.0013498980), (0.0, 1.0, 0.25), (0.0, -1.0, 0.75), (1.0, 1.0, 0.7078610)]
)
def test_the_skew_normal_distribution_has_its_known_values(value: float, shape: float, expected: float) -> None:
    """At 0 it is 1/2 - atan(shape) / pi (Azzalini 1985); with shape 1 it is the normal distribution's square."""
    assert skew_normal_cdf(value, 0.0, 1.0, shape) == pytest.approx(expected, rel=1e-5)


def test_a_fit_has_the_moments_of_its_values() -> None:
    generator = np.random.default_rng(0)
    shape, delta = 3.0, 3.0 / math.sqrt(10.0)
    both = generator.normal(size=(2, 200_000))
    values = 5.0 + 2.0 * (delta * np.abs(both[0]) + math.sqrt(1 - delta**2) * both[1])
    location, scale, fitted = skew_normal_fit(values.tolist())
    assert location == pytest.approx(5.0, abs=0.05)
    assert scale == pytest.approx(2.0, abs=0.05)
    assert fitted == pytest.approx(shape, abs=0.3)


# -- canaries


def test_canaries_depend_on_the_seed_alone_and_no_name_is_given_twice() -> None:
    made = canaries.make_canaries(3)
    assert made == canaries.make_canaries(3)
    assert made != canaries.make_canaries(4)
    assert len({canary.name for canary in made}) == len(made) == 4 * canaries.CANARIES_OF_EACH
    documents = canaries.inserted(made)
    counts = {canary: sum(document.text == canary.text() for document in documents) for canary in made}
    assert all(counts[canary] == canary.repetitions for canary in made)
    assert sorted({canary.repetitions for canary in made}) == [0, 1, 4, 16]


def test_a_learnt_canary_is_exposed_and_an_unseen_one_as_much_as_chance_says(loaded: Loaded, tmp_path: Path) -> None:
    learnt, unseen = canaries.Canary("Bagu Hal", 271828, 1), canaries.Canary("Osra Mojo", 314159, 0)
    store = stored(loaded, tmp_path, learnt.text())
    try:
        runner = overfit(loaded, store)
        found = canaries.exposures(runner, loaded.tokenizer, [learnt, unseen], tmp_path / "scored", 256, 0, references=64)
    finally:
        adapters.detach(loaded.model)
    assert [(exposed.repetitions, exposed.canaries) for exposed in found] == [(0, 1), (1, 1)]
    assert found[1].bits > 15
    assert found[0].bits < 8


def test_passages_follow_each_other_from_the_first_target_with_enough_before_it() -> None:
    scored = torch.ones(100, dtype=torch.bool)
    assert list(passages_of(scored)) == [(23, 47), (47, 71), (71, 95)]
    scored[:50] = False  # a later window of a long note: its first half is another's
    assert list(passages_of(scored)) == [(50, 74), (74, 98)]
    scored[60] = False  # the end of a turn
    assert list(passages_of(scored)) == [(74, 98)]
    assert list(passages_of(torch.ones(46, dtype=torch.bool))) == []


def test_a_passage_that_held_out_notes_hold_too_is_no_notes_own(loaded: Loaded, tmp_path: Path) -> None:
    store = stored(loaded, tmp_path, note(0))
    windows = EvaluationSet.of(store, 256)
    try:
        runner = overfit(loaded, store)
        (alone,) = read_windows(runner, windows, 256)
        held_out = tokenize([Document.of("h.md", " ".join(note(0).split()[:18]))], loaded.tokenizer, tmp_path / "held-out")
        (shared,) = read_windows(runner, windows, 256, held_out=held_out)
    finally:
        adapters.detach(loaded.model)
    assert all(alone.passages)
    assert len(shared.passages) == len(alone.passages)
    assert (shared.passages[0], shared.passages[-1]) == (False, True)
    assert stands_in(np.array([1, 2, 3], np.int32).tobytes(), np.array([2, 3], np.int32))
    assert not stands_in(np.array([1 << 8, 2 << 8], np.int32).tobytes(), np.array([1, 2], np.int32))
