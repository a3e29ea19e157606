"""torch's flash attention for packed rows, with the face of runtime/attention.py, which says what is computed.

The operator takes documents by their cumulative lengths, so that none sees another, and aligns the last query of each with
its last key, as our segments do. What it does not take goes to the tiles of plain torch calls: fp32, cards before Ampere,
heads that are no multiple of 8 or larger than 192, segments with rows between them.

Unverified on a card: the tests give it a stand-in for the operator, made of runtime/attention.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime import attention as tiled
from edgetune.runtime.attention import Segment

MAX_HEAD_DIM = 192
"""Of larger heads the operator is said to have no backward on other cards than A100 and H100 (flash-attention's README)."""
_AMPERE = 8


@dataclass(frozen=True)
class Lengths:
    """Segments as the operator takes them: where each begins, and at last the end, i32 (count + 1,); the longest."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


@functools.lru_cache(maxsize=16)
def lengths(segments: tuple[Segment, ...], rows: int, keys: int, device: torch.device) -> Lengths | None:
    """The segments of `rows` queries and `keys` keys; None where they leave rows out or are not in order.

    Remembered, since all layers of a step ask for the same and each answer is a copy to the card.
    """
    at_row = at_key = 0
    for q_start, q_end, k_start, k_end in segments:
        if (q_start, k_start) != (at_row, at_key) or q_end <= q_start or k_end < k_start:
            return None
        at_row, at_key = q_end, k_end
    if (at_row, at_key) != (rows, keys) or not segments:
        return None
    starts = torch.tensor([[0, *(s[1] for s in segments)], [0, *(s[3] for s in segments)]], dtype=torch.int32).to(device)
    return Lengths(starts[0], starts[1], max(s[1] - s[0] for s in segments), max(s[3] - s[2] for s in segments))


def fits(q: Tensor) -> bool:
    """Whether the operator takes q (N, H, hd): a 16-bit dtype, an Ampere card or later, its head sizes."""
    size = q.shape[2]
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or size % 8 or size > MAX_HEAD_DIM:
        return False
    return bool(torch.backends.cuda.is_flash_attention_available()) and torch.cuda.get_device_capability(q.device)[0] >= _AMPERE


def _planned(q: Tensor, k: Tensor, segments: Sequence[Segment]) -> Lengths | None:
    return lengths(tuple(segments), q.shape[0], k.shape[0], q.device) if fits(q) else None


def _window(window: int | None) -> dict[str, Any]:
    """Keys before and after its own that a query sees; -1: no limit but causality."""
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": -1 if window is None else 0}


def _flash(name: str) -> Any:
    """`_flash_attention_forward` or `_flash_attention_backward` of torch 2.6 and later, which agree in what is passed."""
    return getattr(torch.ops.aten, f"_flash_attention_{name}")


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q (N, H, hd), k and v (M, KV, hd) -> o (N, H, hd), lse (H, N) f32 (of a form of the operator's own in old versions)."""
    plan = _planned(q, k, segments)
    if plan is None:
        return tiled.forward(q, k, v, segments, window, scale)
    o, lse, *_ = _flash("forward")(
        q, k, v, plan.queries, plan.keys, plan.most_queries, plan.most_keys, 0.0, True, False, scale=scale, **_window(window)
    )
    return o, lse


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    segments: Sequence[Segment],
    window: int | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write dq (N, H, hd), dk and dv (M, KV, hd). do, o and lse are the forward's."""
    plan = _planned(q, k, segments)
    if plan is None:
        tiled.backward(do, q, k, v, o, lse, segments, window, scale, dq, dk, dv)
        return
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # its random state
    with _deterministic():
        found = _flash("backward")(
            do, q, k, v, o, lse, plan.queries, plan.keys, plan.most_queries, plan.most_keys, 0.0, True, *no_dropout,
            scale=scale, **_window(window),
        )  # fmt: skip
    for gradient, value in zip((dq, dk, dv), found, strict=True):
        gradient.copy_(value)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """The same plan gives the same bits: without this the operator adds dq up in the order that its blocks finish."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch._C._get_deterministic_fill_uninitialized_memory()
    _set_deterministic(True, False, False)  # the operator writes all that it allocates
    try:
        yield
    finally:
        _set_deterministic(before, warn, fills)


def _set_deterministic(mode: bool, warn_only: bool, fills: bool) -> None:
    """torch.use_deterministic_algorithms without inductor, which newer versions import for it: 150 MB, within a backward.

    fills: whether torch fills what is allocated, where mode is True.
    """
    torch._C._set_deterministic_algorithms(mode, warn_only=warn_only)
    torch._C._set_deterministic_fill_uninitialized_memory(fills)
