"""The one dispatch point: every op of the engine is checked here and sent to the back end that the tensors' device has.

A back end is a module with the functions below: `reference` (plain torch, everywhere), `cpu` (C++), `cuda` (Triton) and
`metal` (Apple GPUs). Back ends are imported on first use. A missing back end falls back to `reference`, said once; a failing
kernel raises. Tests force one with `use_backend("reference")`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime import attention as tiled
from edgetune.runtime.attention import Segment
from edgetune.runtime.int8 import Int8Rows
from edgetune.runtime.int8 import quantize as quantize_rows
from edgetune.runtime.nf4 import QuantizedTensor

log = logging.getLogger("edgetune")
BACKENDS = {
    "reference": "edgetune.runtime.backends.reference",
    "cpu": "edgetune.runtime.backends.cpu",
    "cuda": "edgetune.runtime.backends.cuda",
    "metal": "edgetune.runtime.backends.metal",
}
_KERNELS = {"cpu": ("cpu", "C++"), "cuda": ("cuda", "Triton"), "mps": ("metal", "Metal")}
"""The back end with kernels for a kind of device, and what they are written in."""
COMPUTE_DTYPES = (torch.float32, torch.bfloat16)
FEW_ROWS = 8
"""Up to so many rows `matvec` and `decoder` are what a product should go to."""
_forced: list[str] = []


@functools.cache
def _load(name: str) -> ModuleType:
    module = importlib.import_module(BACKENDS[name])
    if hasattr(module, "load"):
        module.load()  # its kernels; an ImportError where they are not to be had
    return module


@functools.cache
def _best(device_type: str) -> ModuleType:
    """The fastest back end for a kind of device; says once why it is not the kernels."""
    if device_type in _KERNELS:
        name, kind = _KERNELS[device_type]
        try:
            return _load(name)
        except ImportError as error:
            log.warning("Plain torch serves instead of the %s kernels, several times slower: %s", kind, error)
    return _load("reference")


def kernels_missing(device_type: str = "cpu") -> str | None:
    """Why the kernels for a kind of device do not serve on this machine; None where they do, or where there are none."""
    try:
        _load(_KERNELS[device_type][0] if device_type in _KERNELS else "reference")
    except ImportError as error:
        return str(error)
    return None


def backend_for(device: torch.device) -> ModuleType:
    """The back end that runs ops on `device` now."""
    return _load(_forced[-1]) if _forced else _best(device.type)


def backend_name(device: torch.device) -> str:
    """The back end and, for the C++ kernels, the instruction set in use."""
    module = backend_for(device)
    isa = getattr(module, "selected_isa", None)
    return f"{module.NAME}/{isa()}" if isa is not None else str(module.NAME)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Send every op to the named back end, whatever the device. Raises ImportError where it cannot be loaded."""
    if name not in BACKENDS:
        raise ValueError(f"back end {name!r} is none of {', '.join(BACKENDS)}")
    _load(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def _check(condition: bool, message: str, *values: Any) -> None:
    """A wrong call is a bug of the caller's: ValueError, with what was found."""
    if not condition:
        raise ValueError(message.format(*values))


def _check_matrix(x: Tensor, name: str) -> None:
    _check(
        x.dim() == 2 and x.dtype in COMPUTE_DTYPES,
        "{} is {} {}; expected (N, D) f32 or bf16",
        name,
        tuple(x.shape),
        x.dtype,
    )
    _check(x.stride(1) == 1 or x.shape[1] == 1, "{} is not contiguous along its last dimension", name)


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The dense weight (out_features, in_features) in f32, bf16 or f16; written into `out` where given."""
    if out is not None:
        _check(
            tuple(out.shape) == quantized.shape and out.dtype == dtype and out.is_contiguous(),
            "out does not fit {}",
            quantized.shape,
        )
    return backend_for(quantized.device).dequantize(quantized, dtype, out)


def matvec(x: Tensor, quantized: QuantizedTensor) -> Tensor:
    """x (n, in_features) -> (n, out_features), for the few rows of decoding."""
    _check_matrix(x, "x")
    _check(x.shape[1] == quantized.shape[1], "x has {} features; the weight takes {}", x.shape[1], quantized.shape[1])
    return backend_for(x.device).matvec(x, quantized)


def int8_rows(weight: Tensor) -> Int8Rows:
    """A dense (V, D) in 8 bits: int8.quantize's bits."""
    _check(weight.dim() == 2 and weight.is_floating_point(), "weight is {} {}", tuple(weight.shape), weight.dtype)
    quantize = getattr(backend_for(weight.device), "int8_rows", quantize_rows)
    found: Int8Rows = quantize(weight)
    return found


def multiplies_int8(device: torch.device) -> bool:
    """Whether `int8_matvec` serves on this device, and its decoder takes a head in 8 bits."""
    return hasattr(backend_for(device), "int8_matvec")


def int8_matvec(x: Tensor, weight: Int8Rows) -> Tensor | None:
    """x (n, D) -> (n, V), for the few rows of decoding. None: no such kernel here."""
    _check_matrix(x, "x")
    _check(x.shape[1] == weight.shape[1], "x has {} features; the weight takes {}", x.shape[1], weight.shape[1])
    return backend_for(x.device).int8_matvec(x, weight) if multiplies_int8(x.device) else None


def product_into(out: Tensor, x: Tensor, w: Tensor) -> None:
    """out (N, O) = x (N, I) w (I, O), where `out` may be columns of a wider tensor.

    By a copy on MPS: on macOS 14, torch before 2.14 leaves a view that a product is to be written to as it was, and says
    nothing (pytorch#104832, #193385).
    """
    if out.device.type == "mps":
        out.copy_(torch.mm(x, w))
    else:
        torch.mm(x, w, out=out)


def add_product(out: Tensor, x: Tensor, w: Tensor, scale: float) -> None:
    """out (N, O) += scale * x (N, I) w (I, O); see product_into."""
    if out.device.type == "mps":
        out.add_(torch.mm(x, w), alpha=scale)
    else:
        out.addmm_(x, w, alpha=scale)


@dataclass(frozen=True)
class Adapted:
    """One of the linears that share an input: NF4 W (O, I), and its adapter A (r, I), B (O, r) in f32 where it has one.

    `key` (32 bits): dropout with probability `dropout` before A; None: none.
    """

    weight: QuantizedTensor
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    key: int | None = None


def fuses(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `project` serves on this device in this dtype, for shapes that its kernels take."""
    return bool(backend_for(device).fuses(dtype))


def project(x: Tensor, linears: Sequence[Adapted], y: Tensor | None, int8: bool = False) -> Tensor | None:
    """y (M, sum of O) = x W^T + scale * dropout(x) A^T B^T of each linear, side by side, without a dense copy of any W.

    Returns what project_backward wants; y None: only that. None: no such kernel here, nothing written. int8: x and W in 8
    bits, where a kernel can and x has no outliers that this would cost too much; the adapters' share stays as it is.
    """
    _check_matrix(x, "x")
    found: Tensor | None = backend_for(x.device).project(x, linears, y, int8)
    return found


def project_backward(
    dy: Tensor,
    x: Tensor,
    reduced: Tensor,
    linears: Sequence[Adapted],
    gradients: Sequence[tuple[Tensor, Tensor]],
    int8: bool = False,
) -> Tensor | None:
    """dx (M, I); adds to (dA, dB) f32 of each linear that has an adapter. `reduced` is what project returned.

    None: no such kernel here, nothing added. x is read for adapters alone. int8: dy and W in 8 bits, as in project.
    """
    _check_matrix(dy, "dy")
    dx: Tensor | None = backend_for(dy.device).project_backward(dy, x, reduced, linears, gradients, int8)
    return dx


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """h (N, D), weight (D,) -> (N, D)."""
    _check_matrix(h, "h")
    _check(weight.shape == h.shape[1:], "weight is {}; expected {}", tuple(weight.shape), tuple(h.shape[1:]))
    return backend_for(h.device).rms_norm(h, weight, eps)


def rms_norm_backward(dx: Tensor, h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient (N, D) of rms_norm's input."""
    _check(dx.shape == h.shape, "dx is {}; expected {}", tuple(dx.shape), tuple(h.shape))
    return backend_for(h.device).rms_norm_backward(dx, h, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up (N, 2F), gate in the left half -> silu(gate) * up (N, F)."""
    _check_matrix(gate_up, "gate_up")
    gate, up = gate_up.chunk(2, dim=1)
    return backend_for(gate_up.device).swiglu(gate, up)


def swiglu_backward(dact: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient (N, 2F) of swiglu's input."""
    _check(dact.shape[1] * 2 == gate_up.shape[1], "dact is {}; gate_up {}", tuple(dact.shape), tuple(gate_up.shape))
    gate, up = gate_up.chunk(2, dim=1)
    out = torch.empty_like(gate_up)
    dgate, dup = out.chunk(2, dim=1)
    backend_for(gate_up.device).swiglu_backward(dact, gate, up, dgate, dup)
    return out


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate x (N, heads, hd) in place by cos, sin (N, hd/2) f32."""
    _check(cos.shape == sin.shape == (x.shape[0], x.shape[2] // 2), "cos is {}; x {}", tuple(cos.shape), tuple(x.shape))
    return backend_for(x.device).rope_(x, cos, sin, inverse)


def dropout(x: Tensor, p: float, key: int) -> Tensor:
    """x (N, D) with each element kept with probability 1 - p by a hash of (key, position), and scaled by 1 / (1 - p)."""
    _check_matrix(x, "x")
    _check(0.0 <= p < 1.0, "p is {}; expected 0 up to, but not, 1", p)
    return backend_for(x.device).dropout(x, p, key)


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Losses (R,) f32 in nats; logits (R, V) become the gradient of sum(weights * losses)."""
    _check_matrix(logits, "logits")
    _check(
        targets.shape == weights.shape == logits.shape[:1],
        "targets is {}; logits {}",
        tuple(targets.shape),
        tuple(logits.shape),
    )
    return backend_for(logits.device).cross_entropy_(logits, targets, weights)


def _attention(device: torch.device) -> Any:
    """The back end's own attention, or the tiles of plain torch calls that run anywhere."""
    module = backend_for(device)
    return module if hasattr(module, "attention_forward") else tiled


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q (N, H, hd), k and v (M, KV, hd) -> o (N, H, hd), lse (H, N) f32; see attention.py."""
    _check(
        k.shape == v.shape and q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0,
        "q is {}; k {}",
        q.shape,
        k.shape,
    )
    module = _attention(q.device)
    run = module.forward if module is tiled else module.attention_forward
    return run(q, k, v, segments, window, scale)


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    segments: Sequence[Segment],
    window: int | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write dq (N, H, hd), dk and dv (M, KV, hd); see attention.py."""
    module = _attention(q.device)
    run = module.backward if module is tiled else module.attention_backward
    run(do, q, k, v, o, lse, segments, window, scale, dq, dk, dv)


def decoder(model: Any, cache: Any) -> Any:
    """The back end's own one-token step for this model and cache, `step(token) -> logits (V,)`; None where it has none."""
    make = getattr(backend_for(model.device), "decoder", None)
    return make(model, cache) if make is not None else None
