"""The fused linears with adapters equal dense products with dequantised weights, forward and backward."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from tiny import threads
from torch import Tensor

from edgetune.runtime import nf4, ops
from edgetune.runtime import project as products
from edgetune.runtime.backends import reference
from edgetune.runtime.linear import Linear, LoraLinear
from edgetune.runtime.ops_types import Adapted

cpu = pytest.importorskip("edgetune.runtime.backends.cpu", exc_type=ImportError, reason="the C++ kernels were not built")
project = importlib.import_module("edgetune.runtime.backends.cpu.project")

BF16 = torch.bfloat16
# The largest error allowed, as a fraction of a tensor's norm. One rounding to bf16 gives 1.7e-3, and adapters round twice more.
TOLERANCE = 5e-3
# The largest error of an int8 product, as a fraction of its norm. Rounding rows to 127 steps costs about 1% on each side.
INT8_ERROR = 0.02
ROWS = [1, 7, 32, 100, 513, 1100]
ROWS_OF_OTHERS = [7, 100]
# Each case is (inputs, outputs of each linear, rank of each (0: no adapter), block size, double quantisation).
SHAPES = {
    "one strip": (64, (32,), (16,), 64, True),
    "no adapter": (320, (96, 32), (0, 0), 64, True),
    "three, several depths": (832, (352, 64, 64), (16, 16, 16), 64, True),
    "one of them adapted": (384, (64, 96, 32), (0, 8, 0), 128, True),
    "ranks of one and of three squares": (320, (64, 608), (1, 70), 64, False),
    "wider than the sums": (640, (608,), (40,), 128, False),
}
SHAPES_IN_INT8 = {
    "in eights": (832, (640, 64, 128), (16, 40, 0), 64, True),
    "in eights, no adapter": (384, (64, 192), (0, 0), 128, False),
}


@pytest.fixture(params=[name for name in cpu.isas() if name != "scalar"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.force_isa(request.param):
        yield request.param


@pytest.fixture(params=[BF16, torch.float32], ids=["bf16", "fp32"])
def dtype(request: pytest.FixtureRequest, isa: str) -> torch.dtype:
    """Return a dtype of x for which the instruction set has fused kernels."""
    if request.param not in project.dtypes(isa):
        pytest.skip(f"{isa} has no fused kernels for {request.param}")
    return request.param


def adapted(case: str, dropout: float = 0.0) -> tuple[list[Adapted], list[Tensor]]:
    """Return linears that share their input, and their weights dequantised to bf16 and stored as fp32."""
    inputs, outputs, ranks, block_size, double_quant = (SHAPES | SHAPES_IN_INT8)[case]
    generator = torch.Generator().manual_seed(inputs)
    linears, dense = [], []
    for number, (width, rank) in enumerate(zip(outputs, ranks, strict=True)):
        weight = torch.randn(width, inputs, generator=generator) * 0.03
        quantized = nf4.quantize(weight, block_size=block_size, double_quant=double_quant)
        a, b = torch.randn(rank, inputs, generator=generator) * 0.05, torch.randn(width, rank, generator=generator) * 0.05
        key = 40 + number if dropout else None
        linears.append(Adapted(quantized, a, b, 0.75, dropout, key) if rank else Adapted(quantized))
        dense.append(ops.dequantize(quantized, BF16).float())
    return linears, dense


def numbers(rows: int, width: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows + seed)).to(dtype)


def zeros(linears: list[Adapted]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros_like(linear.a), torch.zeros_like(linear.b)) for linear in linears if linear.a is not None]


def dropped(x: Tensor, linear: Adapted) -> Tensor:
    return x if linear.key is None else reference.dropout(x, linear.dropout, linear.key)


def assert_near(found: Tensor, exact: Tensor) -> None:
    assert torch.isfinite(found).all()
    assert (found.float() - exact).norm() <= TOLERANCE * exact.norm()


def forward_exactly(x: Tensor, linears: list[Adapted], dense: list[Tensor]) -> Tensor:
    parts = []
    for linear, weight in zip(linears, dense, strict=True):
        y = x.float() @ weight.T
        if linear.a is not None and linear.b is not None:
            y = y + linear.scale * (dropped(x, linear).float() @ linear.a.T @ linear.b.T)
        parts.append(y)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(("rows", "case"), list(itertools.product(ROWS, SHAPES)))
def test_forward_and_backward_are_the_dense_products(
    rows: int, case: str, dropout: float, isa: str, dtype: torch.dtype
) -> None:
    linears, dense = adapted(case, dropout)
    x, dy = (
        numbers(rows, dense[0].shape[1], dtype=dtype),
        numbers(rows, sum(len(weight) for weight in dense), seed=1, dtype=dtype),
    )
    y = torch.full(dy.shape, float("nan"), dtype=dtype)
    reduced = cpu.project(x, linears, y)
    assert reduced is not None
    assert_near(y, forward_exactly(x, linears, dense))

    gradients = zeros(linears)
    dx = cpu.project_backward(dy, x, reduced, linears, gradients)
    exact, column, found = torch.zeros(x.shape), 0, iter(gradients)
    for linear, weight in zip(linears, dense, strict=True):
        part = dy[:, column : column + len(weight)].float()
        column += len(weight)
        exact += part @ weight
        if linear.a is None or linear.b is None:
            continue
        dreduced = linear.scale * part @ linear.b
        exact += dropped((dreduced @ linear.a), linear)
        da, db = next(found)
        assert_near(da, dreduced.T @ dropped(x, linear).float())
        assert_near(db, linear.scale * part.T @ (dropped(x, linear).float() @ linear.a.T))
    assert_near(dx, exact)
    assert next(found, None) is None
    again = [(da.clone(), db.clone()) for da, db in gradients]
    cpu.project_backward(dy, x, reduced, linears, gradients)
    for pair, once in zip(gradients, again, strict=True):
        assert all(
            torch.allclose(twice, 2 * gradient, rtol=1e-3, atol=1e-4) for twice, gradient in zip(pair, once, strict=True)
        )


def steps(matrix: Tensor) -> Tensor:
    """Round each row to 127 steps on either side of 0."""
    scale = matrix.abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, (matrix / scale).round() * scale, matrix)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("case", ["in eights", "in eights, no adapter"])
@pytest.mark.parametrize("rows", [1, 100, 600])
def test_in_int8_the_large_products_are_those_of_rounded_rows_and_the_adapters_as_they_were(
    rows: int, case: str, dropout: float, dtype: torch.dtype
) -> None:
    linears, dense = adapted(case, dropout)
    x, dy = (
        numbers(rows, dense[0].shape[1], dtype=dtype),
        numbers(rows, sum(len(weight) for weight in dense), seed=1, dtype=dtype),
    )
    weights = [nf4.dequantize(linear.weight, torch.float32) for linear in linears]
    exact = torch.cat([steps(x.float()) @ steps(weight).T for weight in weights], 1)
    exact += forward_exactly(x, linears, [torch.zeros_like(weight) for weight in dense])
    y = torch.empty_like(dy)
    reduced = cpu.project(x, linears, y, int8=True)
    assert reduced is not None
    assert_near(y, exact)
    wanted = forward_exactly(x, linears, dense)
    assert TOLERANCE / 10 < (y.float() - wanted).norm() / wanted.norm() < INT8_ERROR

    in_bf16, in_int8 = zeros(linears), zeros(linears)
    plain = cpu.project_backward(dy, x, reduced, linears, in_bf16)
    dx = cpu.project_backward(dy, x, reduced, linears, in_int8, int8=True)
    scaled = torch.cat([weight.abs().amax(1) / 127 for weight in weights])
    whole = torch.cat([steps(weight) for weight in weights]) / scaled[:, None]
    adapters_alone = plain.float() - dy.float() @ torch.cat(dense)
    assert_near(dx, steps(dy.float() * scaled) @ whole + adapters_alone)
    assert all(torch.equal(one, two) for pair in zip(in_bf16, in_int8, strict=True) for one, two in zip(*pair, strict=True))


def test_rows_with_outliers_or_infinite_numbers_are_multiplied_in_bf16(dtype: torch.dtype) -> None:
    linears, dense = adapted("in eights")
    for outlier in (200.0, float("inf"), float("nan")):
        x, dy = (
            numbers(100, dense[0].shape[1], dtype=dtype),
            numbers(100, sum(len(weight) for weight in dense), seed=1, dtype=dtype),
        )
        x[:, 5], dy[:, 7] = outlier, outlier
        results = []
        for int8 in (False, True):
            y = torch.empty_like(dy)
            reduced = cpu.project(x, linears, y, int8)
            assert reduced is not None
            results.append((y, cpu.project_backward(dy, x, reduced, linears, zeros(linears), int8)))
        for plain, asked in zip(*results, strict=True):
            assert torch.equal(plain.nan_to_num(7), asked.nan_to_num(7))


def test_rows_of_zeros_hide_no_outliers(dtype: torch.dtype) -> None:
    """Padding and untrained tokens have zero gradients, which must not hide outliers in the rows that have gradients."""
    linears, dense = adapted("in eights")
    x, dy = (
        numbers(256, dense[0].shape[1], dtype=dtype),
        numbers(256, sum(len(weight) for weight in dense), seed=1, dtype=dtype),
    )
    dy[:, 7] = 200.0
    dy[20:] = 0
    y = torch.empty_like(dy)
    reduced = cpu.project(x, linears, y)
    assert reduced is not None
    plain, asked = (cpu.project_backward(dy, x, reduced, linears, zeros(linears), int8) for int8 in (False, True))
    assert torch.equal(plain, asked)


def test_a_weight_with_a_number_that_is_none_gives_none_in_int8_too(dtype: torch.dtype) -> None:
    """A NaN absmax must give NaN, and an absmax that double quantisation left below 0 must not be taken for a damaged one."""
    linears, dense = adapted("in eights, no adapter")
    state = dataclasses.replace(linears[0].weight.state, absmax=linears[0].weight.state.absmax.clone())
    damaged = Adapted(dataclasses.replace(linears[0].weight, state=state))
    x, y = numbers(100, dense[0].shape[1], dtype=dtype), torch.empty(100, len(dense[0]), dtype=dtype)
    state.absmax[3] = float("nan")  # in row 1, as rows have three blocks
    assert cpu.project(x, [damaged], y, int8=True) is not None
    assert y[:, 1].isnan().all()
    assert y[:, 0].isfinite().all()
    state.absmax[3:6] = -state.absmax[6:9]
    wanted = x.float() @ ops.dequantize(damaged.weight, BF16).float().T
    assert cpu.project(x, [damaged], y, int8=True) is not None
    assert (y.float() - wanted).norm() < INT8_ERROR * wanted.norm()


def test_sums_of_int8_are_never_deeper_than_32_bits_hold() -> None:
    wide = [project.ProjectLinear(outputs=outputs) for outputs in (66_560, 66_560)]
    assert project._fits_int8(wide, 64)
    assert 127 * 127 * 2 * 66_560 < 2**31
    assert not project._fits_int8([*wide, project.ProjectLinear(outputs=64)], 64)
    assert not project._fits_int8(wide, 133_184)
    assert not project._fits_int8([project.ProjectLinear(outputs=96)], 64)


def test_outputs_that_int8_s_tiles_do_not_take_are_multiplied_in_bf16(dtype: torch.dtype) -> None:
    linears, dense = adapted("three, several depths")
    x = numbers(100, dense[0].shape[1], dtype=dtype)
    results = [torch.empty(100, sum(len(weight) for weight in dense), dtype=dtype) for _ in range(2)]
    for int8, y in enumerate(results):
        assert cpu.project(x, linears, y, bool(int8)) is not None
    assert torch.equal(*results)


def test_without_a_result_the_same_is_kept_for_the_backward(dtype: torch.dtype) -> None:
    linears, dense = adapted("three, several depths", 0.1)
    x = numbers(600, dense[0].shape[1], dtype=dtype)
    whole = cpu.project(x, linears, torch.empty(600, sum(len(weight) for weight in dense), dtype=dtype))
    alone = cpu.project(x, linears, None)
    assert whole is not None
    assert alone is not None
    assert torch.equal(whole, alone)


@pytest.mark.parametrize("rows", [7, 100])
def test_column_slices_are_read_and_written_in_place(rows: int, dtype: torch.dtype) -> None:
    linears, dense = adapted("three, several depths")
    inputs, outputs = dense[0].shape[1], sum(len(weight) for weight in dense)
    # Other columns lie on either side, so that the slice begins and ends at odd places.
    left, right = 33, 5
    x = numbers(rows, left + inputs + right, dtype=dtype)[:, left : left + inputs]
    whole = torch.full((rows, left + outputs + right), 3.0, dtype=dtype)
    y = whole[:, left : left + outputs]
    reduced = cpu.project(x, linears, y)
    assert reduced is not None
    assert_near(y, forward_exactly(x, linears, dense))
    assert (whole[:, :left] == 3).all()
    assert (whole[:, left + outputs :] == 3).all()
    dx = cpu.project_backward(y, x, reduced, linears, zeros(linears))
    whole = cpu.project_backward(y.contiguous(), x.contiguous(), reduced, linears, zeros(linears))
    assert torch.equal(dx, whole)


@pytest.mark.parametrize(
    ("case", "int8"), [("three, several depths", False), ("wider than the sums", False), ("in eights", True)]
)
@pytest.mark.parametrize("rows", [100, 600])
def test_any_number_of_threads_gives_the_same_bits(rows: int, case: str, int8: bool, dtype: torch.dtype) -> None:
    linears, dense = adapted(case, 0.1)
    x, dy = (
        numbers(rows, dense[0].shape[1], dtype=dtype),
        numbers(rows, sum(len(weight) for weight in dense), seed=1, dtype=dtype),
    )
    results = []
    for count in (1, 2, 3):
        with threads(count):
            y = torch.empty_like(dy)
            reduced = cpu.project(x, linears, y, int8)
            assert reduced is not None
            gradients = zeros(linears)
            dx = cpu.project_backward(dy, x, reduced, linears, gradients, int8)
        results.append([y, reduced, dx, *(gradient for pair in gradients for gradient in pair)])
    for result in results[1:]:
        assert all(torch.equal(tensor, first) for tensor, first in zip(result, results[0], strict=True))


def test_every_weight_has_dequantize_s_bits(dtype: torch.dtype) -> None:
    (linear, *_), _ = adapted("no adapter")
    outputs, inputs = linear.weight.shape
    turned = torch.empty(inputs, outputs, dtype=dtype)
    assert cpu.project(torch.eye(inputs, dtype=dtype), [linear], turned) is not None
    nothing, x = torch.empty(outputs, 0, dtype=dtype), torch.zeros(outputs, inputs, dtype=dtype)
    straight = cpu.project_backward(torch.eye(outputs, dtype=dtype), x, nothing, [linear], [])
    dense = ops.dequantize(linear.weight, dtype)
    assert torch.equal(turned.T, dense)
    assert torch.equal(straight, dense)


@pytest.mark.parametrize("odd_gradient", [False, True])
@pytest.mark.parametrize("dropout_key", [None, 11])
def test_a_projection_with_fused_products_is_the_one_with_a_panel(
    monkeypatch: pytest.MonkeyPatch, odd_gradient: bool, dropout_key: int | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    bases = [Linear(nf4.quantize(torch.randn(96, 320, generator=generator) * 0.05))]
    bases.append(Linear(nf4.quantize(torch.randn(352, 320, generator=generator) * 0.05), bias=torch.ones(352, dtype=dtype)))
    adapters = [torch.randn(size, generator=generator) * 0.1 for size in ((8, 320), (352, 8))]
    linears = [bases[0], LoraLinear(bases[1], *adapters, scale=2.0, dropout=0.2)]
    dy = torch.ones(1, 1, dtype=dtype).expand(100, 448) if odd_gradient else numbers(100, 448, dtype=dtype)
    results = []
    for least_rows in (64, 1000):
        monkeypatch.setattr(products, "FUSED_ROWS", least_rows)
        h = numbers(100, 320, dtype=dtype).requires_grad_()
        y = products.project(h, products.Identity(), linears, products.ProjectPlan(products.Panel(), dropout_key))
        linears[1].zero_grad()
        y.backward(dy)
        results.append([y.detach(), h.grad, linears[1].lora_A.grad, linears[1].lora_B.grad])
    for fused, panel in zip(*results, strict=True):
        assert_near(fused, 1.0 * panel.float())


@pytest.mark.parametrize(
    ("outputs", "inputs", "block_size", "dtype"),
    [(40, 64, 64, BF16), (64, 96, 64, BF16), (64, 64, 32, BF16)],
)
def test_what_has_no_fused_kernel_is_left_alone(outputs: int, inputs: int, block_size: int, dtype: torch.dtype) -> None:
    linear = Adapted(nf4.quantize(torch.randn(outputs, inputs), block_size=block_size))
    y = torch.zeros(70, outputs, dtype=dtype)
    assert ops.project(torch.ones(70, inputs, dtype=dtype), [linear], y) is None
    assert not y.any()


def test_fp32_is_not_fused_where_bf16_is_multiplied() -> None:
    linears, dense = adapted("one strip")
    x, y = torch.ones(70, dense[0].shape[1]), torch.zeros(70, dense[0].shape[0])
    for isa in cpu.isas():
        with cpu.force_isa(isa):
            assert (ops.project(x, linears, y) is None) == (isa in (*project.BF16_ISAS, "scalar"))


def test_the_scalar_kernels_and_other_back_ends_have_none() -> None:
    linears, dense = adapted("one strip")
    x, y = numbers(70, dense[0].shape[1]), torch.zeros(70, dense[0].shape[0], dtype=BF16)
    with cpu.force_isa("scalar"):
        assert ops.project(x, linears, y) is None
    with ops.use_backend("reference"):
        assert ops.project(x, linears, y) is None
    assert not y.any()


def test_wrong_arguments_raise() -> None:
    linears, dense = adapted("one strip")
    outputs, inputs = dense[0].shape
    x, y = numbers(70, inputs), numbers(70, outputs)
    with pytest.raises(ValueError, match="y is"):
        cpu.project(x, linears, y[:69])
    with pytest.raises(ValueError, match="y is"):
        cpu.project(x, linears, y.float())
    with pytest.raises(ValueError, match="x is"):
        cpu.project(y, linears, y)
    with pytest.raises(ValueError, match="dy is"):
        cpu.project_backward(x, x, y, linears, zeros(linears))
    with pytest.raises(ValueError, match="contiguous"):
        cpu.project(numbers(inputs, 70).T, linears, y)
    with pytest.raises(ValueError, match="overlap"):
        cpu.project(x, linears, y[:1].expand(70, outputs))
    wrong = Adapted(linears[0].weight, torch.zeros(16, inputs + 1), torch.zeros(outputs, 16))
    if cpu.fuses(BF16):
        with pytest.raises(ValueError, match="lora_A is"):
            cpu.project(x, [wrong], y)
