"""Everything that `--device mps` runs gives what plain torch gives on the CPU.

The device is tests/fake_mps.py, which refuses what Metal refuses and runs the Metal kernels' source.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import metal_shim
import pytest
import tiny
import torch
from fake_mps import Machine, fake_mps, mps_table

from edgetune.cli.main import plain_failures
from edgetune.config import DataConfig, TrainConfig
from edgetune.events import Event, Finished, Interrupted, Sampled, Started, Stepped
from edgetune.runtime import adapter as adapters
from edgetune.runtime import device, heap, memory, ops, peft_folder, vocabulary
from edgetune.runtime.batch import Batch
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.ops_types import Segment
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.pager import CopySlots, Streamer
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.runner import Recompute, Runner
from edgetune.session import Session
from edgetune.training.evaluation import evaluate
from edgetune.training.train import train

pytestmark = metal_shim.needs_a_compiler
MPS, CPU = torch.device("mps"), torch.device("cpu")
LAYERS, LENGTH = 3, 60
OTHER_FAMILIES = ("smollm3", "granite-3", "ministral3", "gemma3")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tiny.threads(1):
        yield


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with fake_mps(monkeypatch) as machine:
        assert ops.backend_for(MPS).NAME == "metal"  # this compiles and checks the kernels
        machine.launches.clear()
        yield machine


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write quantised models of several families; return their folders by family, and a dense model's as `dense`.

    Phi's linears, which are stored as one matrix, are too small here to be doubly quantised: its model stays dense too.
    """
    root, found = tmp_path_factory.mktemp("models"), {}
    for family in ("llama-2-grouped", "llama-3.2-tied-scaled", "qwen2.5-window", "qwen3", *OTHER_FAMILIES):
        tiny.save_model(root / f"{family}-dense", family, num_hidden_layers=LAYERS)
        quantize_folder(root / f"{family}-dense", root / family)
        found[family] = root / family
    found["dense"] = root / "llama-2-grouped-dense"
    tiny.save_model(root / "phi4-mini", "phi4-mini")
    found["phi4-mini"] = root / "phi4-mini"
    return found


def opened(folder: Path, where: torch.device, dtype: torch.dtype = torch.float32, **how: Any) -> Llama:
    return load_llama(open_model(folder), dtype, where, **how)


def row(seed: int) -> Batch:
    """Return a row of two documents whose first tokens are context."""
    ids = torch.randint(3, 128, (LENGTH + 1,), generator=torch.Generator().manual_seed(seed))
    weights = torch.full((LENGTH,), 1 / LENGTH)
    weights[:4] = weights[20:24] = 0
    positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])
    return Batch(ids[:-1], ids[1:], weights, positions, (Segment.packed(0, 20), Segment.packed(20, LENGTH)))


def learnt(model: Llama, runner: Runner, dropout: float = 0.1, **optimizer: Any) -> list[torch.Tensor]:
    """Train two steps; return their losses, the loss on a row never trained on (nats) and the adapter, all on the CPU."""
    adapters.attach_new(model, LoraConfig(rank=4, alpha=8, dropout=dropout), seed=1)
    adam = PagedAdamW(adapters.parameters(model), **optimizer)
    found = []
    for step in range(2):
        found.append(runner.train(row(step), dropout_key=step if dropout else None).cpu())
        adam.step(1e-2)
        adam.zero_grad()
    return [*found, runner.score(row(9)).cpu(), *(parameter.detach().cpu() for parameter in adam.parameters)]


def expected(folder: Path, dtype: torch.dtype = torch.float32, how: Any = None, **optimizer: Any) -> list[torch.Tensor]:
    """Return what `learnt` gives with plain torch on the CPU."""
    with ops.use_backend("reference"):
        model = opened(folder, CPU, dtype)
        return learnt(model, how(model) if how else Runner(model), **optimizer)


def same(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one.float() - other.float()).norm() <= tolerance * other.float().norm() + 1e-6


# ---- training ----


@pytest.mark.parametrize("recompute", list(Recompute))
def test_training_is_what_plain_torch_gives(mac: Machine, folders: dict[str, Path], recompute: Recompute) -> None:
    folder = folders["llama-2-grouped"]
    model = opened(folder, MPS)
    assert {str(parameter.device) for parameter in (model.norm, model.embedding, model.head)} == {"mps:0"}
    same(learnt(model, Runner(model, recompute)), expected(folder, how=lambda model: Runner(model, recompute)))
    assert {name for name, *_ in mac.launches} == {"dequantize_nested"}


@pytest.mark.parametrize("family", ["llama-3.2-tied-scaled", "qwen2.5-window", "qwen3", *OTHER_FAMILIES, "phi4-mini"])
def test_every_kind_of_block_trains(mac: Machine, folders: dict[str, Path], family: str) -> None:
    model = opened(folders[family], MPS)
    same(learnt(model, Runner(model)), expected(folders[family]))


def test_bf16_trains(mac: Machine, folders: dict[str, Path]) -> None:
    folder = folders["llama-2-grouped"]
    model = opened(folder, MPS, torch.bfloat16)
    same(learnt(model, Runner(model)), expected(folder, torch.bfloat16), tolerance=5e-2)


def test_a_dense_base_trains(mac: Machine, folders: dict[str, Path]) -> None:
    model = opened(folders["dense"], MPS)
    mac.launches.clear()
    same(learnt(model, Runner(model)), expected(folders["dense"]))
    assert mac.launches == []


@pytest.mark.parametrize("form", [torch.bfloat16, torch.int8])
def test_a_base_in_16_or_8_bits_trains_and_writes(mac: Machine, folders: dict[str, Path], form: torch.dtype) -> None:
    model = opened(folders["dense"], MPS, quant=form)
    found = learnt(model, Runner(model))
    text = list(Generator(Runner(model), 32).generate([1, 5, 9], 12, Sampling(0.0)))
    with ops.use_backend("reference"):
        plain = opened(folders["dense"], CPU, quant=form)
        same(found, learnt(plain, Runner(plain)))
        assert text == list(Generator(Runner(plain), 32).generate([1, 5, 9], 12, Sampling(0.0)))


def test_states_and_inputs_in_files_and_streamed_layers_train(mac: Machine, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["llama-2-grouped"]
    linears = sum(tensor.nbytes for name, tensor in open_model(folder).stored.items() if "_proj.weight" in name)
    model = opened(folder, MPS, layer_memory=2 * (linears // LAYERS) + 4096)
    assert isinstance(model.pager, Streamer)
    assert isinstance(model.pager._buffers, CopySlots)
    found = learnt(model, Runner(model, offload=tmp_path), pages=tmp_path)
    same(found, expected(folder))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_head_trains(mac: Machine, folders: dict[str, Path], kind: str) -> None:
    folder = folders["llama-2-grouped"]
    model = opened(folder, MPS, head_kind=kind)
    with ops.use_backend("reference"):
        wanted = opened(folder, CPU, head_kind=kind)
        numbers = learnt(wanted, Runner(wanted))
    same(learnt(model, Runner(model)), numbers)


def test_the_heads_backward_is_cut_where_an_m1_would_go_wrong(mac: Machine) -> None:
    dlogits, head = torch.randn(20, 33000), torch.randn(33000, 24)
    found = vocabulary.input_gradient(dlogits.to("mps"), head.to("mps")).cpu()
    torch.testing.assert_close(found, dlogits @ head, rtol=1e-4, atol=1e-3)
    with pytest.raises(RuntimeError, match="M1"):
        dlogits.to("mps") @ head.to("mps")


def test_optimizer_states_in_8_bits_and_in_host_memory(mac: Machine, folders: dict[str, Path]) -> None:
    for how in ({"bits": 8}, {"pages": "host"}):
        model = opened(folders["qwen3"], MPS)
        same(learnt(model, Runner(model), **how), expected(folders["qwen3"], **how), tolerance=2e-2)


@pytest.mark.parametrize("bits", [8, 32])
def test_an_optimizers_step_copies_nothing_to_the_device(mac: Machine, bits: int) -> None:
    """Each copy would wait for all work that is queued."""
    optimizer = PagedAdamW([torch.ones(70, 1024, device="mps")], bits=bits)
    for _ in range(2):
        mac.mode.sent = 0
        optimizer.parameters[0].grad.fill_(0.1)  # type: ignore[union-attr]
        optimizer.step(1e-2)
    assert mac.mode.sent == 0


def test_a_row_costs_six_copies_to_the_device_however_many_layers(mac: Machine, folders: dict[str, Path]) -> None:
    """The copies are the ids, targets, weights and positions, and the two tables of rotation angles."""
    model = opened(folders["llama-2-grouped"], MPS)
    adapters.attach_new(model, LoraConfig(rank=4, alpha=8), seed=1)
    runner = Runner(model)
    for _ in range(2):
        mac.mode.sent = 0
        runner.train(row(0))
    assert mac.mode.sent == 6


def test_the_queue_is_ended_after_every_block(mac: Machine, folders: dict[str, Path]) -> None:
    model = opened(folders["llama-2-grouped"], MPS)
    runner = Runner(model)
    mac.asked.clear()
    runner.train(row(0))
    assert mac.asked == ["synchronize"] * 2 * LAYERS
    mac.asked.clear()
    runner.score(row(0))
    assert mac.asked == ["synchronize"] * LAYERS
    generator = Generator(runner, 40)
    with torch.no_grad():
        generator.prefill([5, 6, 7])
        mac.asked.clear()
        generator.step(8)
    assert mac.asked == []


# ---- writing ----


@pytest.mark.parametrize("family", ["llama-2-grouped", "qwen3", "qwen2.5-window"])
def test_greedy_text_is_plain_torchs(mac: Machine, folders: dict[str, Path], family: str) -> None:
    texts = []
    for where in (CPU, MPS):
        with ops.use_backend("reference" if where == CPU else "metal"):
            model = opened(folders[family], where)
            adapters.attach_new(model, LoraConfig(rank=4, alpha=8), seed=1)
            texts.append(list(Generator(Runner(model), 64).generate([1, 5, 9, 40], 12, Sampling(0.0))))
    assert texts[0] == texts[1]
    assert {name for name, *_ in mac.launches} >= {"matvec_nested", "dequantize_nested"}


def test_a_seed_fixes_the_text_on_either_device(mac: Machine, folders: dict[str, Path]) -> None:
    texts = []
    for where in (CPU, MPS, MPS):
        model = opened(folders["llama-2-grouped"], where)
        texts.append(list(Generator(Runner(model), 64).generate([1, 5, 9], 10, Sampling(1.0, seed=7))))
    assert texts[0] == texts[1] == texts[2]


def test_a_session_and_an_evaluation_run_on_it(mac: Machine, small: tuple[Path, Path]) -> None:
    model, notes = small
    texts = [
        Session.load(str(model), "none", name, weights="nf4").generate("The shed", 4, 0.0).text
        for name in ("mps", "auto", "cpu")
    ]
    assert texts[0] == texts[1]
    assert len(mac.launches) > 0
    scores = [evaluate([str(notes)], str(model), "none", name, weights="nf4").bits_per_byte for name in ("mps", "cpu")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-2)


# ---- a whole run ----


def run(folder: Path, notes: Path, **changes: Any) -> list[Event]:
    data = DataConfig(notes=(str(notes),), seq_len=64, batch_tokens=128)
    settings = {"data": data, "model": str(folder), "weights": "nf4", "steps": 2, "rank": 4, "evaluation_share": 1.0}
    return list(train(TrainConfig(**{**settings, **changes})))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Write a model that trains in a moment, and notes; return their folders."""
    tiny.save_trainable(tmp_path / "model")
    (tmp_path / "notes").mkdir()
    for number in range(24):
        text = f"# Shed {number}\n\nMarra oiled chain {number} and hung it behind the door, out of the wet. " * 2
        (tmp_path / "notes" / f"{number}.md").write_text(text)
    monkeypatch.setattr("edgetune.training.sample_writer.SAMPLE_TOKENS", 3)
    return tmp_path / "model", tmp_path / "notes"


def test_a_run_on_auto_goes_to_the_apple_gpu_and_learns(mac: Machine, small: tuple[Path, Path], tmp_path: Path) -> None:
    events = run(*small)
    started, end = events[0], events[-1]
    assert isinstance(started, Started)
    assert isinstance(end, Finished)
    assert (started.device, started.backend, started.plan["compute_dtype"]) == ("mps:0", "metal", "bfloat16")
    assert end.heldout_bits_per_byte_after is not None
    assert end.heldout_bits_per_byte_after < end.heldout_bits_per_byte_before
    assert len([event for event in events if isinstance(event, Sampled)]) == 2
    # The cache is emptied around each of three evaluations, after the samples before and after training, after the score of the
    # base as published, after the gate's scores, and at the end.
    assert mac.asked.count("empty_cache") == 11
    assert {name for name, *_ in mac.launches} >= {"dequantize_nested", "matvec_nested"}
    same_run = run(*small, device="cpu", out=str(tmp_path / "cpu"))
    losses = [[event.loss for event in one if isinstance(event, Stepped)] for one in (events, same_run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_stopped_run_goes_on_and_ends_as_one_in_one_piece(mac: Machine, small: tuple[Path, Path], tmp_path: Path) -> None:
    whole = run(*small, out=str(tmp_path / "whole"))
    assert isinstance(whole[-1], Finished)
    model, notes = small
    data = DataConfig(notes=(str(notes),), seq_len=64, batch_tokens=128)
    settings = {"weights": "nf4", "steps": 2, "rank": 4, "evaluation_share": 1.0}
    config = TrainConfig(data=data, model=str(model), out=str(tmp_path / "parts"), **settings)
    stop = threading.Event()
    for event in train(config, stop):
        if isinstance(event, Stepped):
            stop.set()
    assert isinstance(event, Interrupted)
    assert isinstance(list(train(config))[-1], Finished)
    weights = [(tmp_path / name / peft_folder.WEIGHTS_FILE).read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_no_memory_left_is_one_sentence(
    mac: Machine, small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9.07 GB). Tried to allocate 1 GB.")

    monkeypatch.setattr(Runner, "train", full)
    with pytest.raises(SystemExit) as ended, plain_failures():
        run(*small)
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("edgetune: The device is out of memory. End other programs")


def test_a_run_without_kernels_is_plain_torch(
    monkeypatch: pytest.MonkeyPatch, small: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(source: str) -> None:
        raise SyntaxError("program_source:1: error")

    with fake_mps(monkeypatch, compile_shader=refuse) as machine:
        events = run(*small, device="mps", steps=1)
    assert isinstance(events[0], Started)
    assert (events[0].device, events[0].backend) == ("mps:0", "reference")
    assert isinstance(events[-1], Finished)
    assert machine.launches == []
    assert caplog.text.count("Metal kernels") == 1


def test_every_op_of_a_run_has_a_kernel_on_mps(mac: Machine, small: tuple[Path, Path]) -> None:
    """torch's own table of ops lists the kernels; an op without one would fail on a Mac, or run on the CPU."""
    run(*small, dropout=0.1)
    table, missing = mps_table(), []
    for op in mac.mode.ops:
        name = str(op).removeprefix("aten.").removesuffix(".default")
        keys = table[name]
        if any(key.startswith("delegate:") for key in keys):
            keys = table[next(iter(keys)).removeprefix("delegate:")]
        if not keys & {"MPS", "CompositeImplicitAutograd", "CompositeExplicitAutograd"}:
            missing.append(name)
    assert len(mac.mode.ops) > 40
    assert missing == []


# ---- memory ----


def test_the_devices_memory_is_counted_and_limits_what_may_be_used(
    mac: Machine, small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memory.device_memory(CPU) == 0
    assert memory.device_memory(MPS) == mac.allocated + mac.cached
    heap.trim_device(CPU)
    device.end_command_buffer(CPU)
    assert mac.asked == []
    heap.trim_device(MPS)
    assert mac.asked == ["synchronize", "empty_cache"]
    assert memory.device_memory(MPS) == mac.allocated
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10 << 20)
    assert memory.available_memory("mps") == (10 << 20) - mac.allocated
    assert memory.available_memory() > 10 << 20
    mac.allocated = 3 << 30
    assert memory.available_memory("mps") == 0
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 8 << 30)
    on_gpu = run(*small, device="mps", steps=1)[-1]
    assert isinstance(on_gpu, Finished)
    assert on_gpu.peak_memory_bytes > 3 << 30


# ---- choosing ----


def test_auto_takes_a_card_then_an_apple_gpu_then_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, wanted in ((True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert device.pick_device("auto") == torch.device(wanted)
        assert device.pick_device("cpu") == CPU


@pytest.mark.parametrize(("newer", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_from_macos_14_on(monkeypatch: pytest.MonkeyPatch, newer: bool, dtype: torch.dtype) -> None:
    asked = []
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: asked.append(version) or newer)
    assert device.compute_dtype(MPS) == dtype
    assert asked == [(14, 0)]


# ---- the fake itself ----


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_the_fake_refuses_what_metal_refuses(mac: Machine) -> None:
    x = torch.zeros(3, device="mps")
    for wrong in (
        lambda: x + torch.zeros(3),
        lambda: x.double(),
        lambda: torch.zeros(3, device="mps", dtype=torch.float64),
        lambda: torch.rand(3, device="mps", generator=torch.Generator()),
        lambda: torch.empty(3, device="mps", pin_memory=True),
        lambda: x.numpy(),
        lambda: x.to("cpu", non_blocking=True),
        lambda: torch.zeros(3).copy_(x, non_blocking=True),
        lambda: torch.add(x, x, out=torch.empty(4, device="mps")),
        lambda: torch.mm(x[:, None], x[None], out=torch.zeros(3, 4, device="mps")[:, 1:]),
        lambda: torch.zeros(3, 2, device="mps").T.masked_fill_(torch.ones(2, 3, dtype=torch.bool, device="mps"), 1.0),
        lambda: torch.zeros(4, device="mps")[1:].scatter_add_(0, torch.zeros(3, dtype=torch.int64, device="mps"), x),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    source = torch.ones(3)
    moved = source.to("mps")
    source.zero_()
    assert moved.cpu().tolist() == [1, 1, 1]
    assert replace(row(0)).to(MPS).input_ids.device.type == "mps"
