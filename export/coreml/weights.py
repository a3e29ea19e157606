"""A linear's weight as a Core ML package stores it: NF4 as the engine has it, symmetric int4 in short blocks, or fp16.

NF4 is not requantised: the codes go through a 16-entry table (constexpr_lut_to_dense) and the fp16 absmax of each block
multiplies what comes out (constexpr_blockwise_shift_scale), so that a weight is fp16(fp16(table[code]) * fp16(absmax)), at
4 + 16/block_size bits. Core ML has no second level of scales: a doubly quantised absmax is stored expanded.

Shapes: codes (out, in), scale (out, in / block), values (out, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetune.export.coreml.package import Array, Package
from edgetune.runtime import nf4
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops_types import Weight

EMBEDDING_NAME = "embedding"
"""What the embedding is called in the program."""
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


def half_of(name: str, values: Tensor) -> Array:
    """f16 numpy of what is called `name`. Raises ModelError where a number leaves fp16's range."""
    largest = max(-float(values.min()), float(values.max()))
    if not largest <= _HALF_MAX:
        raise ModelError(
            f"{name} holds {largest:g}, and Core ML's fp16 ends at {_HALF_MAX:g}; this model cannot be exported to it."
        )
    return values.half().contiguous().numpy()


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
    if form == "int4":
        return _store_int4(name, _dense(weight))
    return Stored("fp16", half_of(name, weight if isinstance(weight, Tensor) else _dense(weight)))


def quantize(weight: Tensor) -> QuantizedTensor:
    """NF4 as the engine quantises a dense base."""
    config = QuantConfig()
    return nf4.quantize(weight, config.quant_type, config.block_size, config.double_quant)


def blank(name: str, shape: tuple[int, int], form: str, block: int) -> Stored:
    """What holds the place of a weight (out, in) in a program until the weight is written into its file: zeros, which take no
    memory. block: of the base's absmax, for NF4.

    Raises ModelError where rows do not end with blocks.
    """
    if form == "fp16":
        return Stored("fp16", np.broadcast_to(np.float16(0), shape))
    block = block if form == "nf4" else INT4_BLOCK
    if shape[1] % block:
        raise _uneven(name, shape[1], block)
    codes = np.broadcast_to(np.uint8(0) if form == "nf4" else np.int8(0), shape)
    return Stored(form, codes, np.broadcast_to(np.float16(0), (shape[0], shape[1] // block)))


def constexpr(stored: Stored, name: str, table: Any) -> Any:
    """The weight as a variable of the program that is being built. table: NF4's, as one."""
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


@dataclass(frozen=True)
class Place:
    """Where a package keeps a weight: the graph's values of codes and, in 4 bits, of scales."""

    form: str
    codes: Any
    scale: Any = None

    def read(self, package: Package) -> Stored:
        """What is stored there."""
        return Stored(self.form, package.constant(self.codes), None if self.scale is None else package.constant(self.scale))

    def write(self, package: Package, stored: Stored) -> None:
        """Put a weight there."""
        assert stored.form == self.form
        package.fill(self.codes, stored.codes)
        if stored.scale is not None:
            package.fill(self.scale, stored.scale)


def places(package: Package, function: str) -> dict[str, Place]:
    """The weights of a function by the name of the linear that uses each; the embedding's by "embedding".

    Raises ModelError for a form that edgetune does not write.
    """
    operations = package.functions[function].operations
    makers = {operation.outputs[0].name: operation for operation in operations if operation.type.startswith("const")}
    users = {operation.outputs[0].name: operation.inputs["weight"] for operation in operations if operation.type == "linear"}
    found = {name: _place(package, makers, weight.arguments[0].name) for name, weight in users.items()}
    return found | ({EMBEDDING_NAME: _place(package, makers, EMBEDDING_NAME)} if EMBEDDING_NAME in makers else {})


def _place(package: Package, makers: Mapping[str, Any], name: str) -> Place:
    maker = makers.get(name)
    if maker is not None and maker.type == "const":
        return Place("fp16", maker.attributes["val"])
    if maker is not None and maker.type == "constexpr_blockwise_shift_scale" and "offset" not in maker.inputs:
        data, scale = (maker.inputs[part].arguments[0] for part in ("data", "scale"))
        if data.WhichOneof("binding") == "value":
            return Place("int4", data.value, scale.value)
        table = makers[data.name]
        if table.type == "constexpr_lut_to_dense":
            indices, lut = (table.inputs[part].arguments[0].value for part in ("indices", "lut"))
            if np.array_equal(package.constant(lut).reshape(-1), nf4_table()):
                return Place("nf4", indices, scale.value)
    raise ModelError(f"The package stores {name} in a form which edgetune does not write; export it again.")


def _dense(weight: Weight) -> Tensor:
    return nf4.dequantize(weight, torch.float32) if isinstance(weight, QuantizedTensor) else weight.float()


def _store_nf4(name: str, quantized: QuantizedTensor) -> Stored:
    (out, width), size = quantized.shape, quantized.state.block_size
    if width % size:
        raise _uneven(name, width, size)
    pairs = quantized.packed.view(-1)
    codes = torch.stack((pairs >> 4, pairs & 15), dim=1).view(-1)[: out * width].view(out, width)
    return Stored("nf4", codes.numpy(), half_of(name, nf4.expand_absmax(quantized.state).view(out, width // size)))


def _store_int4(name: str, dense: Tensor) -> Stored:
    """The scale is the least that holds every value of its block within -8..7."""
    out, width = dense.shape
    if width % INT4_BLOCK:
        raise _uneven(name, width, INT4_BLOCK)
    blocks = dense.view(out, width // INT4_BLOCK, INT4_BLOCK)
    scale = torch.maximum(blocks.amax(2) / 7, -blocks.amin(2) / 8)
    rounded = torch.from_numpy(half_of(name, scale)).float()
    codes = (blocks / rounded.clamp(min=1e-8).unsqueeze(2)).round().clamp(-8, 7).to(torch.int8)
    return Stored("int4", codes.view(out, width).numpy(), rounded.half().numpy())


def _uneven(name: str, width: int, size: int) -> ModelError:
    return ModelError(
        f"{name} has {width} inputs, which are not whole blocks of {size}, and Core ML cannot store that; type --weights fp16."
    )
