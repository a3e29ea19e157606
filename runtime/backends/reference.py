"""Every op in plain torch: slow, short, and the yardstick of the other back ends' tests.

Shapes: N tokens, D hidden, F feed-forward, H heads of hd, R rows with a target, V vocabulary. bf16 inputs are computed in
fp32 and rounded once, to nearest even, when they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from edgetune.runtime import nf4
from edgetune.runtime.attention import backward as attention_backward
from edgetune.runtime.attention import forward as attention_forward
from edgetune.runtime.int8 import Int8Rows
from edgetune.runtime.int8 import quantize as int8_rows
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops_types import Adapted, DecoderCache, DecoderModel, DecodeStep

__all__ = [
    "NAME",
    "attention_backward",
    "attention_forward",
    "cross_entropy_",
    "decoder",
    "dequantize",
    "dropout",
    "fuses",
    "geglu",
    "geglu_backward",
    "int8_matvec",
    "int8_rows",
    "load",
    "matvec",
    "multiplies_int8",
    "project",
    "project_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope_",
    "selected_isa",
    "swiglu",
    "swiglu_backward",
]

NAME = "reference"
MASK32 = 0xFFFFFFFF
GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = GELU_LINEAR * 0.044715
"""The two numbers of GELU's approximation with tanh (arXiv 1606.08415), doubled for a sigmoid."""


def load() -> None:
    """Do nothing: there are no kernels to make ready."""


def selected_isa() -> str | None:
    """Return None: plain torch has no instruction set to choose."""
    return None


def multiplies_int8() -> bool:
    """Return False: `int8_matvec` has no kernel here."""
    return False


def fuses(dtype: torch.dtype, int8: bool = False) -> bool:
    """Return False: `project` has no kernel here."""
    return False


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return the dense weight (out_features, in_features) in `dtype`, written into `out` where given."""
    dense = nf4.dequantize(quantized, dtype)
    return dense if out is None else out.copy_(dense)


def matvec(x: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Multiply x (n, in) by W^T through a dense copy of W; return (n, out)."""
    return x @ nf4.dequantize(quantized, x.dtype).T


def int8_matvec(x: Tensor, weight: Int8Rows) -> Tensor | None:
    """Return None: there is no product with 8-bit rows here, and callers dequantise."""
    return None


def project(x: Tensor, linears: Sequence[Adapted], y: Tensor | None, int8: bool = False) -> Tensor | None:
    """Return None: there is no fused product here, and callers dequantise."""
    return None


def project_backward(
    dy: Tensor,
    x: Tensor,
    reduced: Tensor,
    linears: Sequence[Adapted],
    gradients: Sequence[tuple[Tensor, Tensor]],
    int8: bool = False,
) -> Tensor | None:
    """Return None: there is no fused product here, and callers dequantise."""
    return None


def decoder(model: DecoderModel, cache: DecoderCache) -> DecodeStep | None:
    """Return None: tokens are run block by block here."""
    return None


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide h (N, D) by its root mean square, multiply by weight (D,). Zhang & Sennrich 2019, arXiv 1910.07467."""
    x = h.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (x * weight.float()).to(h.dtype)


def rms_norm_backward(dx: Tensor, h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the gradient (N, D) of the input alone: the weight is frozen."""
    x = h.float()
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    normed = x * rstd
    scaled = dx.float() * weight.float()
    return ((scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd).to(h.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, all (N, F). Shazeer 2020, arXiv 2002.05202."""
    g = gate.float()
    return (g * torch.sigmoid(g) * up.float()).to(gate.dtype)


def swiglu_backward(dact: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Write the gradients of gate and up (N, F) into dgate and dup."""
    d, g, u = dact.float(), gate.float(), up.float()
    sigmoid = torch.sigmoid(g)
    dgate.copy_((d * u * sigmoid * (1 + g * (1 - sigmoid))).to(gate.dtype))
    dup.copy_((d * g * sigmoid).to(gate.dtype))


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu(gate) * up, all (N, F), with tanh's approximation: x sigmoid(z) (Hendrycks & Gimpel, arXiv 1606.08415)."""
    g = gate.float()
    return (g * torch.sigmoid(_gelu_slope(g)) * up.float()).to(gate.dtype)


def geglu_backward(dact: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Write the gradients of gate and up (N, F) into dgate and dup."""
    d, g, u = dact.float(), gate.float(), up.float()
    sigmoid, rise = torch.sigmoid(_gelu_slope(g)), GELU_LINEAR + 3 * GELU_CUBIC * g.square()
    dgate.copy_((d * u * sigmoid * (1 + g * rise * (1 - sigmoid))).to(gate.dtype))
    dup.copy_((d * g * sigmoid).to(gate.dtype))


def _gelu_slope(x: Tensor) -> Tensor:
    """Return z such that gelu(x) = x sigmoid(z), since (1 + tanh y) / 2 is sigmoid(2 y)."""
    return x * (GELU_LINEAR + GELU_CUBIC * x.square())


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate x (N, heads, hd) in place by cos, sin (N, hd/2), pairing i with i + hd/2; `inverse`: its gradient."""
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
    """Hash int64 tensors of 32-bit values with lowbias32 (Wellons 2018), a bijection that costs two multiplications."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK32
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK32
    return x ^ (x >> 16)


def hashed_key(key: int) -> int:
    """Return the hash of a dropout key, with which every position is combined before it is hashed in turn."""
    return int(_hash32(torch.tensor(key & MASK32)))


def dropout(x: Tensor, p: float, key: int) -> Tensor:
    """Return x / (1 - p) where hash(key, i) >= p * 2^32 for flat position i, else 0: the same bits in every back end."""
    position = torch.arange(x.numel(), device=x.device) & MASK32
    keep = _hash32(position ^ hashed_key(key)) >= int(p * 2**32)
    return (x.float() * (1.0 / (1.0 - p)) * keep.view(x.shape)).to(x.dtype)


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the losses (R,) f32, in nats, of logits (R, V) at targets (R,).

    The logits become the gradient of sum(weights * losses).
    """
    values = logits.float()
    log_z = torch.logsumexp(values, dim=-1)
    losses = log_z - values.gather(1, targets.unsqueeze(1)).squeeze(1)
    gradient = torch.exp(values - log_z.unsqueeze(1))
    gradient.scatter_add_(1, targets.unsqueeze(1), gradient.new_full((len(targets), 1), -1.0))
    logits.copy_(gradient * weights.float().unsqueeze(1))
    return losses
