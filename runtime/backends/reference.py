"""Every op in plain torch: slow, short, and what the other back ends are tested against.

Shapes: N tokens, D hidden, F feed-forward, H heads of hd, R rows with a target, V vocabulary. bf16 inputs are computed in
fp32 and rounded once, to nearest even, when they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime import nf4
from edgetune.runtime.nf4 import QuantizedTensor

NAME = "reference"
_MASK32 = 0xFFFFFFFF


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """(out_features, in_features) in `dtype`; written into `out` where given."""
    dense = nf4.dequantize(quantized, dtype)
    return dense if out is None else out.copy_(dense)


def matvec(x: Tensor, quantized: QuantizedTensor) -> Tensor:
    """x (n, in) times W^T -> (n, out), for the few rows of decoding."""
    return x @ nf4.dequantize(quantized, x.dtype).T


def fuses(dtype: torch.dtype) -> bool:
    """False: there are no fused products here."""
    return False


def project(x: Tensor, linears: Sequence[Any], y: Tensor | None, int8: bool = False) -> Tensor | None:
    """None: there is no fused product here, and callers dequantise."""
    return None


def project_backward(
    dy: Tensor,
    x: Tensor,
    reduced: Tensor,
    linears: Sequence[Any],
    gradients: Sequence[tuple[Tensor, Tensor]],
    int8: bool = False,
) -> Tensor | None:
    """None: there is no fused product here, and callers dequantise."""
    return None


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """h (N, D) over its root mean square, times weight (D,) -> (N, D). Zhang & Sennrich 2019, arXiv 1910.07467."""
    x = h.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (x * weight.float()).to(h.dtype)


def rms_norm_backward(dx: Tensor, h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of the input alone, (N, D): the weight is frozen."""
    x = h.float()
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    normed = x * rstd
    scaled = dx.float() * weight.float()
    return ((scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd).to(h.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (N, F). Shazeer 2020, arXiv 2002.05202."""
    g = gate.float()
    return (g * torch.sigmoid(g) * up.float()).to(gate.dtype)


def swiglu_backward(
    dact: Tensor, gate: Tensor, up: Tensor, dgate: Tensor | None = None, dup: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, (N, F) each; written into dgate and dup where given."""
    d, g, u = dact.float(), gate.float(), up.float()
    sigmoid = torch.sigmoid(g)
    gate_grad = (d * u * sigmoid * (1 + g * (1 - sigmoid))).to(gate.dtype)
    up_grad = (d * g * sigmoid).to(gate.dtype)
    if dgate is None or dup is None:
        return gate_grad, up_grad
    return dgate.copy_(gate_grad), dup.copy_(up_grad)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate x (N, heads, hd) in place by cos, sin (N, hd/2), pairing i with i + hd/2; `inverse` rotates back."""
    half = x.shape[-1] // 2
    a, b = x[..., :half].float(), x[..., half:].float()
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    if inverse:
        s = -s
    first, second = (a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype)
    x[..., :half] = first
    x[..., half:] = second
    return x


def _hash32(x: Tensor) -> Tensor:
    """lowbias32 (Wellons 2018) on int64 tensors that hold 32-bit values: a good bijection of three multiplies' cost."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK32
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK32
    return x ^ (x >> 16)


def dropout(x: Tensor, p: float, key: int) -> Tensor:
    """x / (1 - p) where hash(key, i) >= p * 2^32 for flat position i, else 0: the same bits in every back end."""
    seed = int(_hash32(torch.tensor(key & _MASK32)))
    position = torch.arange(x.numel(), device=x.device) & _MASK32
    keep = _hash32(position ^ seed) >= int(p * 2**32)
    return (x.float() * (1.0 / (1.0 - p)) * keep.view(x.shape)).to(x.dtype)


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Losses (R,) f32 in nats of logits (R, V) at targets (R,); logits become d(sum of weights * losses)/d(logits)."""
    values = logits.float()
    log_z = torch.logsumexp(values, dim=-1)
    losses = log_z - values.gather(1, targets.unsqueeze(1)).squeeze(1)
    gradient = torch.exp(values - log_z.unsqueeze(1))
    gradient.scatter_add_(1, targets.unsqueeze(1), gradient.new_full((len(targets), 1), -1.0))
    logits.copy_(gradient * weights.float().unsqueeze(1))
    return losses
