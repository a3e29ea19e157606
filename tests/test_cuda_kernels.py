"""The Triton kernels against reference.py: on a card where there is one, in Triton's interpreter (see conftest.py) elsewhere."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_model
from torch import Tensor

from edgetune.runtime import adapter as adapters
from edgetune.runtime import attention as tiled
from edgetune.runtime import nf4, ops
from edgetune.runtime.backends import reference
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LINEARS, LoraConfig
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.loader import load_llama
from edgetune.runtime.lora import LoraLinear
from edgetune.runtime.model import KVCache, Llama
from edgetune.runtime.nf4 import QuantizedTensor, QuantState
from edgetune.runtime.runner import Recompute, Row, Runner

pytest.importorskip("triton", reason="triton is not installed")
from edgetune.runtime.backends import cuda  # noqa: E402
from edgetune.runtime.backends.cuda import attention as flash  # noqa: E402
from edgetune.runtime.backends.cuda import decode, kernels, weights  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if not (torch.cuda.is_available() or kernels.INTERPRETED.value):
    pytest.skip("no card, and TRITON_INTERPRET is not 1", allow_module_level=True)
ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
DTYPES = [torch.float32, torch.bfloat16]


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def quantized(*shape: int, **how: Any) -> QuantizedTensor:
    return nf4.quantize(torch.randn(shape) * 0.05, **how).to(DEVICE)


# ---- weights ----


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_dequantisation_is_the_specifications_bits(quant_type: str, double_quant: bool) -> None:
    for shape, block_size in (((7, 33), 64), ((5, 1), 32), ((19, 100), 64), ((2, 4097), 256), ((3, 5, 7), 64), ((9, 512), 4096)):
        weight = quantized(*shape, quant_type=quant_type, block_size=block_size, double_quant=double_quant)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(cuda.dequantize(weight, dtype), nf4.dequantize(weight, dtype))


def test_dequantisation_writes_into_the_panel_and_nowhere_else() -> None:
    weight = quantized(13, 77)
    buffer = torch.full((13 * 77 + 64,), 7.0, device=DEVICE)
    out = buffer[: 13 * 77].view(13, 77)
    assert cuda.dequantize(weight, torch.float32, out) is out
    assert torch.equal(out, nf4.dequantize(weight, torch.float32))
    assert bool((buffer[13 * 77 :] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("rows", "cols", "block_size"), [(37, 192, 64), (5, 1408, 32), (3, 64, 64), (6, 1024, 1024)])
def test_few_rows_times_a_packed_weight(rows: int, cols: int, block_size: int, double_quant: bool, dtype: torch.dtype) -> None:
    weight = quantized(rows, cols, block_size=block_size, double_quant=double_quant)
    dense = nf4.dequantize(weight, torch.float32)
    for n in (1, 3):
        x = randn(n, 2 * cols, dtype=dtype)[:, :cols]
        found = cuda.matvec(x, weight)
        assert found.dtype == dtype
        assert relative(found, x.float() @ dense.T) < ERROR[dtype]


def test_rows_that_blocks_cross_are_dequantised_first() -> None:
    weight = quantized(19, 100)
    assert not weights.takes_rows(weight)
    x = randn(2, 100)
    assert relative(cuda.matvec(x, weight), x @ nf4.dequantize(weight, torch.float32).T) < 2e-6


def test_blocks_of_no_power_of_two_go_to_the_reference() -> None:
    state = QuantState(torch.rand(4), (6, 16), torch.float32, block_size=24)
    weight = QuantizedTensor(torch.randint(0, 256, (48, 1), dtype=torch.uint8), state).to(DEVICE)
    assert not weights.takes(weight)
    assert torch.equal(cuda.dequantize(weight, torch.float32), nf4.dequantize(weight, torch.float32))


def test_one_launch_adds_bias_adapter_and_what_was_there() -> None:
    weight, bias, b, reduced = quantized(37, 128), randn(37), randn(37, 5), randn(1, 9)[:, 2:7]
    x, out = randn(1, 128), randn(1, 64)
    before = out.clone()
    weights.multiply(x, weight, out[:, 8:45], bias, reduced, b, add=True)
    expected = before[:, 8:45] + x @ nf4.dequantize(weight, torch.float32).T + bias + reduced @ b.T
    assert relative(out[:, 8:45], expected) < 2e-6
    assert torch.equal(out[:, :8], before[:, :8])
    assert torch.equal(out[:, 45:], before[:, 45:])


def test_a_wrong_call_is_refused_before_a_kernel_sees_it() -> None:
    weight = quantized(16, 64)
    short = QuantizedTensor(weight.packed[:-1], weight.state)
    for call in (lambda: cuda.dequantize(short, torch.float32), lambda: cuda.matvec(randn(1, 64), short)):
        with pytest.raises(ValueError, match="a part of a weight"):
            call()
    with pytest.raises(ValueError, match="rows of a weight"):
        cuda.matvec(randn(1, 128), weight)


# ---- rows and elements ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype: torch.dtype) -> None:
    for rows, width in ((5, 70), (1, 1), (3, 128)):
        h, dx, weight = randn(rows, 2 * width, dtype=dtype)[:, :width], randn(rows, width, dtype=dtype), randn(width)
        for kind in (torch.float32, torch.bfloat16):
            w = weight.to(kind)
            assert relative(cuda.rms_norm(h, w, 1e-5), reference.rms_norm(h, w, 1e-5)) < ERROR[dtype]
            if width > 1:
                expected = reference.rms_norm_backward(dx, h, w, 1e-5)
                assert relative(cuda.rms_norm_backward(dx, h, w, 1e-5), expected) < ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_on_halves_of_one_matrix(dtype: torch.dtype) -> None:
    gate_up, dact = 4 * randn(3, 2 * 1030, dtype=dtype), randn(3, 1030, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=1)
    assert relative(cuda.swiglu(gate, up), reference.swiglu(gate, up)) < ERROR[dtype]
    out = torch.empty_like(gate_up)
    cuda.swiglu_backward(dact, gate, up, *out.chunk(2, dim=1))
    assert relative(out, torch.cat(reference.swiglu_backward(dact, gate, up), 1)) < ERROR[dtype]


def test_swiglu_of_huge_gates_is_finite() -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=DEVICE)
    up = torch.ones_like(gate)
    assert torch.allclose(cuda.swiglu(gate, up), reference.swiglu(gate, up))
    for found, expected in zip(cuda.swiglu_backward(up, gate, up), reference.swiglu_backward(up, gate, up), strict=True):
        assert torch.allclose(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_rope_turns_a_view_in_place_and_nothing_beside_it(inverse: bool, dtype: torch.dtype) -> None:
    qkv, cos, sin = randn(4, 7, 10, dtype=dtype), randn(4, 5), randn(4, 5)
    found, expected = qkv.clone(), qkv.clone()
    cuda.rope_(found[:, :5], cos, sin, inverse)
    reference.rope_(expected[:, :5], cos, sin, inverse)
    assert relative(found, expected) < ERROR[dtype]
    assert torch.equal(found[:, 5:], qkv[:, 5:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_has_the_references_bits(dtype: torch.dtype) -> None:
    x = randn(3, 1100, dtype=dtype)
    for p, key in ((0.1, 1), (0.5, 0xFEDCBA98), (0.0, 16), (0.999, 2**40 + 7)):
        assert torch.equal(cuda.dropout(x, p, key), reference.dropout(x, p, key))
        assert torch.equal(cuda.dropout(x[:, 1:], p, key), reference.dropout(x[:, 1:], p, key))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [10, 4097])
def test_cross_entropy_and_its_gradient(width: int, dtype: torch.dtype) -> None:
    logits, row_weights = 5 * randn(4, width + 3, dtype=dtype)[:, :width], torch.tensor([0.1, 0.0, 0.3, 2.0], device=DEVICE)
    logits[2] += 60 if dtype == torch.bfloat16 else 1e4  # exponentials that overflow unless the largest is taken away
    targets = torch.tensor([0, width - 1, 7, 3], device=DEVICE)
    found, expected = logits.clone(), logits.clone()
    losses = cuda.cross_entropy_(found, targets, row_weights)
    assert torch.allclose(losses, reference.cross_entropy_(expected, targets, row_weights), rtol=1e-5, atol=1e-3)
    assert relative(found, expected) < max(ERROR[dtype], 1e-4)


def test_a_target_outside_the_vocabulary_gives_nan_not_a_stray_read() -> None:
    losses = cuda.cross_entropy_(randn(3, 10), torch.tensor([10, -1, 9], device=DEVICE), torch.ones(3, device=DEVICE))
    assert losses.isnan().tolist() == [True, True, False]
