"""Linears, their LoRA adapters, and the one product that training is made of.

A linear sees tensors, never pages. `project` runs several linears that share an input as one node of autograd: it takes
the input before its norm (or before SwiGLU) and saves only that, since the elementwise part is cheap to do again. The
backward needs the packed weight alone. Fused kernels read it as it is; where there are none, it is dequantised once more
into a panel that all linears share.

Shapes: x (N, in), W (out, in), lora_A (r, in), lora_B (out, r); y = x W^T + scale * dropout(x) A^T B^T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgetune.runtime import nf4, ops
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops import Adapted

Weight = Tensor | QuantizedTensor
FUSED_ROWS = 64
"""NF4 products of so many rows and more go to ops.project, of up to ops.FEW_ROWS to ops.matvec; between, neither pays."""


class Linear(nn.Module):
    """A frozen linear: weight (out, in), dense or NF4, and bias (out,) or None."""

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape


class LoraLinear(nn.Module):
    """A frozen linear and its adapter: base, lora_A (r, in) f32, lora_B (out, r) f32, both trained."""

    def __init__(self, base: Linear, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.scale, self.dropout = scale, dropout
        self.out_features, self.in_features = base.out_features, base.in_features

    @classmethod
    def from_base(cls, base: Linear, config: LoraConfig, generator: torch.Generator) -> LoraLinear:
        """A fresh adapter that changes nothing yet: A kaiming-uniform(a=√5), that is U(-1/√in, 1/√in), and B zero."""
        device = base.weight.device
        bound = 1.0 / math.sqrt(base.in_features)
        a = torch.empty(config.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(base.out_features, config.rank)
        return cls(base, a.to(device), b.to(device), config.scale, config.dropout)

    def merge(self, dtype: torch.dtype) -> Linear:
        """The adapted weight W + scale * B A as a dense linear, summed in fp32."""
        weight = self.base.weight
        dense = nf4.dequantize(weight, torch.float32) if isinstance(weight, QuantizedTensor) else weight.float()
        return Linear((dense + self.scale * (self.lora_B.detach() @ self.lora_A.detach())).to(dtype), self.base.bias)


AnyLinear = Linear | LoraLinear


class Prologue(Protocol):
    """The elementwise part between a block's hidden state and a product: done again in backward, not saved."""

    def forward(self, h: Tensor) -> Tensor: ...

    def backward(self, dx: Tensor, h: Tensor) -> Tensor: ...


class Identity:
    """x = h."""

    def forward(self, h: Tensor) -> Tensor:
        return h

    def backward(self, dx: Tensor, h: Tensor) -> Tensor:
        return dx


@dataclass(frozen=True)
class Norm:
    """x = rms_norm(h)."""

    weight: Tensor
    eps: float

    def forward(self, h: Tensor) -> Tensor:
        return ops.rms_norm(h, self.weight, self.eps)

    def backward(self, dx: Tensor, h: Tensor) -> Tensor:
        return ops.rms_norm_backward(dx, h, self.weight, self.eps)


class SwiGlu:
    """x = silu(gate) * up, of h = (gate | up)."""

    def forward(self, h: Tensor) -> Tensor:
        return ops.swiglu(h)

    def backward(self, dx: Tensor, h: Tensor) -> Tensor:
        return ops.swiglu_backward(dx, h)


class Panel:
    """One buffer that NF4 weights are dequantised into, layer after layer: (out, in) in the compute dtype."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def dense(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """The weight as (out, in) `dtype`; an NF4 one is valid until the next call."""
        if isinstance(weight, Tensor):
            return weight.to(dtype)
        n = weight.numel
        if self._buffer.numel() < n or self._buffer.dtype != dtype or self._buffer.device != weight.device:
            self._buffer = torch.empty(n, dtype=dtype, device=weight.device)
        return ops.dequantize(weight, dtype, self._buffer[:n].view(weight.shape))


@dataclass(frozen=True)
class ProjectPlan:
    """How the products of a step are done: shared panel, dropout key, what is saved, whether the values are needed."""

    panel: Panel
    dropout_key: int | None = None
    """32 bits of (seed, step, layer); None: no dropout (evaluation)."""
    save_input: bool = False
    """Keep the prologue's output too, instead of computing it again in backward."""
    int8: bool = False
    """Large products in 8 bits where ops.project can: in training alone, for what is evaluated is the model as it is stored."""
    values: bool = True
    """False in a recomputation whose result nobody reads: only what the backward needs is made."""

    def numbered(self, first: int) -> ProjectPlan:
        """The same plan with dropout keys of its own for the linears from number `first` of the layer."""
        return self if self.dropout_key is None else replace(self, dropout_key=self.dropout_key + first)


def project(h: Tensor, prologue: Prologue, linears: Sequence[AnyLinear], plan: ProjectPlan) -> Tensor:
    """Products of prologue(h) with each linear, side by side: h (N, in) -> (N, sum of out_features).

    The backward adds the adapters' gradients to their .grad by itself: autograd would make them anew at every step, between
    tensors that come and go, and the heap would never be whole again.
    """
    if torch.is_grad_enabled():
        return _Project.apply(h, prologue, tuple(linears), plan)
    return _forward(prologue.forward(h), linears, plan)[0]


@dataclass(frozen=True)
class _Kept:
    """What a forward leaves to its backward: ops.project's one tensor (`fused`), or each adapter's dropout(x) A^T."""

    reduced: list[Tensor]
    fused: bool


def _forward(x: Tensor, linears: Sequence[AnyLinear], plan: ProjectPlan) -> tuple[Tensor, _Kept]:
    """The products, and what their backward wants."""
    y = x.new_empty(x.shape[0], sum(linear.out_features for linear in linears))
    fused = _fusible(x, linears, plan)
    reduced = ops.project(x, fused, y if plan.values else None, plan.int8) if fused is not None else None
    kept = _Kept([reduced], True) if reduced is not None else _Kept([], False)
    column = 0
    for number, linear in enumerate(linears):
        part = y[:, column : column + linear.out_features]
        column += linear.out_features
        base = _base(linear)
        if not kept.fused:
            if plan.values and isinstance(base.weight, QuantizedTensor) and x.shape[0] <= ops.FEW_ROWS:
                part.copy_(ops.matvec(x, base.weight))
            elif plan.values:
                ops.product_into(part, x, plan.panel.dense(base.weight, x.dtype).T)
            if isinstance(linear, LoraLinear):
                xa = _dropped(x, linear, plan, number) @ linear.lora_A.detach().to(x.dtype).T
                if plan.values:
                    ops.add_product(part, xa, linear.lora_B.detach().to(x.dtype).T, linear.scale)
                kept.reduced.append(xa)
        if base.bias is not None and plan.values:
            part += base.bias
    return y, kept


def _backward(dy: Tensor, x: Tensor, kept: _Kept, linears: Sequence[AnyLinear], plan: ProjectPlan) -> Tensor:
    """dx (N, in); adds to the adapters' gradients."""
    if kept.fused:
        gradients = [_gradients(linear) for linear in linears if isinstance(linear, LoraLinear)]
        here = _fusible(x, linears, plan)  # again: a streamed layer may lie elsewhere by now
        assert here is not None
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        fused = ops.project_backward(dy, x, kept.reduced[0], here, gradients, plan.int8)
        assert fused is not None
        return fused
    dx, reduced, column = torch.zeros_like(x), iter(kept.reduced), 0
    for number, linear in enumerate(linears):
        part = dy[:, column : column + linear.out_features]
        column += linear.out_features
        dx.addmm_(part, plan.panel.dense(_base(linear).weight, dy.dtype))
        if isinstance(linear, LoraLinear):
            _adapter_backward(part, x, next(reduced), linear, plan, number, dx)
    return dx


def _gradients(linear: LoraLinear) -> tuple[Tensor, Tensor]:
    """The .grad of A and B, made where they are not there yet."""
    for parameter in (linear.lora_A, linear.lora_B):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    assert linear.lora_A.grad is not None
    assert linear.lora_B.grad is not None
    return linear.lora_A.grad, linear.lora_B.grad


def _base(linear: AnyLinear) -> Linear:
    return linear.base if isinstance(linear, LoraLinear) else linear


def _fusible(x: Tensor, linears: Sequence[AnyLinear], plan: ProjectPlan) -> list[Adapted] | None:
    """The linears as ops.project takes them; None where there are too few rows, or a weight is dense."""
    if x.shape[0] < FUSED_ROWS or x.dtype != torch.bfloat16 or x.stride(1) != 1:
        return None
    fused = []
    for number, linear in enumerate(linears):
        weight = _base(linear).weight
        if not isinstance(weight, QuantizedTensor):
            return None
        if isinstance(linear, LoraLinear):
            drops = plan.dropout_key is not None and linear.dropout > 0.0
            key = plan.dropout_key + number if drops and plan.dropout_key is not None else None
            a, b = linear.lora_A.detach(), linear.lora_B.detach()
            fused.append(Adapted(weight, a, b, linear.scale, linear.dropout, key))
        else:
            fused.append(Adapted(weight))
    return fused


def _dropped(x: Tensor, linear: LoraLinear, plan: ProjectPlan, number: int) -> Tensor:
    if plan.dropout_key is None or linear.dropout == 0.0:
        return x
    return ops.dropout(x, linear.dropout, plan.dropout_key + number)


class _Project(torch.autograd.Function):
    """project() with its hand-written backward, which needs the packed weights alone."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, prologue: Prologue, linears: tuple[AnyLinear, ...], plan: ProjectPlan) -> Tensor:
        x = prologue.forward(h)
        y, kept = _forward(x, linears, plan)
        ctx.prologue, ctx.linears, ctx.plan, ctx.fused = prologue, linears, plan, kept.fused
        ctx.save_for_backward(h, *([x] if plan.save_input else []), *kept.reduced)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, *rest = ctx.saved_tensors
        x = rest.pop(0) if ctx.plan.save_input else ctx.prologue.forward(h)
        dx = _backward(dy, x, _Kept(rest, ctx.fused), ctx.linears, ctx.plan)
        return ctx.prologue.backward(dx, h), None, None, None


def _adapter_backward(
    dy: Tensor, x: Tensor, xa: Tensor, linear: LoraLinear, plan: ProjectPlan, number: int, dx: Tensor
) -> None:
    """Add dA (r, in) and dB (out, r) to the gradients, and the adapter's share to dx (N, in)."""
    a, b = linear.lora_A.detach().to(x.dtype), linear.lora_B.detach().to(x.dtype)
    dxa = dy @ b  # (N, r)
    da, db = _gradients(linear)
    da.add_(dxa.T @ _dropped(x, linear, plan, number), alpha=linear.scale)
    db.add_(dy.T @ xa, alpha=linear.scale)
    if plan.dropout_key is None or linear.dropout == 0.0:
        dx.addmm_(dxa, a, alpha=linear.scale)
    else:
        dx += _dropped(dxa @ a * linear.scale, linear, plan, number)
