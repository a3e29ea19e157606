"""The C++ back end: the functions of reference.py, by kernels behind a C ABI. Importing it raises KernelsMissing (an
ImportError) where the library was not built.

Everything is checked here, in Python, before a pointer crosses: devices, dtypes, shapes, strides, index ranges. A wrong
call raises ValueError. bf16 and f32 are computed in fp32 and rounded once, to nearest even; threads are torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgetune.runtime.backends.cpu.attention import attention_backward, attention_forward
from edgetune.runtime.backends.cpu.decode import decoder, int8_matvec, int8_rows, matvec
from edgetune.runtime.backends.cpu.library import KernelsMissing, force_isa, isas, kernel, load, selected_isa
from edgetune.runtime.backends.cpu.project import fuses, project, project_backward
from edgetune.runtime.nf4 import QuantizedTensor, code_table

__all__ = [
    "KernelsMissing",
    "attention_backward",
    "attention_forward",
    "cross_entropy_",
    "decoder",
    "dequantize",
    "dropout",
    "force_isa",
    "fuses",
    "int8_matvec",
    "int8_rows",
    "isas",
    "matvec",
    "project",
    "project_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope_",
    "selected_isa",
    "swiglu",
    "swiglu_backward",
]

NAME = "cpu"
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float16: "f16"}
_COMPUTE = (torch.bfloat16, torch.float32)

load()
selected_isa()


def _require(condition: bool, message: str, *values: Any) -> None:
    if not condition:
        raise ValueError(message.format(*values))


def _check(x: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """A CPU tensor of this shape and dtype, its last dimension contiguous -> its address."""
    if tuple(x.shape) != shape or x.dtype != dtype or x.device.type != "cpu":
        raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}; expected {shape} {dtype} on cpu")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} is not contiguous along its last dimension")
    return x.data_ptr()


def _check_whole(x: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The same, contiguous altogether."""
    _require(x.is_contiguous(), "{} is not contiguous", name)
    return _check(x, name, shape, dtype)


def _check_output(x: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The same for a matrix that is written: its rows do not overlap."""
    _require(x.shape[0] <= 1 or x.stride(0) >= x.shape[1], "{} has rows that overlap", name)
    return _check(x, name, shape, dtype)


def _matrix(x: Tensor, name: str) -> tuple[tuple[int, int], torch.dtype, str]:
    """Shape, dtype and the kernels' suffix of a matrix in bf16 or f32."""
    fits = x.dim() == 2 and x.dtype in _COMPUTE
    _require(fits, "{} is {} {}; expected a matrix in bf16 or f32", name, tuple(x.shape), x.dtype)
    return (x.shape[0], x.shape[1]), x.dtype, _SUFFIX[x.dtype]


# ---- weights ----


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The dense weight (out_features, in_features) in bf16, f32 or f16: nf4.dequantize's bits; into `out` if given."""
    if out is None:
        out = torch.empty(quantized.shape, dtype=dtype)
    _require(out.is_contiguous(), "out is not contiguous")
    pointer = _check(out, "out", tuple(quantized.shape), dtype) if out.dim() else out.data_ptr()
    _require(dtype in _SUFFIX, "dtype {} is none of bfloat16, float32, float16", dtype)
    state, nested = quantized.state, quantized.state.nested
    numbers = quantized.numel
    packed = _check_whole(quantized.packed, "packed", ((numbers + 1) // 2, 1), torch.uint8)
    even = state.block_size >= 2 and state.block_size % 2 == 0
    _require(even, "block_size is {}; expected an even number", state.block_size)
    blocks = -(-numbers // state.block_size)
    plain, codes, table, scales, offset, shift = 0, 0, 0, 0, 0.0, 0
    if nested is None:
        plain = _check_whole(state.absmax, "absmax", (blocks,), torch.float32)
    else:
        shift = nested.block_size.bit_length() - 1
        _require(nested.block_size == 1 << shift, "nested block_size is {}; expected a power of two", nested.block_size)
        codes = _check_whole(state.absmax, "absmax", (blocks,), torch.uint8)
        table = _check_whole(nested.table, "nested table", (256,), torch.float32)
        scales = _check_whole(nested.absmax, "nested absmax", (-(-blocks // nested.block_size),), torch.float32)
        offset = nested.offset
    values = code_table(state.quant_type)
    kernel(f"dequantize_{_SUFFIX[dtype]}", "ppppppflllpi")(
        packed, values.data_ptr(), plain, codes, table, scales, offset, shift, state.block_size, numbers, pointer,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


# ---- rows and elements ----


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """h (N, D) over its root mean square, times weight (D,) bf16 or f32 -> (N, D)."""
    shape, dtype, suffix = _matrix(h, "h")
    _require(weight.dtype in _COMPUTE, "weight is {}; expected bf16 or f32", weight.dtype)
    out = torch.empty(shape, dtype=dtype)
    kernel(f"rms_norm_{suffix}_{_SUFFIX[weight.dtype]}", "plpfllpli")(
        _check(h, "h", shape, dtype), h.stride(0), _check_whole(weight, "weight", shape[1:], weight.dtype), eps, *shape,
        out.data_ptr(), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out


def rms_norm_backward(dx: Tensor, h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient (N, D) of rms_norm's input, the weight frozen."""
    shape, dtype, suffix = _matrix(h, "h")
    _require(weight.dtype in _COMPUTE, "weight is {}; expected bf16 or f32", weight.dtype)
    out = torch.empty(shape, dtype=dtype)
    kernel(f"rms_norm_backward_{suffix}_{_SUFFIX[weight.dtype]}", "plplpfllpli")(
        _check(dx, "dx", shape, dtype), dx.stride(0), _check(h, "h", shape, dtype), h.stride(0),
        _check_whole(weight, "weight", shape[1:], weight.dtype), eps, *shape,
        out.data_ptr(), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (N, F) each, perhaps halves of one (N, 2F)."""
    shape, dtype, suffix = _matrix(gate, "gate")
    out = torch.empty(shape, dtype=dtype)
    kernel(f"swiglu_{suffix}", "plplllpli")(
        _check(gate, "gate", shape, dtype), gate.stride(0), _check(up, "up", shape, dtype), up.stride(0), *shape,
        out.data_ptr(), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out


def swiglu_backward(dact: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Gradients of gate and up, (N, F) each, into dgate and dup."""
    shape, dtype, suffix = _matrix(gate, "gate")
    kernel(f"swiglu_backward_{suffix}", "plplplllplpli")(
        _check(dact, "dact", shape, dtype), dact.stride(0), _check(gate, "gate", shape, dtype), gate.stride(0),
        _check(up, "up", shape, dtype), up.stride(0), *shape,
        _check_output(dgate, "dgate", shape, dtype), dgate.stride(0),
        _check_output(dup, "dup", shape, dtype), dup.stride(0), torch.get_num_threads(),
    )  # fmt: skip


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate x (N, heads, hd) in place by cos, sin f32 (N, hd/2), pairing i with i + hd/2; `inverse` rotates back."""
    _require(x.dim() == 3 and x.dtype in _COMPUTE, "x is {} {}; expected (N, heads, hd)", tuple(x.shape), x.dtype)
    rows, heads, size = x.shape
    strides = (x.stride(0), x.stride(1))
    _require(size % 2 == 0, "x has heads of {}; expected an even number", size)
    # rows and heads may lie in any order, as long as no two of them overlap
    small, large = sorted(((strides[0], rows), (strides[1], heads)))
    apart = (small[1] <= 1 or small[0] >= size) and (large[1] <= 1 or large[0] >= small[0] * (small[1] - 1) + size)
    _require(apart, "x has heads that overlap")
    kernel(f"rope_{_SUFFIX[x.dtype]}", "pllppillli")(
        _check(x, "x", (rows, heads, size), x.dtype), *strides,
        _check_whole(cos, "cos", (rows, size // 2), torch.float32),
        _check_whole(sin, "sin", (rows, size // 2), torch.float32), inverse, rows, heads, size // 2,
        torch.get_num_threads(),
    )  # fmt: skip
    return x


def dropout(x: Tensor, p: float, key: int) -> Tensor:
    """x (N, D) / (1 - p) where hash(key, flat position) >= p * 2^32, else 0: reference.py's bits."""
    shape, dtype, suffix = _matrix(x, "x")
    _require(0.0 <= p < 1.0, "p is {}; expected 0 up to, but not, 1", p)
    out = torch.empty(shape, dtype=dtype)
    kernel(f"dropout_{suffix}", "pluufllpi")(
        _check(x, "x", shape, dtype), x.stride(0), key & 0xFFFFFFFF, int(p * 2**32), 1.0 / (1.0 - p), *shape,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Losses (R,) f32 in nats of logits (R, V) at targets (R,) i64; logits become d(sum of weights * losses)/d(logits).

    The sum over the vocabulary is fp32 and starts from each row's largest logit. weights: (R,) f32.
    """
    shape, dtype, suffix = _matrix(logits, "logits")
    rows, width = shape
    losses = torch.empty(rows, dtype=torch.float32)
    if rows == 0:
        return losses
    least, most = (int(bound) for bound in targets.aminmax())
    _require(least >= 0 and most < width, "targets lie between {} and {}; expected 0 to {}", least, most, width - 1)
    kernel(f"cross_entropy_{suffix}", "plppllpi")(
        _check_output(logits, "logits", shape, dtype), logits.stride(0),
        _check_whole(targets, "targets", (rows,), torch.int64),
        _check_whole(weights, "weights", (rows,), torch.float32),
        rows, width, losses.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return losses
