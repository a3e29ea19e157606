"""Forecast the peak memory of an export and refuse one that would exceed --memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from edgetune.export.job import LAYER_SHARE, Job
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.errors import ResourceError
from edgetune.runtime.names import LINEAR_WEIGHT
from edgetune.runtime.pager import SLOTS

TORCH_BUILD_BYTES = 0 if torch.version.cuda is None else 155_000_000
"""Anonymous memory in bytes that importing one of torch's CUDA builds takes beyond its CPU build, with or without a card.

Measured on Linux: 310 MB with torch 2.15.0+cu132, 156 MB with the CPU build of 2.13.
"""
PROCESS_BYTES = 170_000_000 + TORCH_BUILD_BYTES
"""Anonymous memory in bytes of a process that has imported torch and the shared parts of export/.

Measured on Linux with the CPU build of torch: 152 MB.
"""
TOKENIZER_BYTES, TOKENIZER_SHARE = 4_000_000, 22
"""Bytes that a tokenizer and the copies of its files take: some in any case, and so many for each byte of its files.

Measured: 3.7 MB for the demo's tokenizer.model of 0.13 MB, 71 MB for SmolLM2's tokenizer.json of 3.5 MB.
"""
LOGIT_BYTES = 1200
"""Bytes per word of the vocabulary for golden.json's rows of logits, with and without the adapter, and copies of them."""
RUNNING_BYTES = 12
"""Bytes per weight of the largest linear while a model runs in fp32: three fp32 copies."""
ROW_MAPPED_BYTES = 2 << 20
"""Bytes of an embedding's file that the system may map to read one row. Measured on ext4: 6.4 MB for five rows."""
MAPPED_ROWS = 48
"""Upper bound on the embedding rows that are read: about the number of tokens in golden.json."""


@dataclass(frozen=True)
class StageMemory:
    """The peak memory of one stage of an export.

    fixed: bytes that do not depend on how layers are loaded. models: number of models that run in the stage; each of them
    holds the linears of as many layers as Job.layer_memory allows.
    """

    fixed: int
    models: int = 0

    def needed(self, base: Checkpoint, memory: int) -> int:
        """Return the bytes of --memory that this stage needs if its layers are loaded as a limit of `memory` bytes decides.

        Layers whose stored size fits into LAYER_SHARE of the limit are all loaded, those of a dense base as fp32. Otherwise
        they are streamed.
        """
        if not self.models:
            return self.fixed
        config, stored = base.config, sum(tensor.nbytes for name, tensor in base.stored.items() if LINEAR_WEIGHT in name)
        if memory * LAYER_SHARE >= stored:
            # A dense base is converted to fp32, and the pages of its file that were read for that stay in memory too.
            loaded = stored if base.quant is not None else stored + torch.float32.itemsize * config.linear_parameters
            return self.fixed + self.models * loaded
        # Streaming fills LAYER_SHARE of the limit per model whatever the limit is, so solve for the limit; and that share
        # must hold at least the pager's ring of layers.
        ring = min(SLOTS * stored // config.num_layers, stored)
        return math.ceil(max(self.fixed / (1 - self.models * LAYER_SHARE), ring / LAYER_SHARE))


@dataclass(frozen=True)
class ExportMemory:
    """The peak memory of an export: its stages of writing, the reference model included, and those of the proof."""

    write: Sequence[StageMemory]
    read: Sequence[StageMemory]


def reference_memory(job: Job, process: int = PROCESS_BYTES) -> StageMemory:
    """Forecast the run of the reference model. process: bytes that the process holds before it loads the model.

    The adapter is held twice. The fp32 head is first held beside the stored tensor it is made from; later beside the mapped
    rows of the embedding, the copies of the largest linear, and the rows of logits.
    """
    mapped = min(job.embedding_bytes, MAPPED_ROWS * ROW_MAPPED_BYTES)
    running = mapped + RUNNING_BYTES * job.largest_linear + LOGIT_BYTES * job.base.config.vocab_size
    return StageMemory(process + 2 * job.adapter_bytes + job.head_bytes + max(job.embedding_bytes, running), models=1)


def fp32_reader_memory(job: Job, process: int = PROCESS_BYTES) -> StageMemory:
    """Forecast a reader that loads the whole model in fp32."""
    return StageMemory(process + torch.float32.itemsize * job.base.config.parameters)


def tokenizer_memory(base: Checkpoint) -> int:
    """Forecast the tokenizer of a model, which stays in memory during all of an export."""
    files = [base.folder / name for name in ("tokenizer.json", "tokenizer.model")]
    return TOKENIZER_BYTES + TOKENIZER_SHARE * sum(file.stat().st_size for file in files if file.is_file())


def check_memory(forecast: Callable[[Job], ExportMemory], job: Job) -> None:
    """Raise ResourceError if a stage of the export would exceed job.memory. forecast: the target's peak_memory."""
    if job.memory is None:
        return
    stages, tokenizer = forecast(job), tokenizer_memory(job.base)
    write, read = ([replace(stage, fixed=stage.fixed + tokenizer) for stage in part] for part in (stages.write, stages.read))
    to_write = sufficient_memory(write, job.base, job.memory)
    needed = sufficient_memory([*write, *read], job.base, job.memory) if job.check else to_write
    if needed > job.memory:
        unproved = f", or --no-verify and {_megabytes(to_write)} to write it unproved" if needed > to_write else ""
        raise ResourceError(
            f"This export needs about {needed / 1e9:.2f} GB, and --memory allows "
            f"{job.memory / 1e9:.2f} GB; type --memory {_megabytes(needed)} or more{unproved}."
        )


def sufficient_memory(stages: Sequence[StageMemory], base: Checkpoint, memory: int) -> int:
    """Return `memory` if it is enough for every stage, else a larger number of bytes that is.

    A larger limit may load layers that a smaller one streams and so need more still: try again until nothing is missing.
    """
    while (needed := max(stage.needed(base, memory) for stage in stages)) > memory:
        memory = needed
    return memory


def _megabytes(count: int) -> str:
    return f"{math.ceil(count / 1e6)}MB"
