"""Tells learning from repair, by the scores of the base model as it was published.

Training over a base in 4 bits also mends what those bits broke. At the end of a run the held-out notes are therefore scored
by the published weights too, alone and with the adapter: read once, layer by layer, on the tokens of the run's own evaluations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from edgetune.dataset.evaluation_set import EvaluationSet, Score
from edgetune.library.loading import Loaded
from edgetune.progress import Progress
from edgetune.runtime.budget import Parts
from edgetune.runtime.linear import LoraLinear, base_of
from edgetune.runtime.loader import dense_layer, release_layer
from edgetune.runtime.model import Block
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops_types import Weight
from edgetune.runtime.runner import ROW_MULTIPLE, Runner
from edgetune.training.plan import Plan

SCORES = 2
"""Scores that are wanted of the published base: alone, and with the adapter."""


def bits_of_base(loaded: Loaded) -> int | None:
    """Return the bits in which a run holds the numbers of the base's linears; None where they are not quantised."""
    weight = base_of(loaded.model.blocks[0].q_proj).weight
    if isinstance(weight, Tensor):
        return None
    return 4 if isinstance(weight, QuantizedTensor) else 8


def has_published(loaded: Loaded) -> bool:
    """Return True if a run holds its base in fewer bits than the model folder, which therefore has more to compare with."""
    return bits_of_base(loaded) is not None and loaded.checkpoint.quant is None


def fits(loaded: Loaded, scores: int, tokens: int, row_tokens: int, parts: Parts, allowed: int) -> bool:
    """Return True if `scores` of the published base keep a run within the `allowed` bytes, for which `parts` was planned.

    tokens: those that an evaluation reads, in batches of `row_tokens`. One dense layer and every token's hidden state are in
    memory then, and nothing that a training step keeps for its backward.
    """
    config, dtype, stored = loaded.model.config, loaded.model.dtype, loaded.checkpoint.stored
    layer = config.linear_parameters // config.num_layers * dtype.itemsize
    # The layer's pages in its file; where they are in `dtype` already, the CPU multiplies by them as they are.
    pages = sum(tensor.nbytes for name, tensor in stored.items() if name.startswith("model.layers.0."))
    # Any two batches that follow each other are longer than row_tokens together.
    rows = (2 * tokens // row_tokens + 1) * -(-row_tokens // ROW_MULTIPLE) * ROW_MULTIPLE
    states = scores * rows * config.hidden_size * dtype.itemsize
    return parts.total - parts.activations + layer + pages + states <= allowed


def compare(
    loaded: Loaded,
    runner: Runner,
    held_out: EvaluationSet | None,
    plan: Plan,
    batches: int,
    judged: bool,
    in_time: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Return the fields of events.Finished about the base as published, scored on the first `batches` of the held-out batches.

    judged: False if those batches hold too few tokens to compare anything. in_time: False if the run has no time for it.
    """
    fields: dict[str, Any] = {"base_bits": bits_of_base(loaded)}
    if held_out is None or not batches:
        return fields
    if not plan.published_scores:
        return {**fields, "published": _reason(loaded, plan)}
    if not judged:
        return {**fields, "published": "few"}
    if not in_time:
        return {**fields, "published": "time"}
    rows, scores = plan.setting.row_tokens, plan.published_scores
    found = score_published(loaded, runner, held_out, rows, batches, scores, progress)
    names = ("heldout_bits_per_byte_published", "heldout_bits_per_byte_on_published")
    figures = {name: score.bits_per_byte for name, score in zip(names, found, strict=False)}
    return {**fields, "published": "measured", **figures}


def _reason(loaded: Loaded, plan: Plan) -> str:
    """Return the value of Finished.published for a run that plans no score of the published base."""
    if bits_of_base(loaded) is None:
        return "same"
    if not has_published(loaded):
        return "unknown"
    return "memory" if plan.settings["from_adapter"] is None else "adapter"


def score_published(
    loaded: Loaded, runner: Runner, scored: EvaluationSet, row_tokens: int, batches: int, scores: int, progress: Progress
) -> list[Score]:
    """Return the score of the published base and, with `scores` 2, that of the adapter on the model over it.

    Exactly the tokens of the first `batches` batches of an evaluation are scored. progress: receives the layers done.
    """
    chosen, text_bytes = zip(*itertools.islice(scored.batches(row_tokens), batches), strict=True)
    tokens = tuple(batch.trained for batch in chosen)
    found = runner.score_versions(chosen, _layers(loaded, scores, progress), scores)
    weighted = [
        tuple(
            float((losses.cpu().double() * batch.loss_mask.double()).sum())
            for losses, batch in zip(version, chosen, strict=True)
        )
        for version in found
    ]
    return [Score(nats, tokens, text_bytes) for nats in weighted]


def _layers(loaded: Loaded, versions: int, progress: Progress) -> Iterator[list[Block]]:
    """Yield each layer of the published base, dense, and with `versions` 2 the same weights under the adapter."""
    model, checkpoint = loaded.model, loaded.checkpoint
    for layer, trained in enumerate(model.blocks):
        progress(layer, len(model.blocks))
        tensors = dense_layer(checkpoint, layer, model.dtype, model.device)
        yield [_block(trained, tensors, adapted) for adapted in (False, True)[:versions]]
        del tensors
        release_layer(checkpoint, layer)
    progress(len(model.blocks), len(model.blocks))


def _block(trained: Block, tensors: dict[str, Weight], adapted: bool) -> Block:
    """Return a block of these tensors, bare or under the adapter of the trained block in the same place, which it shares."""
    block = Block(trained.config, trained.layer, tensors)
    for name, linear in trained.linears().items():
        if adapted and isinstance(linear, LoraLinear):
            base, a, b = base_of(getattr(block, name)), linear.lora_A.detach(), linear.lora_B.detach()
            setattr(block, name, LoraLinear(base, a, b, linear.scale))
    return block
