"""Measure how much of an adapter's gain is left on llama.cpp's Q4_K_M copy of its base, which is what most people run."""

from __future__ import annotations

from pathlib import Path

import torch

from edgetune.export.gguf import llamacpp
from edgetune.export.gguf.adapter import ADAPTER_FILE
from edgetune.export.gguf.reader import bare_base
from edgetune.export.job import Job, Written
from edgetune.runtime.files import PRIVATE_FILE
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.runner import Runner

LEAST_KEPT = 0.8
"""Share of the adapter's gain (0 to 1) below which the user is warned. Chosen by hand."""
DOCUMENTS, DOCUMENT_TOKENS = 8, 256
"""Upper bounds on the number of texts and the tokens of each on which the gain is measured. Chosen by hand."""
WRITTEN_DOCUMENTS, WRITTEN_TOKENS = 4, 64
"""Number of texts and tokens of each that the adapted model writes where no texts are given. Chosen by hand."""
LEAST_GAIN = 1e-3
"""Gain in nats per token below which the share that is left of it is noise. Chosen by hand."""


def measure_on_q4_k_m(job: Job, folder: Path) -> Written:
    """Measure the adapter's gain, in nats per token of the same texts, on its own base and on llama.cpp's Q4_K_M copy of it."""
    documents = documents_for(job)
    lora = folder / ADAPTER_FILE
    with bare_base(job, folder) as base:
        small = base.with_name("q4_k_m.gguf")
        small.touch(PRIVATE_FILE)  # llama.cpp writes into the existing file, so it stays private
        llamacpp.quantize(base, small)
        gain, left = (llamacpp.loss(model, None, documents) - llamacpp.loss(model, lora, documents) for model in (base, small))
    if gain < LEAST_GAIN:
        notice = (
            f"The adapter gains {gain:.2g} nats per token on the texts it was measured on: too little to say how much of it a "
            "Q4_K_M base keeps."
        )
        return Written(ADAPTER_FILE, (notice,))
    share = left / gain
    notices: tuple[str, ...] = ()
    if share < LEAST_KEPT:
        notices = (
            f"On a Q4_K_M base llama.cpp keeps {share:.0%} of what the adapter gains. Run the adapter on a Q8_0 or F16 base.",
        )
    return Written(ADAPTER_FILE, notices, (("adapter_gain_kept_on_q4_k_m", share),))


def documents_for(job: Job) -> list[list[int]]:
    """Return token ids of the texts to measure on: the job's, each cut short, else some that the adapted model writes."""
    texts = [list(text[:DOCUMENT_TOKENS]) for text in job.texts if len(text) > 1]
    return texts[:: -(-len(texts) // DOCUMENTS)] if texts else _written_by_model(job)


def _written_by_model(job: Job) -> list[list[int]]:
    """Let the adapted model write texts: on these the adapter differs from its base as much as it does anywhere."""
    model = job.model()
    start = [*job.start.text] or [0]
    room = min(WRITTEN_TOKENS, model.config.max_positions)
    documents = []
    for seed in range(WRITTEN_DOCUMENTS):
        generator = Generator(Runner(model), room)
        sampling = Sampling(temperature=1.0, top_p=1.0, seed=seed)
        with torch.no_grad():
            documents.append([*start, *generator.generate(start, room - len(start), sampling)])
    return documents
