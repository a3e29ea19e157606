"""The one dispatch point: check the arguments of every op and send it to the back end of the tensors' device.

The back ends are `reference` (plain torch, runs everywhere), `cpu` (C++), `cuda` (Triton) and `metal` (Apple GPUs); each is a
module that satisfies ops_types.Backend. A back end is imported on first use. Where its kernels are missing, `reference`
serves instead, with one warning; a kernel that fails raises. Tests choose a back end with `use_backend("reference")`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from edgetune.runtime.int8 import Int8Rows
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops_types import (
    COMPUTE_DTYPES,
    Adapted,
    AttentionGradients,
    AttentionInputs,
    Backend,
    DecoderCache,
    DecoderModel,
    DecodeStep,
)

log = logging.getLogger("edgetune")

PIECE_FLOPS = 2e10
"""Floating-point operations after which an fp32 product on the CPU is interrupted, so that Ctrl-C never waits for all of it:
0.1 to 0.2 s on two Zen 4 cores. Chosen by hand. Products in bf16 are computed whole, since oneDNN compiles code for each shape.
"""


# Each import stands in a function of its own: a back end may compile kernels, or need a package that is not installed. The
# return types have mypy compare every back end with the protocol.


def _reference() -> Backend:
    from edgetune.runtime.backends import reference

    return reference


def _cpu() -> Backend:
    from edgetune.runtime.backends import cpu

    return cpu


def _cuda() -> Backend:
    from edgetune.runtime.backends import cuda

    return cuda


def _metal() -> Backend:
    from edgetune.runtime.backends import metal

    return metal


BACKENDS: dict[str, Callable[[], Backend]] = {"reference": _reference, "cpu": _cpu, "cuda": _cuda, "metal": _metal}
"""Every back end by name, and the function that imports it."""
_KERNELS = {"cpu": ("cpu", "C++"), "cuda": ("cuda", "Triton"), "mps": ("metal", "Metal")}
"""For each device type: the back end with kernels for it, and the language of these kernels."""
_forced: list[str] = []
"""Names of the back ends that `use_backend` has chosen, the innermost last."""


@functools.cache
def _load(name: str) -> Backend:
    """Import a back end and make its kernels ready. Raises ImportError where they cannot serve on this machine."""
    backend = BACKENDS[name]()
    backend.load()
    return backend


@functools.cache
def _best(device_type: str) -> Backend:
    """Return the fastest back end for a device type; warn once where that is plain torch for want of kernels."""
    if device_type in _KERNELS:
        name, language = _KERNELS[device_type]
        try:
            return _load(name)
        except ImportError as error:
            log.warning("Plain torch serves instead of the %s kernels, several times slower: %s", language, error)
    return _load("reference")


def kernels_missing(device_type: str = "cpu") -> str | None:
    """Return why the kernels for a device type cannot serve here, or None where they can or where no kernels exist."""
    try:
        _load(_KERNELS[device_type][0] if device_type in _KERNELS else "reference")
    except ImportError as error:
        return str(error)
    return None


def backend_for(device: torch.device) -> Backend:
    """Return the back end that runs ops on `device` now."""
    return _load(_forced[-1]) if _forced else _best(device.type)


def backend_name(device: torch.device) -> str:
    """Return the name of the back end and, for the C++ kernels, of the instruction set in use: "cpu/avx2"."""
    backend = backend_for(device)
    isa = backend.selected_isa()
    return backend.NAME if isa is None else f"{backend.NAME}/{isa}"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Send every op to the named back end, on any device, within this context. Raises ImportError if it cannot be loaded."""
    if name not in BACKENDS:
        raise ValueError(f"back end is {name!r}; expected one of {', '.join(BACKENDS)}")
    _load(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def _check(condition: bool, message: str, *values: object) -> None:
    """Raise ValueError with the message, formatted with `values`, unless the condition holds: a wrong call is a bug."""
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


# ---- weights ----


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return the dense weight (out_features, in_features) in f32, bf16 or f16, written into `out` where given."""
    if out is not None:
        _check(
            tuple(out.shape) == quantized.shape and out.dtype == dtype and out.is_contiguous(),
            "out is {} {}; expected contiguous {} {}",
            tuple(out.shape),
            out.dtype,
            quantized.shape,
            dtype,
        )
    return backend_for(quantized.device).dequantize(quantized, dtype, out)


def matvec(x: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Multiply x (n, in_features) by W^T; return (n, out_features). Fast for up to FEW_ROWS rows, as in decoding."""
    _check_matrix(x, "x")
    _check(x.shape[1] == quantized.shape[1], "x has {} features; the weight takes {}", x.shape[1], quantized.shape[1])
    return backend_for(x.device).matvec(x, quantized)


def int8_rows(weight: Tensor) -> Int8Rows:
    """Quantise a dense weight (V, D) to 8 bits; the bits are those of int8.quantize."""
    _check(weight.dim() == 2 and weight.is_floating_point(), "weight is {} {}", tuple(weight.shape), weight.dtype)
    return backend_for(weight.device).int8_rows(weight)


def multiplies_int8(device: torch.device) -> bool:
    """Return True if this device has a kernel for `int8_matvec` and its decoder takes a head in 8 bits."""
    return backend_for(device).multiplies_int8()


def int8_matvec(x: Tensor, weight: Int8Rows) -> Tensor | None:
    """Multiply x (n, D), a few rows, by an 8-bit W^T; return (n, V), or None where there is no such kernel."""
    _check_matrix(x, "x")
    _check(x.shape[1] == weight.shape[1], "x has {} features; the weight takes {}", x.shape[1], weight.shape[1])
    return backend_for(x.device).int8_matvec(x, weight)


# ---- products ----


def product_into(out: Tensor, x: Tensor, w: Tensor) -> None:
    """Write x (N, I) times w (I, O) into out (N, O), which may be columns of a wider tensor."""
    # On macOS 14, torch before 2.14 silently leaves a view unchanged when a product is written to it (pytorch#104832,
    # #193385), so MPS gets the product as a tensor of its own and copies it.
    if out.device.type == "mps":
        out.copy_(torch.mm(x, w))
    elif out.device.type == "cpu" and x.dtype == torch.float32:
        rows = max(int(PIECE_FLOPS / (2 * w.numel())), 1)
        for part, piece in zip(out.split(rows), x.split(rows), strict=True):
            torch.mm(piece, w, out=part)
    else:
        torch.mm(x, w, out=out)


def add_product(out: Tensor, x: Tensor, w: Tensor, scale: float) -> None:
    """Add scale * x (N, I) w (I, O) to out (N, O), which may be columns of a wider tensor; on MPS see product_into."""
    if out.device.type == "mps":
        out.add_(torch.mm(x, w), alpha=scale)
    else:
        out.addmm_(x, w, alpha=scale)


def fuses(device: torch.device, dtype: torch.dtype, int8: bool = False) -> bool:
    """Return True if `project` has a kernel on this device for this dtype; a shape may still be refused.

    int8: return True if that kernel is also faster in 8 bits.
    """
    return backend_for(device).fuses(dtype, int8)


def project(x: Tensor, linears: Sequence[Adapted], y: Tensor | None, int8: bool = False) -> Tensor | None:
    """Write x W^T + scale * dropout(x) A^T B^T of each linear into y (M, sum of O), side by side; no W is made dense.

    Return the tensor that project_backward needs, or None, with nothing written, where no kernel fits. y None: compute only
    that tensor. int8: multiply x and W in 8 bits if a kernel can and outliers in x do not make it too inaccurate; the
    adapter's part is never in 8 bits.
    """
    _check_matrix(x, "x")
    return backend_for(x.device).project(x, linears, y, int8)


def project_backward(
    dy: Tensor,
    x: Tensor,
    reduced: Tensor,
    linears: Sequence[Adapted],
    gradients: Sequence[tuple[Tensor, Tensor]],
    int8: bool = False,
) -> Tensor | None:
    """Return dx (M, I), and add to the pair (dA, dB) f32 in `gradients` of each linear that has an adapter.

    `reduced` is the tensor that project returned; x is read only for adapters. Return None, with nothing added, where no
    kernel fits. int8: multiply dy and W in 8 bits, under project's conditions.
    """
    _check_matrix(dy, "dy")
    return backend_for(dy.device).project_backward(dy, x, reduced, linears, gradients, int8)


# ---- norms, SwiGLU and GeGLU, RoPE, dropout, loss ----


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide h (N, D) by its root mean square and multiply by weight (D,); return (N, D)."""
    _check_matrix(h, "h")
    _check(weight.shape == h.shape[1:], "weight is {}; expected {}", tuple(weight.shape), tuple(h.shape[1:]))
    return backend_for(h.device).rms_norm(h, weight, eps)


def rms_norm_backward(dx: Tensor, h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the gradient (N, D) of rms_norm's input h, given the gradient dx (N, D) of its output."""
    _check(dx.shape == h.shape, "dx is {}; expected {}", tuple(dx.shape), tuple(h.shape))
    return backend_for(h.device).rms_norm_backward(dx, h, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up (N, F), where gate_up (N, 2F) has gate in its left half."""
    _check_matrix(gate_up, "gate_up")
    return backend_for(gate_up.device).swiglu(*gate_up.chunk(2, dim=1))


def swiglu_backward(dact: Tensor, gate_up: Tensor) -> Tensor:
    """Return the gradient (N, 2F) of swiglu's input, given the gradient dact (N, F) of its output."""
    return _gated_backward(backend_for(gate_up.device).swiglu_backward, dact, gate_up)


def geglu(gate_up: Tensor) -> Tensor:
    """Return gelu(gate) * up (N, F), gelu approximated with tanh, where gate_up (N, 2F) has gate in its left half."""
    _check_matrix(gate_up, "gate_up")
    return backend_for(gate_up.device).geglu(*gate_up.chunk(2, dim=1))


def geglu_backward(dact: Tensor, gate_up: Tensor) -> Tensor:
    """Return the gradient (N, 2F) of geglu's input, given the gradient dact (N, F) of its output."""
    return _gated_backward(backend_for(gate_up.device).geglu_backward, dact, gate_up)


def _gated_backward(backward: Callable[..., None], dact: Tensor, gate_up: Tensor) -> Tensor:
    """Return the gradient (N, 2F) of a gated product's input, which `backward` writes half by half."""
    _check(dact.shape[1] * 2 == gate_up.shape[1], "dact is {}; gate_up {}", tuple(dact.shape), tuple(gate_up.shape))
    out = torch.empty_like(gate_up)
    backward(dact, *gate_up.chunk(2, dim=1), *out.chunk(2, dim=1))
    return out


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate x (N, heads, hd) in place by cos and sin (N, hd/2) f32; x may be a part of wider heads.

    inverse: turn the gradient of the result into that of x.
    """
    _check(cos.shape == sin.shape == (x.shape[0], x.shape[2] // 2), "cos is {}; x {}", tuple(cos.shape), tuple(x.shape))
    return backend_for(x.device).rope_(x, cos, sin, inverse)


def dropout(x: Tensor, p: float, key: int) -> Tensor:
    """Keep each element of x (N, D) with probability 1 - p, by a hash of (key, position), and scale it by 1 / (1 - p)."""
    _check_matrix(x, "x")
    _check(0.0 <= p < 1.0, "p is {}; expected at least 0 and less than 1", p)
    return backend_for(x.device).dropout(x, p, key)


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return losses (R,) f32 in nats, and turn logits (R, V) into the gradient of sum(weights * losses)."""
    _check_matrix(logits, "logits")
    _check(
        targets.shape == weights.shape == logits.shape[:1],
        "targets is {}; logits {}",
        tuple(targets.shape),
        tuple(logits.shape),
    )
    return backend_for(logits.device).cross_entropy_(logits, targets, weights)


# ---- attention and decoding ----


def attention_forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Return attention's output o (N, H, hd) and the log-sum-exp of its scores, lse (H, N) f32; see attention.py."""
    q, k, v = inputs.q, inputs.k, inputs.v
    _check(
        k.shape == v.shape and q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0,
        "q is {}; k {}",
        q.shape,
        k.shape,
    )
    return backend_for(q.device).attention_forward(inputs)


def attention_backward(inputs: AttentionInputs, o: Tensor, lse: Tensor, do: Tensor, gradients: AttentionGradients) -> None:
    """Write the gradients of q, k and v; o and lse are the forward's, do (N, H, hd) is the gradient of o."""
    backend_for(inputs.q.device).attention_backward(inputs, o, lse, do, gradients)


def decoder(model: DecoderModel, cache: DecoderCache) -> DecodeStep | None:
    """Return the back end's own step for this model and cache, `step(token) -> logits (V,)`, or None where it has none."""
    return backend_for(model.device).decoder(model, cache)
