"""The back end of Apple GPUs: NF4 dequantisation and the product of few rows as Metal kernels, the rest in plain torch.

`load` compiles the kernels, and raises KernelsMissing (an ImportError) where they do not compile or give wrong numbers on a
small weight; plain torch serves then. Shapes and meaning are reference.py's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from edgetune.runtime import nf4
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
    attention_backward,
    attention_forward,
    cross_entropy_,
    decoder,
    dropout,
    fuses,
    geglu,
    geglu_backward,
    int8_matvec,
    int8_rows,
    multiplies_int8,
    project,
    project_backward,
    rms_norm,
    rms_norm_backward,
    rope_,
    selected_isa,
    swiglu,
    swiglu_backward,
)
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops_types import FEW_ROWS

__all__ = [
    "NAME",
    "KernelsMissing",
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

NAME = "metal"
MAX_WEIGHTS = 1 << 32
"""The kernels count weights in 32 bits: a tensor of this many or more goes to plain torch."""


def load() -> None:
    """Compile the kernels and compare them with plain torch. Raises KernelsMissing where they cannot serve."""
    for dtype in VALUES:
        library(dtype)
        _prove(dtype, torch.device("mps"))


@functools.cache
def _table(quant_type: str, device: torch.device) -> Tensor:
    """Return the values of the 16 codes, f32 (16,), on the device."""
    return nf4.code_table(quant_type).to(device)


def _scales(quantized: QuantizedTensor) -> tuple[Tensor | float | int, ...]:
    """Return the kernel arguments that give the absmax of each block."""
    state, nested = quantized.state, quantized.state.nested
    if nested is None:
        return (state.absmax,)
    return state.absmax, nested.table, nested.absmax, float(nested.offset), nested.block_size


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return the dense weight (out_features, in_features) in `dtype`, written into `out` where given."""
    count, state, device = quantized.numel, quantized.state, quantized.device
    if not 0 < count < MAX_WEIGHTS:
        return reference.dequantize(quantized, dtype, out)
    out = torch.empty(quantized.shape, dtype=dtype, device=device) if out is None else out
    kernel = DEQUANTIZE if state.nested is None else DEQUANTIZE_NESTED
    weight = (quantized.packed, _table(state.quant_type, device), *_scales(quantized))
    launch(kernel, dtype, device, (-(-count // SPAN),), out, *weight, count, state.block_size)
    return out


def matvec(x: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Multiply x (n, in) by W^T; return (n, out). More than FEW_ROWS rows, or rows of broken blocks, take a dense copy."""
    state, device = quantized.state, quantized.device
    out_features, in_features = quantized.shape
    if not (0 < len(x) <= FEW_ROWS and in_features % state.block_size == 0 and 0 < quantized.numel < MAX_WEIGHTS):
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
            if not error < 4 * torch.finfo(dtype).eps:  # also true for NaN
                raise KernelsMissing(f"the Metal kernels give wrong numbers on this GPU ({dtype}, error {error:.2g})")
