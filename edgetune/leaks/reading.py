"""Reads windows of notes with the model as it is. One forward pass serves extraction and membership inference alike.

Greedy decoding writes a passage word for word exactly where each of its tokens is the likeliest one after the tokens before
it, so nothing has to be generated.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgetune.dataset.evaluation_set import EvaluationSet
from edgetune.dataset.token_store import TokenStore
from edgetune.progress import Progress, ignore
from edgetune.runtime.batch import Batch
from edgetune.runtime.runner import Runner

PREFIX_TOKENS, PASSAGE_TOKENS = 24, 24
"""Fewest tokens of a note that stand before a passage, and the tokens of a passage. Carlini et al. 2023 (arXiv 2202.07646) use
50 and 50; about half of each, chosen by hand, so that a note of 50 tokens can be tried: about 18 words after 18 words."""


@dataclass(frozen=True)
class ReadWindow:
    """A window of a document, read with a model: its number, its document's, its scored tokens and their loss in nats.

    passages: for each passage in it, True if greedy decoding writes it word for word and it is text of this note's own.
    """

    window: int
    document: int
    tokens: int
    nats: float
    passages: tuple[bool, ...]


def read_windows(
    runner: Runner,
    windows: EvaluationSet,
    row_tokens: int,
    progress: Progress = ignore,
    seconds: float = math.inf,
    held_out: TokenStore | None = None,
) -> list[ReadWindow]:
    """Read windows with the adapter that is on the model now, in batches of `row_tokens` tokens.

    progress: receives the tokens read and all tokens; it may raise to end the work. No batch is begun after `seconds`.
    held_out: notes that were not trained on. A passage that stands in them too, such as a signature or the lines of a form, is
    no note's own, and so it does not count as written.
    """
    found: list[ReadWindow] = []
    start, done, total = time.monotonic(), 0, windows.tokens
    shared = b"" if held_out is None else np.asarray(held_out.ids).tobytes()
    progress(0, total)
    for chosen in windows.groups(row_tokens):
        if found and time.monotonic() - start >= seconds:
            break
        batch, _ = windows.batch(chosen)
        found += _read_batch(runner, windows, chosen, batch, shared)
        done += len(batch.input_ids)
        progress(done, total)
    return found


def only(windows: EvaluationSet, numbers: Collection[int]) -> EvaluationSet:
    """Return the set of those of the windows that have one of these numbers, in the same order."""
    kept = [number for number in windows.order.tolist() if number in numbers]
    return dataclasses.replace(windows, order=np.array(kept, dtype=np.int64))


def _read_batch(runner: Runner, windows: EvaluationSet, chosen: list[int], batch: Batch, shared: bytes) -> Iterator[ReadWindow]:
    """Yield what was read of each window of a batch, which stand in it one after another. shared: the held-out token ids."""
    losses, hits = runner.score_and_hits(batch)
    lengths = [int(windows.windows.length[window]) for window in chosen]
    pieces = (torch.split(tensor.cpu(), lengths) for tensor in (losses.cpu().double(), hits, batch.loss_mask))
    for window, nats, hit, mask in zip(chosen, *pieces, strict=True):
        scored, first = mask > 0, int(windows.windows.start[window]) + 1  # target 0 is the window's second token
        passages = tuple(
            bool(hit[start:end].all()) and not stands_in(shared, windows.store.ids[first + start : first + end])
            for start, end in passages_of(scored)
        )
        yield ReadWindow(window, int(windows.owner[window]), int(scored.sum()), float(nats[scored].sum()), passages)


def stands_in(shared: bytes, ids: npt.NDArray[np.int32]) -> bool:
    """Return True if these token ids stand one after another among `shared`, which are the bytes of int32."""
    wanted, size = np.asarray(ids).tobytes(), np.dtype(np.int32).itemsize
    place = shared.find(wanted)
    while place > 0 and place % size:  # bytes of two neighbours
        place = shared.find(wanted, place + 1)
    return place >= 0


def passages_of(scored: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the first target and the end of each passage of a window. scored: (length,) bool.

    Target i is the token after the first i + 1 of the window. Passages follow each other without overlap, from the first
    scored target on that has PREFIX_TOKENS tokens before it; those with a token that is not scored are left out.
    """
    targets = scored.nonzero().squeeze(1).tolist()
    first = max(targets[0] if targets else 0, PREFIX_TOKENS - 1)
    for start, end in itertools.pairwise(range(first, len(scored) + 1, PASSAGE_TOKENS)):
        if scored[start:end].all():
            yield start, end
