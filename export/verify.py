"""Proof of an export: the target's own reader against the reference back end in fp32, on the same tokens.

The golden tokens are a prompt and what the model writes after it, taking the likeliest token each time. A reader that finds
the reference's likeliest token the likeliest at each place would write the same text. They travel with every export as
golden.json, so that the receiving app can prove the same on its own device.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from edgetune.export.target import Job, Reader
from edgetune.runtime import ops
from edgetune.runtime.budget import TORCH_BYTES
from edgetune.runtime.errors import ResourceError
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.model import Llama
from edgetune.runtime.runner import Runner

GOLDEN_FILE = "golden.json"
PROMPT = "The lighthouse keeper wrote down the weather twice a day, and on the last page he"
WRITTEN_TOKENS = 16
STORED_LOGITS = 32
"""The likeliest tokens at each place whose logits golden.json holds."""


@dataclass(frozen=True)
class Bound:
    """The most by which an export may differ: logits at any place and on average, and KL(reference || export) in nats."""

    max_logit: float
    mean_logit: float
    kl: float


EXACT = Bound(2e-2, 2e-3, 1e-5)
"""The same numbers in another order of adding."""
HALF = Bound(0.5, 0.05, 2e-3)
"""Weights or arithmetic rounded to 16 bits."""
BF16 = Bound(1.0, 0.1, 5e-3)
"""Weights, and the activations that they are multiplied with, rounded to 8 bits: llama.cpp's bf16 and q8_0."""
BOUNDS: dict[tuple[str, str], Bound] = {
    ("peft", ""): EXACT,
    ("mps", "nf4"): Bound(5e-2, 5e-3, 1e-4),  # embedding, head and norms of an fp32 base become bf16
    ("coreml", "nf4"): HALF,
    ("coreml", "int4"): HALF,
    ("coreml", "fp16"): HALF,
    ("coreml", "none"): HALF,
    ("gguf", ""): EXACT,  # llama.cpp multiplies f32 weights, and a LoRA, in f32
    ("gguf", "f16"): HALF,  # weights and, in each product, activations rounded to f16
    ("gguf", "bf16"): BF16,
    ("gguf", "q8_0"): BF16,
    ("ollama", "q8_0"): BF16,
    ("ollama", "f16"): HALF,
    ("ollama", "bf16"): BF16,
    ("hf", "fp32"): EXACT,
    ("hf", "bf16"): HALF,
    ("hf", "fp16"): HALF,
    ("hf", "nf4"): EXACT,
    ("hf", "nf4-nearest"): EXACT,
    ("mlx", ""): EXACT,
    ("mlx", "bf16"): HALF,
    ("mlx", "fp16"): HALF,
    ("mlx", "int4"): EXACT,
}
"""By target and form of its weights. 4-bit models are held to the rounded weights, see target.py: what rounding leaves of the
adapter is measured apart."""


@dataclass(frozen=True)
class Golden:
    """ids (N,): prompt, then the model's own continuation; logits (N, V) f32 of the reference."""

    prompt_tokens: int
    ids: list[int]
    logits: Tensor

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
    """How far an export is from the reference on the golden tokens."""

    max_logit_difference: float
    mean_logit_difference: float
    kl: float
    greedy_match: bool

    def holds(self, bound: Bound) -> bool:
        """Whether every figure is within its bound, and the text the same."""
        return (
            self.greedy_match
            and self.max_logit_difference <= bound.max_logit
            and self.mean_logit_difference <= bound.mean_logit
            and self.kl <= bound.kl
        )


def check_memory(job: Job) -> None:
    """Raise ResourceError, before anything is written, where `job.memory` does not hold the model in fp32, as readers do."""
    needed = TORCH_BYTES + 4 * job.base.config.parameters
    if job.memory is not None and needed > job.memory:
        raise ResourceError(
            f"Proving the export takes about {needed / 1e9:.2f} GB, since its reader holds the whole model in fp32, and "
            f"--memory allows {job.memory / 1e9:.2f} GB; type --no-verify to write it unproved."
        )


@torch.no_grad()
def golden(job: Job, prompt: Sequence[int], model: Llama | None = None) -> Golden:
    """What the model writes after `prompt` (token ids, at least one), by this machine's kernels, and the reference's logits
    along it. The model is the job's, unless another is given."""
    model = model or job.model()
    runner = Runner(model)
    room = min(len(prompt) + WRITTEN_TOKENS, model.config.max_positions)
    ids = [*prompt, *Generator(runner, room).generate(prompt, WRITTEN_TOKENS, Sampling(temperature=0.0))]
    with ops.use_backend("reference"):
        h = runner.infer(torch.tensor(ids), torch.arange(len(ids)), [(0, len(ids), 0, len(ids))], None)
        return Golden(len(prompt), ids, model.logits(h).float())


def compare(expected: Golden, reader: Reader, bound: Bound) -> Agreement:
    """What the reader makes of the golden tokens, against the reference.

    The greedy texts match where at each written place both find the same token the likeliest; where the reference's own
    two likeliest are closer than the bound, either will do.
    """
    found = reader.logits(expected.ids).float()
    if found.shape != expected.logits.shape:
        return Agreement(float("inf"), float("inf"), float("inf"), False)
    difference = (found - expected.logits).abs()
    log_p, log_q = (torch.log_softmax(logits.double(), dim=-1) for logits in (expected.logits, found))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    places = slice(expected.prompt_tokens - 1, len(expected.ids) - 1)
    best = expected.logits[places].max(-1).values
    chosen = expected.logits[places].gather(1, found[places].argmax(-1, keepdim=True)).squeeze(1)
    worst = float(difference.max()) if torch.isfinite(found).all() else float("inf")
    return Agreement(worst, float(difference.mean()), float(kl), bool((best - chosen <= bound.max_logit).all()))


def golden_json(expected: Golden, bound: Bound, about: dict[str, Any]) -> str:
    """The text of golden.json."""
    return json.dumps({**about, **expected.as_dict(bound)}) + "\n"
