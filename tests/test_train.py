"""Training on notes with the built-in model learns, is reproducible to the bit, keeps the best adapter and loses nothing."""

from __future__ import annotations

import dataclasses
import errno
import functools
import io
import itertools
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import edgetune
from edgetune.config import DataConfig, TrainConfig
from edgetune.dataset.evaluation_set import Score
from edgetune.events import Event, Finished, Sampled, Skipped, Started, Stepped, Working
from edgetune.library import adapter_registry as registry
from edgetune.library.loading import open_base
from edgetune.progress import Stages
from edgetune.reports.terminal import Plain
from edgetune.runtime import adapter as adapters
from edgetune.runtime import ops, peft_folder
from edgetune.runtime.checkpoint import Checkpoint, open_model
from edgetune.runtime.errors import AdapterError, DataError, ResourceError, TrainingError, UsageError
from edgetune.runtime.linear import LoraLinear
from edgetune.session import Session
from edgetune.training.evaluation import evaluate
from edgetune.training.loop import TrainingLoop
from edgetune.training.run_notes import read_and_split
from edgetune.training.setup import prepare_new
from edgetune.training.step import learning_rate
from edgetune.training.train import train

BEANS = ["broad beans", "runner beans", "peas", "leeks", "chard", "kale", "onions", "garlic", "radishes", "beetroot"]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Write forty short, similar notes, which are learnt quickly and are enough for some to be held out."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(40):
        plant, other = BEANS[number % 10], BEANS[(number * 7 + 3) % 10]
        (folder / f"{number:02}.md").write_text(
            f"# Allotment log {number}\n\nToday Marra and I watered the {plant} behind the tarred shed. "
            f"The {other} want netting before the jackdaws find them. Marra says the {plant} are early this year.\n"
        )
    return folder


def config(notes: Path, **changes: object) -> TrainConfig:
    data = DataConfig(notes=(str(notes),), seq_len=64, batch_tokens=256)
    return TrainConfig(**{"data": data, "model": "demo", "steps": 6, "rank": 4, **changes})  # type: ignore[arg-type]


def finished(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def adapter_bytes(folder: str) -> bytes:
    return (Path(folder) / peft_folder.WEIGHTS_FILE).read_bytes()


STEPS_IMPORT = """
import sys
import threading
from edgetune import TrainConfig, train
from edgetune.config import DataConfig
from edgetune.events import Stepped

data = DataConfig(notes=(sys.argv[1],), seq_len=64, batch_tokens=256)
events = train(TrainConfig(data=data, model="demo", steps=2, rank=4))
next(events)
before = set(sys.modules)
assert sum(isinstance(event, Stepped) for event in events) == 2
print(*sorted(set(sys.modules) - before))
"""


def test_steps_and_readings_import_nothing(notes: Path) -> None:
    """Imports in the middle of a step would put many small objects between tensors on the heap and fragment it."""
    done = subprocess.run([sys.executable, "-c", STEPS_IMPORT, str(notes)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_run_learns_and_tells_what_it_did(notes: Path) -> None:
    events = list(train(config(notes, steps=12)))
    end = finished(events)
    assert end.heldout_bits_per_byte_after < 0.8 * end.heldout_bits_per_byte_before
    assert end.steps == 12
    assert [event.step for event in events if isinstance(event, Stepped)] == list(range(1, 13))
    assert end.tokens == sum(event.tokens for event in events if isinstance(event, Stepped))
    assert end.peak_memory_bytes > 100_000_000
    started = events[0]
    assert isinstance(started, Started)
    assert 1 <= started.heldout_documents <= 4
    assert len(started.heldout_paths) == started.heldout_documents
    prompts = {when: [e.prompt for e in events if isinstance(e, Sampled) and e.when == when] for when in ("before", "after")}
    assert prompts["before"] == prompts["after"] != []
    report = Path(end.report)
    assert report.stat().st_mode & 0o077 == 0
    assert started.heldout_paths[0] in report.read_text()
    assert not (report.parent / "tokens").exists()
    assert not (report.parent / "held-out").exists()


def test_a_run_says_what_it_did_not_read_also_when_it_is_resumed(notes: Path) -> None:
    (notes / "russian.txt").write_bytes("Привет, мир".encode("cp1251"))
    (notes / ".May.md.icloud").write_bytes(b"bplist00")
    settings = config(notes, data=DataConfig((str(notes),), exclude=("drfats",), seq_len=64, batch_tokens=256), steps=2)
    said = (
        "Not read: 1 not downloaded (in iCloud or another cloud), 1 encoding not recognised (save it as UTF-8, or name it with "
        "--encoding). Type edgetune train --dry-run to see which.",
        "--exclude drfats matched nothing.",
    )
    stop = threading.Event()
    stop.set()
    for events in (list(train(settings, stop)), list(train(settings))):
        assert isinstance(events[0], Started)
        assert events[0].notices == said
    printed = io.StringIO()
    Plain(printed).show(events[0])
    assert printed.getvalue().splitlines()[1:] == list(said)


def test_the_adapter_becomes_current_and_scores_what_the_run_said(notes: Path) -> None:
    end = finished(list(train(config(notes, evaluation_share=1.0))))  # so that all held-out notes are scored
    session = Session.load()
    assert session.adapter_name == Path(end.adapter).name
    assert session.model_name == "demo"
    held_out = list(read_and_split(config(notes))[1].held_out)
    result = evaluate([str(notes / document.path) for document in held_out])
    assert result.adapter == session.adapter_name
    # These are the same documents in other windows, so the scores differ only by bf16 rounding.
    assert result.bits_per_byte == pytest.approx(end.heldout_bits_per_byte_after, rel=0.01)
    base = evaluate([str(notes)], adapter="none")
    assert base.adapter == "none"
    assert base.bits_per_byte > result.bits_per_byte


@pytest.mark.slow
def test_the_same_run_twice_gives_the_same_bytes(notes: Path, tmp_path: Path) -> None:
    ends = [finished(list(train(config(notes, out=str(tmp_path / name))))) for name in ("a", "b")]
    assert adapter_bytes(ends[0].adapter) == adapter_bytes(ends[1].adapter)
    other = finished(list(train(config(notes, data=dataclasses.replace(config(notes).data, seed=1)))))
    assert adapter_bytes(other.adapter) != adapter_bytes(ends[0].adapter)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_recomputation_does_not_change_the_adapter(notes: Path, recompute: str) -> None:
    full = finished(list(train(config(notes, recompute="full", steps=3))))
    other = finished(list(train(config(notes, recompute=recompute, steps=3))))
    assert adapter_bytes(full.adapter) == adapter_bytes(other.adapter)


@pytest.mark.skipif(not ops.fuses(torch.device("cpu"), torch.bfloat16), reason="this machine has no fused kernels")
def test_products_in_8_bits_train_as_well_and_are_the_default(notes: Path, tmp_path: Path) -> None:
    ends, adapters_found = {}, {}
    for compute in ("auto", "int8", "bf16"):
        events = list(train(config(notes, compute=compute, steps=12, out=str(tmp_path / compute))))
        assert next(event for event in events if isinstance(event, Started)).plan["int8"] == (compute != "bf16")
        ends[compute], adapters_found[compute] = finished(events), adapter_bytes(str(tmp_path / compute))
    assert adapters_found["auto"] == adapters_found["int8"] != adapters_found["bf16"]
    assert ends["int8"].heldout_bits_per_byte_before == ends["bf16"].heldout_bits_per_byte_before  # both evaluate in bf16
    assert ends["int8"].heldout_bits_per_byte_after == pytest.approx(ends["bf16"].heldout_bits_per_byte_after, rel=1e-2)


def test_8_bits_without_a_kernel_for_them_are_refused(notes: Path) -> None:
    with ops.use_backend("reference"), pytest.raises(UsageError, match=r"found cpu with reference. Type --compute bf16"):
        list(train(config(notes, compute="int8")))


def test_row_length_changes_the_adapter_only_by_rounding(notes: Path, tmp_path: Path) -> None:
    """Gradient accumulation over short rows gives the long row's step, whatever the rows' lengths."""
    losses = []
    for rows in (64, 256):
        prepared = prepare_new(config(notes, compute="fp32", dropout=0.0), open_base("demo"), tmp_path / str(rows))
        batches = prepared.packer.micro_batches(0, rows)
        trained = sum(batch.trained for batch in batches)

        losses.append(sum(float(prepared.runner.train(batch, divisor=trained)) for batch in batches))
        losses.append(float(torch.stack([p.grad.norm() for p in adapters.parameters(prepared.loaded.model)]).norm()))
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] == pytest.approx(losses[3], rel=1e-4)


def test_a_run_tells_how_far_it_is_with_all_that_comes_before_its_steps(
    notes: Path, private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("train", "loop"):
        monkeypatch.setattr(f"edgetune.training.{module}.Stages", functools.partial(Stages, quiet=0.0, pause=0.0))
    told: list[Event] = []
    events = list(train(config(notes, steps=1), show=told.append))
    stages = [event.stage for event in told if isinstance(event, Working)]
    assert [stage for stage, _ in itertools.groupby(stages)] == [
        "reading", "tokenizing", "loading", "sampling", "evaluating", "first step", "evaluating", "judging",
        "auditing", "sampling",
    ]  # fmt: skip
    assert all(isinstance(event, Working) and 0 <= event.done <= event.total for event in told)
    assert not any(isinstance(event, Working) for event in events)
    assert "working" not in next(private_home.glob("runs/*/events.jsonl")).read_text()


@pytest.mark.slow
def test_one_batch_can_be_learnt_by_heart(notes: Path) -> None:
    few = notes.parent / "few"
    few.mkdir()
    (few / "a.md").write_text((notes / "00.md").read_text())
    events = list(train(config(few, steps=60, dropout=0.0, rank=16)))
    losses = [event.loss for event in events if isinstance(event, Stepped)]
    assert losses[-1] < 0.3 < 2.0 < losses[0]
    assert finished(events).heldout_bits_per_byte_before is None


def test_the_best_adapter_is_kept_not_the_last(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out loss turns upward, and the adapter of the lowest evaluation is saved."""
    readings = iter([3.0, 2.0, 1.0, 1.5, 2.5, 4.0, 5.0])
    kept: list[torch.Tensor] = []

    def reading(self: TrainingLoop, *limits: object) -> Score:
        linear = self.model.blocks[0].q_proj
        assert isinstance(linear, LoraLinear)
        kept.append(linear.lora_A.detach().clone())
        return score_of(next(readings))

    monkeypatch.setattr(TrainingLoop, "_score", reading)
    end = finished(list(train(config(notes, steps=6, evaluations=6, evaluation_share=1.0, compute="fp32"))))
    assert end.best_step == 2
    assert end.heldout_bits_per_byte_after == 1.0
    assert torch.equal(peft_folder.load(Path(end.adapter)).tensors[0, "q_proj", "A"], kept[2])


def score_of(bits_per_byte: float) -> Score:
    """Return the score of one batch that holds one byte of text, of document 0."""
    nats = bits_per_byte * math.log(2)
    return Score((nats,), (1,), (1.0,), (((0, 1.0, nats),),))


def test_an_adapter_that_reads_worse_is_saved_but_not_made_current(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([1.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(TrainingLoop, "_score", lambda self, *limits: score_of(next(readings)))
    end = finished(list(train(config(notes, steps=3, evaluations=3, evaluation_share=1.0))))
    assert not end.promoted
    assert (Path(end.adapter) / peft_folder.CONFIG_FILE).is_file()
    assert registry.get_current() is None


def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.runtime.runner import Runner

    original, calls = Runner.train, []

    def sometimes_nan(self: Runner, *arguments: object) -> torch.Tensor:
        calls.append(1)
        loss = original(self, *arguments)  # type: ignore[arg-type]
        return loss * float("nan") if len(calls) == 2 else loss

    monkeypatch.setattr(Runner, "train", sometimes_nan)
    events = list(train(config(notes, data=dataclasses.replace(config(notes).data, batch_tokens=256), steps=4)))
    assert [event.step for event in events if isinstance(event, Skipped)] == [2]
    assert finished(events).skipped_steps == 1
    weights = peft_folder.load(Path(finished(events).adapter)).tensors.values()
    assert all(torch.isfinite(tensor).all() for tensor in weights)


def test_steps_that_stay_not_finite_end_the_run(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.runtime.runner import Runner

    monkeypatch.setattr(Runner, "train", lambda self, *arguments: torch.tensor(float("inf")))
    with pytest.raises(TrainingError, match=r"5 steps in a row.*--lr"):
        list(train(config(notes, steps=20)))
    assert registry.get_current() is None


def test_a_deadline_cuts_at_a_step(notes: Path) -> None:
    end = finished(list(train(config(notes, steps=100000, minutes=0.02))))
    assert end.cut == "deadline"
    assert 1 <= end.steps < 100000


def test_training_goes_on_from_an_adapter(notes: Path) -> None:
    first = finished(list(train(config(notes, steps=8))))
    second = finished(list(train(config(notes, steps=8, from_adapter=first.adapter))))
    assert second.heldout_bits_per_byte_before == pytest.approx(first.heldout_bits_per_byte_after, rel=1e-3)
    assert second.heldout_bits_per_byte_after < first.heldout_bits_per_byte_after


def test_edgetune_json_names_base_and_data_and_no_path(notes: Path) -> None:
    end = finished(list(train(config(notes, steps=2, out=str(notes.parent / "out")))))
    about = json.loads((Path(end.adapter) / peft_folder.EDGETUNE_FILE).read_text())
    assert about["base"] == open_base("demo")[1].digest
    assert about["edgetune"] == edgetune.__version__
    assert str(notes) not in json.dumps(about)
    assert len(about["data"]) == 64


def test_too_little_memory_is_refused_before_the_first_step(notes: Path) -> None:
    with pytest.raises(ResourceError, match=r"may use .* GB and needs .*--memory"):
        list(train(config(notes, memory="100MB")))


def test_an_out_folder_with_other_files_is_refused_before_training(notes: Path) -> None:
    (notes / "keep.txt").write_text("mine")
    with pytest.raises(AdapterError):
        list(train(config(notes, out=str(notes))))
    assert (notes / "keep.txt").read_text() == "mine"


def test_a_failed_run_leaves_no_tokens_behind(notes: Path, private_home: Path) -> None:
    with pytest.raises(DataError):
        list(train(config(notes / "nowhere")))
    with pytest.raises(ResourceError):
        list(train(config(notes, memory="100MB")))
    left = list(private_home.rglob("*.bin"))
    assert left == []


def test_a_run_opens_its_model_once(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def counted(folder: Path) -> Checkpoint:
        opened.append(folder)
        return open_model(folder)

    monkeypatch.setattr("edgetune.library.loading.open_model", counted)
    finished(list(train(config(notes, steps=1))))
    assert len(opened) == 1


def test_everything_in_the_home_is_private(notes: Path, private_home: Path) -> None:
    list(train(config(notes, steps=2)))
    open_to_others = [path for path in [private_home, *private_home.rglob("*")] if path.stat().st_mode & 0o077]
    assert open_to_others == []


@pytest.mark.parametrize(("hidden_size", "rate"), [(384, 2.463e-3), (511, 1.605e-3), (512, 2e-4), (576, 2e-4), (4096, 2e-4)])
def test_a_model_that_may_answer_questions_has_a_low_learning_rate_and_a_smaller_one_a_high_rate(
    hidden_size: int, rate: float
) -> None:
    assert TrainConfig().learning_rate(hidden_size) == pytest.approx(rate, rel=1e-3)


def test_lr_overrides_the_default_learning_rate() -> None:
    assert [TrainConfig(lr=1e-3).learning_rate(hidden_size) for hidden_size in (384, 576)] == [1e-3, 1e-3]


def test_the_learning_rate_warms_up_and_decays_to_a_tenth(notes: Path, tmp_path: Path) -> None:
    plan = prepare_new(config(notes, steps=100, lr=1e-3), open_base("demo"), tmp_path / "run").plan
    rates = [learning_rate(plan, step, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4, rel=0.15)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_no_half_adapter(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.runtime import files

    out = tmp_path / "out"
    first = finished(list(train(config(notes, steps=1, out=str(out)))))
    kept = adapter_bytes(first.adapter)
    original = peft_folder.save

    def full(*arguments: object) -> None:
        monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(peft_folder, "save", full)
    with pytest.raises(ResourceError, match="disk is full"):
        list(train(config(notes, steps=2, out=str(out))))
    assert adapter_bytes(str(out)) == kept
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []
