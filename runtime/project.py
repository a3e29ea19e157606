"""The fused product that training is made of: several linears that share an input, as one node of autograd.

`project` takes the input before its norm (or before SwiGLU) and saves only that, since the elementwise part is cheap to
compute again. The backward needs the weights alone, as they are stored: fused kernels read those in 4 bits as they are;
without such kernels they are dequantised once more into a panel that all linears share, as are rows of 8 bits. Dense weights
of the compute dtype are multiplied where they lie.

Shapes: h (N, in) before the prologue and x (N, in) after it, W (out, in), lora_A (r, in), lora_B (out, r);
y = x W^T + scale * dropout(x) A^T B^T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from edgetune.runtime import int8, ops
from edgetune.runtime.int8 import Int8Rows
from edgetune.runtime.linear import AnyLinear, LoraLinear, base_of
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops_types import FEW_ROWS, Adapted, Weight

FUSED_ROWS = 64
"""Least number of rows for which 4-bit products go to ops.project. Up to FEW_ROWS they go to ops.matvec; in between, neither
is faster than dequantising the weight."""


class Prologue(Protocol):
    """The elementwise part between a block's hidden state and a product; the backward computes it again."""

    def forward(self, h: Tensor) -> Tensor:
        """Return x (N, in)."""

    def backward(self, dx: Tensor, h: Tensor) -> Tensor:
        """Return the gradient of h, given the gradient dx of x."""


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
    """x = silu(gate) * up, where h = (gate | up)."""

    def forward(self, h: Tensor) -> Tensor:
        return ops.swiglu(h)

    def backward(self, dx: Tensor, h: Tensor) -> Tensor:
        return ops.swiglu_backward(dx, h)


class GeGlu:
    """x = gelu(gate) * up, where h = (gate | up) and gelu is approximated with tanh."""

    def forward(self, h: Tensor) -> Tensor:
        return ops.geglu(h)

    def backward(self, dx: Tensor, h: Tensor) -> Tensor:
        return ops.geglu_backward(dx, h)


GATED: dict[str, Prologue] = {"silu": SwiGlu(), "gelu_tanh": GeGlu()}
"""The gates of the MLP by the name of their activation in LlamaConfig."""


class Panel:
    """One buffer that weights of another form are made dense in, layer after layer: (out, in) in the compute dtype."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def dense(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Return the weight as (out, in) `dtype`: itself where it is that already, else a copy, valid until the next call."""
        if isinstance(weight, Tensor) and weight.dtype == dtype:
            return weight
        n = math.prod(weight.shape)
        if self._buffer.numel() < n or self._buffer.dtype != dtype or self._buffer.device != weight.device:
            self._buffer = torch.empty(n, dtype=dtype, device=weight.device)
        out = self._buffer[:n].view(weight.shape)
        if isinstance(weight, Tensor):
            return out.copy_(weight)
        return int8.dequantize(weight, dtype, out) if isinstance(weight, Int8Rows) else ops.dequantize(weight, dtype, out)


Watch = Callable[[Sequence[AnyLinear], Tensor], None]
"""Receives linears and their common input x (N, in)."""


@dataclass(frozen=True)
class ProjectPlan:
    """The settings of a pass over the blocks that decide how its products are computed."""

    panel: Panel
    dropout_key: int | None = None
    """32 bits made of (seed, step, layer); None switches dropout off (evaluation)."""
    save_input: bool = False
    """Keep the prologue's output too, instead of computing it again in the backward."""
    int8: bool = False
    """Compute large products in 8 bits where ops.project can. Only in training: an evaluation measures the model as stored."""
    values: bool = True
    """False in a recomputation whose result nobody reads: compute only the tensors that the backward needs."""
    watch: Watch | None = None
    """Called before each product of a pass without gradients; it may replace the linears' weights."""
    check: Callable[[], None] = lambda: None
    """Called before each product, forward and backward. It may raise to end the pass."""

    def numbered(self, first: int) -> ProjectPlan:
        """Return the plan with the dropout keys of the layer's linears from number `first` on."""
        return self if self.dropout_key is None else replace(self, dropout_key=self.dropout_key + first)


def project(h: Tensor, prologue: Prologue, linears: Sequence[AnyLinear], plan: ProjectPlan) -> Tensor:
    """Multiply prologue(h) by each linear, side by side: h (N, in); return (N, sum of out_features).

    The backward adds the adapters' gradients to their .grad itself. Autograd would allocate them anew at every step, between
    short-lived tensors, and fragment the heap.
    """
    if torch.is_grad_enabled():
        return _Project.apply(h, prologue, tuple(linears), plan)
    plan.check()
    x = prologue.forward(h)
    if plan.watch is not None:
        plan.watch(linears, x)
    return _forward(x, linears, plan)[0]


@dataclass(frozen=True)
class _Reduced:
    """The tensors that a forward saves for its backward: dropout(x) A^T (N, r) of each adapter.

    fused: ops.project computed them, as one tensor in a layout of its own.
    """

    tensors: list[Tensor]
    fused: bool


def _columns(x: Tensor, linears: Sequence[AnyLinear]) -> Iterator[Tensor]:
    """Yield the columns of x (N, sum of out_features) that belong to each linear."""
    column = 0
    for linear in linears:
        yield x[:, column : column + linear.out_features]
        column += linear.out_features


def _forward(x: Tensor, linears: Sequence[AnyLinear], plan: ProjectPlan) -> tuple[Tensor, _Reduced]:
    """Return the products y (N, sum of out_features) and the tensors that the backward needs."""
    y = x.new_empty(x.shape[0], sum(linear.out_features for linear in linears))
    adapted = _fusible(x, linears, plan)
    fused = ops.project(x, adapted, y if plan.values else None, plan.int8) if adapted is not None else None
    reduced = _Reduced([], False) if fused is None else _Reduced([fused], True)
    for number, (linear, part) in enumerate(zip(linears, _columns(y, linears), strict=True)):
        base = base_of(linear)
        if not reduced.fused:
            if plan.values and (few := _few_rows(x, base.weight)) is not None:
                part.copy_(few)
            elif plan.values:
                ops.product_into(part, x, plan.panel.dense(base.weight, x.dtype).T)
            if isinstance(linear, LoraLinear):
                xa = _dropped(x, linear, plan, number) @ linear.lora_A.detach().to(x.dtype).T
                if plan.values:
                    ops.add_product(part, xa, linear.lora_B.detach().to(x.dtype).T, linear.scale)
                reduced.tensors.append(xa)
        if base.bias is not None and plan.values:
            part += base.bias
    return y, reduced


def _few_rows(x: Tensor, weight: Weight) -> Tensor | None:
    """Return x (n, in) times a packed W^T, n up to FEW_ROWS, without making W dense; None where there is no such product."""
    if x.shape[0] > FEW_ROWS or isinstance(weight, Tensor):
        return None
    return ops.matvec(x, weight) if isinstance(weight, QuantizedTensor) else ops.int8_matvec(x, weight)


def _backward(dy: Tensor, x: Tensor, reduced: _Reduced, linears: Sequence[AnyLinear], plan: ProjectPlan) -> Tensor:
    """Return dx (N, in), given dy (N, sum of out_features), and add to the adapters' gradients."""
    if reduced.fused:
        gradients = [_gradients(linear) for linear in linears if isinstance(linear, LoraLinear)]
        # Collected anew, not kept from the forward: a streamed layer may have moved to another slot since.
        adapted = _fusible(x, linears, plan)
        assert adapted is not None
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        fused = ops.project_backward(dy, x, reduced.tensors[0], adapted, gradients, plan.int8)
        assert fused is not None
        return fused
    dx, rest = torch.zeros_like(x), iter(reduced.tensors)
    for number, (linear, part) in enumerate(zip(linears, _columns(dy, linears), strict=True)):
        dx.addmm_(part, plan.panel.dense(base_of(linear).weight, dy.dtype))
        if isinstance(linear, LoraLinear):
            _adapter_backward(part, x, next(rest), linear, plan, number, dx)
    return dx


def _adapter_backward(
    dy: Tensor, x: Tensor, xa: Tensor, linear: LoraLinear, plan: ProjectPlan, number: int, dx: Tensor
) -> None:
    """Add dA (r, in) and dB (out, r) to the gradients, and the adapter's part to dx (N, in); xa is dropout(x) A^T (N, r)."""
    a, b = linear.lora_A.detach().to(x.dtype), linear.lora_B.detach().to(x.dtype)
    dxa = dy @ b  # (N, r)
    da, db = _gradients(linear)
    da.add_(dxa.T @ _dropped(x, linear, plan, number), alpha=linear.scale)
    db.add_(dy.T @ xa, alpha=linear.scale)
    if plan.dropout_key is None or linear.dropout == 0.0:
        dx.addmm_(dxa, a, alpha=linear.scale)
    else:
        # The hash drops the same positions as in the forward, so dropout is its own backward.
        dx += _dropped(dxa @ a * linear.scale, linear, plan, number)


def _gradients(linear: LoraLinear) -> tuple[Tensor, Tensor]:
    """Return the .grad of A and of B, creating them where they do not exist yet."""
    for parameter in (linear.lora_A, linear.lora_B):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    assert linear.lora_A.grad is not None
    assert linear.lora_B.grad is not None
    return linear.lora_A.grad, linear.lora_B.grad


def _fusible(x: Tensor, linears: Sequence[AnyLinear], plan: ProjectPlan) -> list[Adapted] | None:
    """Return the linears as ops.project takes them, or None where x has too few rows or a weight is not in 4 bits."""
    if x.shape[0] < FUSED_ROWS or not ops.fuses(x.device, x.dtype) or x.stride(1) != 1:
        return None
    adapted = []
    for number, linear in enumerate(linears):
        weight = base_of(linear).weight
        if not isinstance(weight, QuantizedTensor):
            return None
        if isinstance(linear, LoraLinear):
            drops = plan.dropout_key is not None and linear.dropout > 0.0
            key = plan.dropout_key + number if drops and plan.dropout_key is not None else None
            a, b = linear.lora_A.detach(), linear.lora_B.detach()
            adapted.append(Adapted(weight, a, b, linear.scale, linear.dropout, key))
        else:
            adapted.append(Adapted(weight))
    return adapted


def _dropped(x: Tensor, linear: LoraLinear, plan: ProjectPlan, number: int) -> Tensor:
    """Return x with the dropout of linear `number`, or x itself where there is no dropout."""
    if plan.dropout_key is None or linear.dropout == 0.0:
        return x
    return ops.dropout(x, linear.dropout, plan.dropout_key + number)


class _Project(torch.autograd.Function):
    """The autograd node of `project`, with a backward written by hand that needs the packed weights alone."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, prologue: Prologue, linears: tuple[AnyLinear, ...], plan: ProjectPlan) -> Tensor:
        plan.check()
        x = prologue.forward(h)
        y, reduced = _forward(x, linears, plan)
        ctx.prologue, ctx.linears, ctx.plan, ctx.fused = prologue, linears, plan, reduced.fused
        ctx.save_for_backward(h, *([x] if plan.save_input else []), *reduced.tensors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.plan.check()
        h, *rest = ctx.saved_tensors
        x = rest.pop(0) if ctx.plan.save_input else ctx.prologue.forward(h)
        dx = _backward(dy, x, _Reduced(rest, ctx.fused), ctx.linears, ctx.plan)
        return ctx.prologue.backward(dx, h), None, None, None
