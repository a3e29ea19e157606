"""Generate text as token ids: prefill a prompt, then decode and sample one token at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgetune.runtime import ops
from edgetune.runtime.errors import ModelError
from edgetune.runtime.model import KVCache
from edgetune.runtime.ops_types import FEW_ROWS, Segment
from edgetune.runtime.runner import Runner

PREFILL_TOKENS = 512
"""Prompt tokens that run at once; chosen by hand: enough to keep the matrix units busy, few enough to bound memory."""
PREFILL_MULTIPLE = 64
"""Shorter pieces of a prompt are padded to a multiple of this many tokens, for the reason that runner.ROW_MULTIPLE gives."""


@dataclass(frozen=True)
class Sampling:
    """The sampling settings.

    temperature: 0 takes the likeliest token. top_p: keep the fewest tokens with this probability. top_k: keep this many of the
    likeliest tokens before that; 0 keeps all. repetition_penalty: above 1, tokens of the prompt and the answer become less
    likely to come again (Keskar et al. 2019, arXiv 1909.05858).
    """

    temperature: float = 0.7
    top_p: float = 0.95
    seed: int | None = None
    top_k: int = 0
    repetition_penalty: float = 1.0


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token id from logits (V,) by nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751).

    Raises ModelError where the logits hold NaN or infinity.
    """
    logits = logits.float()
    if sampling.temperature <= 0:
        largest, id = logits.max(0)
        _check_number(largest)
        return int(id)
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    ordered, ids = probabilities.sort(descending=True, stable=True)
    if sampling.top_k:
        ordered[sampling.top_k :] = 0.0
        ordered = ordered / ordered.sum()
    # The probability before a token decides whether it is in, so the first always is.
    outside = ordered.cumsum(0) - ordered >= sampling.top_p
    ordered = ordered.masked_fill(outside, 0.0).cpu()
    _check_number(ordered[0])
    return int(ids[int(torch.multinomial(ordered, 1, generator=generator))])


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits (V,); those of the tokens in `seen`, bool (V,), are divided by `penalty` if positive, else multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _check_number(largest: Tensor) -> None:
    """Raise ModelError if `largest` is NaN, as the largest logit is if one is NaN, and each probability of infinite logits."""
    if math.isnan(float(largest)):
        raise ModelError(
            "The model gives NaN for the next token, since numbers in its adapter or in the model itself are too large. Type "
            "--adapter none to run without the adapter, or copy the model again."
        )


class Generator:
    """One sequence that is continued. It holds the KV cache, so that a chat's next turn runs its new tokens only."""

    def __init__(self, runner: Runner, max_length: int) -> None:
        self.runner, model = runner, runner.model
        self.cache = KVCache(model.config, max_length, model.dtype, model.device)
        self.tokens: list[int] = []
        self._step = ops.decoder(model, self.cache) if model.whole else None  # the decoder needs all weights in memory

    def prefill(self, input_ids: Sequence[int]) -> Tensor:
        """Run a prompt, except the beginning that the cache already holds; return logits (V,) after its last token."""
        shared = self._shared_prefix(input_ids)
        self.cache.length, self.tokens = shared, list(input_ids)
        if self._step is not None and len(input_ids) - shared <= FEW_ROWS:
            return [self.step(token) for token in input_ids[shared:]][-1]
        for start in range(shared, len(input_ids), PREFILL_TOKENS):
            last = self._prefill_piece(input_ids[start : start + PREFILL_TOKENS], start)
        return self.runner.model.logits(last)[0]

    def _prefill_piece(self, ids: Sequence[int], start: int) -> Tensor:
        """Run tokens of a prompt from position `start`; return the last block's output (1, D) for the last of them.

        The padding's keys and values are overwritten by the tokens that follow.
        """
        pad = min(-len(ids) % PREFILL_MULTIPLE, self.cache.max_length - start - len(ids))
        count, end = len(ids) + pad, start + len(ids) + pad
        tokens = torch.tensor([*ids, *[0] * pad], device=self.runner.model.device)
        positions = torch.arange(start, end, device=tokens.device)
        h = self.runner.infer(tokens, positions, [Segment(0, count, 0, end)], self.cache)
        self.cache.length = start + len(ids)
        return h[len(ids) - 1 : len(ids)]

    def _shared_prefix(self, input_ids: Sequence[int]) -> int:
        """Return the number of tokens at the prompt's beginning that the cache already holds, its last token excluded.

        The last token always runs: its logits are the answer.
        """
        shared = 0
        for old, new in zip(self.tokens[: self.cache.length], input_ids[:-1], strict=False):
            if old != new:
                break
            shared += 1
        return shared

    @torch.no_grad()
    def generate(
        self, input_ids: Sequence[int], max_tokens: int, sampling: Sampling, stop_ids: Sequence[int] = ()
    ) -> Iterator[int]:
        """Yield up to `max_tokens` new ids. A stop id ends the sequence and is not yielded."""
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        max_tokens = min(max_tokens, self.cache.max_length - len(input_ids))
        logits = self.prefill(input_ids)
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[torch.tensor(list(input_ids), device=seen.device)] = True
        for number in range(max_tokens):
            if sampling.repetition_penalty != 1:
                logits = penalize(logits, seen, sampling.repetition_penalty)
            token = sample(logits, sampling, generator)
            seen[token] = True
            if token in stop_ids:
                return
            yield token
            self.tokens.append(token)
            if number + 1 < max_tokens:
                logits = self.step(token)

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Run one more token, by the back end's own decoder where it has one; return logits (V,)."""
        if self._step is not None:
            return self._step(token)
        position = self.cache.length
        ids, positions = (torch.tensor([value], device=self.runner.model.device) for value in (token, position))
        h = self.runner.infer(ids, positions, [Segment(0, 1, 0, position + 1)], self.cache)
        return self.runner.model.logits(h)[0]
