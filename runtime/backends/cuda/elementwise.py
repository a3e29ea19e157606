"""Norms, SwiGLU and GeGLU, RoPE, dropout and the loss on a card: reference.py's functions, one launch each.

ops.py has checked the arguments; this module checks only what these kernels need in addition.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from edgetune.runtime.backends import reference
from edgetune.runtime.backends.cuda import kernels

COLUMNS = 1024
"""Numbers of a row that a program of an elementwise kernel takes; chosen by hand."""
VOCABULARY_COLUMNS = 4096
"""Logits that a program of cross_entropy_ takes at a time; chosen by hand."""


def _rows(x: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Return x with contiguous rows, copied if need be. Raises ValueError unless it has this shape."""
    if x.shape != shape:
        raise ValueError(f"{name} is {tuple(x.shape)}; expected {tuple(shape)}")
    return x if x.stride(-1) == 1 or shape[-1] == 1 else x.contiguous()


def _warps(tile: int) -> int:
    """Return the number of warps for a row of `tile` numbers: at least 8 numbers a thread, at most 16 warps."""
    return min(max(tile // 256, 1), 16)


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide h (N, D) by its root mean square and multiply by weight (D,); return (N, D)."""
    h, weight, out = _rows(h, h.shape, "h"), weight.contiguous(), torch.empty(h.shape, dtype=h.dtype, device=h.device)
    tile = triton.next_power_of_2(h.shape[1])
    if len(h):
        kernels.rms_norm[(len(h),)](h, weight, out, h.shape[1], eps, h.stride(0), TILE=tile, num_warps=_warps(tile))
    return out


def rms_norm_backward(dx: Tensor, h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the gradient (N, D) of rms_norm's input; the weight is frozen."""
    h, dx, weight = _rows(h, h.shape, "h"), _rows(dx, h.shape, "dx"), weight.contiguous()
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    tile = triton.next_power_of_2(h.shape[1])
    if len(h):
        kernels.rms_norm_backward[(len(h),)](
            dx, h, weight, out, h.shape[1], eps, dx.stride(0), h.stride(0), TILE=tile, num_warps=_warps(tile)
        )
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, all (N, F); gate and up may be halves of one (N, 2F)."""
    return _gated(gate, up, gelu=False)


def swiglu_backward(dact: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Write the gradients of gate and up (N, F) into dgate and dup, whose rows are contiguous."""
    _gated_backward(dact, gate, up, dgate, dup, gelu=False)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu(gate) * up with tanh's approximation, all (N, F); gate and up may be halves of one (N, 2F)."""
    return _gated(gate, up, gelu=True)


def geglu_backward(dact: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Write the gradients of gate and up (N, F) into dgate and dup, whose rows are contiguous."""
    _gated_backward(dact, gate, up, dgate, dup, gelu=True)


def _gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = _rows(gate, gate.shape, "gate"), _rows(up, gate.shape, "up")
    if gate.numel():
        kernels.gated[(len(gate), triton.cdiv(gate.shape[1], COLUMNS))](
            gate, up, out, gate.shape[1], gate.stride(0), up.stride(0), out.stride(0), GELU=gelu, TILE=COLUMNS
        )
    return out


def _gated_backward(dact: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, gelu: bool) -> None:
    dact, gate, up = _rows(dact, gate.shape, "dact"), _rows(gate, gate.shape, "gate"), _rows(up, gate.shape, "up")
    if gate.numel():
        kernels.gated_backward[(len(gate), triton.cdiv(gate.shape[1], COLUMNS))](
            dact, gate, up, dgate, dup, gate.shape[1], dact.stride(0), gate.stride(0), up.stride(0), dgate.stride(0),
            dup.stride(0), GELU=gelu, TILE=COLUMNS,
        )  # fmt: skip


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate x (N, heads, hd) in place by cos, sin f32 (N, hd/2), pairing i with i + hd/2; `inverse`: its gradient."""
    if x.stride(2) != 1:
        raise ValueError("x is not contiguous along its last dimension")
    rows, heads, size = x.shape
    if rows:
        kernels.rope[(rows,)](
            x, cos.contiguous(), sin.contiguous(), heads, size // 2, x.stride(0), x.stride(1), INVERSE=inverse,
            HEADS_TILE=triton.next_power_of_2(heads), TILE=triton.next_power_of_2(size // 2),
        )  # fmt: skip
    return x


def dropout(x: Tensor, p: float, key: int) -> Tensor:
    """Return x (N, D) / (1 - p) where hash(key, flat position) >= p * 2^32, else 0, with reference.py's bits."""
    x, out = _rows(x, x.shape, "x"), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        kernels.dropout[(len(x), triton.cdiv(x.shape[1], COLUMNS))](
            x, out, x.shape[1], x.stride(0), reference.hashed_key(key), int(p * 2**32), 1.0 / (1.0 - p), TILE=COLUMNS
        )
    return out


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the losses (R,) f32, in nats, of logits (R, V) at targets (R,).

    The logits become the gradient of sum(weights * losses). A target outside the vocabulary gives a loss of NaN.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if logits.stride(1) != 1:
        raise ValueError("logits are not contiguous along their last dimension")
    if len(logits):
        kernels.cross_entropy[(len(logits),)](
            logits, targets.contiguous(), weights.contiguous(), losses, logits.shape[1], logits.stride(0),
            TILE=VOCABULARY_COLUMNS, num_warps=8,
        )  # fmt: skip
    return losses
