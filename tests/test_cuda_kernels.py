"""The Triton kernels agree with reference.py, on a GPU if there is one, else in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

import contextlib
import logging
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
from edgetune.runtime.batch import Batch
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LINEARS, LoraConfig, QuantConfig
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.linear import LoraLinear
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import KVCache, Llama
from edgetune.runtime.nf4 import QuantizedTensor, QuantState
from edgetune.runtime.ops_types import AttentionGradients, AttentionInputs, Segment
from edgetune.runtime.runner import Recompute, Runner

pytest.importorskip("triton", reason="triton is not installed")
from edgetune.runtime.backends import cuda
from edgetune.runtime.backends.cuda import attention as flash
from edgetune.runtime.backends.cuda import decode, kernels, weights

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
    for shape, block_size in (
        ((7, 33), 64),
        ((5, 1), 32),
        ((19, 100), 64),
        ((2, 4097), 256),
        ((3, 5, 7), 64),
        ((9, 512), 4096),
    ):
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
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gated_activations_on_halves_of_one_matrix(name: str, dtype: torch.dtype) -> None:
    gate_up, dact = 4 * randn(3, 2 * 1030, dtype=dtype), randn(3, 1030, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=1)
    assert relative(getattr(cuda, name)(gate, up), getattr(reference, name)(gate, up)) < ERROR[dtype]
    out = torch.empty_like(gate_up)
    getattr(cuda, f"{name}_backward")(dact, gate, up, *out.chunk(2, dim=1))
    wanted = torch.empty_like(out)
    getattr(reference, f"{name}_backward")(dact, gate, up, *wanted.chunk(2, dim=1))
    assert relative(out, wanted) < ERROR[dtype]


def test_swiglu_of_huge_gates_is_finite() -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=DEVICE)
    up = torch.ones_like(gate)
    assert torch.allclose(cuda.swiglu(gate, up), reference.swiglu(gate, up))
    gradients = torch.empty_like(gate), torch.empty_like(up)
    cuda.swiglu_backward(up, gate, up, *gradients)
    wanted = torch.empty_like(gate), torch.empty_like(up)
    reference.swiglu_backward(up, gate, up, *wanted)
    for found, expected in zip(gradients, wanted, strict=True):
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
    # The exponentials overflow unless the largest logit is subtracted first.
    logits[2] += 60 if dtype == torch.bfloat16 else 1e4
    targets = torch.tensor([0, width - 1, 7, 3], device=DEVICE)
    found, expected = logits.clone(), logits.clone()
    losses = cuda.cross_entropy_(found, targets, row_weights)
    assert torch.allclose(losses, reference.cross_entropy_(expected, targets, row_weights), rtol=1e-5, atol=1e-3)
    assert relative(found, expected) < max(ERROR[dtype], 1e-4)


def test_a_target_outside_the_vocabulary_gives_nan_not_a_stray_read() -> None:
    losses = cuda.cross_entropy_(randn(3, 10), torch.tensor([10, -1, 9], device=DEVICE), torch.ones(3, device=DEVICE))
    assert losses.isnan().tolist() == [True, True, False]


# ---- attention ----

Segments = Sequence[Segment]
PACKED: Segments = [Segment.packed(0, 5), Segment.packed(5, 6), Segment.packed(6, 17)]
CONTINUED: Segments = [Segment(0, 3, 0, 9)]


def test_segments_as_the_operator_takes_them() -> None:
    found = flash.lengths(tuple(PACKED), 17, 17, DEVICE)
    assert found is not None
    assert (found.queries.tolist(), found.keys.tolist()) == ([0, 5, 6, 17], [0, 5, 6, 17])
    assert (found.most_queries, found.most_keys) == (11, 11)
    assert found.queries.dtype == found.keys.dtype == torch.int32
    assert found.queries.is_contiguous()
    assert found.keys.is_contiguous()
    continued = flash.lengths(tuple(CONTINUED), 3, 9, DEVICE)
    assert continued is not None
    assert (continued.queries.tolist(), continued.keys.tolist(), continued.most_keys) == ([0, 3], [0, 9], 9)


@pytest.mark.parametrize(
    ("segments", "rows", "keys"),
    [
        ([(0, 5, 0, 5)], 6, 6),  # a row that belongs to no document
        ([(0, 5, 0, 5), (6, 9, 6, 9)], 9, 9),  # a gap between documents
        ([(5, 9, 5, 9), (0, 5, 0, 5)], 9, 9),  # documents out of order
        ([(0, 5, 2, 7)], 5, 7),  # keys before the first document
        ([], 0, 0),
    ],
)
def test_segments_that_lengths_cannot_say_are_left_to_the_tiles(segments: Segments, rows: int, keys: int) -> None:
    assert flash.lengths(tuple(segments), rows, keys, DEVICE) is None


def test_what_the_operator_does_not_take_is_left_to_the_tiles() -> None:
    if DEVICE.type == "cpu":
        assert not flash.fits(randn(4, 2, 64, dtype=torch.bfloat16))
    assert not flash.fits(randn(4, 2, 64))
    assert not flash.fits(randn(4, 2, 20, dtype=torch.bfloat16))
    assert not flash.fits(randn(4, 2, 200, dtype=torch.bfloat16))


class _Operator:
    """Imitates aten's flash attention and its documented arguments with tiled.py; documents are given by cumulative lengths."""

    def __init__(self) -> None:
        self.modes: list[tuple[bool, bool]] = []
        """For each backward call: whether it was deterministic, and whether torch filled newly allocated memory."""

    def of(self, name: str) -> Any:
        return self.forward if name == "forward" else self.backward

    @staticmethod
    def _segments(queries: Tensor, keys: Tensor) -> Segments:
        q, k = queries.tolist(), keys.tolist()
        return [Segment(*bounds) for bounds in zip(q[:-1], q[1:], k[:-1], k[1:], strict=True)]

    @staticmethod
    def _window(left: int, right: int) -> int | None:
        assert (left, right) == (-1, -1) or (left >= 0 and right == 0)
        return None if left < 0 else left + 1

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int, dropout_p: float,
        is_causal: bool, return_debug_mask: bool, *, scale: float, window_size_left: int, window_size_right: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        segments = self._segments(cum_q, cum_k)
        assert (max_q, max_k) == (max(s[1] - s[0] for s in segments), max(s[3] - s[2] for s in segments))
        assert is_causal
        assert (dropout_p, return_debug_mask) == (0.0, False)
        window = self._window(window_size_left, window_size_right)
        found = tiled.forward(AttentionInputs(q, k, v, segments, window, scale))
        return *found, torch.zeros(2), torch.zeros(()), torch.zeros(0)

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int,
        max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *, scale: float,
        window_size_left: int, window_size_right: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        fills = torch.utils.deterministic.fill_uninitialized_memory
        self.modes.append((torch.are_deterministic_algorithms_enabled(), fills))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        window = self._window(window_size_left, window_size_right)
        inputs = AttentionInputs(q, k, v, self._segments(cum_q, cum_k), window, scale)
        tiled.backward(inputs, o, lse, do, AttentionGradients(dq, dk, dv))
        return dq, dk, dv


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("segments", [PACKED, CONTINUED])
def test_attention_through_a_stand_in_for_the_operator(
    segments: Segments, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the arguments passed to the operator and the use of its results; the operator itself needs a GPU."""
    operator = _Operator()
    monkeypatch.delattr(torch, "use_deterministic_algorithms")  # using it would import inductor
    monkeypatch.setattr(flash, "fits", lambda q: True)
    monkeypatch.setattr(flash, "_flash", operator.of)
    rows, keys = segments[-1][1], segments[-1][3]
    q, do, kv = randn(rows, 4, 16), randn(rows, 4, 16), randn(keys, 4, 16)
    k, v = kv[:, :2], kv[:, 2:]
    inputs = AttentionInputs(q, k, v, segments, window, 0.25)
    expected = tiled.forward(inputs)
    o, lse = cuda.attention_forward(inputs)
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])
    found, wanted = ([torch.empty_like(x) for x in (q, k, v)] for _ in range(2))
    cuda.attention_backward(inputs, o, lse, do, AttentionGradients(*found))
    tiled.backward(inputs, o, lse, do, AttentionGradients(*wanted))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert operator.modes == [(True, False)]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_torchs_operators_take_what_is_passed() -> None:
    """Calls the operators on meta tensors, which every build of torch supports."""
    q, k = (
        torch.empty(17, 4, 16, device="meta", dtype=torch.bfloat16),
        torch.empty(17, 2, 16, device="meta", dtype=torch.bfloat16),
    )
    starts = torch.tensor([0, 5, 6, 17], dtype=torch.int32, device="meta")
    window = flash._window(4)
    o, lse, *_ = flash._flash("forward")(q, k, k, starts, starts, 11, 11, 0.0, True, False, scale=0.25, **window)
    assert (o.shape, lse.shape, lse.dtype) == (q.shape, (4, 17), torch.float32)
    state = torch.empty(2, dtype=torch.uint64, device="meta"), torch.empty(0, device="meta")
    dq, dk, _ = flash._flash("backward")(o, q, k, k, o, lse, starts, starts, 11, 11, 0.0, True, *state, scale=0.25, **window)
    assert (dq.shape, dk.shape) == (q.shape, k.shape)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a card")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("segments", [PACKED, CONTINUED])
def test_flash_attention_on_a_card(segments: Segments, window: int | None) -> None:
    rows, keys = segments[-1][1], segments[-1][3]
    q, do = randn(rows, 4, 64, dtype=torch.bfloat16), randn(rows, 4, 64, dtype=torch.bfloat16)
    k, v = randn(keys, 2, 64, dtype=torch.bfloat16), randn(keys, 2, 64, dtype=torch.bfloat16)
    if not flash.fits(q):
        pytest.skip("this card or this build of torch has no flash attention")
    inputs = AttentionInputs(q, k, v, segments, window, 0.125)
    exact = AttentionInputs(q.float(), k.float(), v.float(), segments, window, 0.125)
    o, lse = cuda.attention_forward(inputs)
    exact_o, exact_lse = tiled.forward(exact)
    assert relative(o, exact_o) < 1e-2
    found, wanted = [torch.empty_like(x) for x in (q, k, v)], [torch.empty_like(x).float() for x in (q, k, v)]
    cuda.attention_backward(inputs, o, lse, do, AttentionGradients(*found))
    tiled.backward(exact, exact_o, exact_lse, do.float(), AttentionGradients(*wanted))
    assert max(relative(a, b) for a, b in zip(found, wanted, strict=True)) < 2e-2


# ---- whole models ----


def tiny_model(folder: Path, family: str, dtype: torch.dtype, rank: int = 5, **changes: Any) -> Llama:
    """Return a tiny NF4 model on the device, with an adapter of random A and B on every linear."""
    if not (folder / "config.json").exists():
        save_model(folder, family, **{"hidden_size": 64, "intermediate_size": 128, **changes})
    model = load_llama(open_model(folder), dtype, DEVICE, QuantConfig())
    adapters.attach_new(model, LoraConfig(rank, 8, 0.1, LINEARS), 0)
    generator = torch.Generator().manual_seed(1)
    for linear in (linear for block in model.blocks for linear in block.linears().values()):
        assert isinstance(linear, LoraLinear)
        b = 0.1 * torch.randn(linear.lora_B.shape, generator=generator)
        linear.lora_B.data.copy_(b)
    return model


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch fewer and larger programs, since the interpreter's time depends on their number."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(weights, "ROWS", 64)
        monkeypatch.setattr(decode, "A_ROWS", 64)


def row_of(count: int) -> Batch:
    ids = torch.randint(0, 128, (count + 1,), generator=torch.Generator().manual_seed(3))
    third = count // 3
    positions = torch.cat([torch.arange(third), torch.arange(count - third)])
    weight = torch.full((count,), 1 / count)
    weight[5] = 0
    return Batch(ids[:-1], ids[1:], weight, positions, (Segment.packed(0, third), Segment.packed(third, count)))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("qwen2", torch.float32),
        pytest.param("qwen3", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("granite-3", torch.float32, marks=pytest.mark.slow),
        pytest.param("phi4-mini", torch.float32, marks=pytest.mark.slow),
        ("gemma3", torch.float32),
    ],
)
def test_a_training_step_gives_the_references_loss_and_gradients(
    tmp_path: Path, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetune.runtime.runner.ROW_MULTIPLE", 16)
    losses, gradients = {}, {}
    for name in ("reference", "cuda"):
        model = tiny_model(tmp_path / "model", family, dtype, num_hidden_layers=1)
        with ops.use_backend(name):
            losses[name] = Runner(model, Recompute.FULL, loss_rows=8).train(row_of(16), dropout_key=7)
        gradients[name] = torch.cat([p.grad.flatten() for p in adapters.parameters(model) if p.grad is not None])
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert float(losses["cuda"]) == pytest.approx(float(losses["reference"]), rel=bound)
    assert relative(gradients["cuda"], gradients["reference"]) < bound


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("family", ["llama-2-grouped", "qwen2", "qwen3", "mistral-window", "llama-head-dim"])
def test_the_decoders_step_is_the_runners(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers bias, per-head norms, windows, grouped heads and adapters, with each head's keys split into several parts."""
    monkeypatch.setattr(decode, "SPLIT_KEYS", 16)
    model = tiny_model(tmp_path / "model", family, torch.float32, num_hidden_layers=1)
    caches = [KVCache(model.config, 40, model.dtype, model.device) for _ in range(2)]
    ids = torch.randint(0, 128, (23,)).tolist()
    with torch.no_grad(), ops.use_backend("reference"):
        runner = Runner(model)
        for cache in caches:
            prompt = torch.tensor(ids[:20], device=DEVICE)
            runner.infer(prompt, torch.arange(20, device=DEVICE), [Segment(0, 20, 0, 20)], cache)
    with ops.use_backend("cuda"):
        step = ops.decoder(model, caches[0])
    assert isinstance(step, decode.Decoder)
    assert step.splits == 3
    for at, token in enumerate(ids[20:], start=20):
        with torch.no_grad(), ops.use_backend("reference"):
            position = torch.tensor([at], device=DEVICE)
            h = runner.infer(torch.tensor([token], device=DEVICE), position, [Segment(0, 1, 0, at + 1)], caches[1])
            expected = model.logits(h)[0]
        with ops.use_backend("cuda"):
            assert relative(step(token), expected) < 1e-5
    assert caches[0].length == caches[1].length == 23
    assert relative(caches[0].k[0], caches[1].k[0]) < 1e-5
    assert relative(caches[0].v[0], caches[1].v[0]) < 1e-5


@pytest.mark.usefixtures("wide")
def test_greedy_text_is_the_references(tmp_path: Path) -> None:
    texts = {}
    for name in ("reference", "cuda"):
        with ops.use_backend(name):
            model = tiny_model(tmp_path / "model", "llama-2-grouped", torch.float32, num_hidden_layers=1)
            generator = Generator(Runner(model), 80)
            texts[name] = list(generator.generate(list(range(3, 15)), 8, Sampling(temperature=0.0)))
    assert texts["cuda"] == texts["reference"]
    assert len(texts["cuda"]) == 8


@pytest.mark.parametrize("family", ["smollm3", "granite-3", "ministral3", "phi4-mini", "gemma3"])
def test_layers_unlike_llamas_are_decoded_by_the_plain_path(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path / "model", family, torch.float32)
    with ops.use_backend("cuda"):
        assert ops.decoder(model, KVCache(model.config, 8, model.dtype, model.device)) is None


def test_a_model_that_the_decoder_cannot_run_has_none(tmp_path: Path) -> None:
    # With 96 inputs, rows hold a block and a half.
    model = tiny_model(tmp_path / "model", "llama-1", torch.float32, num_hidden_layers=1, intermediate_size=96)
    with ops.use_backend("cuda"):
        assert ops.decoder(model, KVCache(model.config, 8, model.dtype, model.device)) is None


def test_a_full_cache_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama-1", torch.float32, num_hidden_layers=1)
    cache = KVCache(model.config, 8, model.dtype, model.device)
    cache.length = 8
    with ops.use_backend("cuda"), pytest.raises(ValueError, match="holds 8 tokens"):
        ops.decoder(model, cache)(1)


class _Cards:
    """Imitates torch.cuda's graphs: replaying one runs again what ran while it was recorded."""

    def __init__(self, step: decode.Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self.runs, self.replays, self.order = step, 0, 0, list[str]()
        self._run, self._out = step.run, torch.empty(0)
        monkeypatch.setattr(step, "run", self._count)
        for name, stand_in in {
            "Stream": lambda: self, "current_stream": lambda: self, "stream": self._side, "CUDAGraph": lambda: self,
            "graph": self._recording,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def _count(self) -> Tensor:
        self.runs += 1
        self.order.append("run")
        self._out = self._run()
        return self._out

    def wait_stream(self, other: Any) -> None:
        self.order.append("wait")

    @contextlib.contextmanager
    def _side(self, stream: Any) -> Iterator[None]:
        self.order.append("side")
        yield
        self.order.append("back")

    @contextlib.contextmanager
    def _recording(self, graph: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.order.append("record")
        yield
        self.order.append("recorded")

    def replay(self) -> None:
        self.replays += 1
        self._out.copy_(self._run())


@pytest.mark.usefixtures("wide")
def test_a_step_is_recorded_once_and_replayed_for_every_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the order of calls around a CUDA graph with a stand-in for torch.cuda; real graphs need a GPU."""
    if DEVICE.type == "cuda":
        pytest.skip("a card has real graphs, which test_the_decoders_step_is_the_runners replays")
    model = tiny_model(tmp_path / "model", "llama-1", torch.float32, num_hidden_layers=1)
    with ops.use_backend("cuda"):
        plain, recorded = (decode.Decoder(model, KVCache(model.config, 8, model.dtype, model.device)) for _ in range(2))
        card = _Cards(recorded, monkeypatch)
        monkeypatch.setattr(recorded, "_records", True)
        found = [recorded(token) for token in (5, 9, 77)]
        for logits, token in zip(found, (5, 9, 77), strict=True):
            assert torch.equal(logits, plain(token))
    assert (card.runs, card.replays) == (2, 3)
    assert card.order == ["wait", "side", "run", "back", "wait", "record", "run", "recorded"]
    assert recorded.cache.length == 3


# ---- choosing and compiling ----


def test_without_triton_plain_torch_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> Any:
        if name == "cuda":
            raise ImportError("No module named 'triton'")
        return reference

    monkeypatch.setattr(ops, "_load", missing)
    with caplog.at_level(logging.WARNING, "edgetune"):
        assert ops._best.__wrapped__("cuda") is reference
    assert "No module named 'triton'" in caplog.text


def test_a_card_has_the_triton_kernels() -> None:
    assert ops._best("cuda") is cuda


def test_a_machine_on_which_triton_makes_no_kernel_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(shape))
    monkeypatch.setattr(cuda, "rms_norm", fails)
    with pytest.raises(ImportError, match=r"cannot compile kernels for this card \(Failed to find C compiler\.\)"):
        cuda.load()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["75", "80", "90", "120"])
def test_every_kernel_compiles_for_real_cards(capability: str, tmp_path: Path) -> None:
    """Compiles for Hopper (and Turing, Ampere, Blackwell) without a GPU: the compiler may refuse what the interpreter runs."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, str(script), capability], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 21
    assert all(int(size) > 0 for *_, size in lines)
    loads = [int(loads) for name, _, loads, _ in lines if name == "matvec"]
    assert 0 < max(loads) < 100  # it would be 64 more if each weight took a load of its own
