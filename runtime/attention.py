"""Causal attention in tiles, forward and backward, in plain torch calls: never a T x T matrix, no head repeated.

The log-sum-exp of each row is kept, so that the backward rebuilds the probabilities tile by tile (FlashAttention, Dao et al.
2022, arXiv 2205.14135). Back ends with a kernel of their own take the same arguments.

Shapes: q (N, H, hd); k, v (M, KV, hd); o (N, H, hd); lse (H, N) f32. H is a multiple of KV: G = H / KV.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """One document's range of queries and of keys in packed tensors; its last query sees its last key.

    Queries of a segment see keys of the same segment alone. A packed training batch has equal ranges (`packed`); a prefill
    that continues a KV cache has more keys than queries.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int

    @classmethod
    def packed(cls, start: int, end: int) -> Segment:
        """Return the segment whose queries and keys are both tokens `start` to `end` of a packed batch."""
        return cls(start, end, start, end)


TILE = 128
"""Query rows a tile: of 64 to 512 the fastest that keeps scores in cache."""


def _tiles(segment: Segment, window: int | None) -> Iterator[tuple[int, int, int, int, int]]:
    """(row, row_end, key, key_end, offset) of each query tile; query i sees keys up to i + offset."""
    q_start, q_end, k_start, k_end = segment
    offset = k_end - q_end
    for row in range(q_start, q_end, TILE):
        row_end = min(row + TILE, q_end)
        key = k_start if window is None else max(k_start, row + offset - window + 1)
        yield row, row_end, key, row_end + offset, offset


def _hidden(tile: tuple[int, int, int, int, int], window: int | None, device: torch.device) -> Tensor:
    """Bool (rows, keys): True where a query may not look."""
    row, row_end, key, key_end, offset = tile
    queries = torch.arange(row, row_end, device=device).unsqueeze(1) + offset
    keys = torch.arange(key, key_end, device=device)
    hidden = keys > queries
    return hidden if window is None else hidden | (keys <= queries - window)


def _stack_heads(x: Tensor, groups: int) -> Tensor:
    """(rows, H, hd) -> (KV, G * rows, hd): the G query heads of one key head as rows of one product."""
    rows, heads, size = x.shape
    return x.reshape(rows, heads // groups, groups, size).permute(1, 2, 0, 3).reshape(heads // groups, groups * rows, size)


def _unstack_heads(x: Tensor, groups: int) -> Tensor:
    """(KV, G * rows, hd) -> (rows, H, hd)."""
    kv, stacked, size = x.shape
    rows = stacked // groups
    return x.view(kv, groups, rows, size).permute(2, 0, 1, 3).reshape(rows, kv * groups, size)


def forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """-> o (N, H, hd) in q's dtype, lse (H, N) f32."""
    groups = q.shape[1] // k.shape[1]
    out, lse = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32),
    )
    for segment in segments:
        for tile in _tiles(segment, window):
            row, row_end, key, key_end, _ = tile
            keys, values = k[key:key_end].transpose(0, 1), v[key:key_end].transpose(0, 1)  # (KV, keys, hd)
            scores = _scores(q[row:row_end], keys, groups, scale, _hidden(tile, window, q.device))
            log_z = torch.logsumexp(scores, dim=-1, keepdim=True)
            product = torch.bmm(torch.exp(scores - log_z).to(q.dtype), values)
            out[row:row_end] = _unstack_heads(product, groups)
            lse[:, row:row_end] = log_z.view(q.shape[1], row_end - row)
    return out, lse


def _scores(q: Tensor, keys: Tensor, groups: int, scale: float, hidden: Tensor) -> Tensor:
    """f32 (KV, G * rows, keys): scaled products, -inf where hidden."""
    product = torch.bmm(_stack_heads(q, groups), keys.transpose(1, 2)).float() * scale
    return product.masked_fill_(hidden.repeat(groups, 1), float("-inf"))


def backward(
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
    """Write the gradients of q, k and v into dq (N, H, hd), dk and dv (M, KV, hd)."""
    groups, heads = q.shape[1] // k.shape[1], q.shape[1]
    delta = (do.float() * o.float()).sum(-1)  # (N, H): the softmax's own mean of dP
    key_grad, value_grad = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    for segment in segments:
        for tile in _tiles(segment, window):
            row, row_end, key, key_end, _ = tile
            keys, values = k[key:key_end].transpose(0, 1), v[key:key_end].transpose(0, 1)
            queries, grads = _stack_heads(q[row:row_end], groups), _stack_heads(do[row:row_end], groups)
            scores = _scores(q[row:row_end], keys, groups, scale, _hidden(tile, window, q.device))
            shape = (k.shape[1], groups * (row_end - row), 1)
            p = torch.exp(scores - lse[:, row:row_end].reshape(shape))
            value_grad[key:key_end] += torch.bmm(p.to(q.dtype).transpose(1, 2), grads).transpose(0, 1)
            dp = torch.bmm(grads, values.transpose(1, 2)).float()
            ds = (p * (dp - delta[row:row_end].T.reshape(heads, -1).reshape(shape)) * scale).to(q.dtype)
            dq[row:row_end] = _unstack_heads(torch.bmm(ds, keys), groups)
            key_grad[key:key_end] += torch.bmm(ds.transpose(1, 2), queries).transpose(0, 1)
    dk.copy_(key_grad)
    dv.copy_(value_grad)
