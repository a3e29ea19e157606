"""The specification of 8-bit rows: what `vocabulary` keeps a head in, and what the kernels compute bit for bit.

Symmetric, a scale for each row: the largest magnitude becomes 127, the others the nearest integers, ties to even.
8 + 32/D bits a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgetune.runtime.nf4 import SMALLEST_ABSMAX

PANEL_ROWS = 2048
"""Rows that are in fp32 at once while they are quantised."""


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """codes i8 (V, D), scale f32 (V, 1): row i is codes[i] * scale[i]."""

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
        """The same on a device."""
        return Int8Rows(self.codes.to(device), self.scale.to(device))


def quantize(weight: Tensor) -> Int8Rows:
    """A dense (V, D) of any float dtype. A row with inf or NaN gets a scale that is not finite either, and any codes."""
    codes = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], PANEL_ROWS):
        rows, part = weight[start : start + PANEL_ROWS].float(), slice(start, start + PANEL_ROWS)
        scale[part] = rows.abs().amax(1, keepdim=True) / 127
        codes[part] = (rows / scale[part].clamp(min=SMALLEST_ABSMAX)).round_().nan_to_num_(0)
    return Int8Rows(codes, scale)
