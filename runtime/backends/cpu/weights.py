"""Quantised weights by C++ kernels: made dense as a whole, or multiplied with a few rows as they are.

Shapes: W (out, in) in blocks of block_size; x (n, in).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from edgetune.runtime import int8
from edgetune.runtime.backends.cpu.arguments import SUFFIX, address, aligned, require
from edgetune.runtime.backends.cpu.library import kernel
from edgetune.runtime.backends.cpu.structures import Absmax, DecodeLinear
from edgetune.runtime.int8 import Int8Rows
from edgetune.runtime.nf4 import QuantizedTensor, code_table
from edgetune.runtime.ops_types import FEW_ROWS

COMPUTE = {"f32": 0, "bf16": 1, "int8": 2}
"""The ways to compute a product with a 4-bit weight, numbered as in matvec.inl. f32: exact but for fp32 sums. bf16: weights and
activations in bf16 where the machine multiplies bf16, else f32. int8: both in 8 bits, with a scale for each 64 activations
(relative error of a product about 8e-3)."""
NF4_KIND, INT8_KIND = 0, 3
DENSE_KIND = {torch.bfloat16: 1, torch.float32: 2}
"""The kinds of weight, numbered as in matvec.inl's enum Kind."""


def quantized_addresses(weight: QuantizedTensor, name: str) -> tuple[int, Absmax]:
    """Return the address of a 4-bit weight's packed codes and the structure of its absmax."""
    state, nested = weight.state, weight.state.nested
    size = state.block_size
    require(size >= 2 and size % 2 == 0, "{} has blocks of {}; expected an even number", name, size)
    packed = address(weight.packed, f"{name}'s codes", ((weight.numel + 1) // 2, 1), torch.uint8)
    blocks = -(-weight.numel // size)
    if nested is None:
        return packed, Absmax(plain=address(state.absmax, f"{name}'s absmax", (blocks,), torch.float32))
    shift, nested_size = nested.block_size.bit_length() - 1, nested.block_size
    require(nested_size == 1 << shift, "{} has nested blocks of {}; expected a power of two", name, nested_size)
    return packed, Absmax(
        codes=address(state.absmax, f"{name}'s absmax", (blocks,), torch.uint8),
        table=address(nested.table, f"{name}'s nested table", (256,), torch.float32),
        nested=address(nested.absmax, f"{name}'s nested absmax", (-(-blocks // nested_size),), torch.float32),
        offset=nested.offset,
        shift=shift,
    )


def linear_structure(weight: Tensor | QuantizedTensor | Int8Rows, name: str) -> DecodeLinear:
    """Return the structure of a weight (out, in) without bias and adapter; it points into the weight's own tensors."""
    require(len(weight.shape) == 2, "{} is {}; expected a matrix", name, tuple(weight.shape))
    rows, cols = weight.shape
    if isinstance(weight, QuantizedTensor):
        packed, absmax = quantized_addresses(weight, name)
        codes = code_table(weight.state.quant_type).data_ptr()  # cached: it lives as long as the process
        return DecodeLinear(
            kind=NF4_KIND, rows=rows, cols=cols, weight=packed, codes=codes, absmax=absmax, block_size=weight.state.block_size
        )
    if isinstance(weight, Int8Rows):
        codes = address(weight.codes, f"{name}'s codes", (rows, cols), torch.int8)
        scale = address(weight.scale, f"{name}'s scale", (rows, 1), torch.float32)
        return DecodeLinear(kind=INT8_KIND, rows=rows, cols=cols, weight=codes, codes=scale)
    require(weight.dtype in DENSE_KIND, "{} is {}; expected bf16, f32, NF4 or 8-bit rows", name, weight.dtype)
    dense = address(weight, name, (rows, cols), weight.dtype)
    return DecodeLinear(kind=DENSE_KIND[weight.dtype], rows=rows, cols=cols, weight=dense)


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return the dense weight in bf16, f32 or f16 with nf4.dequantize's bits, written into `out` where given."""
    require(dtype in SUFFIX, "dtype is {}; expected bfloat16, float32 or float16", dtype)
    if out is None:
        out = torch.empty(quantized.shape, dtype=dtype)
    pointer = address(out, "out", quantized.shape, dtype)
    packed, absmax = quantized_addresses(quantized, "the weight")
    kernel(f"dequantize_{SUFFIX[dtype]}", "ppppppflllpi")(
        packed, code_table(quantized.state.quant_type).data_ptr(), absmax.plain, absmax.codes, absmax.table, absmax.nested,
        absmax.offset, absmax.shift, quantized.state.block_size, quantized.numel, pointer, torch.get_num_threads(),
    )  # fmt: skip
    return out


def multiplies_int8() -> bool:
    """Return True: `int8_matvec` has a kernel, and the decoder takes a head in 8 bits."""
    return True


def int8_rows(weight: Tensor) -> Int8Rows:
    """Quantise a dense weight (V, D) to 8 bits; the bits are those of int8.quantize."""
    if weight.dtype not in DENSE_KIND or not weight.is_contiguous():
        return int8.quantize(weight)
    rows, cols = weight.shape
    small = Int8Rows(torch.empty(rows, cols, dtype=torch.int8), torch.empty(rows, 1))
    kernel(f"int8_rows_{SUFFIX[weight.dtype]}", "pllppi")(
        weight.data_ptr(), rows, cols, small.codes.data_ptr(), small.scale.data_ptr(), torch.get_num_threads()
    )
    return small


def int8_matvec(x: Tensor, weight: Int8Rows) -> Tensor:
    """Multiply x (n, in) bf16 or f32 by an 8-bit W^T, computed in fp32; return (n, out) in x's dtype."""
    return matvec(x, weight)


def matvec(x: Tensor, quantized: QuantizedTensor | Int8Rows, compute: str | None = None) -> Tensor:
    """Multiply x (n, in) bf16 or f32 by W^T, FEW_ROWS rows at a time; return (n, out) in x's dtype.

    compute: a key of `COMPUTE` for a 4-bit weight; None takes x's own dtype. 8-bit rows are computed in fp32.
    """
    found = (tuple(x.shape), x.dtype, x.device.type)
    fits = x.dim() == 2 and x.dtype in DENSE_KIND and x.device.type == "cpu"
    require(fits, "x is {} {} on {}; expected (n, in) bf16 or f32 on cpu", *found)
    require(x.shape[1] == quantized.shape[1], "x has {} features; the weight takes {}", x.shape[1], quantized.shape[1])
    how = COMPUTE["f32" if isinstance(quantized, Int8Rows) else compute or SUFFIX[x.dtype]]
    weight = linear_structure(quantized, "the weight")
    activations = x.detach().float().contiguous()
    y = torch.empty(x.shape[0], weight.rows)
    size = ctypes.c_int64()
    kernel("matvec_space", "lp")(weight.cols, ctypes.addressof(size))
    space = aligned(min(len(x), FEW_ROWS) * size.value)
    for start in range(0, len(x), FEW_ROWS):
        rows = activations[start : start + FEW_ROWS]
        kernel("matvec", "plplppi")(
            ctypes.addressof(weight), how, rows.data_ptr(), len(rows), y[start:].data_ptr(), space.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return y.to(x.dtype)
