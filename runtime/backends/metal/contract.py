"""The record of nf4.metal's kernels: the arguments of each in order, their types, and the size of a threadgroup.

`torch.mps.compile_shader` binds arguments by position and checks no type: a tensor is its buffer at its storage offset, a
Python int eight bytes, a float four. So the launcher checks every call against this record, and a test checks this record
against the kernels' source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LANES = 32
"""Threads in a simdgroup, on every Apple GPU."""
SPAN = 8
"""Weights that a thread decodes at a time; nf4.metal says why 8."""
VALUES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
"""The dense dtypes and their names in the shading language: VALUE in the source."""
_DTYPES = {"uchar": torch.uint8, "float": torch.float32}


@dataclass(frozen=True)
class Kernel:
    """A kernel's record; `arguments` are pairs (name, type as in the source), in the order of their buffers."""

    name: str
    arguments: tuple[tuple[str, str], ...]
    group_size: tuple[int, ...]

    def check(self, dtype: torch.dtype, device: torch.device, values: tuple[Any, ...]) -> None:
        """Raise ValueError unless the values are of the types recorded, with VALUE as `dtype`."""
        if len(values) != len(self.arguments):
            raise ValueError(f"{self.name} takes {len(self.arguments)} arguments; {len(values)} were given")
        for (name, kind), value in zip(self.arguments, values, strict=True):
            if kind.startswith("device "):
                _check_tensor(f"{self.name}'s {name}", kind, dtype, device, value)
            elif type(value) is not {"constant long&": int, "constant float&": float}[kind]:
                raise ValueError(f"{self.name}'s {name} is a {type(value).__name__}; expected {kind}")


def _check_tensor(name: str, kind: str, dtype: torch.dtype, device: torch.device, value: Any) -> None:
    element = kind.removeprefix("device ").removeprefix("const ").removesuffix("*")
    wanted = dtype if element == "VALUE" else _DTYPES[element]
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; expected a tensor")
    if value.dtype != wanted or value.device != device or not value.is_contiguous():
        how = "contiguous" if value.is_contiguous() else "strided"
        raise ValueError(f"{name} is {how} {value.dtype} on {value.device}; expected contiguous {wanted} on {device}")


_SCALES = (("absmax", "device const float*"),)
_NESTED_SCALES = (
    ("absmax_codes", "device const uchar*"),
    ("nested_table", "device const float*"),
    ("nested_absmax", "device const float*"),
    ("offset", "constant float&"),
    ("nested_size", "constant long&"),
)
_WEIGHT = (("packed", "device const uchar*"), ("table", "device const float*"))
_FLAT = (("count", "constant long&"), ("block_size", "constant long&"))
_MATRIX = (
    ("rows", "constant long&"),
    ("in_features", "constant long&"),
    ("out_features", "constant long&"),
    ("block_size", "constant long&"),
)
_OUT = (("out", "device VALUE*"),)
_PRODUCT = (("y", "device VALUE*"), ("x", "device const VALUE*"))
_GROUP, _ROWS_A_GROUP = 256, 8

DEQUANTIZE = Kernel("dequantize", (*_OUT, *_WEIGHT, *_SCALES, *_FLAT), (_GROUP,))
DEQUANTIZE_NESTED = Kernel("dequantize_nested", (*_OUT, *_WEIGHT, *_NESTED_SCALES, *_FLAT), (_GROUP,))
MATVEC = Kernel("matvec", (*_PRODUCT, *_WEIGHT, *_SCALES, *_MATRIX), (LANES, _ROWS_A_GROUP))
MATVEC_NESTED = Kernel("matvec_nested", (*_PRODUCT, *_WEIGHT, *_NESTED_SCALES, *_MATRIX), (LANES, _ROWS_A_GROUP))
KERNELS = (DEQUANTIZE, DEQUANTIZE_NESTED, MATVEC, MATVEC_NESTED)
