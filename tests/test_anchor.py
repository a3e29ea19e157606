"""With an anchor, a chat model learns notes and still predicts its own answers as it did; the same plan gives the same bits."""

from __future__ import annotations

import dataclasses
import itertools
import math
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from edgetune.config import ANCHOR_SHARE, DataConfig, TrainConfig
from edgetune.dataset.anchor_set import SOFT_TOKENS, AnchorSet
from edgetune.dataset.pieces import TEXT
from edgetune.events import Event, Finished, Interrupted, Started, Stepped
from edgetune.home import private_folder
from edgetune.library.loading import load_base, open_base
from edgetune.progress import SILENT
from edgetune.reports.terminal import started_line
from edgetune.runtime import adapter as adapters
from edgetune.runtime import peft_folder
from edgetune.runtime.batch import SoftTargets
from edgetune.runtime.errors import DataError
from edgetune.runtime.loss import divergence_
from edgetune.runtime.ops_types import Segment
from edgetune.texts import anchor_questions, calibration_text
from edgetune.training import anchor as making
from edgetune.training.anchor import ANCHOR, AnchorKind, AnchorPlan, affordable_replies, packed_files, unpack_files
from edgetune.training.distributed import SingleProcess
from edgetune.training.gate_evidence import GateEvidence
from edgetune.training.prepared_run import PreparedRun
from edgetune.training.setup import prepare_new
from edgetune.training.step import TrainStep
from edgetune.training.train import train
from edgetune.training.unfinished_run import lock_run

TEMPLATE = (
    "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ '</s>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Write a tiny model with a chat template."""
    folder = tmp_path / "model"
    tiny.save_trainable(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(autouse=True)
def two_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the base answer few questions in few tokens."""
    monkeypatch.setattr(making, "FEWEST_REPLIES", 3)
    monkeypatch.setattr(making, "REPLY_TOKENS", 6)


def config(base: Path, tmp_path: Path, **changes: object) -> TrainConfig:
    notes = tmp_path / "notes"
    if not notes.exists():
        notes.mkdir()
        for number in range(12):
            (notes / f"{number}.md").write_text(f"# Tide {number}\n\nThe tide turned at {number} and we walked home.\n" * 4)
    data = DataConfig(notes=(str(notes),), seq_len=64, batch_tokens=256)
    own: dict[str, object] = {"data": data, "model": str(base), "steps": 4, "rank": 4, "anchor": 0.25, "lr": 1e-2}
    return TrainConfig(**{**own, **changes})  # type: ignore[arg-type]


def prepared(config: TrainConfig, folder: Path) -> PreparedRun:
    return prepare_new(config, open_base(config.model), private_folder(folder))


# The loss


def test_the_divergence_and_its_gradient_are_those_of_autograd() -> None:
    rows, vocabulary, kept = 6, 50, 4
    before = 2 * torch.randn(rows, vocabulary)
    logits = (before + 0.3 * torch.randn(rows, vocabulary)).requires_grad_()
    weights = torch.rand(rows)
    top = before.softmax(-1).topk(kept)
    p = torch.cat([top.values, 1 - top.values.sum(1, keepdim=True)], 1)
    found = logits.softmax(-1).gather(1, top.indices)
    q = torch.cat([found, 1 - found.sum(1, keepdim=True)], 1)
    expected = (p * (p / q).log()).sum(1)
    (expected * weights).sum().backward()
    gradient = logits.detach().clone()
    losses = divergence_(gradient, SoftTargets(top.indices, top.values), weights)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_itself_has_no_divergence_and_nothing_to_change(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(5, 200)).to(dtype)
    top = logits.float().softmax(-1).topk(8)
    losses = divergence_(logits, SoftTargets(top.indices, top.values), torch.ones(5))
    assert losses.abs().max() < 1e-5
    assert logits.abs().max() < 1e-5


def test_a_base_that_is_sure_of_its_word_gives_finite_numbers() -> None:
    before, logits = torch.zeros(2, 40), torch.zeros(2, 40)
    before[:, 3], logits[:, 7] = 100.0, 100.0
    top = before.softmax(-1).topk(4)
    losses = divergence_(logits, SoftTargets(top.indices, top.values), torch.ones(2))
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logits).all()
    assert logits[0, 3] == pytest.approx(-1, abs=1e-3)


# What the anchor is


def test_the_questions_are_many_different_and_short() -> None:
    questions = anchor_questions()
    assert len(questions) == len(set(questions)) >= 80
    assert max(map(len, questions)) < 120
    assert not any(question in text for question in questions for text in calibration_text())


def test_the_anchor_holds_the_answers_of_the_bare_base_and_its_predictions(base: Path, tmp_path: Path) -> None:
    run = prepared(config(base, tmp_path), tmp_path / "run")
    assert run.plan.anchor == AnchorPlan(0.25, AnchorKind.REPLIES, 3)
    assert run.anchor is not None
    store, tokenizer = run.anchor.store, run.loaded.tokenizer
    first = store.documents[0]
    text = tokenizer.decode(store.ids[first.start : first.start + first.tokens].tolist())
    assert f"### user: {anchor_questions()[0]}\n### assistant: " in text
    batch = run.anchor.batch([0])
    assert batch.soft is not None
    assert batch.soft.ids.shape == (len(batch.input_ids), SOFT_TOKENS)
    # A fresh adapter changes nothing, so the model still predicts what it predicted: its own words.
    ids, probabilities = making.likeliest(run.runner, batch)
    trained = batch.loss_mask > 0
    assert torch.equal(ids.long(), batch.soft.ids[trained])
    torch.testing.assert_close(probabilities, batch.soft.probabilities[trained])
    files = sorted((tmp_path / "run" / ANCHOR).iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert {f"{ANCHOR}/{path.name}" for path in files} == {name for name in run.record.files if name.startswith(ANCHOR)}


def test_an_anchor_that_a_deadline_cut_short_is_repeated_with_as_many_answers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(base, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("edgetune.training.deadline.Deadline.seconds_left", lambda self: 0.0)
        cut = prepared(settings, tmp_path / "cut").plan.anchor
    assert cut == AnchorPlan(0.25, AnchorKind.REPLIES, 1, asked=1)
    loaded = load_base(open_base(settings.model))
    again = making.make_anchor(settings, loaded, private_folder(tmp_path / "again"), 256, 1000.0, SILENT, cut.asked)
    assert again == cut
    assert packed_files(tmp_path / "again") == packed_files(tmp_path / "cut")


def test_a_base_without_a_chat_template_is_anchored_to_a_text_if_asked(base: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").unlink()
    run = prepared(config(base, tmp_path), tmp_path / "run")
    assert run.plan.anchor == AnchorPlan(0.25, AnchorKind.TEXT, 1)
    assert run.anchor is not None
    words = run.loaded.tokenizer.decode(run.anchor.store.ids.tolist()[:30])
    assert " ".join(words.split()[:5]) in " ".join(calibration_text()[0].split())


def test_by_default_models_that_answer_questions_have_an_anchor() -> None:
    assert TrainConfig().anchor_share(576, has_template=True) == ANCHOR_SHARE > 0
    assert TrainConfig().anchor_share(576, has_template=False) == 0
    assert TrainConfig().anchor_share(384, has_template=True) == 0
    assert TrainConfig(anchor=0.0).anchor_share(2048, has_template=True) == 0
    assert TrainConfig(anchor=0.2).anchor_share(64, has_template=False) == 0.2


def test_making_the_anchor_takes_at_most_its_share_of_a_usual_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    count, tokens = affordable_replies(400_000, "cpu"), 400_000
    assert count > making.FEWEST_REPLIES
    work = count * making.REPLY_TOKENS * (making.WRITING_COST["cpu"] + making.PREDICTING_COST)
    assert 0.9 * making.MAKING_SHARE * tokens < work <= making.MAKING_SHARE * tokens
    assert affordable_replies(1000, "cpu") == making.FEWEST_REPLIES


def test_the_gate_judges_by_answers_of_the_base_that_are_not_trained_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "FEWEST_REPLIES", 8)
    run = prepared(config(base, tmp_path, evaluation_share=1.0), tmp_path / "run")
    assert run.anchor is not None
    assert run.replies is not None
    trained, kept = run.anchor.store, run.replies.store
    assert (len(trained.documents), len(kept.documents)) == (6, 2)
    texts = [run.loaded.tokenizer.decode(store.ids.tolist()) for store in (trained, kept)]
    assert [question in texts[0] for question in anchor_questions()[:8]] == [True] * 6 + [False] * 2
    assert [question in texts[1] for question in anchor_questions()[:8]] == [False] * 6 + [True] * 2

    def bits_per_byte() -> float:
        bits = 0.0
        for document in kept.documents:
            ids = torch.from_numpy(kept.ids[document.start : document.start + document.tokens].astype(np.int64))
            h = run.runner.infer(ids, torch.arange(len(ids)), (Segment.packed(0, len(ids)),), None)
            losses = -run.loaded.model.logits(h[:-1]).float().log_softmax(-1).gather(1, ids[1:, None])[:, 0] / math.log(2)
            is_text = kept.trained[document.start + 1 : document.start + document.tokens] == TEXT
            bits += float(losses[torch.from_numpy(is_text)].double().sum())
        return bits / sum(document.bytes for document in kept.documents)

    with adapters.replaced(run.loaded.model, None):
        bare = bits_per_byte()
    for parameter in adapters.parameters(run.loaded.model):
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    replies = GateEvidence(run, math.inf, 0.0, SILENT).measure(None, None).replies
    assert replies is not None
    assert (replies.before, replies.after) == (pytest.approx(bare, rel=1e-4), pytest.approx(bits_per_byte(), rel=1e-4))
    assert replies.after > replies.before


# The batches


def test_steps_take_their_share_of_the_anchor_in_turn(base: Path, tmp_path: Path) -> None:
    run = prepared(config(base, tmp_path), tmp_path / "run")
    anchor, steps = run.anchor, 40
    assert anchor is not None
    total, share = int(anchor.windows.length.sum()), run.plan.anchor.tokens_a_step(256) if run.plan.anchor else 0
    assert share == 85  # a quarter of all tokens: 256 of notes and a third of that
    batches = [anchor.micro_batches(step, share, 64, seed=1) for step in range(steps)]
    read = [len(batch.input_ids) for batch in itertools.chain(*batches)]
    assert abs(sum(read) - steps * share) <= max(anchor.windows.length)
    assert max(read) <= max(64, *anchor.windows.length)
    again = AnchorSet.open(tmp_path / "run" / ANCHOR, 64).micro_batches(7, share, 64, seed=1)
    assert len(again) == len(batches[7])
    for one, other in zip(again, batches[7], strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert one.soft is not None
        assert other.soft is not None
        assert torch.equal(one.soft.probabilities, other.soft.probabilities)
    # Each window comes once before any comes again.
    first = [batch for step in range(steps) for batch in anchor.micro_batches(step, 1, 10**6, seed=1) if step < total]
    lengths = sorted(len(batch.input_ids) for batch in first)
    assert lengths == sorted(anchor.windows.length.tolist())[: len(lengths)] or len(lengths) < len(anchor.windows)


def test_the_loss_that_is_told_is_that_of_the_notes(base: Path, tmp_path: Path) -> None:
    kept = {}
    for share in (0.0, 0.25):
        run = prepared(config(base, tmp_path, anchor=share, dropout=0.0), tmp_path / f"run-{share}")
        result = TrainStep(run, SingleProcess()).run(0)
        kept[share] = result.loss, result.tokens
    assert kept[0.0] == pytest.approx(kept[0.25], rel=1e-6)


# Runs


def drift(share: float, base: Path, tmp_path: Path) -> float:
    """Return the mean divergence of the base's predictions on the anchor after a run with this share of it, in nats."""
    with_anchor = prepared(config(base, tmp_path), tmp_path / f"measured-{share}")
    run = prepared(config(base, tmp_path, anchor=share, steps=12), tmp_path / f"trained-{share}")
    step = TrainStep(run, SingleProcess())
    for number in range(12):
        step.run(number)
    anchor = with_anchor.anchor
    assert anchor is not None
    batch = anchor.batch(list(range(len(anchor.windows))))
    assert batch.soft is not None
    ids = batch.soft.ids[batch.loss_mask > 0]
    h = run.runner.infer(batch.input_ids, batch.positions, batch.segments, None)
    logits = run.loaded.model.logits(h[batch.loss_mask > 0]).float()
    soft = SoftTargets(ids, batch.soft.probabilities[batch.loss_mask > 0])
    return float(divergence_(logits, soft, torch.ones(len(ids))).mean())


def test_with_an_anchor_a_model_answers_more_as_it_did(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "REPLY_TOKENS", 24)
    without, with_anchor = drift(0.0, base, tmp_path), drift(0.5, base, tmp_path)
    assert 0 < with_anchor < 0.6 * without


def adapter_bytes(events: list[Event]) -> bytes:
    assert isinstance(events[-1], Finished)
    return (Path(events[-1].adapter) / peft_folder.WEIGHTS_FILE).read_bytes()


def test_a_stopped_run_goes_on_with_the_anchor_it_has_and_gives_the_same_bits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(base, tmp_path, steps=6)
    whole = list(train(wanted))
    assert isinstance(whole[0], Started)
    assert whole[0].plan["anchor"] == {"share": 0.25, "kind": "replies", "documents": 3, "asked": None}
    assert started_line(whole[0]).endswith("; anchor: 25% of tokens, 3 of the base's own replies")
    stop, events = threading.Event(), []
    for event in train(wanted, stop):
        events.append(event)
        if isinstance(event, Stepped) and event.step == 3:
            stop.set()
    assert isinstance(events[-1], Interrupted)
    monkeypatch.setattr(making, "replies", None)  # a resumed run asks nothing again
    rest = list(train(wanted))
    assert adapter_bytes(rest) == adapter_bytes(whole)


def test_a_damaged_anchor_starts_the_run_over(base: Path, tmp_path: Path) -> None:
    wanted, stop = config(base, tmp_path, steps=6), threading.Event()
    for event in train(wanted, stop):
        if isinstance(event, Stepped) and event.step == 2:
            stop.set()
    with lock_run(wanted, open_base(wanted.model)[1].digest) as unfinished:
        path = unfinished.folder / ANCHOR / "soft-probabilities.bin"
        path.write_bytes(path.read_bytes()[:-4])
    events = list(train(wanted))
    assert any("damaged" in notice for event in events for notice in getattr(event, "notices", ()))
    assert isinstance(events[-1], Finished)


def test_an_anchor_of_the_wrong_size_is_refused(base: Path, tmp_path: Path) -> None:
    prepared(config(base, tmp_path), tmp_path / "run")
    path = tmp_path / "run" / ANCHOR / "soft-ids.bin"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"The anchor in .* is damaged"):
        AnchorSet.open(tmp_path / "run" / ANCHOR, 64)


def test_a_follower_has_the_leaders_anchor(base: Path, tmp_path: Path) -> None:
    run = prepared(config(base, tmp_path), tmp_path / "run")
    unpack_files(packed_files(tmp_path / "run"), private_folder(tmp_path / "follower"))
    names = sorted(path.name for path in (tmp_path / "run" / ANCHOR).iterdir())
    assert sorted(path.name for path in (tmp_path / "follower" / ANCHOR).iterdir()) == names
    for name in names:
        assert (tmp_path / "follower" / ANCHOR / name).read_bytes() == (tmp_path / "run" / ANCHOR / name).read_bytes()
    assert {name for name in run.record.for_followers().files if name.startswith(ANCHOR)} == {f"{ANCHOR}/{n}" for n in names}


def test_the_record_of_a_run_keeps_its_anchor(base: Path, tmp_path: Path) -> None:
    run = prepared(config(base, tmp_path), tmp_path / "run")
    assert type(run.record).from_dict(run.record.as_dict()).plan.anchor == run.plan.anchor


def test_the_anchor_is_what_the_base_says_and_not_the_adapter_to_start_from(base: Path, tmp_path: Path) -> None:
    plain = prepared(config(base, tmp_path), tmp_path / "plain")
    events = list(train(config(base, tmp_path, steps=6, anchor=0.0, out=str(tmp_path / "adapter"))))
    assert isinstance(events[-1], Finished)
    again = prepared(config(base, tmp_path, from_adapter=str(tmp_path / "adapter")), tmp_path / "again")
    assert any(bool(t.abs().max() > 0) for key, t in adapters.live_tensors(again.loaded.model).items() if key[2] == "B")
    assert plain.anchor is not None
    assert again.anchor is not None
    assert np.array_equal(plain.anchor.store.ids, again.anchor.store.ids)
    assert dataclasses.asdict(plain.plan.anchor or run_has_none()) == dataclasses.asdict(again.plan.anchor or run_has_none())


def run_has_none() -> AnchorPlan:
    raise AssertionError("the run has no anchor")
