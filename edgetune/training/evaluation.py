"""Measures held-out bits per byte: how well a model predicts text it has not seen (lower is better).

Bits per byte of text do not depend on the tokenizer, so they compare models that cut text into different tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgetune.config import DataConfig
from edgetune.dataset.packing import BitsPerByte, bits_per_byte, evaluation_batches
from edgetune.dataset.token_store import TokenStore, tokenize
from edgetune.documents.reading import read_notes
from edgetune.library import adapter_registry as registry
from edgetune.library.loading import load_base, open_base
from edgetune.runtime import adapter as adapters
from edgetune.runtime.errors import ModelError
from edgetune.runtime.runner import Runner
from edgetune.scratch import scratch_folder

LARGEST_LOG_PERPLEXITY = 700.0
"""Nats per token beyond which perplexity would overflow a double (exp(709.8) does)."""


@dataclass(frozen=True)
class Evaluation:
    """The answer of `edgetune eval`. Perplexity is per token, so it compares only models that share a tokenizer."""

    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int
    documents: int
    model: str
    adapter: str


def evaluate_store(
    runner: Runner, store: TokenStore, seq_len: int, batch_tokens: int, before_each: Callable[[], None] = lambda: None
) -> BitsPerByte:
    """Score every text token of a token store once, with the adapter that is on the model now.

    `before_each` is called before each batch and may raise to end the evaluation.
    """
    scored = []
    for batch in evaluation_batches(store, seq_len, batch_tokens):
        before_each()
        scored.append((batch, runner.score(batch).cpu()))
    return bits_per_byte(store, scored)


def evaluate(texts: Sequence[str], model: str | None = None, adapter: str | None = None, device: str = "auto") -> Evaluation:
    """Measure a model's bits per byte on every document in `texts`, which are files and folders of notes.

    adapter: a folder, a name, "none" for the bare base model, or None for the current adapter.
    Raises subclasses of EdgetuneError.
    """
    reading = read_notes(texts)
    loaded = load_base(open_base(model), device)
    name, found = registry.adapter_for(adapter, loaded.checkpoint)
    if found is not None:
        adapters.attach(loaded.model, found)
    settings = DataConfig()
    with scratch_folder() as folder:
        store = tokenize(reading.documents, loaded.tokenizer, folder / "tokens")
        result = evaluate_store(Runner(loaded.model), store, settings.seq_len, settings.batch_tokens)
    if not math.isfinite(result.bits_per_byte):
        raise ModelError(
            f"{loaded.choice.name} with adapter {name} predicts NaN, since numbers in it are too large; name another adapter, "
            "or copy the model again."
        )
    nats = result.bits_per_byte * math.log(2) * result.bytes
    return Evaluation(
        bits_per_byte=result.bits_per_byte,
        perplexity=math.exp(min(nats / max(result.tokens, 1), LARGEST_LOG_PERPLEXITY)),
        tokens=result.tokens,
        bytes=result.bytes,
        documents=len(store.documents),
        model=loaded.choice.name,
        adapter=name,
    )
