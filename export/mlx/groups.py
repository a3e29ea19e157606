"""MLX's 4-bit weights: groups of 64 in a row share a scale and a bias, eight codes a 32-bit word, the first lowest.

    NAME.weight   u32 (out, in / 8)
    NAME.scales   bf16 (out, in / 64)          weight = scale * code + bias
    NAME.biases   bf16 (out, in / 64)

Written without mlx; tests hold scales, biases and codes to mlx.core.quantize bit for bit, in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgetune.runtime.safetensors_file import TensorSpec

GROUP, BITS = 64, 4
"""mlx-lm's defaults."""
LARGEST_CODE = 2**BITS - 1
_SHIFTS = torch.arange(0, 32, BITS)


def affine_specs(name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
    """What MLX stores a quantised weight (out, in) as."""
    rows, columns = shape
    scales = (rows, columns // GROUP)
    return [
        TensorSpec(name, torch.uint32, (rows, columns * BITS // 32)),
        TensorSpec(name.replace(".weight", ".scales"), torch.bfloat16, scales),
        TensorSpec(name.replace(".weight", ".biases"), torch.bfloat16, scales),
    ]


class AffineGrid:
    """scale * code + bias, one of each for GROUP weights of a row; a Grid of rounding.py.

    scale, bias: f32 (out, in / GROUP), rounded to the bf16 that they are stored in before a code is chosen.
    """

    def __init__(self, scale: Tensor, bias: Tensor) -> None:
        self._scale, self._bias = scale.bfloat16().float(), bias.bfloat16().float()

    @classmethod
    def of(cls, weight: Tensor) -> AffineGrid:
        """The groups of a dense weight (out, in)."""
        return cls(*affine_groups(weight))

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        scale, bias = self._scale[:, column // GROUP], self._bias[:, column // GROUP]
        codes = ((values - bias) / scale).round_().clamp_(0, LARGEST_CODE)
        return codes, codes * scale + bias

    def weight(self, codes: Tensor) -> Tensor:
        return _value(codes, self._scale, self._bias)

    def tensors(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        eights = codes.to(torch.int64).view(codes.shape[0], -1, 32 // BITS)
        words = (eights << _SHIFTS).sum(-1)
        packed = (words - ((words >> 31) << 32)).to(torch.int32).view(torch.uint32)
        specs = affine_specs(name, tuple(codes.shape))
        return dict(zip((spec.name for spec in specs), (packed, self._scale, self._bias), strict=True))


def affine_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and bias f32 (out, in / GROUP) as mlx.core.quantize finds them in fp32: the end of the group that is farther
    from zero is a code's exact value, and so is zero.
    """
    groups = weight.view(weight.shape[0], -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / LARGEST_CODE).clamp(min=1e-7)
    scale, edge = torch.where(low.abs() > high.abs(), scale, -scale), torch.where(low.abs() > high.abs(), low, high)
    steps = torch.round(edge / scale)
    off = steps != 0
    return torch.where(off, edge / steps, scale), torch.where(off, edge, torch.zeros_like(edge))


def affine_weight(packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The dense weight f32 (out, in) of a stored one."""
    words = packed.view(torch.int32).to(torch.int64).unsqueeze(-1)
    return _value(((words >> _SHIFTS) & LARGEST_CODE).flatten(1), scale.float(), bias.float())


def _value(codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    grouped = codes.float().view(codes.shape[0], -1, GROUP)
    return (grouped * scale.unsqueeze(2) + bias.unsqueeze(2)).view(codes.shape)
