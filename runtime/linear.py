"""The linear layers of a model: a frozen one, and one with a LoRA adapter (Hu et al. 2021, arXiv 2106.09685).

Both hold tensors and know nothing of paging. They are run by project.py, several at a time.

Shapes: x (N, in), W (out, in), lora_A (r, in), lora_B (out, r); y = x W^T + scale * dropout(x) A^T B^T.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgetune.runtime import int8, nf4
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.int8 import Int8Rows
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops_types import LinearParts, Weight


def dense_weight(weight: Weight) -> Tensor:
    """Return a weight of any form as a dense (out, in) in fp32."""
    if isinstance(weight, QuantizedTensor):
        return nf4.dequantize(weight, torch.float32)
    return int8.dequantize(weight, torch.float32) if isinstance(weight, Int8Rows) else weight.float()


class Linear(nn.Module):
    """A frozen linear: weight (out, in), dense, in 4 bits or in rows of 8, and bias (out,) or None."""

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def parts(self) -> LinearParts:
        """Return the weight and the bias."""
        return LinearParts(self.weight, self.bias)


class LoraLinear(nn.Module):
    """A frozen linear `base` and its adapter: lora_A (r, in) and lora_B (out, r), both f32 and trained."""

    def __init__(self, base: Linear, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.scale, self.dropout = scale, dropout
        self.out_features, self.in_features = base.out_features, base.in_features

    @classmethod
    def from_base(cls, base: Linear, config: LoraConfig, generator: torch.Generator) -> LoraLinear:
        """Return `base` with a fresh adapter that changes nothing yet: A from U(-1/√in, 1/√in), B zero.

        The distribution of A is PEFT's, kaiming_uniform(a=√5).
        """
        device = base.weight.device
        bound = 1.0 / math.sqrt(base.in_features)
        a = torch.empty(config.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(base.out_features, config.rank)
        return cls(base, a.to(device), b.to(device), config.scale, config.dropout)

    def merge(self, dtype: torch.dtype) -> Linear:
        """Return the adapted weight W + scale * B A as a dense linear, summed in fp32."""
        dense = dense_weight(self.base.weight)
        return Linear((dense + self.scale * (self.lora_B.detach() @ self.lora_A.detach())).to(dtype), self.base.bias)

    def parts(self) -> LinearParts:
        """Return the base's weight and bias, and the adapter as it is now."""
        return LinearParts(self.base.weight, self.base.bias, self.lora_A.detach(), self.lora_B.detach(), self.scale)


AnyLinear = Linear | LoraLinear


def base_of(linear: AnyLinear) -> Linear:
    """Return the frozen linear under an adapter, or the linear itself where it has none."""
    return linear.base if isinstance(linear, LoraLinear) else linear
