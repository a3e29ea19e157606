"""Packing: each token trained once an epoch, each byte scored once, no window across documents, by (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.dataset.packing import Packer, cut_windows, deal, random_words
from edgetune.dataset.pieces import CONTEXT, STOP, TEXT
from edgetune.dataset.token_store import StoredDocument, TokenStore
from edgetune.runtime.errors import DataError, UsageError


def make_store(marks: list[list[int]]) -> TokenStore:
    """Return a store of documents with the given marks; a token's id is its index in the store, so batches show its origin."""
    documents, start = [], 0
    for number, document in enumerate(marks):
        documents.append(StoredDocument(f"{number}.md", f"{number:064x}", start, len(document), document.count(TEXT)))
        start += len(document)
    flat = [mark for document in marks for mark in document]
    return TokenStore(np.arange(start, dtype=np.int32), np.array(flat, dtype=np.uint8), tuple(documents))


def notes(*sizes: int) -> TokenStore:
    return make_store([[CONTEXT, *[TEXT] * size, STOP] for size in sizes])


@st.composite
def stores(draw) -> TokenStore:
    """Draw stores of short and long notes and chats, with at least one trained token."""
    sizes = draw(st.lists(st.integers(0, 90), min_size=1, max_size=25))
    marks = []
    for size in sizes:
        if draw(st.booleans()):
            marks.append([CONTEXT, *[TEXT] * size, STOP])
        else:
            marks.append([CONTEXT, *draw(st.lists(st.sampled_from([CONTEXT, TEXT, STOP]), min_size=size, max_size=size))])
    marks.append([CONTEXT, TEXT, STOP])
    return make_store(marks)


lengths = st.tuples(st.integers(2, 40), st.integers(0, 80)).map(lambda t: (t[0], t[0] + t[1]))


def document_of(store: TokenStore) -> np.ndarray:
    return np.repeat(np.arange(len(store.documents)), [document.tokens for document in store.documents])


def trained_targets(batches) -> list[int]:
    return sorted(chain_targets(batches, lambda batch: batch.loss_mask > 0))


def chain_targets(batches, chosen) -> list[int]:
    return [target for batch in batches for target in batch.targets[chosen(batch)].tolist()]


def whole_row(packer: Packer, step: int):
    """Return all of a step's windows in one row."""
    (batch,) = packer.micro_batches(step, packer.batch_tokens)
    return batch


def check_row(batch, store: TokenStore, seq_len: int, max_tokens: int) -> None:
    """Check a row's shapes and dtypes, that segments partition it, positions restart and no window crosses documents."""
    owner = document_of(store)
    assert len(batch.input_ids) <= max_tokens
    assert batch.input_ids.dtype == batch.targets.dtype == batch.positions.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32
    assert set(batch.loss_mask.tolist()) <= {0.0, 1.0}
    begins, ends, key_begins, key_ends = zip(*batch.segments, strict=True)
    assert (begins, ends) == (key_begins, key_ends)
    assert (begins[0], ends[-1]) == (0, len(batch.input_ids))
    assert begins[1:] == ends[:-1]
    for begin, end in zip(begins, ends, strict=True):
        assert 1 <= end - begin <= seq_len
        assert batch.positions[begin:end].tolist() == list(range(end - begin))
        assert len({*owner[batch.input_ids[begin:end].numpy()], *owner[batch.targets[begin:end].numpy()]}) == 1
        assert torch.equal(batch.targets[begin:end], batch.input_ids[begin:end] + 1)
        assert batch.loss_mask[begin:end].any()


@given(stores(), lengths, st.integers(0, 2**70), st.integers(0, 3))
def test_an_epoch_trains_every_token_exactly_once(store, shape, seed, epoch):
    seq_len, batch_tokens = shape
    packer = Packer(store, seq_len, batch_tokens, seed)
    steps = range(epoch * packer.steps_per_epoch, (epoch + 1) * packer.steps_per_epoch)
    batches = [whole_row(packer, step) for step in steps]
    for batch in batches:
        check_row(batch, store, seq_len, batch_tokens)
    assert trained_targets(batches) == np.flatnonzero(store.trained).tolist()
    assert sum(batch.trained for batch in batches) == store.trained_tokens
    assert sum(len(batch.input_ids) for batch in batches) == packer.windows.length.sum()


@given(stores(), lengths, st.integers(1, 90), st.data())
def test_micro_batches_are_the_steps_windows(store, shape, micro_tokens, data):
    seq_len, batch_tokens = shape
    packer = Packer(store, seq_len, batch_tokens, 1)
    step = data.draw(st.integers(0, 2 * packer.steps_per_epoch))
    whole, micro = whole_row(packer, step), packer.micro_batches(step, micro_tokens)
    longest = max(segment.q_end - segment.q_start for segment in whole.segments)
    for batch in micro:
        check_row(batch, store, seq_len, max(micro_tokens, longest))
    assert trained_targets(micro) == trained_targets([whole])
    assert sum(batch.trained for batch in micro) == whole.trained


@given(stores(), st.integers(2, 40), st.integers(0, 39))
def test_a_later_window_sees_its_overlap_first(store, seq_len, overlap):
    overlap %= seq_len
    windows = cut_windows(store, seq_len, overlap)
    begins = {document.start for document in store.documents}
    for start, context in zip(windows.start, windows.context, strict=True):
        assert context == (0 if start in begins else overlap)


def equal(left, right) -> bool:
    return left.segments == right.segments and all(
        torch.equal(getattr(left, name), getattr(right, name)) for name in ("input_ids", "targets", "loss_mask", "positions")
    )


@settings(max_examples=20)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=10), st.integers(0, 1000))
def test_a_step_does_not_depend_on_the_calls_before_it(steps, seed):
    store = notes(*range(1, 60))
    used = Packer(store, 16, 64, seed)
    for step in steps:
        whole_row(used, step)
    for step in steps:
        fresh = Packer(store, 16, 64, seed)
        assert equal(whole_row(used, step), whole_row(fresh, step))
        assert all(map(equal, used.micro_batches(step, 20), fresh.micro_batches(step, 20)))


def test_epochs_and_seeds_differ():
    store = notes(*range(1, 60))
    packer, other = Packer(store, 16, 64, 0), Packer(store, 16, 64, 1)
    steps = packer.steps_per_epoch
    assert not equal(whole_row(packer, 0), whole_row(packer, steps))
    assert not equal(whole_row(packer, 0), whole_row(other, 0))
    rows = [{frozenset(row) for row in packer.plan(epoch)} for epoch in (0, 1)]
    assert rows[0] != rows[1]  # the rows are composed differently, not only reordered


def test_random_words_are_philoxs_own():
    # These values must not change: with others, a resumed run would train on other rows than an uninterrupted one.
    assert random_words(7, 3, 1, 3).tolist() == [3845544696532098304, 9931676275916508706, 5599683423530089621]
    assert random_words(-1, 0, 0, 1).tolist() == random_words(2**64 - 1, 0, 0, 1).tolist()


def test_rows_are_full_and_alike_on_note_like_lengths():
    sizes = np.random.default_rng(0).lognormal(5.5, 0.6, 2000).astype(int) + 20
    packer = Packer(notes(*sizes.tolist()), 512, 2048, 0)
    assert packer.windows.length.sum() > 0.95 * packer.steps_per_epoch * 2048
    for epoch in range(3):
        held = [int(packer.windows.length[row].sum()) for row in packer.plan(epoch)]
        assert max(held) <= 2048
        assert min(held) > 0.9 * 2048


def test_rows_hold_what_hardly_fits():
    packer = Packer(notes(*[33] * 50), 64, 64, 0)  # two windows would need 68 tokens
    assert packer.steps_per_epoch == 50
    assert Packer(notes(5), 64, 1000, 0).steps_per_epoch == 1


def test_deal_says_when_a_row_overflows():
    assert deal(np.array([3, 3, 3]), np.arange(3), 2, 5) is None
    assert deal(np.array([3, 3, 3]), np.arange(3), 2, 6) == [[0, 2], [1]]


def test_a_question_that_nobody_answers_is_not_computed():
    store = make_store([[CONTEXT] * 10 + [TEXT] * 3 + [STOP] + [CONTEXT] * 30])
    windows = cut_windows(store, 16, 4)
    assert (windows.start.tolist(), windows.length.tolist()) == ([0], [13])


def test_accumulated_gradients_are_those_of_the_whole_row():
    store = notes(*range(3, 40))
    packer = Packer(store, 16, 128, 0)
    weight = torch.randn(store.tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def mean_loss(batches):
        total = sum(batch.trained for batch in batches)
        return sum(float((weight[batch.targets] * batch.loss_mask).sum()) / total for batch in batches)

    for step in range(packer.steps_per_epoch):
        assert mean_loss(packer.micro_batches(step, 32)) == pytest.approx(mean_loss([whole_row(packer, step)]), rel=1e-12)


@pytest.mark.parametrize(("seq_len", "batch_tokens", "said"), [(1, 8, "--seq-len 512"), (64, 32, "--batch-tokens 64")])
def test_lengths_that_cannot_be_honoured(seq_len, batch_tokens, said):
    with pytest.raises(UsageError, match=said):
        Packer(notes(5), seq_len, batch_tokens, 0)


def test_nothing_trained_is_said():
    with pytest.raises(DataError, match="Nothing to train on"):
        Packer(make_store([[CONTEXT] * 5]), 8, 8, 0)
