"""Makes a run's anchor before step 1, so that a chat model still answers as it did (dataset/anchor_set.py trains on it).

A base with a chat template answers built-in questions, without any adapter and always taking the likeliest token; these
answers are the anchor. Any other base, and one that would take too long to answer, is anchored to a built-in text.
"""

from __future__ import annotations

import base64
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgetune.config import TrainConfig
from edgetune.dataset.anchor_set import (
    SOFT_TOKENS,
    AnchorSet,
    anchor_windows,
    row_numbers,
    target_rows,
    write_predictions,
)
from edgetune.dataset.packing import make_batch, split
from edgetune.dataset.token_store import TokenStore, tokenize
from edgetune.documents.document import Document, Turn
from edgetune.home import private_folder
from edgetune.library.loading import Loaded
from edgetune.progress import Stages
from edgetune.runtime.batch import Batch
from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.files import explain_full_disk, private_file, read_own
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.heap import trim_memory
from edgetune.runtime.runner import ROW_MULTIPLE, Runner
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.texts import anchor_questions, calibration_text
from edgetune.training.deadline import Deadline

ANCHOR, REPLIES = "anchor", "replies"
"""Folders, in the unfinished run's own, of the anchor and of the base's answers that are kept out of it for the gate."""
MAKING_SHARE = 0.03
"""Largest share of a run's work that making the anchor may take (0 to 1); chosen by hand."""
REPLY_TOKENS = 32
"""Most tokens of an answer; chosen by hand. More answers cover more kinds of questions than longer ones."""
FEWEST_REPLIES = 16
"""Answers that even a short run makes; chosen by hand."""
KEPT_SHARE = 0.25
"""Share of the answers (0 to 1) that are not trained on, since the gate judges the new adapter by them; chosen by hand."""
WRITING_COST = {"cpu": 12, "cuda": 100, "mps": 30}
"""Time that writing a token takes on each device, relative to training one. CPU: SmolLM2 on one Zen 4 core of a busy machine
wrote one in 71 ms and trained one in 6.1. The others are guesses, not measured."""
PREDICTING_COST = 0.5
"""Time that reading a token takes to note the base's predictions, relative to training one; chosen by hand: a forward pass
alone, and a sort of its predictions."""
DEADLINE_SHARE = 0.05
"""Share of the time until a deadline after which the base answers no further question (0 to 1); chosen by hand. Without a
deadline no clock decides, so that the same command gives the same bits."""
_BYTES_PER_TOKEN = 4
"""Bytes of the built-in text per token, roughly; chosen by hand."""
_HEAD_ROWS = 64
"""Rows of predictions that are sorted at a time; chosen by hand: in fp32 they take less memory than a step's own."""


class AnchorKind(StrEnum):
    """The texts of an anchor."""

    REPLIES = "replies"
    TEXT = "text"


@dataclass(frozen=True)
class AnchorPlan:
    """The anchor of a run."""

    share: float
    """Share of the tokens of a step that come from the anchor (0 to 1)."""
    kind: AnchorKind
    documents: int
    """The base's own answers, or the built-in texts."""
    asked: int | None = None
    """Questions that the base was asked until a deadline ended that; None for all that the run could afford."""

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> AnchorPlan:
        """Return the plan that was written as JSON."""
        return cls(**{**values, "kind": AnchorKind(str(values["kind"]))})  # type: ignore[arg-type]

    def tokens_a_step(self, batch_tokens: int) -> int:
        """Return the anchor's tokens in a step with `batch_tokens` tokens of notes."""
        return max(round(batch_tokens * self.share / (1 - self.share)), 1)


def make_anchor(
    config: TrainConfig,
    loaded: Loaded,
    folder: Path,
    row_tokens: int,
    trained_tokens: float,
    stages: Stages,
    most_asked: int | None = None,
) -> AnchorPlan | None:
    """Write the anchor of a new run to `folder` / ANCHOR and return its plan; None where the run has none.

    The model must be bare, without an adapter. row_tokens: most tokens of a batch. trained_tokens: those of notes that the run
    reads in training, which decide how much the anchor may cost. most_asked: number of questions that the run which this one
    repeats had asked when a deadline ended that.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    share = config.anchor_share(model.config.hidden_size, tokenizer.has_template)
    path = folder / ANCHOR
    for made in (path, folder / REPLIES):
        shutil.rmtree(made, ignore_errors=True)
    if not share:
        return None
    kind, documents, store, asked = AnchorKind.REPLIES, list[Document](), None, None
    count = affordable_replies(trained_tokens, model.device.type) if model.whole and tokenizer.has_template else 0
    if count:
        seconds = DEADLINE_SHARE * Deadline.of(config).seconds_left()
        questions = anchor_questions()[:count]
        documents, answered = replies(loaded, questions[:most_asked], seconds, stages)
        asked = answered if answered < len(questions) else None
        documents = _keep_some(documents, tokenizer, folder / REPLIES)
        store = tokenize(documents, tokenizer, path, may_be_empty=True)
    if store is None or not store.trained_tokens:
        kind, documents = AnchorKind.TEXT, affordable_texts(trained_tokens)
        store = tokenize(documents, tokenizer, path)
    _predict(Runner(model), store, path, config.data.seq_len, row_tokens, stages)
    trim_memory()
    return AnchorPlan(share, kind, len(store.documents), asked)


def _keep_some(documents: list[Document], tokenizer: Tokenizer, path: Path) -> list[Document]:
    """Write the last KEPT_SHARE of the answers to `path` as tokens, for the gate, and return the others."""
    kept = math.floor(KEPT_SHARE * len(documents))
    if not kept:
        return documents
    if not tokenize(documents[-kept:], tokenizer, path, may_be_empty=True).trained_tokens:
        shutil.rmtree(path)
    return documents[:-kept]


def open_anchor(folder: Path, plan: AnchorPlan | None, seq_len: int) -> AnchorSet | None:
    """Open the anchor that `make_anchor` wrote, or a follower received. Raises DataError if it is damaged."""
    return None if plan is None else AnchorSet.open(folder / ANCHOR, seq_len)


def affordable_replies(trained_tokens: float, device: str) -> int:
    """Return how many answers fit in MAKING_SHARE of a run that trains this many tokens: at least FEWEST_REPLIES."""
    cost = REPLY_TOKENS * (WRITING_COST[device] + PREDICTING_COST)
    return max(math.floor(MAKING_SHARE * trained_tokens / cost), FEWEST_REPLIES)


def affordable_texts(trained_tokens: float) -> list[Document]:
    """Return the built-in texts that fit in MAKING_SHARE of a run, at least one."""
    left, chosen = MAKING_SHARE * trained_tokens / PREDICTING_COST, list[Document]()
    for number, text in enumerate(calibration_text(), 1):
        left -= len(text.encode()) / _BYTES_PER_TOKEN
        if chosen and left < 0:
            break
        chosen.append(Document.of(f"text#{number}", text))
    return chosen


def replies(loaded: Loaded, questions: Sequence[str], seconds: float, stages: Stages) -> tuple[list[Document], int]:
    """Let the base answer each question; return the conversations, without those that its template refuses, and the questions.

    No further question is asked once `seconds` have passed.
    """
    progress, documents, start = stages.of("answering"), list[Document](), time.monotonic()
    runner, asked = Runner(loaded.model), 0
    for question in questions:
        if documents and time.monotonic() - start >= seconds:
            break
        words = list[int]()
        for token in _answer(runner, loaded.tokenizer, question):
            words.append(token)
            progress(asked * REPLY_TOKENS + len(words), len(questions) * REPLY_TOKENS)
        asked += 1
        answer = loaded.tokenizer.decode(words, continuing=True).strip()
        if answer:
            turns = (Turn("user", question), Turn("assistant", answer))
            documents.append(Document.of(f"question#{asked}", f"{question}\n{answer}", turns))
    return documents, asked


def _answer(runner: Runner, tokenizer: Tokenizer, question: str) -> Iterator[int]:
    """Yield the tokens of the base's likeliest answer; none where the chat template refuses the question."""
    try:
        ids = tokenizer.chat_ids([{"role": "user", "content": question}])
    except TokenizerError:
        return
    longest = min(len(ids) + REPLY_TOKENS, runner.model.config.max_positions)
    if len(ids) < longest:
        yield from Generator(runner, longest).generate(ids, REPLY_TOKENS, Sampling(temperature=0.0), tokenizer.eos_ids)


def _predict(runner: Runner, store: TokenStore, path: Path, seq_len: int, row_tokens: int, stages: Stages) -> None:
    """Write what the model on `runner` predicts for each trained token of the store into its folder `path`."""
    windows, row_of = anchor_windows(store, seq_len), row_numbers(store)
    ids = np.zeros((store.trained_tokens, SOFT_TOKENS), np.int32)
    probabilities = np.zeros((store.trained_tokens, SOFT_TOKENS), np.float32)
    progress, done = stages.of("predicting"), 0
    for members in split(windows.length, row_tokens):
        progress(done, int(windows.length.sum()))
        batch = make_batch(store, windows, members)
        rows, mask = target_rows(row_of, windows, members), batch.loss_mask.numpy() > 0
        found = likeliest(runner, batch)
        ids[rows[mask]], probabilities[rows[mask]] = (values.numpy() for values in found)
        done += len(batch.input_ids)
    write_predictions(path, ids, probabilities)


@torch.no_grad()
def likeliest(runner: Runner, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the SOFT_TOKENS likeliest tokens after each target that carries loss, (R, K) int32, and their probabilities."""
    model = runner.model
    padded = batch.padded(ROW_MULTIPLE).to(model.device)
    h = runner.infer(padded.input_ids, padded.positions, padded.segments, None)
    rows = padded.loss_mask.nonzero().squeeze(1)
    ids, probabilities = [], []
    for some in rows.split(_HEAD_ROWS):
        every = torch.nn.functional.pad(some, (0, _HEAD_ROWS - len(some)))  # one shape, as in loss.py
        best = torch.softmax(model.logits(h[every]).float(), -1).topk(SOFT_TOKENS)
        ids.append(best.indices[: len(some)].int().cpu())
        probabilities.append(best.values[: len(some)].cpu())
    return torch.cat(ids), torch.cat(probabilities)


def packed_files(folder: Path) -> dict[str, str]:
    """Return the anchor's files as text, for the followers of a run: it holds nothing of the notes. Empty without an anchor."""
    return {path.name: base64.b64encode(read_own(path)).decode() for path in sorted((folder / ANCHOR).glob("*"))}


def unpack_files(files: Mapping[str, str], folder: Path) -> None:
    """Write the files that `packed_files` returned on the leader's machine."""
    shutil.rmtree(folder / ANCHOR, ignore_errors=True)
    for name, content in files.items():
        path = private_folder(folder / ANCHOR) / Path(name).name
        with explain_full_disk(path), private_file(path) as file:
            file.write(base64.b64decode(content))
