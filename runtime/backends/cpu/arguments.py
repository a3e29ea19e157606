"""Checks of the kernels' arguments: every pointer that crosses the C ABI comes from one of these functions.

A wrong call raises ValueError here, in Python, since a kernel would read or write past the end of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float16: "f16"}
"""The end of a kernel's name for each dtype."""
ALIGNMENT = 64
"""Bytes that scratch memory is aligned to: a cache line, and a vector of AVX-512."""


def require(condition: bool, message: str, *values: object) -> None:
    """Raise ValueError with the message, formatted with `values`, unless the condition holds."""
    if not condition:
        raise ValueError(message.format(*values))


def address(x: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the address of a contiguous CPU tensor of exactly this shape and dtype."""
    require(x.is_contiguous(), "{} is not contiguous", name)
    return address_of_rows(x, name, shape, dtype)


def address_of_rows(x: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the address of a CPU tensor of this shape and dtype whose last dimension is contiguous."""
    found, expected = (tuple(x.shape), x.dtype, x.device.type), (tuple(shape), dtype, "cpu")
    require(found == expected, "{} is {} {} on {}; expected {} {} on {}", name, *found, *expected)
    require(x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] <= 1, "{} is not contiguous along its last dimension", name)
    return x.data_ptr()


def address_of_output(x: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the address of a matrix as address_of_rows does, and require that its rows do not overlap: it is written."""
    pointer = address_of_rows(x, name, shape, dtype)
    require(x.shape[0] <= 1 or x.stride(0) >= x.shape[1], "{} has rows that overlap", name)
    return pointer


def aligned(size: int) -> Tensor:
    """Return u8 (size,), not initialised, at a multiple of ALIGNMENT bytes."""
    whole = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    return whole[-whole.data_ptr() % ALIGNMENT :][:size]
