"""The grid of NF4 for rounding with error feedback (error_feedback.py), with each block's absmax as it is or refined.

A block's largest weight is not the best scale for the rest of the block. The refined absmax is the one, out of a few around it,
with the smallest sum of squared rounding errors, each weighted by the power of its input: errors where inputs are small hardly
change the product.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from edgetune.runtime import bnb_layout, nf4
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.device import one_thread
from edgetune.runtime.nf4 import QuantizedTensor

FACTORS = tuple(percent / 100 for percent in (100, *range(70, 100, 4), *range(104, 132, 4)))
"""Multiples of a block's absmax that are tried, 1 first: it stays where no other is better. Chosen on SmolLM2-135M (LOG.md,
"calibrated NF4")."""
_CHUNK = 1 << 14
"""Blocks that are searched at a time: temporaries stay near 32 MB."""


class Nf4Grid:
    """The Grid (error_feedback.py) of NF4: its table times each block's absmax, as the reader will see it.

    quantized: a weight (out, in) that holds the scales; its codes are not used.
    """

    def __init__(self, quantized: QuantizedTensor) -> None:
        self._state = replace(quantized.state, dtype=torch.bfloat16)
        rows, columns = quantized.shape
        absmax = nf4.expand_absmax(self._state).repeat_interleave(self._state.block_size)[: rows * columns]
        self._scale = absmax.view(rows, columns).T.contiguous()
        self._bounds = (nf4.NF4_TABLE[:-1] + nf4.NF4_TABLE[1:]) / 2

    @classmethod
    def of(cls, weight: Tensor, quant: QuantConfig, power: Tensor | None = None) -> Nf4Grid:
        """Make the grid of a dense weight (out, in). Raises ValueError if it cannot be quantised.

        power (in,): the sum of each input's squares, to refine every absmax by; None takes each block's own absmax.
        """
        quantized = nf4.quantize(weight, quant.quant_type, quant.block_size, double_quant=False)
        if power is not None:
            absmax = refined_absmax(weight.float(), quantized.state.absmax, power, quant.block_size)
            quantized = replace(quantized, state=replace(quantized.state, absmax=absmax))
        if quant.double_quant:
            with one_thread():
                quantized = nf4.double_quantize(quantized)
        return cls(quantized)

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Round values (out,) f32 of one input's column; return codes (out,) and the values they stand for, f32 (out,)."""
        scale = self._scale[column]
        codes = torch.bucketize(values / scale.clamp(min=nf4.SMALLEST_ABSMAX), self._bounds)
        return codes, nf4.NF4_TABLE[codes] * scale

    def weight(self, codes: Tensor) -> QuantizedTensor:
        """Return codes u8 (out, in) as an NF4 weight with this grid's scales."""
        flat = torch.nn.functional.pad(codes.reshape(-1), (0, codes.numel() % 2))
        return QuantizedTensor(((flat[::2] << 4) | flat[1::2]).view(-1, 1), self._state)

    def tensors(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        """Return codes u8 (out, in) as the tensors of bitsandbytes' layout, by name."""
        return bnb_layout.weight_tensors(name, self.weight(codes))


def refined_absmax(weight: Tensor, absmax: Tensor, power: Tensor, block_size: int) -> Tensor:
    """Return f32 (nb,), the multiple of each block's absmax with the least weighted squared error.

    weight: f32 (out, in), whose blocks may cross rows. absmax: f32 (nb,) of the blocks. power: f32 (in,).
    """
    missing = -weight.numel() % block_size
    blocks = torch.nn.functional.pad(weight.reshape(-1), (0, missing)).view(-1, block_size)
    shares = torch.nn.functional.pad(power.expand(weight.shape).reshape(-1), (0, missing)).view(-1, block_size)
    bounds = (nf4.NF4_TABLE[:-1] + nf4.NF4_TABLE[1:]) / 2
    best = absmax.clone()
    for start in range(0, len(blocks), _CHUNK):
        part = slice(start, start + _CHUNK)
        least = torch.full_like(absmax[part], torch.inf)
        for factor in FACTORS:
            scale = absmax[part] * factor
            codes = torch.bucketize(blocks[part] / scale.clamp(min=nf4.SMALLEST_ABSMAX).unsqueeze(1), bounds, out_int32=True)
            errors = nf4.NF4_TABLE[codes].mul_(scale.unsqueeze(1)).sub_(blocks[part]).square_().mul_(shares[part]).sum(1)
            better = errors < least
            least = torch.where(better, errors, least)
            best[part] = torch.where(better, scale, best[part])
    return best
