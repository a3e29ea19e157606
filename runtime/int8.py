"""Quantise the rows of a matrix to 8 bits, for heads and linears: the specification that the kernels match bit for bit.

The form is symmetric with one scale a row: the largest magnitude becomes 127, the others are rounded to the nearest integer,
ties to even. It takes 8 + 32/D bits a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgetune.runtime.nf4 import SMALLEST_ABSMAX

PANEL_ROWS = 2048
"""Rows that are converted to fp32 at a time (chosen by hand)."""
DENSE_NUMBERS = 1 << 16
"""Numbers that a CPU makes dense at a time, in fp32: few enough to stay in its cache (chosen by hand)."""


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """A matrix in 8-bit rows. codes: i8 (V, D); scale: f32 (V, 1); row i is codes[i] * scale[i]."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def to(self, device: torch.device) -> Int8Rows:
        """Return the same rows on another device."""
        return Int8Rows(self.codes.to(device), self.scale.to(device))


def quantize(weight: Tensor) -> Int8Rows:
    """Quantise a dense (V, D) of any float dtype. A row with inf or NaN gets a non-finite scale and arbitrary codes."""
    codes = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], PANEL_ROWS):
        rows, part = weight[start : start + PANEL_ROWS].float(), slice(start, start + PANEL_ROWS)
        scale[part] = rows.abs().amax(1, keepdim=True) / 127
        codes[part] = (rows / scale[part].clamp(min=SMALLEST_ABSMAX)).round_().nan_to_num_(0)
    return Int8Rows(codes, scale)


def dequantize(rows: Int8Rows, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return the dense weight (V, D), its numbers computed in fp32 and rounded once to `dtype`; written into `out` if given."""
    count, width = rows.codes.shape
    out = torch.empty(count, width, dtype=dtype, device=rows.device) if out is None else out
    height = PANEL_ROWS if rows.device.type != "cpu" else max(1, DENSE_NUMBERS // max(width, 1))
    panel = torch.empty(min(height, count), width, device=rows.device)
    for start in range(0, count, height):
        part = slice(start, min(start + height, count))
        some = panel[: part.stop - start].copy_(rows.codes[part])
        out[part] = some.mul_(rows.scale[part])
    return out
