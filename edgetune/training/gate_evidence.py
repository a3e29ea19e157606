"""Measures what the gate decides by (library/gate.py): yesterday's adapter on the held-out notes, general text, chat replies,
and what the new adapter gives away of the notes that it was trained on (leak_evidence.py).

All come at the end of a run, when the best adapter is on the model, and all but the last within the share of the run that
evaluations may take. Yesterday's adapter is put in its place for a moment, in the memory of the gradients: no step follows, so
they are dropped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetune.config import TrainConfig
from edgetune.dataset.evaluation_set import Score
from edgetune.library import adapter_registry as registry
from edgetune.library.gate import Change, Decision, Evidence, PairedDocument
from edgetune.progress import Stages
from edgetune.runtime import adapter as adapters
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.batch import Batch, pack
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.texts import measuring_text
from edgetune.training import evaluation, leak_evidence
from edgetune.training.leak_evidence import AUDIT_SHARE, Leaks
from edgetune.training.prepared_run import PreparedRun

FEWEST_GENERAL_TOKENS = 500
"""Tokens of general text below which it is not measured: fewer say nothing about a few per cent. Chosen by hand."""
NO_NUMBER = (PairedDocument(0.0, 0.0, math.nan),)
"""Evidence about an adapter that never gave the held-out notes a finite score."""


class GateEvidence:
    """The measurements of one finished run, whose best adapter is on the model. Scores hold the held-out notes' figures."""

    leaks = Leaks()

    def __init__(self, run: PreparedRun, seconds: float, elapsed: float, stages: Stages) -> None:
        """Find yesterday's adapter.

        seconds: those that each score may take, infinite unless the run was cut short. elapsed: the seconds that the run has
        taken, of which the audit takes its share where the run was cut short.
        """
        self.run, self.seconds, self.stages = run, seconds, stages
        self.audit_seconds = math.inf if math.isinf(seconds) else AUDIT_SHARE * elapsed
        for parameter in adapters.parameters(run.loaded.model):
            parameter.grad = None
        self.rival, self.adapter = _yesterdays(run)

    def measure(self, before: Score | None, after: Score | None) -> Evidence:
        """Return the evidence. before: the score of the run's step 0; after: that of the best adapter; None: nothing scored."""
        progress = self.stages.of("judging")
        progress(0, 3)
        heldout = self._heldout(before, after)
        progress(1, 3)
        general = self._general()
        progress(2, 3)
        replies = self._replies()
        progress(3, 3)
        self.leaks = leak_evidence.measure(self.run, self.audit_seconds, self.stages.of("auditing"))
        extracted, recognised = leak_evidence.as_evidence(self.leaks, self.run.config)
        return Evidence(heldout, general, replies, extracted, recognised, first=self.rival is None)

    def _heldout(self, before: Score | None, after: Score | None) -> tuple[PairedDocument, ...]:
        """Return the held-out documents that both adapters read, over the same batches."""
        if self.run.held_out is None or before is None:
            return ()
        if after is None:
            return NO_NUMBER
        if not starts_from(self.run.config, self.rival, self.run.plan.base):
            before = self._score_of_rival(len(after))
        common = min(len(before), len(after))
        old, new = before.first(common).by_document(), after.first(common).by_document()
        return tuple(PairedDocument(size, old[number][1], bits) for number, (size, bits) in sorted(new.items()))

    def _score_of_rival(self, batches: int) -> Score:
        """Score the first batches of the held-out notes with yesterday's adapter, or with the bare base if there is none."""
        run = self.run
        assert run.held_out is not None
        with adapters.replaced(run.loaded.model, self.adapter):
            return evaluation.score(
                run.runner, run.held_out, run.plan.setting.row_tokens, seconds=self.seconds, most_batches=batches
            )

    def _general(self) -> Change | None:
        """Score general text with the bare base and with the new adapter; None where the run is too short for that."""
        run, most = self.run, self.run.plan.evaluate_tokens
        rows = run.plan.setting.row_tokens
        batches = general_batches(run.loaded.tokenizer, min(run.plan.seq_len, rows), rows, most)
        if sum(batch.trained for batch, _ in batches) < FEWEST_GENERAL_TOKENS:
            return None
        return self._change(batches)

    def _replies(self) -> Change | None:
        """Score answers that the base gave before the run and that were kept out of its anchor; None where there are none."""
        run = self.run
        return None if run.replies is None else self._change(list(run.replies.batches(run.plan.setting.row_tokens)))

    def _change(self, batches: list[tuple[Batch, float]]) -> Change:
        """Score batches, each with its bytes of text, with the bare base and with the new adapter."""
        run = self.run
        with adapters.replaced(run.loaded.model, None):
            bare = evaluation.score_batches(run.runner, batches, self.seconds)
        adapted = evaluation.score_batches(run.runner, batches[: len(bare)], math.inf)
        return Change(bare.bits_per_byte, adapted.bits_per_byte)


def starts_from(config: TrainConfig, rival: Path | None, base: str) -> bool:
    """Return True if the first evaluation of a run is one with yesterday's adapter, or with the bare base if there is none."""
    if config.from_adapter is None:
        return rival is None
    try:
        start = registry.find(config.from_adapter, base)
    except AdapterError:  # it was there when the run began
        return False
    return start is rival if start is None or rival is None else start.resolve() == rival.resolve()


def planned_scores(has_replies: bool) -> int:
    """Return the most scores that the gate takes at the end of a run: yesterday's adapter, and general text and the base's own
    answers, if there are any, twice. A plan must not depend on which adapter is the current one, so all of them count."""
    return 5 if has_replies else 3


def general_batches(tokenizer: Tokenizer, piece_tokens: int, row_tokens: int, most: int) -> list[tuple[Batch, float]]:
    """Return the built-in text in batches, each with its bytes: `most` tokens in all, in pieces of up to `piece_tokens`.

    A batch has as many whole pieces as fit in `row_tokens`, side by side.
    """
    pieces: list[list[int]] = []
    sizes: list[float] = []
    for piece, size in _general_pieces(tokenizer, piece_tokens):
        most -= len(piece) - 1
        if most < 0:
            break
        pieces.append(piece)
        sizes.append(size)
    left = iter(sizes)
    return [(Batch.of(group), sum(itertools.islice(left, len(group)))) for group in pack(pieces, row_tokens)]


def _general_pieces(tokenizer: Tokenizer, piece_tokens: int) -> Iterator[tuple[list[int], float]]:
    """Yield the built-in text as token ids in pieces with up to `piece_tokens` inputs, each with its bytes."""
    start = tokenizer.start_ids
    for text in measuring_text():
        ids = tokenizer.encode(text)
        size = len(text.encode()) / max(len(ids), 1)
        for first in range(0, len(ids), piece_tokens):
            piece = [*start, *ids[first : first + piece_tokens]][: piece_tokens + 1]
            if len(piece) < 2:
                return
            yield piece, size * (len(piece) - 1)


def decision_record(decision: Decision, evidence: Evidence, rival: Path | None, leaks: Leaks) -> dict[str, Any]:
    """Return the decision and the figures behind it, JSON-ready, for events.Finished."""
    size = math.fsum(document.bytes for document in evidence.heldout)
    before = math.fsum(document.bits_before for document in evidence.heldout)
    after = math.fsum(document.bits_after for document in evidence.heldout)
    return {
        "verdict": str(decision.verdict),
        "reason": decision.reason,
        "first": rival is None,
        "heldout_documents": len(evidence.heldout),
        "current_bits_per_byte": before / size if size else None,
        "new_bits_per_byte": after / size if size else None,
        "general_bits_per_byte_base": None if evidence.general is None else evidence.general.before,
        "general_bits_per_byte_new": None if evidence.general is None else evidence.general.after,
        "replies_bits_per_byte_base": None if evidence.replies is None else evidence.replies.before,
        "replies_bits_per_byte_new": None if evidence.replies is None else evidence.replies.after,
        **leaks.figures(),
    }


def _yesterdays(run: PreparedRun) -> tuple[Path | None, Adapter | None]:
    """Return the folder and the values of the base's current adapter; None for one that there is not or that is unreadable.

    A run that repeats another one is compared with what that one was compared with.
    """
    current = registry.get_current(run.plan.base)
    folder = None if current is None else current.adapter
    if run.recorded is not None:
        folder = run.recorded.rival
    if folder is None:
        return None, None
    try:
        adapter = registry.load_for(folder, run.loaded.checkpoint)
        adapters.check_fits(adapter, run.loaded.model.config)
    except AdapterError:
        return None, None
    return folder, adapter
