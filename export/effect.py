"""How much of what an adapter does is left in a merge that rounds: measured on text, not hoped.

On texts that the person gives, by nats: (base - merged) / (base - adapted). On text that the adapted model writes itself,
whose nats need no sample of their own, by divergences: 1 - KL(adapted || merged) / KL(adapted || base). 1 is all of it, 0
nothing; below 0 rounding did more harm than the adapter does good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgetune.export.job import Job
from edgetune.runtime import adapter as adapters
from edgetune.runtime.attention import Segment
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.device import compute_dtype
from edgetune.runtime.errors import ModelError
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.model import Llama
from edgetune.runtime.runner import Runner

Documents = list[list[int]]

DOCUMENT_TOKENS = 256
"""Of a document that the model writes, and of the pieces that a text is cut into."""
TOKENS = 4096
"""To calibrate on, and of texts to measure on; of its own writing half as many others."""
LEAST = 0.5
"""Of the effect; a merge that keeps less is refused."""
MOST_KL = 0.2
"""Nats a token that rounding a model to 4 bits may cost it, beside the adapter's effect. Measured on a 16M model: 0.0032 (MLX's
groups of 64, with feedback) and 0.0057 (blocks of 32, to the nearest). Larger models lose more: OpenLLaMA 3B, to the nearest in
blocks of 32, 0.05 by the perplexities of llama.cpp's own tests (8.53, and 8.97 in q4_0).
"""
_ROWS = 128
"""Rows of logits that exist at once, for each of three models."""


@dataclass(frozen=True)
class Effect:
    """Nats a token of base, adapted and merged model, and the divergences from the adapted one, over the same tokens."""

    nats_base: float
    nats_adapted: float
    nats_merged: float
    kl_base: float
    kl_merged: float

    def kept(self, by_nats: bool) -> float:
        """The share that is left; by divergences too where the adapter was not trained for such a text: a gain much smaller
        than what it changes would make a share out of noise.
        """
        gain = self.nats_base - self.nats_adapted
        if by_nats and gain > self.kl_base / 2:
            return (self.nats_base - self.nats_merged) / gain
        return 1.0 - self.kl_merged / max(self.kl_base, 1e-12)


def texts_for(job: Job) -> tuple[Documents, Documents]:
    """Token ids to calibrate on and others to measure on: every second text of the job each, or the model's own writing."""
    given = [list(text) for text in job.texts if len(text) > 1]
    if len(given) > 1:
        return _pieces(given[::2]), _pieces(given[1::2])
    count = TOKENS // DOCUMENT_TOKENS
    room = min(DOCUMENT_TOKENS, job.base.config.max_positions)
    model = job.model(compute_dtype(torch.device("cpu")))
    wanted = count + (0 if given else count // 2)
    done, written = job.counter("sampling", wanted), []
    for seed in range(wanted):
        written.append(_write(model, room, seed))
        done(str(seed))
    return written[:count], _pieces(given) or written[count:]


def _write(model: Llama, room: int, seed: int) -> list[int]:
    """A document of the model's, sampled from all that it finds possible."""
    start = _start(model.config)
    return [start, *Generator(Runner(model), room).generate([start], room - 1, Sampling(1.0, 1.0, seed))]


def _start(config: LlamaConfig) -> int:
    ids = [config.bos_token_id, *config.eos_token_ids, 0]
    return next(token for token in ids if token is not None)


def _pieces(texts: Documents) -> Documents:
    """Texts cut to DOCUMENT_TOKENS, at most TOKENS in all."""
    pieces = [text[i : i + DOCUMENT_TOKENS] for text in texts for i in range(0, len(text), DOCUMENT_TOKENS)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    return pieces[: max(1, TOKENS // DOCUMENT_TOKENS)]


def packed(documents: Documents) -> tuple[Tensor, Tensor, list[Segment]]:
    """Put documents side by side; return token ids (N,), positions (N,) and each document's segment."""
    segments, end = [], 0
    for document in documents:
        segments.append(Segment.packed(end, end + len(document)))
        end += len(document)
    ids = torch.tensor([token for document in documents for token in document])
    return ids, torch.cat([torch.arange(segment.q_end - segment.q_start) for segment in segments]), segments


@torch.no_grad()
def measure(own: Llama, merged: Llama, documents: Documents) -> Effect:
    """Run base, adapted and merged model on each document. own: base and adapter, which is detached."""
    runners, sums, count = Runner(own), torch.zeros(5, dtype=torch.float64), 0
    hidden = [runners.read(document) for document in documents]
    adapters.detach(own)
    other = Runner(merged)
    for document, adapted in zip(documents, hidden, strict=True):
        base, changed = runners.read(document), other.read(document)
        for rows, targets in _predictions(document):
            a, b, c = (
                torch.log_softmax(model.logits(h[rows]).double(), dim=-1)
                for model, h in ((own, adapted), (own, base), (merged, changed))
            )
            nats = [-logs.gather(1, targets.unsqueeze(1)).sum() for logs in (b, a, c)]
            divergences = [(a.exp() * (a - logs)).sum() for logs in (b, c)]
            sums += torch.stack([*nats, *divergences])
            count += len(targets)
    return Effect(*(sums / count).tolist())


def _predictions(document: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Which rows predict, and the ids that they should have."""
    for start in range(0, len(document) - 1, _ROWS):
        stop = min(start + _ROWS, len(document) - 1)
        yield slice(start, stop), torch.tensor(document[start + 1 : stop + 1])


def check(job: Job, merged: Llama, documents: Documents, advice: str) -> tuple[str, float]:
    """What rounding left, as a fact to report: the share of the adapter's effect that `merged` keeps, or without an adapter
    the divergence from the base.

    Raises ModelError, with `advice` at its end, where that is out of bounds and the job does not insist.
    """
    with job.stage("measuring"):
        found = measure(job.model(), merged, documents)
    given = any(len(text) > 1 for text in job.texts)
    where = "the texts" if given else "text that it writes itself"
    if job.adapter is None:
        hold_rounding(job, found.kl_merged, where, advice)
        return "kl_of_rounding", found.kl_merged
    kept = found.kept(by_nats=given)
    hold_kept(job, kept, where, advice)
    return "adapter_effect_kept", kept


def hold_kept(job: Job, kept: float, where: str, advice: str) -> None:
    """Raise ModelError, unless the job insists, where a merge keeps less than LEAST of the adapter's effect."""
    if not kept >= LEAST and not job.force:
        raise ModelError(
            f"This merge keeps {kept:.0%} of what the adapter does on {where}, so it was not written (expected at least "
            f"{LEAST:.0%}); {advice}, or --force to write it all the same."
        )


def hold_rounding(job: Job, kl: float, where: str, advice: str) -> None:
    """Raise ModelError, unless the job insists, where rounded weights are farther than MOST_KL from those they were made of."""
    if not kl <= MOST_KL and not job.force:
        raise ModelError(
            f"Rounded to {job.weights}, the model is KL {kl:.2g} from what it was on {where}, so it was not written (expected "
            f"at most {MOST_KL:g}); {advice}, or --force to write it all the same."
        )
