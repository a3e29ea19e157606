"""The Metal kernels agree with nf4.py; their source runs lane by lane on the CPU (tests/metal_shim.py)."""

from __future__ import annotations

import logging
import math
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import metal_shim
import pytest
import torch
from fake_mps import Machine, fake_mps
from torch import Tensor

from edgetune.runtime import nf4, ops
from edgetune.runtime.backends import reference
from edgetune.runtime.backends.metal.contract import KERNELS, LANES, SPAN
from edgetune.runtime.nf4 import QuantizedTensor

pytestmark = metal_shim.needs_a_compiler
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with fake_mps(monkeypatch) as machine:
        yield machine


@pytest.fixture
def metal(mac: Machine) -> Any:
    """Return the Metal back end, whose import compiles the kernels and checks them."""
    module = ops.backend_for(torch.device("mps"))
    assert module.NAME == "metal"
    mac.launches.clear()
    return module


def inside(tensor: Tensor, ahead: int = 3) -> Tensor:
    """Copy a tensor into a larger one on the device; return the copy, a view with a storage offset."""
    larger = torch.zeros(ahead + tensor.numel(), dtype=tensor.dtype, device="mps")
    view = larger[ahead:].view(tensor.shape)
    view.copy_(tensor)
    return view


def on_mps(quantized: QuantizedTensor) -> QuantizedTensor:
    """Move every part of a quantised tensor to the device, each as a view with a storage offset."""
    state, nested = quantized.state, quantized.state.nested
    if nested is not None:
        nested = replace(nested, absmax=inside(nested.absmax), table=inside(nested.table))
    state = replace(state, absmax=inside(state.absmax), nested=nested)
    return QuantizedTensor(inside(quantized.packed), state)


# ---- dequantisation: bit for bit ----


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantisation_is_bit_exact(mac: Machine, metal: Any, block_size: int, double_quant: bool, dtype: torch.dtype) -> None:
    for shape in [(1, 1), (1, 7), (3, 67), (5, 33), (31, 65), (16, 64), (9, 700), (7, 1023)]:
        quantized = nf4.quantize(torch.randn(shape), block_size=block_size, double_quant=double_quant)
        found = ops.dequantize(on_mps(quantized), dtype)
        assert found.dtype == dtype
        assert found.device.type == "mps"
        assert torch.equal(found.cpu(), nf4.dequantize(quantized, dtype)), shape
    assert {name for name, *_ in mac.launches} == {"dequantize_nested" if double_quant else "dequantize"}
    assert len(mac.launches) == 8


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_every_table_of_codes_goes_by_the_same_kernel(metal: Any, quant_type: str) -> None:
    quantized = nf4.quantize(torch.randn(7, 129), quant_type)
    assert torch.equal(ops.dequantize(on_mps(quantized), torch.float32).cpu(), nf4.dequantize(quantized))


def test_many_blocks_take_many_nested_ones(metal: Any) -> None:
    # 1,682 blocks make seven nested blocks, of which the last is short.
    quantized = nf4.quantize(torch.randn(311, 173), block_size=32)
    assert torch.equal(ops.dequantize(on_mps(quantized), torch.bfloat16).cpu(), nf4.dequantize(quantized, torch.bfloat16))


def test_dequantisation_writes_into_a_panel_and_nothing_beside_it(metal: Any) -> None:
    quantized = nf4.quantize(torch.randn(13, 77))
    panel = torch.full((13 * 77 + 8,), 9.0, device="mps")
    into = panel[4:-4].view(13, 77)
    found = ops.dequantize(on_mps(quantized), torch.float32, into)
    assert found is into
    assert torch.equal(into.cpu(), nf4.dequantize(quantized))
    assert (panel[:4] == 9).all()
    assert (panel[-4:] == 9).all()


def test_no_rows_are_no_launch(mac: Machine, metal: Any) -> None:
    empty = nf4.QuantState(torch.empty(0, device="mps"), (0, 64), torch.float32)
    found = ops.dequantize(QuantizedTensor(torch.empty(0, 1, dtype=torch.uint8, device="mps"), empty), torch.float32)
    assert found.shape == (0, 64)
    assert mac.launches == []


# ---- the product of few rows ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("out", "into", "block_size"), [(1, 64, 64), (37, 192, 64), (9, 32, 32), (70, 1408, 128), (8, 256, 256), (17, 320, 32)]
)
def test_a_product_is_right_to_its_last_rounding(
    mac: Machine, metal: Any, out: int, into: int, block_size: int, double_quant: bool, dtype: torch.dtype
) -> None:
    quantized = nf4.quantize(torch.randn(out, into) * 0.1, block_size=block_size, double_quant=double_quant)
    there, dense = on_mps(quantized), nf4.dequantize(quantized, torch.float32).double()
    for n in (1, 2, 3, 8):
        x = torch.randn(n, into).to(dtype)
        found = metal.matvec(inside(x), there)
        assert found.dtype == dtype
        exact = x.double() @ dense.T
        bound = torch.finfo(dtype).eps * exact.abs() + 1e-6 * (x.double().abs() @ dense.abs().T)
        assert ((found.cpu().double() - exact).abs() <= bound).all()
    assert {name for name, *_ in mac.launches} == {"matvec_nested" if double_quant else "matvec"}
    assert mac.launches[0][2:] == ((LANES, out), (LANES, 8))


def test_a_product_does_not_depend_on_company(metal: Any) -> None:
    quantized, x = on_mps(nf4.quantize(torch.randn(21, 192))), torch.randn(8, 192)
    together = metal.matvec(x.to("mps"), quantized).cpu()
    alone = torch.cat([metal.matvec(row[None].to("mps"), quantized).cpu() for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("n", "out", "into"), [(9, 16, 64), (2, 7, 33), (1, 5, 700), (0, 4, 64)], ids=["many rows", "odd", "crossing", "no rows"]
)
def test_other_products_go_through_a_dense_copy(mac: Machine, metal: Any, n: int, out: int, into: int) -> None:
    quantized, x = nf4.quantize(torch.randn(out, into)), torch.randn(n, into)
    found = ops.matvec(x.to("mps"), on_mps(quantized)).cpu()
    assert torch.allclose(found, reference.matvec(x, quantized), rtol=1e-5, atol=1e-5)
    assert [name for name, *_ in mac.launches] == ["dequantize_nested"]


def test_strided_rows_are_made_contiguous(metal: Any) -> None:
    quantized, x = nf4.quantize(torch.randn(12, 64)), torch.randn(3, 128)
    strided = x.to("mps")[:, :64]
    expected = x[:, :64] @ nf4.dequantize(quantized, torch.float32).T
    assert torch.allclose(ops.matvec(strided, on_mps(quantized)).cpu(), expected, rtol=1e-5, atol=1e-5)


# ---- the contract ----


def test_the_contract_is_what_the_source_says() -> None:
    found = metal_shim.signatures(metal_shim.SOURCE.read_text())
    assert [(own.name, own.buffers) for own in found] == [(own.name, own.arguments) for own in KERNELS]
    for own, recorded in zip(found, KERNELS, strict=True):
        dimensions = {"uint": 1, "uint2": 2}[
            next(kind for _, kind, where in own.builtins if where == "thread_position_in_grid")
        ]
        assert len(recorded.group_size) == dimensions
        assert math.prod(recorded.group_size) <= 1024
        assert math.prod(recorded.group_size) % LANES == 0


def test_the_source_is_installed_with_the_package() -> None:
    settings = tomllib.loads((metal_shim.SOURCE.parents[3] / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["edgetune.runtime.backends.metal"]
    assert any(metal_shim.SOURCE.match(pattern) for pattern in patterns)


def test_the_sources_constants_are_the_contracts() -> None:
    source = metal_shim.SOURCE.read_text()
    assert f"constexpr uint LANES = {LANES};" in source
    assert f"constexpr uint SPAN = {SPAN};" in source
    assert all(size % SPAN == 0 for size in nf4.BLOCK_SIZES)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_call_that_differs_from_the_contract_is_refused(mac: Machine, kernel: Any) -> None:
    device, dtype = torch.zeros(1, device="mps").device, torch.bfloat16
    dtypes = {"VALUE": dtype, "uchar": torch.uint8, "float": torch.float32}
    good: list[Any] = []
    for _, kind in kernel.arguments:
        if kind.startswith("device"):
            good.append(torch.zeros(4, dtype=dtypes[kind.split()[-1].removesuffix("*")], device="mps"))
        else:
            good.append(1 if "long" in kind else 1.0)
    kernel.check(dtype, device, tuple(good))
    with pytest.raises(ValueError, match="arguments"):
        kernel.check(dtype, device, tuple(good[:-1]))
    for number, value in enumerate(good):
        wrong = [2.5 if isinstance(value, int) else 2, True, "x"]
        if isinstance(value, Tensor):
            wrong = [value.to(torch.int16), value.cpu(), torch.stack([value, value], 1)[:, 0], 3]
        for other in wrong:
            with pytest.raises(ValueError, match=kernel.arguments[number][0]):
                kernel.check(dtype, device, (*good[:number], other, *good[number + 1 :]))


def test_a_wrong_absmax_is_refused_before_the_launch(mac: Machine, metal: Any) -> None:
    quantized = on_mps(nf4.quantize(torch.randn(8, 64), double_quant=False))
    state = replace(quantized.state, absmax=quantized.state.absmax.half())
    with pytest.raises(ValueError, match="absmax"):
        ops.dequantize(QuantizedTensor(quantized.packed, state), torch.float32)
    assert mac.launches == []


# ---- where the kernels cannot serve ----

FAULTS = {
    "nibbles in the other order": ("byte >> 4 : byte & 15", "byte & 15 : byte >> 4"),
    "absmax of the next block": ("scales.of(first / block_size)", "scales.of(first / block_size + 1)"),
    "no offset": ("return scaled + offset", "return scaled"),
    "a lane left out": ("k = lane * SPAN", "k = (lane + 1) * SPAN"),
    "no sum over lanes": ("simd_sum(sums[r])", "sums[r]"),
    "does not compile": ("float sums[FEW_ROWS]", "no_such_type sums[FEW_ROWS]"),
    "a kernel is missing": ("kernel void matvec_nested(", "kernel void another_name("),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_kernel_that_is_wrong_is_not_used_and_that_is_said(
    mac: Machine, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    old, new = FAULTS[fault]
    source = metal_shim.SOURCE.read_text()
    assert old in source
    mac.source_changes = lambda source: source.replace(old, new)
    with caplog.at_level(logging.WARNING, "edgetune"):
        for _ in range(2):
            assert ops.backend_for(torch.device("mps")).NAME == "reference"
    assert len(caplog.records) == 1
    assert "Metal kernels" in caplog.text
    assert ops.kernels_missing("mps")
    quantized = nf4.quantize(torch.randn(3, 67))
    assert torch.equal(ops.dequantize(quantized.to("mps"), torch.float32).cpu(), nf4.dequantize(quantized))


def test_an_older_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_mps(monkeypatch, compile_shader=None):
        assert ops.backend_for(torch.device("mps")).NAME == "reference"
        assert "torch 2.7" in str(ops.kernels_missing("mps"))


def test_a_gpu_with_other_simdgroups_is_left_to_plain_torch(monkeypatch: pytest.MonkeyPatch, mac: Machine) -> None:
    from fake_mps import FakeKernel

    monkeypatch.setattr(FakeKernel, "thread_execution_width", 64)
    assert ops.backend_for(torch.device("mps")).NAME == "reference"
    assert "64" in str(ops.kernels_missing("mps"))


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this is a Mac with an Apple GPU")
def test_without_a_mac_the_back_end_is_not_there_and_nothing_else_minds() -> None:
    assert "does not compile" in str(ops.kernels_missing("mps"))
