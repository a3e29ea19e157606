"""Convert a linear's weight to the form that a Core ML package stores: NF4, symmetric int4 in short blocks, or fp16.

NF4 is the engine's own and is not quantised again: the codes index a 16-entry table (constexpr_lut_to_dense), and each block
of the result is multiplied by its fp16 absmax (constexpr_blockwise_shift_scale). A weight is therefore
fp16(fp16(table[code]) * fp16(absmax)), at 4 + 16/block_size bits. Core ML has no second level of scales, so a doubly quantised
absmax is stored expanded.

Shapes: codes (out, in), scale (out, in / block), values (out, in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetune.export.coreml.package import Array
from edgetune.runtime import nf4
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.nf4 import QuantizedTensor

INT4_BLOCK = 32
"""Inputs that share a scale in int4: the block size that Apple's 4-bit linear kernels are made for."""
INT4_MIN, INT4_MAX = -8, 7
"""The range of an int4 code."""
_HALF_MAX = 65504.0
"""The largest number of fp16."""
_LEAST_DIVISOR = 1e-8
"""Stands in for a scale of 0 in the division that finds int4 codes. Less than fp16's smallest number, 6e-8, so that it changes
no other scale."""


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """The numbers that a package stores for one weight.

    form: "nf4" has u8 codes and an f16 scale, "int4" i8 codes from -8 to 7 and an f16 scale; the codes of "fp16" are the f16
    values themselves, without a scale.
    """

    form: str
    codes: Array
    scale: Array | None = None

    def values(self) -> Array:
        """Return the weight that Core ML computes with, f16 (out, in), rounded as its constexpr operations round."""
        if self.scale is None:
            return self.codes
        codes = nf4_table().astype(np.float32)[self.codes] if self.form == "nf4" else self.codes.astype(np.float32)
        # fp32 holds the product of two fp16 numbers exactly, so it is rounded only once
        scaled = codes.reshape(*self.scale.shape, -1) * self.scale[..., None].astype(np.float32)
        return torch.from_numpy(scaled).half().view(self.codes.shape).numpy()

    def differences(self, other: StoredWeight) -> int:
        """Count the codes and scales that differ from `other` in any bit; all codes count where shapes or dtypes differ."""
        total = 0
        for mine, theirs in ((self.codes, other.codes), (self.scale, other.scale)):
            if mine is None and theirs is None:
                continue
            if mine is None or theirs is None or mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                return self.codes.size
            total += int((mine.view(f"u{mine.itemsize}") != theirs.view(f"u{theirs.itemsize}")).sum())
        return total


def nf4_table() -> Array:
    """Return the engine's NF4 table rounded to f16 (16,)."""
    return nf4.NF4_TABLE.half().numpy()


def checked_half(name: str, values: Tensor) -> Array:
    """Round a tensor to f16. Raises ModelError, with `name`, where a number is beyond fp16's range."""
    largest = max(-float(values.min()), float(values.max()))
    if not largest <= _HALF_MAX:
        raise ModelError(
            f"{name} holds {largest:g}, and Core ML's fp16 ends at {_HALF_MAX:g}: this model cannot be exported to Core ML."
        )
    return values.half().contiguous().numpy()


def store(name: str, weight: Tensor | QuantizedTensor, form: str) -> StoredWeight:
    """Convert `weight` (out, in) to a form. For NF4, a dense weight is quantised as `edgetune train` does; a 4-bit weight keeps
    its codes.

    Raises ModelError where a row is not a whole number of blocks, which Core ML cannot express, or a value is beyond fp16.
    """
    if form == "nf4":
        try:
            quantized = weight if isinstance(weight, QuantizedTensor) else quantize(weight)
        except ValueError as error:
            raise ModelError(f"{name} cannot be quantised: {error}; copy the model folder again.") from error
        return _store_nf4(name, quantized)
    if form == "int4":
        return _store_int4(name, _dense(weight))
    return StoredWeight("fp16", checked_half(name, weight if isinstance(weight, Tensor) else _dense(weight)))


def quantize(weight: Tensor) -> QuantizedTensor:
    """Quantise a dense weight to NF4 with the engine's default settings."""
    config = QuantConfig()
    return nf4.quantize(weight, config.quant_type, config.block_size, config.double_quant)


def placeholder(name: str, shape: tuple[int, int], form: str, block: int) -> StoredWeight:
    """Return zeros of a weight's shape (out, in) and form. They take no memory: coremltools lays out the package with them, and
    the weight is written over them later. block: inputs that share an absmax in the base, for NF4.

    Raises ModelError where a row is not a whole number of blocks.
    """
    if form == "fp16":
        return StoredWeight("fp16", np.broadcast_to(np.float16(0), shape))
    block = block if form == "nf4" else INT4_BLOCK
    if shape[1] % block:
        raise _partial_block(name, shape[1], block)
    codes = np.broadcast_to(np.uint8(0) if form == "nf4" else np.int8(0), shape)
    return StoredWeight(form, codes, np.broadcast_to(np.float16(0), (shape[0], shape[1] // block)))


def constexpr(stored: StoredWeight, name: str, table: Any) -> Any:
    """Add the operations that make a weight to the program being built; return its variable. `table` is NF4's variable."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    if stored.form == "fp16":
        return mb.const(val=stored.codes, name=name)
    kind = types.nptype_from_builtin(types.int4 if stored.form == "int4" else types.uint4)
    codes = mb.const(val=stored.codes.view(kind), name=f"{name}_codes")
    scale = mb.const(val=stored.scale, name=f"{name}_scale")
    if stored.form == "nf4":
        codes = mb.constexpr_lut_to_dense(indices=codes, lut=table, name=f"{name}_looked_up")
    return mb.constexpr_blockwise_shift_scale(data=codes, scale=scale, name=name)


def _dense(weight: Tensor | QuantizedTensor) -> Tensor:
    return nf4.dequantize(weight, torch.float32) if isinstance(weight, QuantizedTensor) else weight.float()


def _store_nf4(name: str, quantized: QuantizedTensor) -> StoredWeight:
    (out, width), size = quantized.shape, quantized.state.block_size
    if width % size:
        raise _partial_block(name, width, size)
    pairs = quantized.packed.view(-1)
    codes = torch.stack((pairs >> 4, pairs & 15), dim=1).view(-1)[: out * width].view(out, width)
    return StoredWeight("nf4", codes.numpy(), checked_half(name, nf4.expand_absmax(quantized.state).view(out, width // size)))


def _store_int4(name: str, dense: Tensor) -> StoredWeight:
    """Quantise to int4 with the smallest scale per block that keeps all of its values within INT4_MIN and INT4_MAX."""
    out, width = dense.shape
    if width % INT4_BLOCK:
        raise _partial_block(name, width, INT4_BLOCK)
    blocks = dense.view(out, width // INT4_BLOCK, INT4_BLOCK)
    scale = torch.maximum(blocks.amax(2) / INT4_MAX, blocks.amin(2) / INT4_MIN)
    rounded = torch.from_numpy(checked_half(name, scale)).float()
    codes = (blocks / rounded.clamp(min=_LEAST_DIVISOR).unsqueeze(2)).round().clamp(INT4_MIN, INT4_MAX).to(torch.int8)
    return StoredWeight("int4", codes.view(out, width).numpy(), rounded.half().numpy())


def _partial_block(name: str, width: int, size: int) -> ModelError:
    return ModelError(
        f"{name} has {width} inputs, which is not a multiple of the block size {size}, so Core ML cannot store it in 4 bits; "
        "type --weights fp16."
    )
