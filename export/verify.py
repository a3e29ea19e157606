"""Prove an export: compare the target's own reader with the reference back end in fp32 on the same tokens.

The golden tokens are a prompt and its greedy continuation by the model. A reader whose most likely token is the reference's at
every position would write the same text. Every export contains them as golden.json, so that the receiving app can repeat the
proof on its own device. The bounds hold for one reader only: transformers and mlx-lm compute in bf16 if a folder asks for it,
and then differed by 0.05 to 0.27 of a logit on the demo.
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
"""Beginning of the golden text."""
WRITTEN_TOKENS = 16
"""Tokens that the model writes after the prompt. Chosen by hand."""
STORED_LOGITS = 32
"""Number of most likely tokens per position whose logits golden.json stores. Chosen by hand."""
STORED_DECIMALS = 5
"""Decimals of a logit in golden.json. Chosen by hand."""

MARGIN = 5
"""Largest ratio between a bound and the figure that was measured on correct exports."""
MOVED_BY_BF16 = (0.076, 0.0098, 4.2e-5)
"""Largest and mean difference of a logit, and KL in nats, when the model that the bounds were measured on runs its blocks in
bf16. That model is base-16m with an adapter trained on 1,778 notes."""
LEAST_EFFECT = 1e-6
"""Smallest KL(adapted || base) in nats of which a lost share is computed. An untrained adapter, whose B is 0, is below it.
Chosen by hand."""


OTHER_BASE = (MARGIN, 2.0, 3.0)
"""Factors on the three figures (largest and mean difference of a logit, KL) by which the reader's own form of the base differs
from edgetune's: the adapted models may differ by as much more. Measured on SmolLM2-135M in Q4_1, with an adapter of 60 steps
and with 0.3 to 0.003 of its scale: 2.2, 1.2 and 1.3."""
LEAST_APPLIED, NOISE_SHARE = 0.05, 0.75
"""Bound on the distance from 1 of the share of the adapter's effect that a reader applies, and its increase for a noise of 1.

The noise is the energy (the sum of squares) of the two bases' difference in logits, as a share of that of the adapter's effect.
Measured on the same file: 0.006 for the adapter of 60 steps on a copy in bf16, whose share was 0.996; 0.44 for that adapter at
0.1 of its scale, 0.97; 0.51 for an adapter of 24 steps on a copy in NF4, 0.74, since what an adapter mends of NF4 is whole
in the file. Without the reordering of q's and k's rows, or at 0.9 of its scale, the adapter of 60 steps gave 0.92. Chosen
by hand."""


@dataclass(frozen=True)
class Bound:
    """Upper bounds on the differences of an export: logits at any position and on average, and KL(reference || export) in nats.

    lost: upper bound on that KL as a share of KL(reference || bare base), so that a small adapter's loss is noticed too.
    rounds: the form rounds weights or activations, which moves some models more than others.
    """

    max_logit: float
    mean_logit: float
    kl: float
    lost: float = 0.05
    rounds: bool = True

    @property
    def tie(self) -> float:
        """Return the distance of two logits of the reference below which the greedy text may take either token.

        Each of the two may move by max_logit / MARGIN, which is what correct exports were measured to do.
        """
        return 2 * self.max_logit / MARGIN

    def of(self, expected: Golden) -> Bound:
        """Return the bound for the model that produced `expected`.

        It is larger in proportion if bf16 moves that model more than the one the table was measured on; `lost` stays. If the
        reader runs the adapter on its own form of the base, OTHER_BASE times the difference of the bases is added.
        """
        if expected.without is not None:
            added = [factor * figure for factor, figure in zip(OTHER_BASE, _figures(*expected.without), strict=True)]
            return replace(
                self, max_logit=self.max_logit + added[0], mean_logit=self.mean_logit + added[1], kl=self.kl + added[2]
            )
        if not self.rounds or expected.moved_by_bf16 is None:
            return self
        largest, mean, kl = (max(1.0, a / b) for a, b in zip(expected.moved_by_bf16, MOVED_BY_BF16, strict=True))
        return replace(self, max_logit=self.max_logit * largest, mean_logit=self.mean_logit * mean, kl=self.kl * kl)


EXACT = Bound(5e-3, 5e-4, 1e-7, rounds=False)
"""For forms that change no number, only the order of additions."""
FP16 = Bound(2e-2, 3e-3, 1e-6)
"""For weights rounded to 11 bits. Measured with llama.cpp, which also rounds activations to fp16: 0.004, 6e-4 and 2e-7."""
BF16 = Bound(0.2, 3e-2, 8e-5)
"""For weights rounded to 8 bits, with arithmetic in fp32. Measured on a 16M model: 0.015, 0.0018 and 2e-6; on random weights in
the shape of a 1.1B model: largest difference 0.064, KL 3e-6; on SmolLM2-135M with the adapter of a whole run, KL 9.5e-4, which
is 3.9e-5 in proportion (LOG.md, "exports of SmolLM2")."""
BF16_PRODUCTS = Bound(0.2, 2.5e-2, 4.5e-5)
"""For llama.cpp's bf16, which also rounds activations to 8 bits. Measured: 0.045, 0.005 and 9e-6."""
Q8_0 = Bound(0.6, 9e-2, 9e-4, lost=0.5)
"""For weights and activations that are 8-bit integers in blocks of 32. Measured: 0.13 and 0.23, 0.02, 1.9e-4. The base is
rounded as well as the adapter, so `lost` is large: an adapter with ten times this effect must not be refused."""
COREML = Bound(7e-2, 8e-3, 7.5e-6)
"""For Core ML, which computes everything between two norms in fp16. Measured: 0.014, 0.0016 and 1.5e-6."""
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
    ("ollama", "none"): EXACT,
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
"""The bound of each target and form of its weights, for a model that rounding moves as much as MOVED_BY_BF16.

4-bit models are compared with the rounded weights (TargetSpec.reference); effect.py measures separately how much of the model
and of the adapter the rounding leaves.
"""


@dataclass(frozen=True)
class Golden:
    """The golden tokens and what the reference makes of them.

    ids (N,): the prompt, then the model's continuation. logits (N, V): of the reference, f32. kl_of_adapter: KL in nats of
    the reference to the same model without its adapter, None if none is attached. moved_by_bf16: how far computing the blocks
    in bf16 moves this model (as MOVED_BY_BF16), None if that was not measured. bare: logits of the same model without its
    adapter, kept for an export that runs on the user's own file. without: these, and the reader's on its own form of the base.
    """

    prompt_tokens: int
    ids: list[int]
    logits: Tensor
    kl_of_adapter: float | None = None
    moved_by_bf16: tuple[float, float, float] | None = None
    bare: Tensor | None = None
    without: tuple[Tensor, Tensor] | None = None

    def beside(self, bare_read: Tensor | None) -> Golden:
        """Return the same with the reader's logits (N, V) f32 without the adapter; None if it runs edgetune's own base."""
        if self.bare is None or bare_read is None or bare_read.shape != self.bare.shape:
            return self
        return replace(self, without=(self.bare, bare_read))

    def as_dict(self, bound: Bound) -> dict[str, Any]:
        """Return the content of golden.json: the ids, and at each position the most likely tokens with their logits."""
        values, tokens = self.logits.topk(min(STORED_LOGITS, self.logits.shape[1]))
        return {
            "format": 1,
            "prompt_tokens": self.prompt_tokens,
            "token_ids": self.ids,
            "top_token_ids": tokens.tolist(),
            "top_logits": [[round(value, STORED_DECIMALS) for value in row] for row in values.tolist()],
            "bounds": asdict(bound),
        }


@dataclass(frozen=True)
class Agreement:
    """The differences between an export and the reference on the golden tokens.

    kl: in nats. adapter_lost: kl as a share of the adapter's own effect there; None if the adapter has no effect, or if it is
    merged into the reference's weights, or if the reader runs it on its own form of the base. applied: in that last case, the
    share of the adapter's effect on the logits that the reader applies, and applied_within how far from 1 it may be.
    """

    max_logit_difference: float
    mean_logit_difference: float
    kl: float
    greedy_match: bool
    adapter_lost: float | None = None
    applied: float | None = None
    applied_within: float = LEAST_APPLIED

    def holds(self, bound: Bound) -> bool:
        """Return True if every figure is within its bound and the greedy text is the same."""
        return not self.faults(bound)

    def faults(self, bound: Bound) -> list[str]:
        """Return a clause for each figure that is out of bounds, with the value found and the one allowed."""
        figures = [
            ("logits differ by up to {}", self.max_logit_difference, bound.max_logit),
            ("logits differ by {} on average", self.mean_logit_difference, bound.mean_logit),
            ("KL is {}", self.kl, bound.kl),
        ]
        # `not <=` instead of `>`, so that NaN is a fault.
        clauses = [f"{text.format(f'{found:.3g}')} (at most {limit:g})" for text, found, limit in figures if not found <= limit]
        if self.adapter_lost is not None and not self.adapter_lost <= bound.lost:
            clauses.append(f"KL is {self.adapter_lost:.0%} of the adapter's effect (at most {bound.lost:.0%})")
        if self.applied is not None and not abs(self.applied - 1) <= self.applied_within:
            within = f"expected 100%, give or take {self.applied_within:.0%}"
            clauses.append(f"{self.applied:.0%} of the adapter's effect arrives ({within})")
        if not self.greedy_match:
            clauses.append("the greedy text is different (expected the same)")
        return clauses


@torch.no_grad()
def golden(job: Job, prompt: Sequence[int], model: Llama, rounds: bool = False) -> Golden:
    """Write the golden text with `model`, the reference of the job's target, and return it with its reference logits.

    prompt: token ids, at least one. rounds: also measure how far bf16 moves this model. The text is written by this machine's
    kernels, the logits come from the reference back end. An adapter attached to the model is detached at the end.
    """
    runner = Runner(model)
    room = min(len(prompt) + WRITTEN_TOKENS, model.config.max_positions)
    ids = [*prompt, *Generator(runner, room).generate(prompt, WRITTEN_TOKENS, Sampling(temperature=0.0))]
    expected = along(model, ids, len(prompt), rounds)
    if job.adapter is None or not adapters.parameters(model):  # none, or merged into the weights
        return expected
    adapters.detach(model)
    bare = reference_logits(model, ids)
    kept = bare if job.user_file is not None else None
    return replace(expected, kl_of_adapter=_divergence(expected.logits, bare), bare=kept)


@torch.no_grad()
def along(model: Llama, ids: Sequence[int], prompt_tokens: int = 1, rounds: bool = False) -> Golden:
    """Return the reference back end's logits for ids (N,) of an existing text. rounds: also measure how far bf16 moves them."""
    logits = reference_logits(model, ids)
    moved = _figures(logits, _logits_in_bf16(model, ids)) if rounds else None
    return Golden(prompt_tokens, list(ids), logits, kl_of_adapter=None, moved_by_bf16=moved)


def _logits_in_bf16(model: Llama, ids: Sequence[int]) -> Tensor:
    """Run ids (N,) as reference_logits does but with the blocks in bf16; return logits (N, V) f32.

    The head stays in its own dtype: a bf16 head would be a second copy of it.
    """
    dtype, model.dtype = model.dtype, torch.bfloat16
    try:
        with ops.use_backend("reference"):
            h = Runner(model).read(ids)
    finally:
        model.dtype = dtype
    with ops.use_backend("reference"):
        return model.logits(h.to(dtype)).float()


def _figures(expected: Tensor, found: Tensor) -> tuple[float, float, float]:
    """Return the largest and the mean difference of a logit, and KL(expected || found) in nats, of two (N, V) f32."""
    difference = (found - expected).abs()
    largest = float(difference.max()) if torch.isfinite(found).all() else float("inf")
    return largest, float(difference.mean()), _divergence(expected, found)


@torch.no_grad()
def reference_logits(model: Llama, ids: Sequence[int]) -> Tensor:
    """Run token ids (N,) of one sequence on the reference back end; return logits (N, V) f32."""
    with ops.use_backend("reference"):
        return model.logits(Runner(model).read(ids)).float()


def _divergence(expected: Tensor, found: Tensor) -> float:
    """Return KL(expected || found) in nats of two logits (N, V), the mean over positions.

    One position after another, so that fp64 copies of whole logits never exist side by side.
    """
    rows = (
        (torch.log_softmax(wanted.double(), dim=-1), torch.log_softmax(got.double(), dim=-1))
        for wanted, got in zip(expected, found, strict=True)
    )
    return float(torch.stack([(log_p.exp() * (log_p - log_q)).sum() for log_p, log_q in rows]).mean())


def compare(expected: Golden, reader: Reader, bound: Bound) -> Agreement:
    """Let the reader run the golden tokens, and compare its logits with the reference's.

    The greedy texts match if at each written position the reader's most likely token is the reference's, or one whose logit
    in the reference is at most bound.tie below it.
    """
    found = reader.logits(expected.ids).float()
    if found.shape != expected.logits.shape:
        return Agreement(float("inf"), float("inf"), float("inf"), False)
    largest, mean, kl = _figures(expected.logits, found)
    written = slice(expected.prompt_tokens - 1, len(expected.ids) - 1)  # rows that predict the written tokens
    best = expected.logits[written].max(-1).values
    chosen = expected.logits[written].gather(1, found[written].argmax(-1, keepdim=True)).squeeze(1)
    greedy_match = bool((best - chosen <= bound.tie).all())
    effect = expected.kl_of_adapter
    if effect is None or effect < LEAST_EFFECT:
        return Agreement(largest, mean, kl, greedy_match)
    if expected.without is None:
        return Agreement(largest, mean, kl, greedy_match, kl / effect)
    return Agreement(largest, mean, kl, greedy_match, None, *_applied(expected.logits, found, *expected.without))


def _applied(adapted: Tensor, adapted_read: Tensor, bare: Tensor, bare_read: Tensor) -> tuple[float, float]:
    """Return the share of the adapter's effect that the reader applies, and how far from 1 noise may move it. All (N, V) f32.

    The effect is what the adapter changes in the logits. The share is the coefficient of the reader's effect on edgetune's
    (least squares): most of the noise of two differently rounded bases has no part in that direction and averages out.
    """
    squares, products, noises = 0.0, 0.0, 0.0
    for row in range(len(adapted)):  # a row at a time, in f64, to save memory
        ours, theirs, noise = (
            _centred(a[row], b[row]) for a, b in ((adapted, bare), (adapted_read, bare_read), (bare_read, bare))
        )
        squares += float(ours @ ours)
        products += float(ours @ theirs)
        noises += float(noise @ noise)
    return products / squares, LEAST_APPLIED + NOISE_SHARE * noises / squares


def _centred(a: Tensor, b: Tensor) -> Tensor:
    """Return a - b (V,) in f64 without its mean, which no softmax depends on."""
    difference = a.double() - b.double()
    return difference - difference.mean()


def golden_json(expected: Golden, bound: Bound, about: dict[str, Any]) -> str:
    """Return the text of golden.json. about: what it says about the export, before the tokens."""
    return json.dumps({**about, **expected.as_dict(bound)}) + "\n"
