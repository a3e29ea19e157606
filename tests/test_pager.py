"""With streaming and offload, a model that is never whole in memory learns and writes the same bits as one that is."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from edgetune.runtime import adapter as adapters
from edgetune.runtime import pager
from edgetune.runtime.batch import Batch
from edgetune.runtime.checkpoint import Checkpoint, open_model
from edgetune.runtime.config import LoraConfig, QuantConfig
from edgetune.runtime.errors import ModelError, ResourceError
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.linear import Linear
from edgetune.runtime.loader import load_llama
from edgetune.runtime.memory import anonymous_memory
from edgetune.runtime.model import Llama
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops_types import Segment
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.pager import CudaSlots, HostSlots, PagedLayer, PagedWeight, Streamer, streamed_layers
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.runner import Recompute, Runner
from edgetune.runtime.safetensors_file import StoredTensor

LAYERS = 6
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write one model as transformers does and as edgetune does, whole, in shards and without double quantisation."""
    root = tmp_path_factory.mktemp("models")
    model = tiny.save_model(root / "dense", num_hidden_layers=LAYERS)
    model.save_pretrained(root / "shards", max_shard_size="100KB")
    assert len(list((root / "shards").glob("*.safetensors"))) > 3
    quantize_folder(root / "dense", root / "nf4")
    quantize_folder(root / "dense", root / "nf4-shards", shard_bytes=30_000)
    quantize_folder(root / "dense", root / "nf4-plain", double_quant=False)
    return {path.name: path for path in root.iterdir()}


def layer_bytes(checkpoint: Checkpoint) -> int:
    """Return the size in bytes of one layer's linears, padded as they are in a slot."""
    sizes = [t.nbytes for n, t in checkpoint.stored.items() if ".layers.0." in n and n.endswith(("_proj.weight", ".absmax"))]
    return sum(-(-size // 64) * 64 for size in sizes if size)


def opened(folder: Path, layers_in_memory: int | None, dtype: torch.dtype = torch.float32) -> Llama:
    checkpoint = open_model(folder)
    memory = None if layers_in_memory is None else layers_in_memory * layer_bytes(checkpoint)
    return load_llama(checkpoint, dtype, layer_memory=memory)


def row(seed: int, length: int = 50) -> Batch:
    ids = torch.randint(0, 128, (length + 1,), generator=torch.Generator().manual_seed(seed))
    documents = (Segment.packed(0, 20), Segment.packed(20, length))
    return Batch(ids[:-1], ids[1:], torch.full((length,), 1 / length), torch.arange(length), documents)


def trained(model: Llama, runner: Runner, pages: Path | None = None) -> list[torch.Tensor]:
    """Train four steps; return their losses, the loss on another row and the adapter."""
    adapters.attach_new(model, LORA, seed=1)
    optimizer = PagedAdamW(adapters.parameters(model), pages=pages)
    losses = []
    for step in range(4):
        losses.append(runner.train(row(step), dropout_key=step))
        optimizer.step(1e-2)
        optimizer.zero_grad()
    return [*losses, runner.score(row(9)), *optimizer.parameters]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "nf4-plain", "nf4-shards", "dense", "shards"])
@pytest.mark.parametrize("in_memory", [2, 3, 5])
def test_streaming_changes_no_bit_of_what_is_learnt(folders: dict[str, Path], kind: str, in_memory: int) -> None:
    resident, streamed = opened(folders[kind], None), opened(folders[kind], in_memory)
    assert not resident.pager.streaming
    assert isinstance(streamed.pager, Streamer)
    assert len(streamed.pager.streamed) == LAYERS - in_memory + 2
    assert equal(trained(resident, Runner(resident)), trained(streamed, Runner(streamed)))


@pytest.mark.parametrize("recompute", list(Recompute))
def test_streaming_paged_states_and_offload_together_change_no_bit(
    folders: dict[str, Path], recompute: Recompute, tmp_path: Path
) -> None:
    resident, frugal = (opened(folders["nf4"], n, torch.bfloat16) for n in (None, 2))
    wanted = trained(resident, Runner(resident, recompute))
    offload = tmp_path if recompute is Recompute.FULL else None
    assert equal(wanted, trained(frugal, Runner(frugal, recompute, offload=offload), pages=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_demo_learns_the_same_under_a_budget(tmp_path: Path) -> None:
    demo = Path(sys.modules["edgetune"].__file__ or "").parent / "demo"
    resident, frugal = (opened(demo, n, torch.bfloat16) for n in (None, 2))
    wanted = trained(resident, Runner(resident))
    assert equal(wanted, trained(frugal, Runner(frugal, offload=tmp_path), pages=tmp_path))


@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_a_streamed_model_writes_the_same_text(folders: dict[str, Path], kind: str) -> None:
    resident, streamed = opened(folders[kind], None), opened(folders[kind], 2)
    texts = []
    for model in (resident, streamed):
        generator = Generator(Runner(model), 64)
        texts.append(list(generator.generate([1, 5, 9], 30, Sampling(1.0, seed=7))))
    assert texts[0] == texts[1]


def test_a_linear_that_is_away_holds_nothing_and_says_so(folders: dict[str, Path]) -> None:
    model = opened(folders["nf4"], 2)
    linear = model.blocks[3].q_proj
    assert isinstance(linear, Linear)
    assert isinstance(linear.weight, QuantizedTensor)
    assert linear.weight.packed.numel() == linear.weight.state.absmax.numel() == 0
    assert linear.weight.shape == (64, 64)
    with model.pager.layer(3):
        assert linear.weight.packed.numel() == 64 * 64 // 2
        assert linear.weight.packed.data_ptr() % 64 == 0
    assert linear.weight.packed.numel() == 0
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        model.blocks[3](torch.zeros(4, 64), Runner(model)._context(torch.arange(4), [Segment(0, 4, 0, 4)], None))


def test_what_cannot_be_streamed_is_one_sentence(folders: dict[str, Path]) -> None:
    with pytest.raises(ResourceError, match="two layers take"):
        opened(folders["nf4"], 1)
    with pytest.raises(ModelError, match="edgetune quantize"):
        load_llama(open_model(folders["dense"]), torch.float32, quant=QuantConfig(), layer_memory=100_000)


def test_a_file_that_shrinks_while_it_is_used_is_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folders["nf4"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    model = opened(copy, 2)
    weights = copy / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    with pytest.raises(ModelError, match="can no longer be read"):
        Runner(model).score(row(0))


def test_offload_needs_full_recomputation(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected full, since only"):
        Runner(opened(folders["nf4"], None), Recompute.NONE, offload=tmp_path)


# ---- the ring itself, on a device that checks how it is used ----


class CheckedSlots(HostSlots):
    """Records each layer that is filled in, and fails if a slot is written to while in use or used before it is filled."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.filled: list[int] = []
        self._lock, self._taken, self._whole = threading.Lock(), set[int](), set[int]()

    def host(self, slot: int) -> torch.Tensor:
        with self._lock:
            assert slot not in self._taken
            self._whole.discard(slot)
        return super().host(slot)

    def send(self, slot: int) -> None:
        with self._lock:
            self._whole.add(slot)
            self.filled.append(int(self._buffers[slot][0]))

    def take(self, slot: int) -> torch.Tensor:
        with self._lock:
            assert slot in self._whole
            self._taken.add(slot)
        return super().take(slot)

    def give(self, slot: int) -> None:
        self._taken.discard(slot)


def ring(patch: pytest.MonkeyPatch, tmp_path: Path, count: int, in_memory: int) -> tuple[Streamer, CheckedSlots, list[Linear]]:
    """Make a ring over `count` layers of one linear each, whose bytes all equal the layer's number."""
    path = tmp_path / "weights"
    path.write_bytes(b"".join(bytes([number]) * 64 for number in range(count)))
    linears = [Linear(torch.zeros(8, 8, dtype=torch.uint8)) for _ in range(count)]
    layers = []
    for number, linear in enumerate(linears):
        stored = StoredTensor("w", torch.uint8, (64,), 64 * number)
        layers.append(PagedLayer([PagedWeight(linear, ((path, stored),), lambda raw: raw.view(8, 8), torch.empty(0))]))
    made: list[CheckedSlots] = []

    def make(device: torch.device, nbytes: int) -> CheckedSlots:
        made.append(CheckedSlots(nbytes))
        return made[0]

    patch.setattr(pager, "slots_for", make)
    return Streamer(layers, in_memory * 64, torch.device("cpu")), made[0], linears


def visit(streamer: Streamer, linears: list[Linear], order: list[int]) -> None:
    for number in order:
        with streamer.layer(number):
            assert (linears[number].weight == number).all()


def test_the_turns_read_nothing_that_is_still_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    streamer, slots, linears = ring(monkeypatch, tmp_path, 10, in_memory=2)
    there_and_back = [*range(10), *reversed(range(10))]
    streamer.expect(there_and_back)
    visit(streamer, linears, there_and_back)
    assert slots.filled == [*range(10), *reversed(range(8))]
    for _ in range(3):
        streamer.expect(there_and_back)
        visit(streamer, linears, there_and_back)
    assert len(slots.filled) == 18 + 3 * 16


def test_pinned_layers_are_read_once_and_lie_between_streamed_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    streamer, slots, linears = ring(monkeypatch, tmp_path, 10, in_memory=7)
    assert sorted(streamer.streamed) == [1, 3, 5, 7, 9]
    for _ in range(2):
        streamer.expect(range(10))
        visit(streamer, linears, list(range(10)))
    assert set(slots.filled) == set(streamer.streamed)
    assert all((linears[number].weight == number).all() for number in (0, 2, 4, 6, 8))


def test_an_order_that_was_not_announced_is_right_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    streamer, _, linears = ring(monkeypatch, tmp_path, 8, in_memory=3)
    streamer.expect(range(8))
    visit(streamer, linears, [5, 5, 0, 7, 1, 2, 1, 3])
    streamer.expect(range(8))
    visit(streamer, linears, list(range(8)))


def test_an_error_in_a_layer_leaves_the_ring_usable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    streamer, _, linears = ring(monkeypatch, tmp_path, 8, in_memory=2)
    streamer.expect(range(8))
    with pytest.raises(KeyboardInterrupt), streamer.layer(0):
        raise KeyboardInterrupt
    streamer.expect(range(8))
    visit(streamer, linears, list(range(8)))


@pytest.mark.parametrize("memory", range(2, 9))
def test_the_fewest_layers_are_streamed(memory: int) -> None:
    assert len(streamed_layers([10] * 9, memory * 10)) == 9 - memory + 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told by Linux alone")
def test_weights_take_no_more_than_they_were_given(tmp_path: Path) -> None:
    """A model whose linears take 60 MB runs with 12 MB for them."""
    tiny.save_model(tmp_path / "dense", hidden_size=512, intermediate_size=1536, num_hidden_layers=40)
    quantize_folder(tmp_path / "dense", tmp_path / "nf4")
    checkpoint = open_model(tmp_path / "nf4")
    warm = opened(tmp_path / "nf4", None, torch.bfloat16)
    Runner(warm).score(row(0))
    before = anonymous_memory()
    model = load_llama(checkpoint, torch.bfloat16, layer_memory=12_000_000)
    Runner(model).score(row(0))
    assert anonymous_memory() - before < 12_000_000 + 6_000_000


# ---- the ring on a card ----


class _Stream:
    """Imitates a CUDA stream: its work runs as late as allowed or, if `eager`, as early as allowed."""

    def __init__(self, eager: bool) -> None:
        self.eager, self.done = eager, 0
        self._work: list[Callable[[], object] | tuple[_Stream, int]] = []

    def queue(self, work: Callable[[], object] | tuple[_Stream, int]) -> None:
        self._work.append(work)
        while self.eager and self.done < len(self._work) and self._may(self._work[self.done]):
            self.run(self.done + 1)

    @staticmethod
    def _may(work: Callable[[], object] | tuple[_Stream, int]) -> bool:
        return callable(work) or work[0].done >= work[1]

    def run(self, until: int) -> None:
        while self.done < until:
            work = self._work[self.done]
            if callable(work):
                work()
            else:
                work[0].run(work[1])
            self.done += 1

    def wait_event(self, event: _Event) -> None:
        if event.mark is not None:
            self.queue(event.mark)

    @property
    def end(self) -> tuple[_Stream, int]:
        return self, len(self._work)


class _Event:
    mark: tuple[_Stream, int] | None = None

    def record(self, stream: _Stream) -> None:
        self.mark = stream.end

    def synchronize(self) -> None:
        if self.mark is not None:
            self.mark[0].run(self.mark[1])


@pytest.mark.parametrize("hasty", ["copies", "computing", "neither"])
def test_a_cards_ring_waits_for_whatever_order_its_streams_run_in(monkeypatch: pytest.MonkeyPatch, hasty: str) -> None:
    """Streams run late or early wherever they need not wait, and the slots' memory is still being read by earlier work."""
    compute, copies = _Stream(hasty == "computing"), _Stream(hasty == "copies")
    memory, current, recorded, seen = [torch.full((4,), 99, dtype=torch.uint8) for _ in range(2)], [compute], [], []
    for former in memory:
        compute.queue(lambda former=former: seen.append(int(former[0])))
    lent, copy = iter(memory), torch.Tensor.copy_

    def empty(nbytes: int, **how: Any) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8) if how.get("pin_memory") else next(lent)

    @contextlib.contextmanager
    def on(stream: _Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(pager.torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda buffer, stream: recorded.append((buffer, stream)))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda a, b, non_blocking: current[-1].queue(lambda: copy(a, b)))
    for name, value in {"Stream": lambda _: copies, "Event": _Event, "stream": on, "current_stream": lambda _: compute}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    slots, layers = CudaSlots(4, torch.device("cuda")), 7
    for ahead in range(layers + 1):
        if ahead < layers:
            slots.host(ahead % 2).fill_(ahead)
            slots.send(ahead % 2)
        if ahead:
            taken = slots.take((ahead - 1) % 2)
            compute.queue(lambda taken=taken: seen.append(int(taken[0])))
            slots.give((ahead - 1) % 2)
    compute.run(compute.end[1])
    assert seen == [99, 99, *range(layers)]
    assert [(id(buffer), stream) for buffer, stream in recorded] == [(id(buffer), copies) for buffer in memory]
