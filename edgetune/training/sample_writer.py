"""Lets the model write on from a run's prompts (samples.py), for the report."""

from __future__ import annotations

from collections.abc import Iterator

from edgetune.events import Sampled
from edgetune.progress import Stages
from edgetune.runtime.generate import Generator
from edgetune.runtime.heap import trim
from edgetune.training.prepared_run import PreparedRun
from edgetune.training.samples import prompt_ids, prompt_text

SAMPLE_TOKENS = 80
"""Tokens that the model writes for each sample; chosen by hand. Half as many where layers are streamed from files."""


def write_samples(when: str, run: PreparedRun, stages: Stages) -> Iterator[Sampled]:
    """Let the model write on from each prompt of the run, and yield what it wrote. when: "before" or "after" training."""
    model, tokenizer = run.loaded.model, run.loaded.tokenizer
    sampling = run.loaded.sampling(seed=run.config.data.seed)
    prompts, tokens = run.record.prompts, SAMPLE_TOKENS
    # Where weights are streamed, every token reads them from disk again: write less.
    if not model.whole:
        prompts, tokens = prompts[:1], SAMPLE_TOKENS // 2
    progress, total = stages.of("sampling"), tokens * len(prompts)
    for number, prompt in enumerate(prompts):
        progress(number * tokens, total)
        ids = prompt_ids(prompt, tokenizer)
        if len(ids) >= model.config.max_positions:
            continue
        generator = Generator(run.runner, min(len(ids) + tokens, model.config.max_positions))
        written = []
        for token in generator.generate(ids, tokens, sampling, tokenizer.eos_ids):
            written.append(token)
            progress(number * tokens + len(written), total)
        yield Sampled(when, prompt_text(prompt, tokenizer), tokenizer.decode(written, continuing=True))
    trim(model.device)
