"""Cross-entropy in chunks over the trained rows only, the hidden gradient computed on the way.

Never more than `chunk` rows of logits (chunk, V) exist, and rows that carry no loss never meet the head. The last chunk
is filled up with rows of no weight, so that every product has one shape (see runner.ROW_MULTIPLE).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from edgetune.runtime import ops, vocabulary
from edgetune.runtime.model import Llama


@torch.no_grad()
def chunked_cross_entropy(model: Llama, h: Tensor, targets: Tensor, weights: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Sum of weights * nats (), f32, and its gradient (N, D) for the last block's output h (N, D).

    targets (N,) int64; weights (N,) f32, 0 for tokens that are context only.
    """
    loss = torch.zeros((), dtype=torch.float32, device=h.device)
    dx = torch.zeros_like(h)
    for rows, count, logits in _chunks(model, h, weights, chunk):
        weight = weights[rows]
        weight[count:] = 0
        loss += (ops.cross_entropy_(logits, targets[rows], weight) * weight).sum()
        dx[rows[:count]] = vocabulary.input_gradient(logits, model.head)[:count]
    return loss, ops.rms_norm_backward(dx, h, model.norm, model.config.rms_norm_eps)


def meet_head(model: Llama, chunk: int) -> None:
    """Make each of the head's products once, of the shapes that every row's will have.

    oneDNN compiles a product where it first meets its shape, and keeps a thousand small pieces for it. Met before a step's
    tensors lie in the heap, they do not end up between these, where each would leave a hole.
    """
    h = torch.zeros(1, model.config.hidden_size, dtype=model.dtype, device=model.device)
    target = torch.zeros(1, dtype=torch.int64, device=model.device)
    chunked_cross_entropy(model, h, target, torch.ones(1, device=model.device), chunk)


@torch.no_grad()
def token_nats(model: Llama, h: Tensor, targets: Tensor, weights: Tensor, chunk: int) -> Tensor:
    """Nats (N,) f32 of each target whose weight is not 0, and 0 elsewhere; h (N, D) is the last block's output."""
    nats = torch.zeros(len(h), dtype=torch.float32, device=h.device)
    for rows, count, logits in _chunks(model, h, weights, chunk):
        nats[rows[:count]] = ops.cross_entropy_(logits, targets[rows], torch.ones_like(weights[rows]))[:count]
    return nats


def _chunks(model: Llama, h: Tensor, weights: Tensor, chunk: int) -> Iterator[tuple[Tensor, int, Tensor]]:
    """(rows (chunk,), how many of them count, logits (chunk, V)) over the rows whose weight is not 0."""
    trained = weights.nonzero().squeeze(1)
    for rows in trained.split(chunk):
        count = len(rows)
        rows = torch.nn.functional.pad(rows, (0, chunk - count))
        yield rows, count, model.logits(h[rows])
