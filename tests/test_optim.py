"""PagedAdamW equals torch's AdamW with 32 bits and bitsandbytes' with 8 bits, and paging its states changes no bit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch

from edgetune.runtime.errors import ResourceError, TrainingError
from edgetune.runtime.memory import anonymous_memory
from edgetune.runtime.nf4 import dynamic_map
from edgetune.runtime.optim import HOST, PagedAdamW

# States are in 8 bits from 4,096 numbers on. The sizes include odd tails and one of more than one chunk.
SIZES = ((1,), (300,), (4095,), (64, 64), (16, 313), (70001,))


def parameters(sizes: Sequence[tuple[int, ...]] = SIZES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def set_gradients(tensors: list[torch.Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator)


def run(optimizer: PagedAdamW, steps: range = range(5)) -> None:
    for step in steps:
        set_gradients(optimizer.parameters, step)
        optimizer.step(1e-2 / (1 + step))
        optimizer.zero_grad()


def clones(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_32_bits_are_torchs_adamw(fused: bool, weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    mine = PagedAdamW(ours, (0.8, 0.95), weight_decay)
    oracle = torch.optim.AdamW(theirs, 1.0, (0.8, 0.95), weight_decay=weight_decay, fused=fused)
    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        mine.step(1e-2 / (1 + step))
        oracle.param_groups[0]["lr"] = 1e-2 / (1 + step)
        oracle.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if fused else 1e-5, atol=0 if fused else 1e-6)


@pytest.mark.parametrize("steps", [1, 20])
def test_8_bits_are_bitsandbytes_adamw8bit(steps: int) -> None:
    """Moments and updates agree, and both keep small tensors in 32 bits; one code in thirty may round to the other side."""
    import bitsandbytes

    ours, theirs = parameters(), parameters()
    before = [p.detach().clone() for p in ours]
    mine = PagedAdamW(ours, weight_decay=0.1, bits=8)
    oracle = bitsandbytes.optim.AdamW8bit(theirs, lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        mine.step(1e-2)
        oracle.step()
    state = mine.state()
    for number, (a, b, start) in enumerate(zip(ours, theirs, before, strict=True)):
        moved, wanted = a.detach() - start, b.detach() - start
        assert (moved - wanted).norm() < 0.02 * wanted.norm()
        found = oracle.state[b]
        assert (found["state1"].dtype == torch.uint8) == (state[f"{number}.exp_avg"].dtype == torch.uint8)
        for name, other, signed in (("exp_avg", "1", True), ("exp_avg_sq", "2", False)):
            codes, their_codes = state[f"{number}.{name}"][: a.numel()], found[f"state{other}"].flatten()
            if codes.dtype == torch.uint8:
                if steps == 1:
                    assert (codes == their_codes).float().mean() > 0.96
                absmax, their_absmax = state[f"{number}.{name}.absmax"], found[f"absmax{other}"]
                m, n = (
                    dynamic_map(signed)[c.int()] * s.repeat_interleave(256)[: a.numel()]
                    for c, s in ((codes, absmax), (their_codes, their_absmax))
                )
                assert (m - n).norm() < 0.02 * n.norm()


def test_8_bits_move_like_32_where_gradients_differ_by_orders_of_magnitude() -> None:
    """A second moment that was rounded to zero would throw its weight far away."""
    moved = []
    for bits in (8, 32):
        optimizer = PagedAdamW(parameters(((64, 256),)), bits=bits)
        start = optimizer.parameters[0].detach().clone()
        generator = torch.Generator().manual_seed(5)
        scale = 10 ** (2 * torch.randn(64, 256, generator=generator))
        for _ in range(20):
            optimizer.parameters[0].grad = scale * torch.randn(64, 256, generator=generator)
            optimizer.step(1e-2)
        moved.append(optimizer.parameters[0].detach() - start)
    assert moved[0].abs().max() < 2 * moved[1].abs().max()
    assert torch.nn.functional.cosine_similarity(moved[0].flatten(), moved[1].flatten(), dim=0) > 0.5


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_maps_are_bitsandbytes(signed: bool) -> None:
    from bitsandbytes.functional import create_dynamic_map

    assert torch.equal(dynamic_map(signed), create_dynamic_map(signed))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("where", ["file", HOST])
def test_paging_changes_no_bit(bits: int, where: str, tmp_path: Path) -> None:
    resident = PagedAdamW(parameters(), weight_decay=0.1, bits=bits)
    paged = PagedAdamW(parameters(), weight_decay=0.1, bits=bits, pages=HOST if where == HOST else tmp_path)
    run(resident)
    run(paged)
    for a, b in zip(resident.parameters, paged.parameters, strict=True):
        assert torch.equal(a, b)
    wanted = resident.state()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in paged.state().items())
    # The file has no name, so nothing is left behind, whatever happens.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("paged", [True, False])
def test_resuming_equals_going_on(bits: int, paged: bool, tmp_path: Path) -> None:
    whole = PagedAdamW(parameters(), bits=bits)
    run(whole, range(6))
    half = PagedAdamW(parameters(), bits=bits, pages=tmp_path / "pages" if paged else None)
    run(half, range(3))
    safetensors.torch.save_file(clones(half.state()), tmp_path / "state.safetensors")
    resumed = PagedAdamW([p.detach().clone().requires_grad_() for p in half.parameters], bits=bits)
    resumed.load(safetensors.torch.load_file(tmp_path / "state.safetensors"))
    run(resumed, range(3, 6))
    for a, b in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(a, b)
    assert resumed.steps == 6


def test_states_of_another_adapter_are_refused_and_change_nothing() -> None:
    optimizer = PagedAdamW(parameters())
    run(optimizer)
    kept = clones(optimizer.state())
    other = clones(PagedAdamW(parameters(((2, 2), *SIZES))).state())
    with pytest.raises(TrainingError, match="of its tensors differ"):
        optimizer.load(other)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in optimizer.state().items())


def test_a_parameter_without_a_gradient_stays() -> None:
    optimizer = PagedAdamW(parameters())
    kept = [p.detach().clone() for p in optimizer.parameters]
    set_gradients(optimizer.parameters, 0)
    optimizer.parameters[2].grad = None
    optimizer.step(1e-2)
    moved = [not torch.equal(a, b) for a, b in zip(optimizer.parameters, kept, strict=True)]
    assert moved == [True, True, False, True, True, True]


def test_8_bit_states_take_a_quarter() -> None:
    large = parameters(((256, 1024),))
    assert PagedAdamW(large, bits=8).nbytes < 0.26 * PagedAdamW(large, bits=32).nbytes


def test_what_it_cannot_train_is_refused() -> None:
    for wrong in ([], [torch.zeros(2, dtype=torch.bfloat16)], [torch.zeros(2, 3).T]):
        with pytest.raises(ValueError, match="contiguous and fp32"):
            PagedAdamW(wrong)
    with pytest.raises(ValueError, match="8 or 32"):
        PagedAdamW(parameters(), bits=4)


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told by Linux alone")
def test_states_in_a_file_take_no_memory_but_one_parameters(tmp_path: Path) -> None:
    large = [torch.nn.Parameter(torch.zeros(256 * 1024)) for _ in range(64)]  # 64 MB, and their states 128 MB
    set_gradients(large[:1], 0)
    for parameter in large:
        parameter.grad = large[0].grad
    torch.zeros(1 << 20).sum()
    before = anonymous_memory()
    optimizer = PagedAdamW(large, pages=tmp_path)
    optimizer.step(1e-3)
    assert sum(tensor.nbytes for tensor in optimizer.state().values()) > 128e6
    assert anonymous_memory() - before < 16e6


def test_a_disk_without_room_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse, raising=False)
    with pytest.raises(ResourceError, match="disk is full"):
        PagedAdamW(parameters(), pages=tmp_path)
