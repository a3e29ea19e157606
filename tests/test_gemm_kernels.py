"""The fused NF4 linears are a dense product with dequantize's weights, rounded once, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from edgetune.runtime import lora, nf4, ops
from edgetune.runtime.nf4 import QuantizedTensor

cpu = pytest.importorskip("edgetune.runtime.backends.cpu", exc_type=ImportError, reason="the C++ kernels were not built")

BF16 = torch.bfloat16
TOLERANCE = 4e-3  # of a tensor's norm: one rounding to bf16 is 1.7e-3
ROWS = [1, 7, 32, 100, 513]
SHAPES = {  # outputs, inputs, block size, double quantised
    "one strip": (32, 64, 64, True),
    "several depths": (352, 832, 64, True),
    "plain absmax": (64, 320, 64, False),
    "blocks of 128": (96, 384, 128, True),
    "wider than the sums": (608, 640, 128, False),
}

needs_amx = pytest.mark.skipif("amx" not in cpu.isas(), reason="this machine has no AMX")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def weight(case: str) -> tuple[QuantizedTensor, Tensor]:
    """A quantised weight (O, I), and its dequantised bf16 numbers in f32."""
    outputs, inputs, block_size, double_quant = SHAPES[case]
    dense = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs)) * 0.03
    quantized = nf4.quantize(dense, block_size=block_size, double_quant=double_quant)
    return quantized, ops.dequantize(quantized, BF16).float()


def numbers(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows + seed)).to(BF16)


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """found bf16 is exact f32, but for the order of the sum and one rounding (2^-9 of a number)."""
    assert (found.float() - exact).norm() <= TOLERANCE * exact.norm()
    torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=1e-5 * float(exact.abs().max()))


@needs_amx
@pytest.mark.parametrize(("rows", "case"), list(itertools.product(ROWS, SHAPES)))
def test_linear_is_the_dense_product(rows: int, case: str) -> None:
    quantized, dense = weight(case)
    x = numbers(rows, dense.shape[1])
    y = torch.full((rows, dense.shape[0]), float("nan"), dtype=BF16)
    assert cpu.linear(x, quantized, y)
    assert_rounded(y, x.float() @ dense.T)


@needs_amx
@pytest.mark.parametrize(("rows", "case"), list(itertools.product(ROWS, SHAPES)))
def test_linear_backward_is_the_dense_product(rows: int, case: str) -> None:
    quantized, dense = weight(case)
    dy = numbers(rows, dense.shape[0])
    dx = torch.full((rows, dense.shape[1]), float("nan"), dtype=BF16)
    assert cpu.linear_backward(dy, quantized, dx)
    exact = dy.float() @ dense
    assert_rounded(dx, exact)
    before = numbers(rows, dense.shape[1], seed=1)
    total = before.clone()
    assert cpu.linear_backward(dy, quantized, total, accumulate=True)
    assert_rounded(total, exact + before.float())


@needs_amx
@pytest.mark.parametrize("rows", [7, 100])
def test_column_slices_are_read_and_written_in_place(rows: int) -> None:
    quantized, dense = weight("several depths")
    outputs, inputs = dense.shape
    left, right = 33, 5  # columns of others on either side, at odd places
    x = numbers(rows, left + inputs + right)[:, left : left + inputs]
    whole = torch.full((rows, left + outputs + right), 3.0, dtype=BF16)
    y = whole[:, left : left + outputs]
    assert cpu.linear(x, quantized, y)
    assert_rounded(y, x.float() @ dense.T)
    dx = torch.full((rows, left + inputs + right), 3.0, dtype=BF16)
    assert cpu.linear_backward(y, quantized, dx[:, left : left + inputs])
    assert_rounded(dx[:, left : left + inputs], y.float() @ dense)
    for matrix, width in ((whole, outputs), (dx, inputs)):
        assert (matrix[:, :left] == 3).all()
        assert (matrix[:, left + width :] == 3).all()


@needs_amx
@pytest.mark.parametrize("rows", [100, 600])
def test_any_number_of_threads_gives_the_same_bits(rows: int) -> None:
    quantized, dense = weight("wider than the sums")
    x, dy = numbers(rows, dense.shape[1]), numbers(rows, dense.shape[0])
    results = []
    for count in (1, 2, 3):
        with threads(count):
            y, dx = torch.empty_like(dy), torch.zeros_like(x)
            assert cpu.linear(x, quantized, y)
            assert cpu.linear_backward(dy, quantized, dx, accumulate=True)
        results.append((y, dx))
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


@needs_amx
def test_every_weight_has_dequantize_s_bits() -> None:
    quantized, dense = weight("several depths")
    outputs, inputs = dense.shape
    turned, straight = torch.empty(inputs, outputs, dtype=BF16), torch.empty(outputs, inputs, dtype=BF16)
    assert cpu.linear(torch.eye(inputs, dtype=BF16), quantized, turned)
    assert cpu.linear_backward(torch.eye(outputs, dtype=BF16), quantized, straight)
    assert torch.equal(turned.T.float(), dense)
    assert torch.equal(straight.float(), dense)


@needs_amx
@pytest.mark.parametrize("odd_gradient", [False, True])
def test_a_projection_with_fused_products_is_the_one_with_a_panel(monkeypatch: pytest.MonkeyPatch, odd_gradient: bool) -> None:
    weights = [
        nf4.quantize(torch.randn(width, 320, generator=torch.Generator().manual_seed(width)) * 0.05) for width in (96, 352)
    ]
    linears = [lora.Linear(weights[0]), lora.Linear(weights[1], bias=torch.ones(352, dtype=BF16))]
    dy = torch.ones(1, 1, dtype=BF16).expand(100, 448) if odd_gradient else numbers(100, 448)
    results = []
    for least_rows in (64, 1000):
        monkeypatch.setattr(lora, "FUSED_ROWS", least_rows)
        h = numbers(100, 320).requires_grad_()
        y = lora.project(h, lora.Identity(), linears, lora.ProjectPlan(lora.Panel()))
        y.backward(dy)
        assert h.grad is not None
        results.append((y.detach().float(), h.grad.float()))
    for fused, panel in zip(*results, strict=True):
        assert (fused - panel).norm() <= 2 * TOLERANCE * panel.norm()


@pytest.mark.parametrize(
    ("outputs", "inputs", "block_size", "dtype"),
    [(40, 64, 64, BF16), (64, 96, 64, BF16), (64, 64, 32, BF16), (64, 64, 64, torch.float32)],
)
def test_what_has_no_fused_kernel_is_left_alone(outputs: int, inputs: int, block_size: int, dtype: torch.dtype) -> None:
    quantized = nf4.quantize(torch.randn(outputs, inputs), block_size=block_size)
    y, dx = torch.zeros(70, outputs, dtype=dtype), torch.zeros(70, inputs, dtype=dtype)
    assert not ops.linear(torch.ones_like(dx), quantized, y)
    assert not ops.linear_backward(torch.ones_like(y), quantized, dx)
    assert not y.any()
    assert not dx.any()


def test_other_instruction_sets_and_back_ends_have_none() -> None:
    quantized, dense = weight("one strip")
    x, y = numbers(70, dense.shape[1]), torch.zeros(70, dense.shape[0], dtype=BF16)
    with cpu.force_isa("scalar"):
        assert not ops.linear(x, quantized, y)
        assert not ops.linear_backward(y, quantized, x)
    with ops.use_backend("reference"):
        assert not ops.linear(x, quantized, y)
        assert not ops.linear_backward(y, quantized, x)
    assert not y.any()


def test_wrong_arguments_raise() -> None:
    quantized, dense = weight("one strip")
    outputs, inputs = dense.shape
    x, y = numbers(70, inputs), numbers(70, outputs)
    with pytest.raises(ValueError, match="out is"):
        cpu.linear(x, quantized, y[:69])
    with pytest.raises(ValueError, match="out is"):
        cpu.linear(x, quantized, y.float())
    with pytest.raises(ValueError, match="x is"):
        cpu.linear(y, quantized, y)
    with pytest.raises(ValueError, match="dy is"):
        cpu.linear_backward(x, quantized, x)
    with pytest.raises(ValueError, match="contiguous"):
        cpu.linear(numbers(inputs, 70).T, quantized, y)
    with pytest.raises(ValueError, match="overlap"):
        cpu.linear(x, quantized, y[:1].expand(70, outputs))
