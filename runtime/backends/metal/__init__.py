"""The back end of Apple GPUs: NF4 dequantisation and the product of few rows as Metal kernels, the rest through torch.

`load` compiles the kernels, and raises KernelsMissing (an ImportError) where they cannot be compiled or give wrong numbers
on a small weight; plain torch serves then. Shapes and meaning are reference.py's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from edgetune.runtime import nf4, ops
from edgetune.runtime.backends import reference
from edgetune.runtime.backends.metal.contract import (
    DEQUANTIZE,
    DEQUANTIZE_NESTED,
    LANES,
    MATVEC,
    MATVEC_NESTED,
    SPAN,
    VALUES,
)
from edgetune.runtime.backends.metal.library import KernelsMissing, launch, library
from edgetune.runtime.backends.reference import (
    cross_entropy_,
    dropout,
    fuses,
    project,
    project_backward,
    rms_norm,
    rms_norm_backward,
    rope_,
    swiglu,
    swiglu_backward,
)
from edgetune.runtime.nf4 import QuantizedTensor

__all__ = [
    "KernelsMissing",
    "cross_entropy_",
    "dequantize",
    "dropout",
    "fuses",
    "load",
    "matvec",
    "project",
    "project_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope_",
    "swiglu",
    "swiglu_backward",
]

NAME = "metal"
_MOST = 1 << 32
"""Weights that a kernel counts up to, in 32 bits."""


def load() -> None:
    """Compile the kernels and try them; once is enough. Raises KernelsMissing where they cannot serve."""
    for dtype in VALUES:
        library(dtype)
        _prove(dtype, torch.device("mps"))


@functools.cache
def _table(quant_type: str, device: torch.device) -> Tensor:
    """f32 (16,): the values of the codes, on the device."""
    return nf4.code_table(quant_type).to(device)


def _scales(quantized: QuantizedTensor) -> tuple[Tensor | float | int, ...]:
    """The kernels' arguments that say what the absmax of each block is."""
    state, nested = quantized.state, quantized.state.nested
    if nested is None:
        return (state.absmax,)
    return state.absmax, nested.table, nested.absmax, float(nested.offset), nested.block_size


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """(out_features, in_features) in `dtype`; written into `out` where given."""
    count, state, device = quantized.numel, quantized.state, quantized.device
    if not 0 < count < _MOST:
        return reference.dequantize(quantized, dtype, out)
    out = torch.empty(quantized.shape, dtype=dtype, device=device) if out is None else out
    kernel = DEQUANTIZE if state.nested is None else DEQUANTIZE_NESTED
    weight = (quantized.packed, _table(state.quant_type, device), *_scales(quantized))
    launch(kernel, dtype, device, (-(-count // SPAN),), out, *weight, count, state.block_size)
    return out


def matvec(x: Tensor, quantized: QuantizedTensor) -> Tensor:
    """x (n, in) times W^T -> (n, out), for the few rows of decoding; of any other weight or x through a dense copy."""
    state, device = quantized.state, quantized.device
    out_features, in_features = quantized.shape
    if not (0 < len(x) <= ops.FEW_ROWS and in_features % state.block_size == 0 and 0 < quantized.numel < _MOST):
        return x @ dequantize(quantized, x.dtype).T
    y = x.new_empty(len(x), out_features)
    kernel = MATVEC if state.nested is None else MATVEC_NESTED
    weight = (quantized.packed, _table(state.quant_type, device), *_scales(quantized))
    sizes = (len(x), in_features, out_features, state.block_size)
    launch(kernel, x.dtype, device, (LANES, out_features), y, x.contiguous(), *weight, *sizes)
    return y


def _prove(dtype: torch.dtype, device: torch.device) -> None:
    """Raise KernelsMissing unless every kernel gives on `device` what plain torch gives for a small weight of odd shape."""
    x = torch.cos(torch.arange(3 * 192, dtype=torch.float32)).view(3, 192).to(dtype)
    weight = torch.sin(torch.arange(5 * 192, dtype=torch.float32)).view(5, 192)
    for double_quant in (False, True):
        whole, odd = (nf4.quantize(part.contiguous(), double_quant=double_quant) for part in (weight, weight[:3, :67]))
        product = (x.float() @ nf4.dequantize(whole).T).to(dtype)
        for found, expected in (
            (dequantize(odd.to(device), dtype), nf4.dequantize(odd, dtype)),
            (matvec(x.to(device), whole.to(device)), product),
        ):
            error = float((found.cpu().float() - expected.float()).norm() / expected.float().norm())
            if not error < 4 * torch.finfo(dtype).eps:
                raise KernelsMissing(f"the Metal kernels give wrong numbers on this GPU ({dtype}, error {error:.2g})")
