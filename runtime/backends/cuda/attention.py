"""torch's flash attention for packed documents: the functions of runtime/attention.py, which says what they compute.

The operator takes documents by their cumulative lengths, so that none sees another, and aligns the last query of each with
its last key, as segments do. It does not take fp32, cards before Ampere, head sizes that are larger than 192 or no multiple of
8, or segments with rows between them; those go to the tiles of runtime/attention.py.

Unverified on a card: in the tests a stand-in made of runtime/attention.py takes the operator's place.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime import attention as tiled
from edgetune.runtime.ops_types import AttentionGradients, AttentionInputs, Segment

MAX_HEAD_DIM = 192
"""Largest head size: for larger ones the operator has a backward on A100 and H100 only (flash-attention's README)."""
AMPERE = 8
"""Major compute capability of the first cards that the operator runs on."""


@dataclass(frozen=True)
class Lengths:
    """Segments as the operator takes them: the start of each and the end of the last, i32 (count + 1,), and the longest."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


@functools.lru_cache(maxsize=16)
def lengths(segments: tuple[Segment, ...], rows: int, keys: int, device: torch.device) -> Lengths | None:
    """Return the lengths of segments over `rows` queries and `keys` keys, or None where they skip rows or are out of order.

    Cached: all layers of a step ask for the same lengths, and each answer is a copy to the card.
    """
    at_row = at_key = 0
    for q_start, q_end, k_start, k_end in segments:
        if (q_start, k_start) != (at_row, at_key) or q_end <= q_start or k_end < k_start:
            return None
        at_row, at_key = q_end, k_end
    if (at_row, at_key) != (rows, keys) or not segments:
        return None
    bounds = [[0, *(s[1] for s in segments)], [0, *(s[3] for s in segments)]]
    starts = torch.tensor(bounds, dtype=torch.int32).to(device)
    return Lengths(starts[0], starts[1], max(s[1] - s[0] for s in segments), max(s[3] - s[2] for s in segments))


def fits(q: Tensor) -> bool:
    """Return True if the operator takes q (N, H, hd): a 16-bit dtype, an Ampere card or later, a head size it knows."""
    size = q.shape[2]
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or size % 8 or size > MAX_HEAD_DIM:
        return False
    return bool(torch.backends.cuda.is_flash_attention_available()) and torch.cuda.get_device_capability(q.device)[0] >= AMPERE


def _planned(inputs: AttentionInputs) -> Lengths | None:
    """Return the segments' lengths where the operator takes these inputs, else None."""
    q, k = inputs.q, inputs.k
    return lengths(tuple(inputs.segments), q.shape[0], k.shape[0], q.device) if fits(q) else None


def _window(window: int | None) -> dict[str, Any]:
    """Return the operator's window arguments: keys seen before and after a query's own, -1 for no limit but causality."""
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": -1 if window is None else 0}


def _flash(name: str) -> Any:
    """Return `_flash_attention_forward` or `_flash_attention_backward`, whose arguments are the same since torch 2.6."""
    return getattr(torch.ops.aten, f"_flash_attention_{name}")


def attention_forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Return o (N, H, hd) and lse (H, N) f32; in old versions of torch, lse has a layout of the operator's own."""
    plan = _planned(inputs)
    if plan is None:
        return tiled.forward(inputs)
    o, lse, *_ = _flash("forward")(
        inputs.q, inputs.k, inputs.v, plan.queries, plan.keys, plan.most_queries, plan.most_keys, 0.0, True, False,
        scale=inputs.scale, **_window(inputs.window),
    )  # fmt: skip
    return o, lse


def attention_backward(inputs: AttentionInputs, o: Tensor, lse: Tensor, do: Tensor, gradients: AttentionGradients) -> None:
    """Write the gradients of q, k and v; o and lse are the forward's, do (N, H, hd) is the gradient of o."""
    plan = _planned(inputs)
    if plan is None:
        tiled.backward(inputs, o, lse, do, gradients)
        return
    q, k, v = inputs.q, inputs.k, inputs.v
    # The operator wants the random state of the forward's dropout, and reads none of it since p is 0.
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    with _deterministic():
        found = _flash("backward")(
            do, q, k, v, o, lse, plan.queries, plan.keys, plan.most_queries, plan.most_keys, 0.0, True, *no_dropout,
            scale=inputs.scale, **_window(inputs.window),
        )  # fmt: skip
    for gradient, value in zip((gradients.dq, gradients.dk, gradients.dv), found, strict=True):
        gradient.copy_(value)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Run the operator in torch's deterministic mode: otherwise dq is summed in the order in which its blocks finish."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch._C._get_deterministic_fill_uninitialized_memory()
    _set_deterministic(True, False, False)  # no filling: the operator writes all that it allocates
    try:
        yield
    finally:
        _set_deterministic(before, warn, fills)


def _set_deterministic(mode: bool, warn_only: bool, fills: bool) -> None:
    """Set what torch.use_deterministic_algorithms sets, without importing inductor (150 MB, within a backward) as it does.

    fills: have torch fill new allocations while mode is True.
    """
    torch._C._set_deterministic_algorithms(mode, warn_only=warn_only)
    torch._C._set_deterministic_fill_uninitialized_memory(fills)
