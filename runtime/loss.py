"""Cross-entropy in chunks over the trained rows only, the hidden gradient computed on the way.

Never more than `chunk` rows of logits (chunk, V) exist; rows that carry no loss never meet the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgetune.runtime import ops
from edgetune.runtime.model import Llama


@torch.no_grad()
def chunked_cross_entropy(model: Llama, h: Tensor, targets: Tensor, weights: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Sum of weights * nats (), f32, and its gradient (N, D) for the last block's output h (N, D).

    targets (N,) int64; weights (N,) f32, 0 for tokens that are context only.
    """
    rows = weights.nonzero().squeeze(1)
    every = len(rows) == len(h)
    kept = h if every else h[rows]
    head = model.dense_head()
    x = ops.rms_norm(kept, model.norm, model.config.rms_norm_eps)
    loss = torch.zeros((), dtype=torch.float32, device=h.device)
    dx = torch.empty_like(x)
    for start in range(0, len(rows), chunk):
        part, at = slice(start, start + chunk), rows[start : start + chunk]
        logits = x[part] @ head.T
        loss += (ops.cross_entropy_(logits, targets[at], weights[at]) * weights[at]).sum()
        torch.mm(logits, head, out=dx[part])
    gradient = ops.rms_norm_backward(dx, kept, model.norm, model.config.rms_norm_eps)
    return loss, gradient if every else torch.zeros_like(h).index_copy_(0, rows, gradient)


@torch.no_grad()
def token_nats(model: Llama, h: Tensor, targets: Tensor, weights: Tensor, chunk: int) -> Tensor:
    """Nats (N,) f32 of each target whose weight is not 0, and 0 elsewhere; h (N, D) is the last block's output."""
    rows = weights.nonzero().squeeze(1)
    head = model.dense_head()
    nats = torch.zeros(len(h), dtype=torch.float32, device=h.device)
    for start in range(0, len(rows), chunk):
        at = rows[start : start + chunk]
        logits = ops.rms_norm(h[at], model.norm, model.config.rms_norm_eps) @ head.T
        nats[at] = ops.cross_entropy_(logits, targets[at], torch.ones_like(weights[at]))
    return nats
