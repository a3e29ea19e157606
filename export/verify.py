"""Proof of an export: the target's own reader against the reference back end in fp32, on the same tokens.

The golden tokens are a prompt and what the model writes after it, taking the likeliest token each time. A reader that finds
the reference's likeliest token the likeliest at each place would write the same text. They travel with every export as
golden.json, so that the receiving app can prove the same on its own device. A reader that computes otherwise than the one that
its bounds are for differs by more: transformers and mlx-lm compute in bf16 where a folder says so, which made 0.05 to 0.27 of a
logit on the demo.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgetune.export.job import Job, Reader
from edgetune.runtime import adapter as adapters
from edgetune.runtime import ops
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.model import Llama
from edgetune.runtime.runner import Runner

GOLDEN_FILE = "golden.json"
PROMPT = "The lighthouse keeper wrote down the weather twice a day, and on the last page he"
WRITTEN_TOKENS = 16
STORED_LOGITS = 32
"""The likeliest tokens at each place whose logits golden.json holds."""


MARGIN = 5
"""What a bound leaves, at most, over what was measured on correct exports."""
MOVED_BY_BF16 = (0.076, 0.0098, 4.2e-5)
"""Largest and mean logit difference and KL that blocks in bf16 make in the model that the bounds were measured on: base-16m
with an adapter trained on 1,778 notes."""
LEAST_EFFECT = 1e-6
"""KL(adapted || base) in nats: an adapter below it does too little for a share, as a new one does, whose B is 0."""


@dataclass(frozen=True)
class Bound:
    """The most by which an export may differ: logits at any place and on average, and KL(reference || export) in nats.

    lost: the most that this KL may be of KL(reference || bare base): little may be missing of a small effect, too.
    rounds: whether the form rounds weights or what is multiplied with them, which moves some models more than others.
    """

    max_logit: float
    mean_logit: float
    kl: float
    lost: float = 0.05
    rounds: bool = True

    @property
    def tie(self) -> float:
        """Two tokens whose logits are closer in the reference may change places: each moves by what a correct export's do."""
        return 2 * self.max_logit / MARGIN

    def of(self, expected: Golden) -> Bound:
        """The bound for the model that made `expected`: where rounding moves it more than the one that the table was measured
        on, by as much larger. What may be lost of the adapter stays."""
        if not self.rounds or expected.moved_by_bf16 is None:
            return self
        largest, mean, kl = (max(1.0, a / b) for a, b in zip(expected.moved_by_bf16, MOVED_BY_BF16, strict=True))
        return replace(self, max_logit=self.max_logit * largest, mean_logit=self.mean_logit * mean, kl=self.kl * kl)


EXACT = Bound(5e-3, 5e-4, 1e-7, rounds=False)
"""The same numbers in another order of adding."""
FP16 = Bound(2e-2, 3e-3, 1e-6)
"""Weights rounded to 11 bits. Measured with llama.cpp, which rounds activations so too: 0.004, 6e-4 and 2e-7."""
BF16 = Bound(0.2, 3e-2, 1.5e-5)
"""Weights rounded to 8 bits, arithmetic in fp32. Measured on a 16M model: 0.015, 0.0018 and 2e-6; on one of a 1.1B's shape with
random weights a largest difference of 0.064 and KL 3e-6."""
BF16_PRODUCTS = Bound(0.2, 2.5e-2, 4.5e-5)
"""llama.cpp's bf16 rounds activations to 8 bits as well. Measured: 0.045, 0.005 and 9e-6."""
Q8_0 = Bound(0.6, 9e-2, 9e-4, lost=0.5)
"""Weights and activations are 8-bit integers in blocks of 32. Measured: 0.13 and 0.23, 0.02 and 1.9e-4, which is the rounding
of the base too: an adapter that does ten times as much is not to be refused."""
COREML = Bound(7e-2, 8e-3, 7.5e-6)
"""Everything between two norms is fp16. Measured: 0.014, 0.0016 and 1.5e-6."""
BOUNDS: dict[tuple[str, str], Bound] = {
    ("peft", ""): EXACT,
    ("mps", "nf4"): Bound(5e-2, 5e-3, 1e-4),  # embedding, head and norms of an fp32 base become bf16
    ("coreml", "nf4"): COREML,
    ("coreml", "int4"): COREML,
    ("coreml", "fp16"): COREML,
    ("coreml", "none"): FP16,  # A and B alone are rounded
    ("gguf", ""): EXACT,  # llama.cpp multiplies f32 weights, and a LoRA, in f32
    ("gguf", "f16"): FP16,
    ("gguf", "bf16"): BF16_PRODUCTS,
    ("gguf", "q8_0"): Q8_0,
    ("ollama", "q8_0"): Q8_0,
    ("ollama", "f16"): FP16,
    ("ollama", "bf16"): BF16_PRODUCTS,
    ("hf", "fp32"): EXACT,
    ("hf", "bf16"): BF16,
    ("hf", "fp16"): FP16,
    ("hf", "nf4"): EXACT,
    ("hf", "nf4-nearest"): EXACT,
    ("mlx", ""): EXACT,
    ("mlx", "bf16"): BF16,
    ("mlx", "fp16"): FP16,
    ("mlx", "int4"): EXACT,
}
"""By target and form of its weights, for a model that rounding moves as the one they were measured on. 4-bit models are held to
the rounded weights, see target.py: what rounding leaves of the model and of the adapter is measured apart, by effect.py."""


@dataclass(frozen=True)
class Golden:
    """ids (N,): prompt, then the model's own continuation; logits (N, V) f32 of the reference; kl_of_adapter: the divergence
    from it of the same model without its adapter along the ids, None where it has none attached; moved_by_bf16: the largest
    and mean difference of a logit and the KL that computing the blocks in bf16 makes, where that was asked for."""

    prompt_tokens: int
    ids: list[int]
    logits: Tensor
    kl_of_adapter: float | None = None
    moved_by_bf16: tuple[float, float, float] | None = None

    def as_dict(self, bound: Bound) -> dict[str, Any]:
        """JSON-ready: the ids, and at each place the likeliest tokens with their logits."""
        values, tokens = self.logits.topk(min(STORED_LOGITS, self.logits.shape[1]))
        return {
            "format": 1,
            "prompt_tokens": self.prompt_tokens,
            "token_ids": self.ids,
            "top_token_ids": tokens.tolist(),
            "top_logits": [[round(value, 5) for value in row] for row in values.tolist()],
            "bounds": asdict(bound),
        }


@dataclass(frozen=True)
class Agreement:
    """How far an export is from the reference on the golden tokens.

    adapter_lost: kl as a share of what the adapter does there; None where it does nothing, or is in the reference's weights.
    """

    max_logit_difference: float
    mean_logit_difference: float
    kl: float
    greedy_match: bool
    adapter_lost: float | None = None

    def holds(self, bound: Bound) -> bool:
        """Whether every figure is within its bound, and the text the same."""
        return not self.faults(bound)

    def faults(self, bound: Bound) -> list[str]:
        """Each figure that is out of bounds, as a clause that says what was found and what is allowed."""
        figures = [
            ("logits differ by up to {}", self.max_logit_difference, bound.max_logit),
            ("logits differ by {} on average", self.mean_logit_difference, bound.mean_logit),
            ("KL is {}", self.kl, bound.kl),
        ]
        said = [f"{text.format(f'{found:.3g}')} (at most {most:g})" for text, found, most in figures if not found <= most]
        if self.adapter_lost is not None and not self.adapter_lost <= bound.lost:
            said.append(f"KL is {self.adapter_lost:.0%} of what the adapter does (at most {bound.lost:.0%})")
        if not self.greedy_match:
            said.append("the greedy text is another (expected the same)")
        return said


@torch.no_grad()
def golden(job: Job, prompt: Sequence[int], model: Llama, rounds: bool = False) -> Golden:
    """What `model`, the reference of the job's target, writes after `prompt` (token ids, at least one) by this machine's
    kernels, and the reference back end's logits along it. An adapter that is attached to the model is detached at the end.

    rounds: whether to try how much rounding moves this model.
    """
    runner = Runner(model)
    room = min(len(prompt) + WRITTEN_TOKENS, model.config.max_positions)
    ids = [*prompt, *Generator(runner, room).generate(prompt, WRITTEN_TOKENS, Sampling(temperature=0.0))]
    expected = along(model, ids, len(prompt), rounds)
    if job.adapter is None or not adapters.parameters(model):  # it may be in the weights
        return expected
    adapters.detach(model)
    return replace(expected, kl_of_adapter=_divergence(expected.logits, reference_logits(model, ids)))


@torch.no_grad()
def along(model: Llama, ids: Sequence[int], prompt_tokens: int = 1, rounds: bool = False) -> Golden:
    """What the reference back end makes of ids that are there already."""
    logits = reference_logits(model, ids)
    return Golden(prompt_tokens, list(ids), logits, None, _figures(logits, _in_bf16(model, ids)) if rounds else None)


def _in_bf16(model: Llama, ids: Sequence[int]) -> Tensor:
    """What reference_logits would be if the blocks computed in bf16; the head, of which that would need a copy, does not."""
    dtype, model.dtype = model.dtype, torch.bfloat16
    try:
        with ops.use_backend("reference"):
            h = Runner(model).read(ids)
    finally:
        model.dtype = dtype
    with ops.use_backend("reference"):
        return model.logits(h.to(dtype)).float()


def _figures(expected: Tensor, found: Tensor) -> tuple[float, float, float]:
    """Largest and mean difference of a logit, and KL, of two (N, V) f32."""
    difference = (found - expected).abs()
    largest = float(difference.max()) if torch.isfinite(found).all() else float("inf")
    return largest, float(difference.mean()), _divergence(expected, found)


@torch.no_grad()
def reference_logits(model: Llama, ids: Sequence[int]) -> Tensor:
    """Token ids (N,) of one sequence -> logits (N, V) f32 by the reference back end."""
    with ops.use_backend("reference"):
        return model.logits(Runner(model).read(ids)).float()


def _divergence(expected: Tensor, found: Tensor) -> float:
    """KL in nats of two (N, V), the mean over places."""
    log_p, log_q = (torch.log_softmax(logits.double(), dim=-1) for logits in (expected, found))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def compare(expected: Golden, reader: Reader, bound: Bound) -> Agreement:
    """What the reader makes of the golden tokens, against the reference.

    The greedy texts match where at each written place both find the same token the likeliest, or one that in the reference
    is closer to it than bound.tie.
    """
    found = reader.logits(expected.ids).float()
    if found.shape != expected.logits.shape:
        return Agreement(float("inf"), float("inf"), float("inf"), False)
    (largest, mean, kl), whole = _figures(expected.logits, found), expected.kl_of_adapter
    places = slice(expected.prompt_tokens - 1, len(expected.ids) - 1)
    best = expected.logits[places].max(-1).values
    chosen = expected.logits[places].gather(1, found[places].argmax(-1, keepdim=True)).squeeze(1)
    lost = None if whole is None or whole < LEAST_EFFECT else kl / whole
    return Agreement(largest, mean, kl, bool((best - chosen <= bound.tie).all()), lost)


def golden_json(expected: Golden, bound: Bound, about: dict[str, Any]) -> str:
    """The text of golden.json."""
    return json.dumps({**about, **expected.as_dict(bound)}) + "\n"
