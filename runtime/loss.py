"""The loss in chunks over the trained rows only, with the gradient of the hidden states computed on the way.

It is the cross-entropy of the targets, or the divergence from soft targets: KL(p || q) of the distributions p and q in which
each of the K likeliest tokens of the soft targets counts for itself, and all other tokens count as one.

At most `chunk` rows of logits (chunk, V) exist at a time, and rows that carry no loss never meet the head. The last chunk is
padded with rows of weight 0, so that every product has the same shape (see runner.ROW_MULTIPLE).

A step's `loss_weights` (N,) are its batch's loss_mask divided by the trained tokens of the whole step, so that the weighted
sum of a step's losses is their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from edgetune.runtime import ops, vocabulary
from edgetune.runtime.batch import SoftTargets
from edgetune.runtime.model import Llama

Check = Callable[[], None]
"""Called before each chunk: a vocabulary is so large that all chunks together take seconds. It may raise to end the work."""
LEAST_PROBABILITY = 1e-6
"""Smallest probability that the divergence gives the tokens outside the K likeliest, so that it stays finite. Chosen by hand:
differences of float32 probabilities near 1 mean nothing below it."""


@torch.no_grad()
def chunked_loss(
    model: Llama,
    h: Tensor,
    targets: Tensor,
    loss_weights: Tensor,
    chunk: int,
    soft: SoftTargets | None = None,
    check: Check = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the losses in nats, () f32, and its gradient (N, D) for the last block's output h (N, D).

    targets (N,) int64; loss_weights (N,) f32, 0 for tokens that are context only; soft: N rows that replace the targets.
    """
    loss = torch.zeros((), dtype=torch.float32, device=h.device)
    dx = torch.zeros_like(h)
    for rows, count, logits in _chunks(model, h, loss_weights, chunk, check):
        weight = loss_weights[rows]
        weight[count:] = 0
        if soft is None:
            losses = ops.cross_entropy_(logits, targets[rows], weight)
        else:
            losses = divergence_(logits, soft.rows(rows), weight)
        loss += (losses * weight).sum()
        # `logits` now holds the gradient of this chunk's loss.
        dx[rows[:count]] = vocabulary.input_gradient(logits, model.head)[:count]
    return loss, ops.rms_norm_backward(dx, h, model.norm, model.config.rms_norm_eps)


def divergence_(logits: Tensor, soft: SoftTargets, weights: Tensor) -> Tensor:
    """Return the divergences (R,) f32 in nats, and turn logits (R, V) into the gradient of sum(weights * divergences).

    soft: R rows; weights (R,) f32.
    """
    p, likeliest = soft.probabilities, soft.ids
    kept = logits.gather(1, likeliest).float()  # (R, K)
    # Afterwards logits hold weights * softmax, but for the likeliest column, which is replaced below.
    log_z = ops.cross_entropy_(logits, likeliest[:, 0].contiguous(), weights) + kept[:, 0]
    log_q = kept - log_z.unsqueeze(1)
    q = log_q.exp()
    rest_p, rest_q = ((1 - kept.sum(1)).clamp(min=LEAST_PROBABILITY) for kept in (p, q))
    divergence = (torch.special.xlogy(p, p) - p * log_q).sum(1) + rest_p * (rest_p / rest_q).log()
    logits.mul_((1 - rest_p / rest_q).unsqueeze(1))
    logits.scatter_(1, likeliest, (weights.unsqueeze(1) * (q - p)).to(logits.dtype))
    return divergence


def warm_up_head(model: Llama, chunk: int) -> None:
    """Run each of the head's products once, in the shapes that training will use, before the first step.

    oneDNN compiles a product when it first meets its shape, and keeps about a thousand small allocations for it. Made in the
    middle of a step they would end up between the step's tensors and fragment the heap.
    """
    h = torch.zeros(1, model.config.hidden_size, dtype=model.dtype, device=model.device)
    target = torch.zeros(1, dtype=torch.int64, device=model.device)
    chunked_loss(model, h, target, torch.ones(1, device=model.device), chunk)


@torch.no_grad()
def token_nats(model: Llama, h: Tensor, targets: Tensor, loss_mask: Tensor, chunk: int, check: Check = lambda: None) -> Tensor:
    """Return the loss in nats, (N,) f32, of each target whose loss_mask is not 0, and 0 elsewhere.

    h (N, D) is the last block's output; targets (N,) int64; loss_mask (N,) f32.
    """
    nats = torch.zeros(len(h), dtype=torch.float32, device=h.device)
    for rows, count, logits in _chunks(model, h, loss_mask, chunk, check):
        nats[rows[:count]] = ops.cross_entropy_(logits, targets[rows], torch.ones_like(loss_mask[rows]))[:count]
    return nats


@torch.no_grad()
def nats_and_hits(
    model: Llama, h: Tensor, targets: Tensor, loss_mask: Tensor, chunk: int, check: Check = lambda: None
) -> tuple[Tensor, Tensor]:
    """Return what `token_nats` returns, and (N,) bool: True for each of these targets that is the likeliest token."""
    nats = torch.zeros(len(h), dtype=torch.float32, device=h.device)
    hits = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    for rows, count, logits in _chunks(model, h, loss_mask, chunk, check):
        likeliest = logits.argmax(1)  # before the next line overwrites the logits
        nats[rows[:count]] = ops.cross_entropy_(logits, targets[rows], torch.ones_like(loss_mask[rows]))[:count]
        hits[rows[:count]] = (likeliest == targets[rows])[:count]
    return nats, hits


def _chunks(model: Llama, h: Tensor, loss_weights: Tensor, chunk: int, check: Check) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield (rows (chunk,), count, logits (chunk, V)) over the rows whose weight is not 0; rows after `count` are padding."""
    trained = loss_weights.nonzero().squeeze(1)
    for rows in trained.split(chunk):
        check()
        count = len(rows)
        rows = torch.nn.functional.pad(rows, (0, chunk - count))
        yield rows, count, model.logits(h[rows])
