"""Private training: each document's gradient is autograd's, clipped as one, with the planned noise; a resume repeats it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from edgetune.config import DataConfig, TrainConfig
from edgetune.dataset.pieces import CONTEXT, STOP, TEXT
from edgetune.dataset.privacy_units import UnitPacker
from edgetune.dataset.token_store import StoredDocument, TokenStore
from edgetune.events import Event, Finished, Interrupted, Stepped
from edgetune.home import unfinished_folder
from edgetune.library import privacy_ledger as ledger
from edgetune.privacy.accounting import Mechanism, spent
from edgetune.privacy.secret_source import SecretSource, new_key
from edgetune.runtime import adapter as adapters
from edgetune.runtime import peft_folder
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.errors import UsageError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.runner import Runner
from edgetune.training.private_plan import CLIP, PrivatePlan
from edgetune.training.private_step import PrivateGradient
from edgetune.training.train import train

LORA = LoraConfig(rank=2, alpha=4.0)
SIZES = (20, 75, 5, 40)
"""Tokens of four notes: with windows of 32, the second has three and the last two."""
KEY = "00" * 32


def store(sizes: tuple[int, ...] = SIZES, names: tuple[str, ...] = ()) -> TokenStore:
    documents, start = [], 0
    for number, size in enumerate(sizes):
        path = names[number] if names else f"{number}.md"
        documents.append(StoredDocument(path, f"{number:064x}", start, size + 2, size))
        start += size + 2
    marks = [mark for size in sizes for mark in (CONTEXT, *[TEXT] * size, STOP)]
    ids = torch.randint(3, 128, (start,), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    return TokenStore(ids.numpy(), np.array(marks, dtype=np.uint8), tuple(documents))


def packer(most_windows: int = 8, **about: object) -> UnitPacker:
    return UnitPacker(store(**about), 32, 10_000, 0, most_windows)  # type: ignore[arg-type]


def plan(noise: float, clip: float, units: int = 4, rate: float = 1.0, most_windows: int = 8) -> PrivatePlan:
    return PrivatePlan(8.0, 1e-3, units, rate, noise, clip, most_windows, "run")


def adapted(folder: Path) -> Llama:
    """Return a tiny fp32 model with an adapter whose B is not zero."""
    model = load_llama(open_model(folder), torch.float32)
    adapters.attach_new(model, LORA, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapters.parameters(model):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def private_gradients(model: Llama, plan: PrivatePlan, packer: UnitPacker, micro: int = 64, step: int = 0, key: str = KEY):
    parameters = adapters.parameters(model)
    for parameter in parameters:
        parameter.grad = None
    computed = PrivateGradient(plan, key, packer, Runner(model, loss_rows=16), parameters, micro)
    loss, tokens = computed.compute(step, lambda number: None)
    return loss, tokens, [parameter.grad.clone() for parameter in parameters]


def autograd_gradients(theirs: torch.nn.Module, model: Llama, packer: UnitPacker) -> list[list[torch.Tensor]]:
    """Return the gradient of each unit's mean loss by autograd through transformers' model, window by window."""
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in adapters.live_tensors(model).items()}
    merged = dict(theirs.named_parameters())
    for layer, linear, _ in [key for key in leaves if key[2] == "A"]:
        name = next(n for n in merged if f"layers.{layer}." in n and n.endswith(f"{linear}.weight"))
        merged[name] = merged[name].detach() + LORA.alpha / LORA.rank * leaves[layer, linear, "B"] @ leaves[layer, linear, "A"]
    order = {
        id(tensor): key for key in leaves for tensor in [getattr(model.blocks[key[0]].linears()[key[1]], f"lora_{key[2]}")]
    }
    found = []
    for unit in packer.units:
        batches = [batch for window in unit for batch in packer.of_unit([window], 10_000)]
        total, trained = torch.zeros(()), sum(batch.trained for batch in batches)
        for batch in batches:
            logits = torch.func.functional_call(theirs, merged, (batch.input_ids[None],)).logits[0]
            nats = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
            total = total + (nats * batch.loss_mask).sum() / trained
        wanted = [leaves[order[id(parameter)]] for parameter in adapters.parameters(model)]
        found.append(list(torch.autograd.grad(total, wanted, retain_graph=True)))
    return found


def norm(gradients: list[torch.Tensor]) -> float:
    return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    tiny.save_model(path)
    return path


@pytest.mark.parametrize("micro", [32, 64, 4096])
@pytest.mark.parametrize("share", [0.5, 1e6])
def test_the_gradient_is_the_sum_of_each_documents_clipped_autograd_gradient(folder: Path, micro: int, share: float) -> None:
    """Also with one clip over three windows of a document that do not fit one micro-batch, and where none is clipped."""
    model, units = adapted(folder), packer()
    each = autograd_gradients(tiny.transformers_model("llama-2-grouped"), model, units)
    clip = share * sorted(map(norm, each))[2]  # at 0.5 most are clipped, at a million none
    _, tokens, ours = private_gradients(model, plan(0.0, clip), units, micro)
    factors = [min(1.0, clip / norm(gradients)) for gradients in each]
    assert (min(factors) < 1) == (share < 1)
    for place, gradient in enumerate(ours):
        wanted = sum(factor * gradients[place] for factor, gradients in zip(factors, each, strict=True)) / 4
        torch.testing.assert_close(gradient, wanted, rtol=2e-3, atol=2e-6)
    assert tokens == sum(SIZES) + len(SIZES)


def test_one_document_alone_moves_the_sum_by_the_clip_at_most(folder: Path) -> None:
    model, rest = adapted(folder), packer()
    less = packer(sizes=SIZES[1:], names=("1.md", "2.md", "3.md"))
    less.store.ids[:] = rest.store.ids[-len(less.store.ids) :]
    whole = private_gradients(model, plan(0.0, 0.05, units=1), rest)[2]
    without = private_gradients(model, plan(0.0, 0.05, units=1), less)[2]
    difference = norm([a - b for a, b in zip(whole, without, strict=True)])
    assert 0.0499 < difference <= 0.05


def test_packing_and_the_limit_on_windows_hold_for_a_document_with_its_copies() -> None:
    units = packer(sizes=(75, 20, 75, 30), names=("log.md", "other.md", "log (conflicted copy).md", "list.md"))
    owners = [{int(units.windows.start[window]) for window in unit} for unit in units.units]
    assert [len(unit) for unit in units.units] == [6, 1, 1]
    assert owners[0].isdisjoint(owners[1] | owners[2])
    source = SecretSource(KEY)
    chosen = [source.choose(step, 0, units.units[0], 2) for step in range(50)]
    assert all(len(windows) == 2 and set(windows) <= set(units.units[0]) for windows in chosen)
    assert {window for windows in chosen for window in windows} == set(units.units[0])


def test_a_step_reads_a_long_document_only_in_part(folder: Path) -> None:
    model, units = adapted(folder), packer(most_windows=1)
    gradient = PrivateGradient(plan(0.0, 1.0, most_windows=1), KEY, units, Runner(model), adapters.parameters(model), 64)
    assert [len(batch.segments) for _, batches in gradient.batches(0) for batch in batches] == [1, 1, 1, 1]


def test_the_noise_has_the_planned_spread_and_is_added_once(folder: Path) -> None:
    model, units = adapted(folder), packer()
    without = private_gradients(model, plan(0.0, 0.1), units)[2]
    noisy = private_gradients(model, plan(3.0, 0.1), units)[2]
    noise = torch.cat([(a - b).flatten() for a, b in zip(noisy, without, strict=True)])
    count, spread = len(noise), 3.0 * 0.1 / 4
    assert count > 3000
    assert abs(float(noise.mean())) < 4 * spread / math.sqrt(count)
    assert float(noise.var()) == pytest.approx(spread**2, rel=4 * math.sqrt(2 / count))
    # Kolmogorov and Smirnov's distance from the normal distribution, which exceeds 1.95 / sqrt(n) once in a thousand.
    normal = 0.5 * torch.erfc(-noise.sort().values / (spread * math.sqrt(2)))
    assert float((normal - torch.arange(count) / count).abs().max()) < 1.95 / math.sqrt(count)


def test_an_empty_sample_is_a_step_of_noise_alone(folder: Path) -> None:
    model, units = adapted(folder), packer()
    never = dataclasses.replace(plan(2.0, 0.1), sample_rate=1e-12)
    loss, tokens, noise = private_gradients(model, never, units)
    assert (loss, tokens) == (0.0, 0)
    expected = torch.from_numpy(SecretSource(KEY).normal(0, 0, noise[0].numel())).view(noise[0].shape)
    torch.testing.assert_close(noise[0].double(), expected * 0.2 / never.expected_units, rtol=1e-6, atol=0)


def test_a_gradient_that_is_not_finite_adds_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, units = adapted(folder), packer()
    whole, calls = Runner.train, []

    def broken(self: Runner, batch, *rest):
        loss = whole(self, batch, *rest)
        calls.append(batch)
        if len(calls) == 1:
            adapters.parameters(model)[0].grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(Runner, "train", broken)
    _, tokens, gradients = private_gradients(model, plan(0.0, 1.0), units)
    assert tokens == sum(SIZES[1:]) + 3
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_samples_come_at_the_planned_rate_and_other_keys_give_others() -> None:
    source, other = SecretSource(KEY), SecretSource("01" * 32)
    samples = [source.sample(step, 200, 0.3) for step in range(500)]
    counts = np.array([len(sample) for sample in samples])
    assert counts.mean() == pytest.approx(60, abs=4 * math.sqrt(200 * 0.21 / 500))
    assert counts.var() == pytest.approx(200 * 0.21, rel=0.3)  # Poisson sampling: not a fixed number
    often = np.bincount(np.concatenate(samples), minlength=200)
    assert often.min() > 150 - 5 * math.sqrt(105)
    assert often.max() < 150 + 5 * math.sqrt(105)
    assert len(source.sample(0, 200, 1.0)) == 200
    assert not np.array_equal(samples[0], other.sample(0, 200, 0.3))
    assert not np.array_equal(samples[0], samples[1])
    assert abs(np.corrcoef(source.normal(3, 0, 4000), other.normal(3, 0, 4000))[0, 1]) < 0.07
    assert abs(np.corrcoef(source.normal(3, 0, 4000), source.normal(3, 1, 4000))[0, 1]) < 0.07
    np.testing.assert_array_equal(source.normal(3, 0, 4000), SecretSource(KEY).normal(3, 0, 4000))
    assert len({new_key() for _ in range(10)}) == 10


# -- whole runs


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.md").write_text(
            f"Day {number}: the beans by the tarred shed want water, said Marra, and went to number {number * number} with two "
            "full cans.\n"
        )
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    tiny.save_trainable(path)
    return path


def config(notes: Path, base: Path, **changes: object) -> TrainConfig:
    data = DataConfig(notes=(str(notes),), seq_len=64, batch_tokens=64)
    return TrainConfig(**{"data": data, "model": str(base), "steps": 8, "rank": 2, "private": "8", **changes})  # type: ignore[arg-type]


def last(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def test_a_run_keeps_its_promise_and_says_so_everywhere(notes: Path, base: Path) -> None:
    pytest.importorskip("dp_accounting")
    events = list(train(config(notes, base)))
    done, planned = last(events), events[0].plan["private"]  # type: ignore[attr-defined]
    privacy = done.privacy
    assert privacy is not None
    mechanism = Mechanism(planned["noise_multiplier"], planned["sample_rate"], 8)
    assert privacy["spent"] == pytest.approx(spent([mechanism], planned["delta"]))
    assert 7.5 < privacy["spent"] <= 8
    assert planned["delta"] == pytest.approx(0.1 / planned["units"])
    assert (planned["clip"], planned["units"]) == (CLIP, events[0].documents)  # type: ignore[attr-defined]
    [entry] = ledger.entries()
    assert (entry.mechanism, entry.run, entry.lineage) == (mechanism, Path(done.adapter).name, Path(done.adapter).name)
    about = json.loads((Path(done.adapter) / "edgetune.json").read_text())
    assert about["private"] == privacy
    assert "noise_key" not in json.dumps(about)
    report = Path(done.report or "").read_text()
    assert f"private: epsilon 8 at delta {planned['delta']:.2g}, unit: a document, spent {privacy['spent']:.2f}" in report
    assert list(unfinished_folder().glob("*/run.json")) == []  # and with it the key


@pytest.mark.slow
def test_two_runs_draw_different_noise(notes: Path, base: Path) -> None:
    pytest.importorskip("dp_accounting")
    adapters_made = [last(list(train(config(notes, base, steps=1), fresh=True))).adapter for _ in range(2)]
    first, second = (Path(adapter, peft_folder.WEIGHTS_FILE).read_bytes() for adapter in adapters_made)
    assert first != second


KILLED = """
import os, sys, signal
from edgetune import train
from edgetune.events import Saved, Stepped
from edgetune.training import checkpoints
from tests_config import config

checkpoints.KEEP_SECONDS = 0.0  # a checkpoint before every step
for event in train(config):
    if isinstance(event, Stepped) and event.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    notes: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dp_accounting")
    keys = iter([KEY, KEY])
    monkeypatch.setattr("edgetune.training.setup.new_key", lambda: next(keys))
    whole = last(list(train(config(notes, base)))).adapter
    # The same run again, in a process that is killed after its fifth step, and then here.
    (tmp_path / "tests_config.py").write_text(
        "from edgetune.config import DataConfig, TrainConfig\n"
        "import edgetune.training.setup as setup\n"
        f"setup.new_key = lambda: {KEY!r}\n"
        f"config = TrainConfig(data=DataConfig(notes=({str(notes)!r},), seq_len=64, batch_tokens=64), model={str(base)!r}, "
        "steps=8, rank=2, private='8')\n"
    )
    place = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parent.parent)])
    killed = subprocess.run([sys.executable, "-c", KILLED], env={**os.environ, "PYTHONPATH": place}, check=False)
    assert killed.returncode == -signal.SIGKILL
    [kept] = unfinished_folder().glob("*/run.json")
    assert kept.stat().st_mode & 0o777 == 0o600
    events = list(train(config(notes, base)))
    assert next(event.step for event in events if isinstance(event, Stepped)) in (5, 6)
    ours, theirs = (Path(adapter, peft_folder.WEIGHTS_FILE).read_bytes() for adapter in (last(events).adapter, whole))
    assert ours == theirs


def test_a_stopped_run_spends_nothing_and_goes_on(notes: Path, base: Path) -> None:
    pytest.importorskip("dp_accounting")
    stop, events = threading.Event(), []
    for event in train(config(notes, base), stop):
        events.append(event)
        if isinstance(event, Stepped) and event.step == 3:
            stop.set()
    assert isinstance(events[-1], Interrupted)
    assert ledger.entries() == []
    assert last(list(train(config(notes, base)))).steps == 8


@pytest.mark.slow
def test_a_deadline_spends_what_was_done(notes: Path, base: Path) -> None:
    pytest.importorskip("dp_accounting")
    done = last(list(train(config(notes, base, minutes=1e-6))))
    assert done.privacy is not None
    assert (done.cut, done.steps, done.privacy["steps"]) == ("deadline", 1, 1)
    assert done.privacy["spent"] < 8
    [entry] = ledger.entries()
    assert entry.steps == 1
    assert last(list(train(config(notes, base)))).privacy["steps"] == 8  # type: ignore[index]
    assert [entry.steps for entry in ledger.entries()] == [8]


@pytest.mark.slow
def test_a_lineage_shares_its_epsilon_until_nothing_is_left(notes: Path, base: Path) -> None:
    pytest.importorskip("dp_accounting")
    first = last(list(train(config(notes, base, steps=2, private="8,runs=2"))))
    second = last(list(train(config(notes, base, steps=2, private="8,runs=2", from_adapter=first.adapter))))
    assert first.privacy is not None
    assert second.privacy is not None
    assert first.privacy["spent"] < 6.5 < second.privacy["spent"] <= 8
    assert second.privacy["lineage"] == first.privacy["lineage"]
    with pytest.raises(ledger.BudgetSpent, match=r"have spent epsilon \d\.\d\d at delta 0\.0\d+, and --private allows 8"):
        list(train(config(notes, base, steps=2, private="8,runs=2", from_adapter=second.adapter)))
    assert len(ledger.entries()) == 2


def test_a_parent_without_a_ledger_is_refused_in_one_sentence(notes: Path, base: Path) -> None:
    pytest.importorskip("dp_accounting")
    public = last(list(train(config(notes, base, steps=1, private=None)))).adapter
    with pytest.raises(UsageError, match="was trained without --private"):
        list(train(config(notes, base, from_adapter=public)))


def test_torchrun_is_refused_in_one_sentence(notes: Path, base: Path) -> None:
    from edgetune.training.private_plan import check_parent

    with pytest.raises(UsageError, match="without torchrun"):
        check_parent(config(notes, base), None, 2)


def test_without_the_extra_one_sentence_names_it(notes: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    with pytest.raises(UsageError, match=r"pip install 'edgetune\[private\]'"):
        list(train(config(notes, base)))
