"""Measures held-out bits per byte: how well a model predicts text it has not seen (lower is better).

Bits per byte of text do not depend on the tokenizer, so they compare models that cut text into different tokens.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgetune.config import DataConfig, GenerateConfig, TrainConfig
from edgetune.dataset.chat_notices import ChatNotices
from edgetune.dataset.evaluation_set import EvaluationSet, Score
from edgetune.dataset.token_store import tokenize
from edgetune.documents.reading import read_notes
from edgetune.documents.summary import sentences
from edgetune.library import adapter_registry as registry
from edgetune.library.adapter_notices import adapter_notices
from edgetune.library.loading import load_base, open_base
from edgetune.progress import Progress, Show, Stages, ignore
from edgetune.runtime import adapter as adapters
from edgetune.runtime.batch import Batch
from edgetune.runtime.errors import ModelError
from edgetune.runtime.runner import Runner
from edgetune.scratch import scratch_folder
from edgetune.weight_forms import form_for_writing

LARGEST_LOG_PERPLEXITY = 700.0
"""Nats per token beyond which perplexity would overflow a double (exp(709.8) does)."""
FEWEST_TOKENS = 2048
"""Tokens that an evaluation should read: a run too short for that many has fewer evaluations. Chosen by hand."""
NIGHT_TOKENS = 8192
"""Held-out tokens that a night's evaluation reads, if there are so many, whatever its share of the work: a night with few new
notes is short, and a share of it would judge by too few held-out ones. Chosen by hand: 16 rows of the default length."""
NIGHT_SHARE = 0.35
"""Largest share of a night's time (0 to 1) that its evaluations take in order to read so many tokens; chosen by hand."""
CUT_SHARE, CUT_SECONDS = 0.2, 45.0
"""Share of its time (0 to 1), but no more than so many seconds, that a night may take for evaluations where its deadline cuts
it short; chosen by hand. It keeps 60 seconds, in a short night a quarter of its time, to finish in (nights/night.py)."""
TOKEN_COST = 0.6
"""Time that an evaluation takes per token, relative to training. Measured: 0.45 on two Zen 4 cores with a model of 16M
parameters. Rounded up by hand, since a forward pass alone has half of the products of forward and backward."""
TOKEN_COST_INT8 = 1.0
"""TOKEN_COST for runs that train with 8-bit products, which evaluations do not use. An upper bound, chosen by hand."""
READ_BY_DEFAULT = DataConfig()
"""The settings by which texts are read where nothing else is asked for."""


@dataclass(frozen=True)
class Evaluation:
    """The answer of `edgetune eval`. Perplexity is per token, so it compares only models that share a tokenizer.

    notices: sentences for the user about the adapter.
    """

    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int
    documents: int
    model: str
    adapter: str
    weights: str
    """Form of the base's linears, one of WEIGHTS but auto."""
    notices: tuple[str, ...]
    """Sentences for the user about what was not read, or not as it is, and about the adapter."""


def plan_evaluations(
    config: TrainConfig, steps: int, trained_tokens: float, set_tokens: int, int8: bool, more: int = 0
) -> tuple[int, int]:
    """Return the steps between two evaluations, and the most tokens that each reads, for config.evaluation_share.

    trained_tokens: those that the whole run reads in training. set_tokens: those of all held-out windows. One evaluation
    comes before step 1; from the second one on, evaluations never have had more than their share of the work so far, and
    their share of the whole run has room for `more` that come at its end. In a night each reads NIGHT_TOKENS at least.
    """
    affordable = config.evaluation_share * trained_tokens / (TOKEN_COST_INT8 if int8 else TOKEN_COST)
    # Two evaluations in the first of `count` parts of the run take half of that part's share each.
    enough = min(set_tokens, FEWEST_TOKENS)
    count = max(min(config.evaluations, steps, int(affordable / 2 / max(enough, 1))), 1)
    every = -(-steps // count)
    share = min(every / steps / 2, 1 / (-(-steps // every) + 1 + more))
    least = min(NIGHT_TOKENS, set_tokens) if config.only_new else 1
    return every, max(int(affordable * share), least, 1)


def largest_share(config: TrainConfig) -> float:
    """Return the largest share of a run's time that evaluations take: more in a night, which must be judged to be of use."""
    return max(config.evaluation_share, NIGHT_SHARE) if config.only_new else config.evaluation_share


def seconds_after_deadline(config: TrainConfig, elapsed: float) -> float:
    """Return the seconds that all evaluations of a run may take which a deadline ends after `elapsed` seconds."""
    usual = config.evaluation_share * elapsed
    return max(usual, min(CUT_SHARE * elapsed, CUT_SECONDS)) if config.only_new else usual


def score(
    runner: Runner,
    scored: EvaluationSet,
    row_tokens: int,
    progress: Progress = ignore,
    seconds: float = math.inf,
    most_batches: int | None = None,
) -> Score:
    """Score an evaluation set with the adapter that is on the model now, in batches of `row_tokens` tokens.

    progress: receives the tokens read and all tokens; it may raise to end the evaluation. No further batch is begun once
    `seconds` have passed or `most_batches` are done.
    """
    nats: list[float] = []
    tokens: list[int] = []
    text_bytes: list[float] = []
    windows: list[tuple[tuple[int, float, float], ...]] = []
    start, done, total = time.monotonic(), 0, scored.tokens
    progress(0, total)
    for chosen in itertools.islice(scored.groups(row_tokens), most_batches):
        if nats and time.monotonic() - start >= seconds:
            break
        batch, size = scored.batch(chosen)
        losses = runner.score(batch).cpu().double() * batch.loss_mask.double()
        nats.append(float(losses.sum()))
        windows.append(tuple(_windows(scored, chosen, losses)))
        tokens.append(batch.trained)
        text_bytes.append(size)
        done += len(batch.input_ids)
        progress(done, total)
    return Score(tuple(nats), tuple(tokens), tuple(text_bytes), tuple(windows))


def score_batches(runner: Runner, batches: Sequence[tuple[Batch, float]], seconds: float) -> Score:
    """Score batches, each with its bytes of text, with the adapter that is on the model; none is begun after `seconds`."""
    nats: list[float] = []
    start = time.monotonic()
    for batch, _ in batches:
        if nats and time.monotonic() - start >= seconds:
            break
        nats.append(float((runner.score(batch).cpu().double() * batch.loss_mask.double()).sum()))
    done = batches[: len(nats)]
    return Score(tuple(nats), tuple(batch.trained for batch, _ in done), tuple(size for _, size in done))


def common_batches(before: Score | None, after: Score | None) -> int:
    """Return the number of batches that both scores cover; where one is None, those of the other alone."""
    return min((len(score) for score in (before, after) if score is not None), default=0)


def both_bits(before: Score | None, after: Score | None) -> tuple[float | None, float | None]:
    """Return the bits per byte of two scores over the text that both cover; None for a score that is None."""
    common = common_batches(before, after)
    first, second = (None if score is None else score.first(common).bits_per_byte for score in (before, after))
    return first, second


def _windows(scored: EvaluationSet, chosen: list[int], losses: Tensor) -> Iterator[tuple[int, float, float]]:
    """Yield the document, bytes and nats of each window of a batch, whose losses (N,) stand one window after another."""
    lengths = [int(scored.windows.length[window]) for window in chosen]
    for window, own in zip(chosen, torch.split(losses, lengths), strict=True):
        yield int(scored.owner[window]), float(scored.bytes[window]), float(own.sum())


def evaluate(
    texts: Sequence[str],
    model: str | None = None,
    adapter: str | None = None,
    device: str = "auto",
    show: Show = lambda event: None,
    weights: str = GenerateConfig.weights,
    data: DataConfig = READ_BY_DEFAULT,
) -> Evaluation:
    """Measure a model's bits per byte on every document in `texts`, which are files and folders of notes.

    adapter: a folder, a name, "none" for the bare base model, or None for the current adapter. show: receives progress as
    events.Working. weights: one of WEIGHTS, the form of the base's linears. data: decides which of the files are read, and what
    of their text; rows and batches are those of the defaults. Raises subclasses of EdgetuneError.
    """
    stages, notices = Stages(show), ChatNotices()
    reading = read_notes(texts, data, stages.of("reading"))
    base = open_base(model, show)
    name, found = registry.adapter_for(adapter, base[1])
    form = form_for_writing(weights, base[1], None if found is None else found.about)
    loaded = load_base(base, device, progress=stages.of("loading"), form=form)
    if found is not None:
        adapters.attach(loaded.model, found)
    with scratch_folder() as folder:
        progress = stages.of("tokenizing")
        store = tokenize(reading.documents, loaded.tokenizer, folder / "tokens", progress=progress, notices=notices)
        whole = EvaluationSet.of(store, min(DataConfig.seq_len, loaded.model.config.longest_row))
        result = score(Runner(loaded.model), whole, DataConfig.batch_tokens, stages.of("evaluating"))
    if not math.isfinite(result.bits_per_byte):
        raise ModelError(
            f"{loaded.choice.name} with adapter {name} predicts NaN, since numbers in it are too large; name another adapter, "
            "or copy the model again."
        )
    tokens = sum(result.tokens)
    return Evaluation(
        bits_per_byte=result.bits_per_byte,
        perplexity=math.exp(min(math.fsum(result.nats) / max(tokens, 1), LARGEST_LOG_PERPLEXITY)),
        tokens=tokens,
        bytes=round(math.fsum(result.bytes)),
        documents=len(store.documents),
        model=loaded.choice.name,
        adapter=name,
        weights=form,
        notices=(
            *sentences(reading),
            *notices.sentences(),
            *adapter_notices(adapter, found, loaded.checkpoint, loaded.tokenizer),
        ),
    )
