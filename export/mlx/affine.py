"""Round weights to MLX's 4-bit format, which MLX calls affine, and pack them.

64 weights in a row share a scale and a bias; eight codes share a 32-bit word, the first in its lowest bits.

    NAME.weight   u32 (out, in / 8)
    NAME.scales   bf16 (out, in / 64)          weight = scale * code + bias
    NAME.biases   bf16 (out, in / 64)

Needs no mlx; tests compare scales, biases and codes with mlx.core.quantize in fp32, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgetune.runtime.safetensors_file import TensorSpec

GROUP, BITS = 64, 4
"""Weights in a group, and bits of a code: mlx-lm's defaults."""
LARGEST_CODE = 2**BITS - 1
_WORD_BITS = 32
_SHIFTS = torch.arange(0, _WORD_BITS, BITS)
"""Position of each code's lowest bit within its word."""
_LEAST_SCALE = 1e-7
"""Smallest scale of a group: the eps of mlx.core.quantize."""


def affine_specs(name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
    """Return the specifications of the three tensors in which MLX stores a quantised weight (out, in)."""
    rows, columns = shape
    scales = (rows, columns // GROUP)
    return [
        TensorSpec(name, torch.uint32, (rows, columns * BITS // _WORD_BITS)),
        TensorSpec(name.replace(".weight", ".scales"), torch.bfloat16, scales),
        TensorSpec(name.replace(".weight", ".biases"), torch.bfloat16, scales),
    ]


class AffineGrid:
    """A Grid of error_feedback.py with the values scale * code + bias, where GROUP weights in a row share scale and bias.

    scale, bias: f32 (out, in / GROUP). They are rounded to bf16, as they are stored, before any code is chosen.
    """

    def __init__(self, scale: Tensor, bias: Tensor) -> None:
        self._scale, self._bias = scale.bfloat16().float(), bias.bfloat16().float()

    @classmethod
    def of(cls, weight: Tensor) -> AffineGrid:
        """Return the grid that fits a dense weight (out, in)."""
        return cls(*affine_groups(weight))

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Return the nearest codes of one column's values (out,), and the weights that the codes stand for."""
        scale, bias = self._scale[:, column // GROUP], self._bias[:, column // GROUP]
        codes = ((values - bias) / scale).round_().clamp_(0, LARGEST_CODE)
        return codes, codes * scale + bias

    def weight(self, codes: Tensor) -> Tensor:
        """Return the dense weight f32 (out, in) of codes (out, in)."""
        return _value(codes, self._scale, self._bias)

    def tensors(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        """Return the tensors that MLX stores for codes (out, in), by name."""
        by_word = codes.to(torch.int64).view(codes.shape[0], -1, _WORD_BITS // BITS)
        words = (by_word << _SHIFTS).sum(-1)
        # wrap each word to the int32 with the same 32 bits, then view it as uint32
        packed = (words - ((words >> 31) << 32)).to(torch.int32).view(torch.uint32)
        specs = affine_specs(name, tuple(codes.shape))
        return dict(zip((spec.name for spec in specs), (packed, self._scale, self._bias), strict=True))


def affine_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and bias, f32 (out, in / GROUP), of a weight (out, in) as mlx.core.quantize finds them in fp32.

    They are chosen such that one code is exactly zero and one is exactly the end of the group's range that is farther from
    zero.
    """
    groups = weight.view(weight.shape[0], -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / LARGEST_CODE).clamp(min=_LEAST_SCALE)
    scale, edge = torch.where(low.abs() > high.abs(), scale, -scale), torch.where(low.abs() > high.abs(), low, high)
    steps = torch.round(edge / scale)
    nonzero = steps != 0
    return torch.where(nonzero, edge / steps, scale), torch.where(nonzero, edge, torch.zeros_like(edge))


def affine_weight(packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return the dense weight f32 (out, in) of stored tensors: packed u32 (out, in / 8), scale and bias (out, in / GROUP)."""
    words = packed.view(torch.int32).to(torch.int64).unsqueeze(-1)
    return _value(((words >> _SHIFTS) & LARGEST_CODE).flatten(1), scale.float(), bias.float())


def _value(codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return scale * code + bias, (out, in)."""
    grouped = codes.float().view(codes.shape[0], -1, GROUP)
    return (grouped * scale.unsqueeze(2) + bias.unsqueeze(2)).view(codes.shape)
