"""Measure on text how much of an adapter's effect is left in a merge that rounds the weights.

On the user's texts the share is one of losses in nats: (base - merged) / (base - adapted). Without texts the adapted model
writes some itself, and the share is one of divergences: 1 - KL(adapted || merged) / KL(adapted || base). 1 means that all of
the effect is left, 0 none of it; below 0, rounding does more harm than the adapter does good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from edgetune.export.job import Job
from edgetune.runtime import adapter as adapters
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.device import compute_dtype
from edgetune.runtime.error_feedback import Documents
from edgetune.runtime.errors import ModelError
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.model import Llama
from edgetune.runtime.runner import Runner

DOCUMENT_TOKENS = 256
"""Length in tokens of a document that the model writes, and of the pieces that a text is cut into. Chosen by hand."""
TOKENS = 4096
"""Tokens to calibrate on, and upper bound on the tokens of texts to measure on. Chosen by hand.

If the model writes the texts itself, half as many further tokens are measured on.
"""
LEAST = 0.5
"""Smallest share of the adapter's effect that a merge must keep, else it is refused. Chosen by hand."""
MOST_KL = 0.2
"""Upper bound, in nats per token, on the loss of rounding a model without an adapter to 4 bits.

Measured on a 16M model: 0.0032 (MLX's groups of 64, with feedback) and 0.0057 (blocks of 32, to nearest). Larger models lose
more: OpenLLaMA 3B, to nearest in blocks of 32, 0.05 by the perplexities of llama.cpp's own tests (8.53, and 8.97 in q4_0).
"""
SMALLEST_KL = 1e-12
"""Divergence in nats that a share is divided by if the adapter has no effect at all, to avoid division by 0."""
_ROWS = 128
"""Rows of logits in memory at once, for each of three models. Chosen by hand."""


@dataclass(frozen=True)
class Effect:
    """Loss in nats per token of the base, adapted and merged model, and KL of the adapted model to the other two.

    All are means over the same tokens.
    """

    nats_base: float
    nats_adapted: float
    nats_merged: float
    kl_base: float
    kl_merged: float

    def kept(self, by_nats: bool) -> float:
        """Return the share of the adapter's effect that is left (1 is all). by_nats: measure it by losses if they say enough.

        An adapter that was not trained for such a text changes much and gains little; a share of that gain would be noise, so
        divergences are used instead.
        """
        gain = self.nats_base - self.nats_adapted
        if by_nats and gain > self.kl_base / 2:
            return (self.nats_base - self.nats_merged) / gain
        return 1.0 - self.kl_merged / max(self.kl_base, SMALLEST_KL)


def texts_for(job: Job) -> tuple[Documents, Documents]:
    """Return token ids to calibrate on, and others to measure on.

    Each gets every second text of the job. A single text is only measured on, and the adapted model writes the texts to
    calibrate on; without any text it writes both.
    """
    given = [list(text) for text in job.texts if len(text) > 1]
    if len(given) > 1:
        return _pieces(given[::2]), _pieces(given[1::2])
    count = TOKENS // DOCUMENT_TOKENS
    room = min(DOCUMENT_TOKENS, job.base.config.max_positions)
    model = job.model(compute_dtype(torch.device("cpu")))
    number = count + (0 if given else count // 2)
    done, written = job.counter("sampling", number), []
    for seed in range(number):
        written.append(_write(model, job.start.text[0] if job.start.text else _start(model.config), room, seed))
        done(str(seed))
    return written[:count], _pieces(given) or written[count:]


def _write(model: Llama, start: int, room: int, seed: int) -> list[int]:
    """Let the model write a document of `room` tokens from the token `start`, sampled at temperature 1 without other limits."""
    return [start, *Generator(Runner(model), room).generate([start], room - 1, Sampling(1.0, 1.0, seed))]


def _start(config: LlamaConfig) -> int:
    """Return the token that a document begins with where the model has no tokenizer: bos, else an eos, else token 0."""
    ids = [config.bos_token_id, *config.eos_token_ids, 0]
    return next(token for token in ids if token is not None)


def _pieces(texts: Documents) -> Documents:
    """Cut texts into pieces of DOCUMENT_TOKENS; return at most TOKENS in all."""
    pieces = [text[i : i + DOCUMENT_TOKENS] for text in texts for i in range(0, len(text), DOCUMENT_TOKENS)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    return pieces[: max(1, TOKENS // DOCUMENT_TOKENS)]


@torch.no_grad()
def measure(adapted_model: Llama, merged: Llama, documents: Documents) -> Effect:
    """Run the base, the adapted and the merged model on each document; detaches the adapter of `adapted_model`."""
    base_runner, sums, count = Runner(adapted_model), torch.zeros(5, dtype=torch.float64), 0
    # One model serves as adapted and as base: keep the hidden states of all documents, then detach the adapter.
    adapted_states = [base_runner.read(document) for document in documents]
    adapters.detach(adapted_model)
    merged_runner = Runner(merged)
    for document, h_adapted in zip(documents, adapted_states, strict=True):
        h_base, h_merged = base_runner.read(document), merged_runner.read(document)
        for rows, targets in _predictions(document):
            adapted, base, rounded = (
                torch.log_softmax(model.logits(h[rows]).double(), dim=-1)
                for model, h in ((adapted_model, h_adapted), (adapted_model, h_base), (merged, h_merged))
            )
            nats = [-logs.gather(1, targets.unsqueeze(1)).sum() for logs in (base, adapted, rounded)]
            divergences = [(adapted.exp() * (adapted - logs)).sum() for logs in (base, rounded)]
            sums += torch.stack([*nats, *divergences])
            count += len(targets)
    return Effect(*(sums / count).tolist())


@torch.no_grad()
def mean_nats(model: Llama, documents: Documents) -> float:
    """Return the mean loss in nats per token of documents, each of at least two ids, with the adapter that is on the model."""
    runner, total, count = Runner(model), 0.0, 0
    for document in documents:
        h = runner.read(document)
        for rows, targets in _predictions(document):
            total += float(cross_entropy(model.logits(h[rows]).double(), targets, reduction="sum"))
            count += len(targets)
    return total / count


def _predictions(document: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of at most _ROWS rows that predict a token of the document, with the ids they should predict."""
    for start in range(0, len(document) - 1, _ROWS):
        stop = min(start + _ROWS, len(document) - 1)
        yield slice(start, stop), torch.tensor(document[start + 1 : stop + 1])


def check(job: Job, merged: Llama, documents: Documents, advice: str) -> tuple[str, float]:
    """Measure what rounding left and return it as a fact to report, by name.

    That is the share of the adapter's effect that `merged` keeps, or without an adapter the KL of the base to it. Raises
    ModelError, which ends with `advice`, if it is out of bounds, unless job.force.
    """
    with job.stage("measuring"):
        found = measure(job.model(), merged, documents)
    given = any(len(text) > 1 for text in job.texts)
    where = "the texts" if given else "text that the model wrote itself"
    if job.adapter is None:
        hold_rounding(job, found.kl_merged, where, advice)
        return "kl_of_rounding", found.kl_merged
    kept = found.kept(by_nats=given)
    hold_kept(job, kept, where, advice)
    return "adapter_effect_kept", kept


def hold_kept(job: Job, kept: float, where: str, advice: str) -> None:
    """Raise ModelError if a merge keeps less than LEAST of the adapter's effect, unless job.force. where: measured on what."""
    if not kept >= LEAST and not job.force:
        raise ModelError(
            f"This merge keeps {kept:.0%} of the adapter's effect on {where}, so it was not written (expected at least "
            f"{LEAST:.0%}); {advice}, or --force to write it anyway."
        )


def hold_rounding(job: Job, kl: float, where: str, advice: str) -> None:
    """Raise ModelError if rounding moved the model by more than MOST_KL, unless job.force. where: measured on what."""
    if not kl <= MOST_KL and not job.force:
        raise ModelError(
            f"Rounding to {job.weights} changes the model by KL {kl:.2g} on {where}, so it was not written (expected at most "
            f"{MOST_KL:g}); {advice}, or --force to write it anyway."
        )
