"""Norms, SwiGLU and GeGLU, RoPE, dropout and the loss by C++ kernels: reference.py's functions, one call of the library each.

bf16 and f32 are computed in fp32 and rounded once, to nearest even; threads are torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgetune.runtime.backends.cpu.arguments import SUFFIX, address, address_of_output, address_of_rows, require
from edgetune.runtime.backends.cpu.library import kernel
from edgetune.runtime.ops_types import COMPUTE_DTYPES


def _matrix(x: Tensor, name: str) -> tuple[tuple[int, int], torch.dtype, str]:
    """Return the shape, the dtype and the kernels' suffix of a matrix in bf16 or f32."""
    fits = x.dim() == 2 and x.dtype in COMPUTE_DTYPES
    require(fits, "{} is {} {}; expected a matrix in bf16 or f32", name, tuple(x.shape), x.dtype)
    return (x.shape[0], x.shape[1]), x.dtype, SUFFIX[x.dtype]


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide h (N, D) by its root mean square and multiply by weight (D,), bf16 or f32; return (N, D)."""
    shape, dtype, suffix = _matrix(h, "h")
    require(weight.dtype in COMPUTE_DTYPES, "weight is {}; expected bf16 or f32", weight.dtype)
    out = torch.empty(shape, dtype=dtype)
    kernel(f"rms_norm_{suffix}_{SUFFIX[weight.dtype]}", "plpfllpli")(
        address_of_rows(h, "h", shape, dtype), h.stride(0), address(weight, "weight", shape[1:], weight.dtype), eps, *shape,
        out.data_ptr(), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out


def rms_norm_backward(dx: Tensor, h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the gradient (N, D) of rms_norm's input; the weight is frozen."""
    shape, dtype, suffix = _matrix(h, "h")
    require(weight.dtype in COMPUTE_DTYPES, "weight is {}; expected bf16 or f32", weight.dtype)
    out = torch.empty(shape, dtype=dtype)
    kernel(f"rms_norm_backward_{suffix}_{SUFFIX[weight.dtype]}", "plplpfllpli")(
        address_of_rows(dx, "dx", shape, dtype), dx.stride(0), address_of_rows(h, "h", shape, dtype), h.stride(0),
        address(weight, "weight", shape[1:], weight.dtype), eps, *shape,
        out.data_ptr(), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, all (N, F); gate and up may be halves of one (N, 2F)."""
    return _gated("swiglu", gate, up)


def swiglu_backward(dact: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Write the gradients of gate and up (N, F) into dgate and dup."""
    _gated_backward("swiglu_backward", dact, gate, up, dgate, dup)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu(gate) * up with tanh's approximation, all (N, F); gate and up may be halves of one (N, 2F)."""
    return _gated("geglu", gate, up)


def geglu_backward(dact: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Write the gradients of gate and up (N, F) into dgate and dup."""
    _gated_backward("geglu_backward", dact, gate, up, dgate, dup)


def _gated(name: str, gate: Tensor, up: Tensor) -> Tensor:
    shape, dtype, suffix = _matrix(gate, "gate")
    out = torch.empty(shape, dtype=dtype)
    kernel(f"{name}_{suffix}", "plplllpli")(
        address_of_rows(gate, "gate", shape, dtype), gate.stride(0),
        address_of_rows(up, "up", shape, dtype), up.stride(0), *shape,
        out.data_ptr(), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _gated_backward(name: str, dact: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    shape, dtype, suffix = _matrix(gate, "gate")
    kernel(f"{name}_{suffix}", "plplplllplpli")(
        address_of_rows(dact, "dact", shape, dtype), dact.stride(0),
        address_of_rows(gate, "gate", shape, dtype), gate.stride(0),
        address_of_rows(up, "up", shape, dtype), up.stride(0), *shape,
        address_of_output(dgate, "dgate", shape, dtype), dgate.stride(0),
        address_of_output(dup, "dup", shape, dtype), dup.stride(0), torch.get_num_threads(),
    )  # fmt: skip


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate x (N, heads, hd) in place by cos, sin f32 (N, hd/2), pairing i with i + hd/2; `inverse`: its gradient."""
    require(x.dim() == 3 and x.dtype in COMPUTE_DTYPES, "x is {} {}; expected (N, heads, hd)", tuple(x.shape), x.dtype)
    rows, heads, size = x.shape
    strides = (x.stride(0), x.stride(1))
    require(size % 2 == 0, "x has heads of {}; expected an even number", size)
    # Rows and heads may lie in any order in memory (q and k are slices of one packed qkv), but none may overlap another:
    # each thread writes its own.
    small, large = sorted(((strides[0], rows), (strides[1], heads)))
    apart = (small[1] <= 1 or small[0] >= size) and (large[1] <= 1 or large[0] >= small[0] * (small[1] - 1) + size)
    require(apart, "x has heads that overlap")
    kernel(f"rope_{SUFFIX[x.dtype]}", "pllppillli")(
        address_of_rows(x, "x", (rows, heads, size), x.dtype), *strides,
        address(cos, "cos", (rows, size // 2), torch.float32),
        address(sin, "sin", (rows, size // 2), torch.float32), inverse, rows, heads, size // 2,
        torch.get_num_threads(),
    )  # fmt: skip
    return x


def dropout(x: Tensor, p: float, key: int) -> Tensor:
    """Return x (N, D) / (1 - p) where hash(key, flat position) >= p * 2^32, else 0, with reference.py's bits."""
    shape, dtype, suffix = _matrix(x, "x")
    require(0.0 <= p < 1.0, "p is {}; expected at least 0 and less than 1", p)
    out = torch.empty(shape, dtype=dtype)
    kernel(f"dropout_{suffix}", "pluufllpi")(
        address_of_rows(x, "x", shape, dtype), x.stride(0), key & 0xFFFFFFFF, int(p * 2**32), 1.0 / (1.0 - p), *shape,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the losses (R,) f32, in nats, of logits (R, V) at targets (R,) int64; weights are (R,) f32.

    The logits become the gradient of sum(weights * losses). The sum over the vocabulary is fp32 and relative to each row's
    largest logit.
    """
    shape, dtype, suffix = _matrix(logits, "logits")
    rows, width = shape
    losses = torch.empty(rows, dtype=torch.float32)
    if rows == 0:
        return losses
    lowest, highest = (int(bound) for bound in targets.aminmax())
    require(lowest >= 0 and highest < width, "targets lie between {} and {}; expected 0 to {}", lowest, highest, width - 1)
    kernel(f"cross_entropy_{suffix}", "plppllpi")(
        address_of_output(logits, "logits", shape, dtype), logits.stride(0),
        address(targets, "targets", (rows,), torch.int64),
        address(weights, "weights", (rows,), torch.float32),
        rows, width, losses.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return losses
