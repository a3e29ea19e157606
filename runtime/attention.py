"""Causal attention in tiles, forward and backward, in plain torch calls: never a T x T matrix, no head repeated.

The forward keeps the log-sum-exp of each row, from which the backward rebuilds the probabilities tile by tile
(FlashAttention, Dao et al. 2022, arXiv 2205.14135). Back ends with a kernel of their own compute the same.

Shapes: q (N, H, hd); k, v (M, KV, hd); o (N, H, hd); lse (H, N) f32. H is a multiple of KV: G = H / KV.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from edgetune.runtime.ops_types import AttentionGradients, AttentionInputs, Segment

TILE = 128
"""Query rows in a tile: the fastest size of 64 to 512, since its scores stay in cache."""


class _Tile(NamedTuple):
    """Queries `row` to `row_end` and the keys that some of them see, `key` to `key_end`; query i sees keys to i + offset."""

    row: int
    row_end: int
    key: int
    key_end: int
    offset: int


def _tiles(segment: Segment, window: int | None) -> Iterator[_Tile]:
    """Yield the tiles of one segment."""
    q_start, q_end, k_start, k_end = segment
    offset = k_end - q_end
    for row in range(q_start, q_end, TILE):
        row_end = min(row + TILE, q_end)
        key = k_start if window is None else max(k_start, row + offset - window + 1)
        yield _Tile(row, row_end, key, row_end + offset, offset)


def _hidden(tile: _Tile, window: int | None, device: torch.device) -> Tensor:
    """Return the causal mask of a tile, bool (rows, keys): True where a query must not see a key."""
    queries = torch.arange(tile.row, tile.row_end, device=device).unsqueeze(1) + tile.offset
    keys = torch.arange(tile.key, tile.key_end, device=device)
    hidden = keys > queries
    return hidden if window is None else hidden | (keys <= queries - window)


def _stack_heads(x: Tensor, groups: int) -> Tensor:
    """Reshape (rows, H, hd) to (KV, G * rows, hd): the G query heads of a key head become rows of one product."""
    rows, heads, size = x.shape
    return x.reshape(rows, heads // groups, groups, size).permute(1, 2, 0, 3).reshape(heads // groups, groups * rows, size)


def _unstack_heads(x: Tensor, groups: int) -> Tensor:
    """Reshape (KV, G * rows, hd) back to (rows, H, hd)."""
    kv, stacked, size = x.shape
    rows = stacked // groups
    return x.view(kv, groups, rows, size).permute(2, 0, 1, 3).reshape(rows, kv * groups, size)


def _scores(q: Tensor, keys: Tensor, groups: int, scale: float, hidden: Tensor) -> Tensor:
    """Return the scaled scores of a tile, f32 (KV, G * rows, keys), -inf where hidden."""
    product = torch.bmm(_stack_heads(q, groups), keys.transpose(1, 2)).float() * scale
    return product.masked_fill_(hidden.repeat(groups, 1), float("-inf"))


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Return o (N, H, hd) in q's dtype and lse (H, N) f32; rows outside every segment are left uninitialised."""
    q, k, v, window = inputs.q, inputs.k, inputs.v, inputs.window
    groups = q.shape[1] // k.shape[1]
    out, lse = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32),
    )
    for segment in inputs.segments:
        for tile in _tiles(segment, window):
            row, row_end, key, key_end, _ = tile
            keys, values = k[key:key_end].transpose(0, 1), v[key:key_end].transpose(0, 1)  # (KV, keys, hd)
            scores = _scores(q[row:row_end], keys, groups, inputs.scale, _hidden(tile, window, q.device))
            # A tile holds every key that its queries see, so its softmax is complete: no running maximum is needed.
            log_z = torch.logsumexp(scores, dim=-1, keepdim=True)
            product = torch.bmm(torch.exp(scores - log_z).to(q.dtype), values)
            out[row:row_end] = _unstack_heads(product, groups)
            lse[:, row:row_end] = log_z.view(q.shape[1], row_end - row)
    return out, lse


def backward(inputs: AttentionInputs, o: Tensor, lse: Tensor, do: Tensor, gradients: AttentionGradients) -> None:
    """Write dq (N, H, hd), dk and dv (M, KV, hd), given the forward's o and lse and the gradient do (N, H, hd) of o.

    With P the probabilities and S the scores: dV = P^T dO, dP = dO V^T, dS = P * (dP - delta) * scale, dQ = dS K, dK = dS^T Q.
    """
    q, k, v, window, scale = inputs.q, inputs.k, inputs.v, inputs.window, inputs.scale
    groups, heads = q.shape[1] // k.shape[1], q.shape[1]
    # The softmax's backward subtracts from dP its mean under P. That is rowsum(dO * O) (FlashAttention, appendix B.2), known
    # before any tile is rebuilt.
    delta = (do.float() * o.float()).sum(-1)  # (N, H)
    # A key meets many tiles of queries: its gradients are summed in fp32 and rounded once, at the end.
    key_grad, value_grad = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    for segment in inputs.segments:
        for tile in _tiles(segment, window):
            row, row_end, key, key_end, _ = tile
            keys, values = k[key:key_end].transpose(0, 1), v[key:key_end].transpose(0, 1)  # (KV, keys, hd)
            queries, grads = _stack_heads(q[row:row_end], groups), _stack_heads(do[row:row_end], groups)
            scores = _scores(q[row:row_end], keys, groups, scale, _hidden(tile, window, q.device))
            per_row = (k.shape[1], groups * (row_end - row), 1)
            # lse gives the probabilities at once, without another softmax; hidden scores are -inf and become 0.
            p = torch.exp(scores - lse[:, row:row_end].reshape(per_row))  # (KV, G * rows, keys)
            value_grad[key:key_end] += torch.bmm(p.to(q.dtype).transpose(1, 2), grads).transpose(0, 1)
            dp = torch.bmm(grads, values.transpose(1, 2)).float()
            ds = (p * (dp - delta[row:row_end].T.reshape(heads, -1).reshape(per_row)) * scale).to(q.dtype)
            # Each query lies in one tile only, so dq is written; a key may lie in several, so dk is added to.
            gradients.dq[row:row_end] = _unstack_heads(torch.bmm(ds, keys), groups)
            key_grad[key:key_end] += torch.bmm(ds.transpose(1, 2), queries).transpose(0, 1)
    gradients.dk.copy_(key_grad)
    gradients.dv.copy_(value_grad)
