"""Export for mlx-lm on Apple silicon: an adapter folder, or base and adapter merged into one MLX model."""

from __future__ import annotations

from pathlib import Path

import torch

from edgetune.export.job import OR_NAME_WEIGHTS, Job, Written
from edgetune.export.memory import ExportMemory, fp32_reader_memory, reference_memory
from edgetune.export.merge import merge_memory
from edgetune.export.mlx.adapter import write_adapter
from edgetune.export.mlx.families import refuse_unlike
from edgetune.export.mlx.model import DTYPES, open_int4, window_notice, write_dense, write_int4
from edgetune.export.mlx.reader import read
from edgetune.export.rounding import rounding_memory
from edgetune.export.targets import MeasuredForm, TargetSpec
from edgetune.runtime.model import Llama

INT4 = "int4"
"""The value of --weights for MLX's 4-bit groups."""


def peak_memory(job: Job) -> ExportMemory:
    """Forecast the memory of the export. The 4-bit model is measured with its linears dense in fp32."""
    stages = [] if not job.weights else [merge_memory(job)]
    if job.weights == INT4:
        stages = [rounding_memory(job, torch.float32.itemsize * job.base.config.linear_parameters)]
    return ExportMemory([*stages, reference_memory(job)], [fp32_reader_memory(job)])


def write(job: Job, folder: Path) -> Written:
    """Write an adapter folder if no --weights are given, otherwise a model folder.

    Raises ModelError for a model that mlx-lm does not have.
    """
    refuse_unlike(job.base.config, job.base_name)
    if job.weights == INT4:
        return write_int4(job, folder)
    if job.weights:
        return Written(notices=write_dense(job, folder))
    adapter = job.needed_adapter(OR_NAME_WEIGHTS)
    write_adapter(adapter, folder, job.base_name, job.base.config.num_layers)
    notices = window_notice(job.base.config)
    if job.base.quant is not None:
        notices += (
            "mlx-lm does not open 4-bit folders in bitsandbytes' layout. To write this base for it, type "
            "`edgetune export mlx --adapter none --weights bf16`.",
        )
    return Written(notices=notices)


def reference(job: Job, folder: Path) -> Llama:
    """Return the model with which the export must agree; for int4 it is made of the weights that were written."""
    return open_int4(job, folder) if job.weights == INT4 else job.model()


SPEC = TargetSpec(
    name="mlx",
    weights=("", *DTYPES, INT4),
    proved_by="mlx-lm in fp32",
    packages=("mlx_lm", "mlx"),
    extra="mlx",
    measured=(MeasuredForm(INT4),),
    peak_memory=peak_memory,
    write=write,
    read=read,
    reference=reference,
)
