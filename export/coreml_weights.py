"""A linear's weight as a Core ML package stores it: NF4 as the engine has it, symmetric int4 in short blocks, or fp16.

NF4 is not requantised: the codes go through a 16-entry table (constexpr_lut_to_dense) and the fp16 absmax of each block
multiplies what comes out (constexpr_blockwise_shift_scale), so that a weight is fp16(fp16(table[code]) * fp16(absmax)), at
4 + 16/block_size bits. Core ML has no second level of scales: a doubly quantised absmax is stored expanded.

Shapes: codes (out, in), scale (out, in / block), values (out, in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgetune.runtime import nf4
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.lora import Weight
from edgetune.runtime.nf4 import QuantizedTensor

Array = npt.NDArray[Any]
INT4_BLOCK = 32
"""Inputs that share a scale: what Apple's 4-bit linear kernels are made for."""
_HALF_MAX = 65504.0


@dataclass(frozen=True, eq=False)
class Stored:
    """form "nf4": codes u8 and scale f16; "int4": codes i8 in -8..7 and scale f16; "fp16": codes are the f16 values."""

    form: str
    codes: Array
    scale: Array | None = None

    def values(self) -> Array:
        """f16 (out, in): the weight that Core ML computes with, rounded as its constexpr operations round."""
        if self.scale is None:
            return self.codes
        codes = nf4_table().astype(np.float32)[self.codes] if self.form == "nf4" else self.codes.astype(np.float32)
        whole = codes.reshape(*self.scale.shape, -1) * self.scale[..., None].astype(np.float32)  # fp32 holds the product
        return torch.from_numpy(whole).half().view(self.codes.shape).numpy()

    def differences(self, other: Stored) -> int:
        """How many stored numbers, codes and scales, are not bit for bit the other's; all, where shapes differ."""
        total = 0
        for own, its in ((self.codes, other.codes), (self.scale, other.scale)):
            if own is None and its is None:
                continue
            if own is None or its is None or own.shape != its.shape or own.dtype != its.dtype:
                return self.codes.size
            total += int((own.view(f"u{own.itemsize}") != its.view(f"u{its.itemsize}")).sum())
        return total


def nf4_table() -> Array:
    """f16 (16,): the engine's table."""
    return nf4.NF4_TABLE.half().numpy()


def store(name: str, weight: Weight, form: str) -> Stored:
    """`weight` (out, in) in a form. A dense one becomes NF4 as `edgetune train` makes it; a 4-bit one keeps its codes.

    Raises ModelError where rows do not end with blocks, which Core ML cannot express, or values leave fp16.
    """
    if form == "nf4":
        try:
            quantized = weight if isinstance(weight, QuantizedTensor) else quantize(weight)
        except ValueError as error:
            raise ModelError(f"{name} cannot be quantised: {error}; copy the model folder again.") from error
        return _store_nf4(name, quantized)
    dense = _dense(weight)
    return _store_int4(name, dense) if form == "int4" else Stored("fp16", _half(name, dense))


def quantize(weight: Tensor) -> QuantizedTensor:
    """NF4 as the engine quantises a dense base."""
    config = QuantConfig()
    return nf4.quantize(weight, config.quant_type, config.block_size, config.double_quant)


def constexpr(stored: Stored, name: str) -> Any:
    """The weight as a variable of the program that is being built."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    if stored.form == "fp16":
        return mb.const(val=stored.codes, name=name)
    if stored.form == "int4":
        codes = stored.codes.astype(types.nptype_from_builtin(types.int4))
        return mb.constexpr_blockwise_shift_scale(data=codes, scale=stored.scale, name=name)
    indices = stored.codes.astype(types.nptype_from_builtin(types.uint4))
    table = mb.constexpr_lut_to_dense(indices=indices, lut=nf4_table().reshape(1, 1, 16, 1), name=f"{name}_codes")
    return mb.constexpr_blockwise_shift_scale(data=table, scale=stored.scale, name=name)


def stored_in(operation: Any) -> Stored:
    """What a saved package holds for a linear: `operation` is what makes its weight. Raises ModelError for another form."""
    inputs = operation.inputs
    if operation.op_type == "const":
        return Stored("fp16", np.asarray(operation.outputs[0].val))
    if operation.op_type == "constexpr_blockwise_shift_scale" and inputs.get("offset") is None:
        data, scale = inputs["data"], np.asarray(inputs["scale"].val)
        if data.op is None or data.op.op_type == "const":
            return Stored("int4", np.asarray(data.val).astype(np.int8), scale)
        if data.op.op_type == "constexpr_lut_to_dense" and np.array_equal(data.op.inputs["lut"].val.reshape(-1), nf4_table()):
            return Stored("nf4", np.asarray(data.op.inputs["indices"].val).astype(np.uint8), scale)
    found = operation.outputs[0].name
    raise ModelError(f"The package stores {found} as {operation.op_type}, which edgetune does not write; export it again.")


def _dense(weight: Weight) -> Tensor:
    return nf4.dequantize(weight, torch.float32) if isinstance(weight, QuantizedTensor) else weight.float()


def _half(name: str, values: Tensor) -> Array:
    """f16 numpy, refused where a number leaves fp16's range."""
    largest = float(values.abs().max())
    if not largest <= _HALF_MAX:
        raise ModelError(
            f"{name} holds {largest:g}, and Core ML's fp16 ends at {_HALF_MAX:g}; this model cannot be exported to it."
        )
    return values.half().contiguous().numpy()


def _store_nf4(name: str, quantized: QuantizedTensor) -> Stored:
    (out, width), size = quantized.shape, quantized.state.block_size
    if width % size:
        raise _uneven(name, width, size)
    pairs = quantized.packed.view(-1)
    codes = torch.stack((pairs >> 4, pairs & 15), dim=1).view(-1)[: out * width].view(out, width)
    return Stored("nf4", codes.numpy(), _half(name, nf4.expand_absmax(quantized.state).view(out, width // size)))


def _store_int4(name: str, dense: Tensor) -> Stored:
    """The scale is the least that holds every value of its block within -8..7."""
    out, width = dense.shape
    if width % INT4_BLOCK:
        raise _uneven(name, width, INT4_BLOCK)
    blocks = dense.view(out, width // INT4_BLOCK, INT4_BLOCK)
    scale = torch.maximum(blocks.amax(2) / 7, -blocks.amin(2) / 8)
    rounded = torch.from_numpy(_half(name, scale)).float()
    codes = (blocks / rounded.clamp(min=1e-8).unsqueeze(2)).round().clamp(-8, 7).to(torch.int8)
    return Stored("int4", codes.view(out, width).numpy(), rounded.half().numpy())


def _uneven(name: str, width: int, size: int) -> ModelError:
    return ModelError(
        f"{name} has {width} inputs, which are not whole blocks of {size}, and Core ML cannot store that; type --weights fp16."
    )
