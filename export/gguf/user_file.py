"""Run an adapter on the GGUF file that its base was converted from, and measure there what the adapter gains.

edgetune trains on a copy of that file, converted to bf16 or NF4, and llama.cpp multiplies quantised weights by activations that
it rounds to 8 bits. So the two bases differ a little without any adapter, and the proof compares what the adapter changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from edgetune.export import effect
from edgetune.export.gguf import llamacpp
from edgetune.export.gguf.quantized_base import DOCUMENT_TOKENS, LEAST_GAIN, LEAST_KEPT, documents_for
from edgetune.export.job import Job, UserFile
from edgetune.export.memory import PROCESS_BYTES, StageMemory
from edgetune.runtime import adapter as adapters
from edgetune.runtime.tokenizer import Tokenizer

_LOGIT_COPIES = 2
"""fp32 copies of a document's logits while llama.cpp measures a loss: its own, and that of llama-cpp-python."""
LEAST_GAIN_WRITTEN = 0.2
"""Gain in nats per token below which the share that is left of it is noise where the model wrote the few texts itself. Chosen
by hand: after 3 steps of training on SmolLM2-135M, gains on three such texts lay between -0.14 and 0.04."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"
"""The text of a token that ends within a character."""


class UserFileReader:
    """The user's own GGUF file with the adapter, run by llama.cpp."""

    def __init__(self, file: UserFile, lora: Path) -> None:
        self._file, self._lora = file, lora

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Read token ids (N,); return logits (N, V) f32."""
        return llamacpp.logits(self._file.path, self._lora, ids)


def bare_logits(job: Job, ids: Sequence[int]) -> Tensor | None:
    """Run ids (N,) through the user's file without the adapter; return logits (N, V) f32, None for a job without a file."""
    return None if job.user_file is None else llamacpp.logits(job.user_file.path, None, ids)


def reader_memory(job: Job, file: UserFile) -> StageMemory:
    """Forecast llama.cpp on the user's file, which it maps."""
    return StageMemory(PROCESS_BYTES + file.bytes + _LOGIT_COPIES * 4 * DOCUMENT_TOKENS * job.base.config.vocab_size)


def measure_on_user_file(job: Job, file: UserFile, lora: Path) -> tuple[tuple[str, ...], tuple[tuple[str, float], ...]]:
    """Measure bits per byte of the same texts without and with the adapter, on the user's file and in edgetune.

    Returns sentences for the user, and the figures by name.
    """
    documents, sizes = _whole_characters(documents_for(job), Tokenizer.load(job.base.folder))
    done = job.counter("measuring", 4)
    nats = []
    for adapter in (None, lora):
        nats.append(llamacpp.loss(file.path, adapter, documents))
        done("llama.cpp")
    model = job.model()
    with_adapter = effect.mean_nats(model, documents)
    done("edgetune")
    adapters.detach(model)
    nats += [effect.mean_nats(model, documents), with_adapter]
    done("edgetune")
    per_byte = (sum(map(len, documents)) - len(documents)) / math.log(2) / sum(sizes)
    before, after, own_before, own_after = (loss * per_byte for loss in nats)
    facts = [
        ("bits_per_byte_before", before), ("bits_per_byte_after", after),
        ("edgetune_bits_per_byte_before", own_before), ("edgetune_bits_per_byte_after", own_after),
    ]  # fmt: skip
    read = "the texts" if job.texts else "texts that the adapted model wrote itself"
    said = (
        f"On your {file.name} ({file.quantisation}), llama.cpp reads {read} at {before:.3f} bits per byte without the adapter "
        f"and at {after:.3f} with it; edgetune, on its own copy of the model, at {own_before:.3f} and {own_after:.3f}."
    )
    if nats[2] - nats[3] < (LEAST_GAIN if job.texts else LEAST_GAIN_WRITTEN):
        advice = "" if job.texts else "; --texts NOTES measures it on your notes"
        return (f"{said} That gain is too small to say how much of it your file keeps{advice}.",), tuple(facts)
    share = (before - after) / (own_before - own_after)
    facts.append(("adapter_gain_kept", share))
    kept = f"Your file keeps {share:.0%} of the adapter's gain."
    if share < LEAST_KEPT:
        kept += " The rest mended what rounding had cost edgetune's own copy, or is lost to your file's rounding."
    return (f"{said} {kept}",), tuple(facts)


def _whole_characters(documents: Sequence[Sequence[int]], tokenizer: Tokenizer) -> tuple[list[list[int]], list[int]]:
    """Cut documents before a character that is not whole; return them and the bytes of all their tokens but the first."""
    kept, sizes = [], []
    for document in documents:
        ids = list(document)
        while len(ids) > 2 and tokenizer.decode(ids[1:], continuing=True).endswith(_BROKEN):
            ids.pop()
        kept.append(ids)
        sizes.append(max(1, len(tokenizer.decode(ids[1:], continuing=True).encode())))
    return kept, sizes
