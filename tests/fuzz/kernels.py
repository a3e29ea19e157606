"""Random calls of the C++ kernels: odd shapes, strides and alignments, NaN and infinity, compared with plain torch.

    PYTHONPATH=.:tests python -m fuzz.kernels FIRST COUNT SECONDS [FOLDER]

FOLDER holds another build of the kernels, for example one with AddressSanitizer. Call N is the same in every run.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime import int8, nf4, ops
from edgetune.runtime.backends import cpu
from edgetune.runtime.ops_types import FEW_ROWS, Adapted, AttentionGradients, AttentionInputs, Segment

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-38, 3e38, -3e38)
"""Values at which arithmetic goes wrong."""
TOLERANCE = {F32: 2e-5, BF16: 2e-2}
"""Largest error, as a fraction of the norm of what is expected."""
CANARY = 77.0


class Call:
    """One random call: its source of numbers, and the buffers around its tensors, which must stay as they are."""

    def __init__(self, number: int) -> None:
        self.chance = random.Random(f"kernels:{number}")
        self.torch = torch.Generator().manual_seed(number)
        self._guards: list[tuple[Tensor, Tensor]] = []

    def size(self, most: int) -> int:
        """Return a size from 1 to `most`: often tiny, often beside a multiple of 16."""
        near = 16 * self.chance.randint(1, max(1, most // 16)) + self.chance.choice((-1, 0, 1))
        return max(1, min(most, self.chance.choice((self.chance.randint(1, 9), self.chance.randint(1, most), near))))

    def dtype(self) -> torch.dtype:
        """Return one of the dtypes in which every back end computes."""
        return self.chance.choice((BF16, F32))

    def empty(self, *shape: int, dtype: torch.dtype, strided: bool = True) -> Tensor:
        """Return a tensor at any alignment, perhaps columns of a wider one, with guards around it."""
        *rows, width = shape
        wider = width + (self.chance.choice((0, 0, 1, 5)) if strided and len(shape) > 1 else 0)
        count = math.prod(rows) * wider
        front, back = self.chance.choice((0, 1, 3)), self.chance.choice((0, 0, 7))
        buffer = torch.full((front + count + back,), CANARY, dtype=dtype)
        outside = torch.ones(front + count + back, dtype=torch.bool)
        outside[front : front + count].view(*rows, wider)[..., :width] = False
        self._guards.append((buffer, outside))
        return buffer[front : front + count].view(*rows, wider)[..., :width]

    def numbers(self, *shape: int, dtype: torch.dtype, strided: bool = True, odd: float = 0.0) -> Tensor:
        """Return normal numbers; with probability `odd` a few of them are ODD values."""
        tensor = self.empty(*shape, dtype=dtype, strided=strided)
        tensor.copy_(torch.randn(shape, generator=self.torch) * self.chance.choice((0.01, 1.0, 4.0)))
        if self.chance.random() < odd:
            for _ in range(self.chance.randint(1, 3)):
                tensor[tuple(self.chance.randrange(n) for n in shape)] = self.chance.choice(ODD)
        return tensor

    def quantized(self, rows: int, columns: int, **settings: Any) -> nf4.QuantizedTensor:
        """Return a random 4-bit weight."""
        settings = {"block_size": self.chance.choice(nf4.BLOCK_SIZES), "double_quant": self.chance.random() < 0.5, **settings}
        return nf4.quantize(torch.randn(rows, columns, generator=self.torch) * 0.05, **settings)

    def check_guards(self) -> None:
        """Check that nothing outside the tensors was written."""
        for buffer, outside in self._guards:
            assert (buffer[outside] == CANARY).all(), "a kernel wrote outside its tensor"


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """Run ops with the C++ kernels and with plain torch."""
    with ops.use_backend("cpu"):
        found = run()
    with ops.use_backend("reference"):
        return found, run()


def near(
    found: Tensor, expected: Tensor, rows: Tensor | None = None, tolerance: float | None = None, least: float = 1e-3
) -> None:
    """Check shapes, dtypes and values; only of `rows`, a mask over the first dimension, where it is given.

    `tolerance` is a fraction of the norm of what is expected, or of `least` where that is larger.
    """
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), f"{found.shape} {found.dtype}"
    found, expected = (each.float() if rows is None else each[rows].float() for each in (found, expected))
    same = (found == expected) | (found.isnan() & expected.isnan())
    error = torch.where(same, 0.0, found - expected).norm()
    scale = torch.where(expected.isfinite(), expected, 0.0).norm().clamp_min(least)
    allowed = tolerance or TOLERANCE[F32]
    assert error <= allowed * scale, f"an error of {float(error / scale):.3g}, more than {allowed:.3g}"


def finite_rows(*tensors: Tensor) -> Tensor:
    """Return which rows hold only numbers of moderate size in all tensors."""
    return torch.stack([(t.float().abs() < 1e15).reshape(t.shape[0], -1).all(1) for t in tensors]).all(0)


def try_dequantize(call: Call) -> None:
    quantized = call.quantized(call.size(70), call.size(600), quant_type=call.chance.choice(nf4.QUANT_TYPES))
    dtype = call.chance.choice((BF16, F16, F32))
    found, expected = both(lambda: ops.dequantize(quantized, dtype))
    assert torch.equal(found, expected), "the bits differ"


def try_matvec(call: Call) -> None:
    inputs = call.size(600)
    x = call.numbers(call.chance.randint(1, FEW_ROWS), inputs, dtype=call.dtype(), odd=0.2)
    quantized = call.quantized(call.size(200), inputs)
    found, expected = both(lambda: ops.matvec(x, quantized))
    near(found, expected, finite_rows(x), 2e-2)


def try_int8(call: Call) -> None:
    rows, columns = call.size(200), call.size(600)
    weight = call.numbers(rows, columns, dtype=call.chance.choice((BF16, F16, F32)), strided=False)
    found, expected = both(lambda: ops.int8_rows(weight))
    for name in ("codes", "scales"):
        if hasattr(found, name):
            assert torch.equal(getattr(found, name), getattr(expected, name)), "the bits differ"
    x = call.numbers(call.chance.randint(1, FEW_ROWS), columns, dtype=call.dtype())
    with ops.use_backend("cpu"):
        product = ops.int8_matvec(x, int8.quantize(weight))
    if product is not None:
        near(product.float(), x.float() @ weight.float().T, tolerance=5e-2)


def try_rms_norm(call: Call) -> None:
    rows, width, dtype = call.size(40), call.size(700), call.dtype()
    h, dx = (call.numbers(rows, width, dtype=dtype, odd=0.3) for _ in range(2))
    weight = call.numbers(width, dtype=call.dtype())
    found, expected = both(lambda: ops.rms_norm(h, weight, 1e-5))
    near(found, expected, finite_rows(h), TOLERANCE[dtype])
    found, expected = both(lambda: ops.rms_norm_backward(dx, h, weight, 1e-5))
    rows_left = finite_rows(h, dx) & (h.float().norm(dim=1) > 1e-2)
    if width > 2:  # at width 1 and 2 large terms cancel, and only their rounding remains
        near(found, expected, rows_left, 2 * TOLERANCE[dtype])


def try_swiglu(call: Call) -> None:
    rows, width, dtype = call.size(40), call.size(500), call.dtype()
    gate_up = call.numbers(rows, 2 * width, dtype=dtype, odd=0.3)
    dact = call.numbers(rows, width, dtype=dtype, odd=0.1)
    found, expected = both(lambda: ops.swiglu(gate_up))
    near(found, expected, finite_rows(gate_up), TOLERANCE[dtype])
    found, expected = both(lambda: ops.swiglu_backward(dact, gate_up))
    near(found, expected, finite_rows(gate_up, dact), TOLERANCE[dtype])


def try_geglu(call: Call) -> None:
    rows, width, dtype = call.size(40), call.size(500), call.dtype()
    gate_up, dact = call.numbers(rows, 2 * width, dtype=dtype), call.numbers(rows, width, dtype=dtype)
    found, expected = both(lambda: ops.geglu(gate_up))
    near(found, expected, finite_rows(gate_up), TOLERANCE[dtype])
    found, expected = both(lambda: ops.geglu_backward(dact, gate_up))
    near(found, expected, finite_rows(gate_up, dact), TOLERANCE[dtype])


def try_rope(call: Call) -> None:
    rows, heads, size, dtype = call.size(60), call.size(6), 2 * call.size(70), call.dtype()
    x = call.numbers(rows, heads, size, dtype=dtype, strided=False)
    angle = torch.randn(rows, size // 2, generator=call.torch)
    inverse = call.chance.random() < 0.5
    start = x.clone()

    def run() -> Tensor:
        x.copy_(start)
        return ops.rope_(x, angle.cos(), angle.sin(), inverse).clone()

    found, expected = both(run)
    near(found, expected, tolerance=TOLERANCE[dtype])


def try_dropout(call: Call) -> None:
    x = call.numbers(call.size(60), call.size(500), dtype=call.dtype(), odd=0.2)
    p, key = call.chance.choice((0.0, 0.05, 0.5, 0.999)), call.chance.choice((0, 1, 2**31, 2**32 - 1))
    found, expected = both(lambda: ops.dropout(x, p, key))
    near(found, expected, finite_rows(x), TOLERANCE[x.dtype])


def try_cross_entropy(call: Call) -> None:
    rows, width = call.size(30), call.size(3000)
    logits = call.numbers(rows, width, dtype=call.dtype(), odd=0.3)
    targets = torch.randint(width, (rows,), generator=call.torch)
    weights = torch.rand(rows, generator=call.torch)
    left = finite_rows(logits)
    start = logits.clone()

    def run() -> tuple[Tensor, Tensor]:
        logits.copy_(start)
        losses = ops.cross_entropy_(logits, targets, weights)
        return losses, logits.clone()

    (losses, gradient), (expected_losses, expected) = both(run)
    near(losses, expected_losses, left, 1e-4)
    near(gradient, expected, left, TOLERANCE[logits.dtype])


def try_attention(call: Call) -> None:
    kv_heads, dtype = call.chance.choice((1, 2, 3)), call.dtype()
    heads, size = kv_heads * call.chance.choice((1, 2, 4)), call.chance.choice((2, 6, 16, 48, 64, 80, 96, 128))
    ends = sorted({call.size(150) for _ in range(call.chance.randint(1, 4))})
    segments = [Segment.packed(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    window = call.chance.choice((None, None, 1, 7, 64))
    q, k, v, do = (call.numbers(ends[-1], n, size, dtype=dtype, strided=False) for n in (heads, kv_heads, kv_heads, heads))
    left = torch.ones(ends[-1], dtype=torch.bool)
    if len(segments) > 1 and call.chance.random() < 0.3:  # one document of NaN must not reach another
        bad = call.chance.choice(segments)
        v[bad.k_start : bad.k_end] = call.chance.choice(ODD[:3])
        left[bad.q_start : bad.q_end] = False
    inputs = AttentionInputs(q, k, v, segments, window, size**-0.5)
    (o, lse), (expected_o, expected_lse) = both(lambda: ops.attention_forward(inputs))
    near(o, expected_o, left, TOLERANCE[dtype])
    near(lse.T, expected_lse.T, left, 1e-2, lse.numel() ** 0.5)  # a logarithm: its error counts as it is

    def run() -> list[Tensor]:
        gradients = [torch.full_like(each, CANARY) for each in (q, k, v)]
        ops.attention_backward(inputs, o, lse, do, AttentionGradients(*gradients))
        return gradients

    # Terms of about this size cancel in the gradients of q and k; in a window of one key nothing but rounding is left.
    lengths = [torch.where(each.isfinite(), each, 0).float().norm(dim=-1).max().item() for each in (q, k, v, do)]
    least = max(1e-3, max(lengths[:2]) * lengths[2] * lengths[3] * inputs.scale)
    for found, expected in zip(*both(run), strict=True):
        near(found, expected, left, 3 * TOLERANCE[dtype], least)


def try_project(call: Call) -> None:
    inputs, rows = 64 * call.size(6), call.size(200)
    x = call.numbers(rows, inputs, dtype=BF16)
    linears, dense = [], []
    for _ in range(call.chance.randint(1, 3)):
        out, rank = 32 * call.size(5), call.chance.choice((0, 1, 8, 16, 40))
        quantized = call.quantized(out, inputs, block_size=64)
        a, b = (torch.randn(*shape, generator=call.torch) * 0.05 for shape in ((rank, inputs), (out, rank)))
        linears.append(Adapted(quantized, a, b, 0.5) if rank else Adapted(quantized))
        weight = nf4.dequantize(quantized, BF16).float()
        dense.append(weight + 0.5 * b @ a if rank else weight)
    y = call.empty(rows, sum(weight.shape[0] for weight in dense), dtype=BF16)
    with ops.use_backend("cpu"):
        if ops.project(x, linears, y) is not None:
            near(y.float(), x.float() @ torch.cat(dense).T, tolerance=2e-2)


TRIES: tuple[Callable[[Call], None], ...] = (
    try_dequantize, try_matvec, try_int8, try_rms_norm, try_swiglu, try_geglu, try_rope, try_dropout, try_cross_entropy,
    try_attention, try_project,
)  # fmt: skip


def fault(number: int, isa: str) -> str | None:
    """Make call `number` with the kernels of an instruction set; return what is wrong with it, or None."""
    call = Call(number)
    attempt = TRIES[number % len(TRIES)]
    try:
        with cpu.force_isa(isa):
            attempt(call)
        call.check_guards()
    except Exception as error:
        return f"{attempt.__name__} on {isa}: {type(error).__name__}: {error}"
    return None


def use_build(folder: Path) -> None:
    """Load the kernels from another folder."""
    cpu.library._FOLDER = folder
    cpu.library.load.cache_clear()
    cpu.library.isas.cache_clear()
    cpu.library._functions.clear()
    assert Path(cpu.library.load()._name).parent == folder


def main(first: int, count: int, seconds: float, folder: str | None) -> None:
    """Make calls until `count` or `seconds` are used up; print each failure as a line of JSON."""
    if folder is not None:
        use_build(Path(folder))
    end, done = time.monotonic() + seconds, 0
    for number in range(first, first + count):
        if time.monotonic() > end:
            break
        print(number, file=sys.stderr, flush=True)
        for isa in cpu.isas():
            found = fault(number, isa)
            done += 1
            if found is not None:
                print(json.dumps({"call": number, "fault": found}), flush=True)
    print(json.dumps({"made": done}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None)
