"""Export a merged model as a Hugging Face folder, for transformers and whatever reads the same: dense, or 4-bit (bitsandbytes).

Rounding to nearest in 4 bits loses most of an adapter, so `nf4` rounds with feedback; `nf4-nearest` exists for comparison. Both
measure how much of the adapter is left and refuse to write if it is little. On the demo after ten steps on examples/notes,
nearest kept 33% on the model's own text and 27% on notes (4% and 3% with the base's own blocks); feedback kept 98% and 86%, and
98% and 90% when calibrated on notes. A residual adapter would keep all of it, but over a base that is already 4-bit that is
what `export peft` writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.export import effect, merge
from edgetune.export.job import Job, Written
from edgetune.export.memory import ExportMemory, fp32_reader_memory, reference_memory
from edgetune.export.peft import PEFT_BYTES, TRANSFORMERS_BYTES, TransformersReader, open_transformers, quiet, refuse_misread
from edgetune.export.probes import check_transformers
from edgetune.export.rounding import RoundedRecipe, rounded, rounding_memory
from edgetune.export.targets import MeasuredForm, TargetSpec
from edgetune.runtime import bnb_layout
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.errors import ModelError, UsageError
from edgetune.runtime.fused import fused_weights
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.model_folder import FusedRecipe, quantization_config, write_model
from edgetune.runtime.nf4_grid import Nf4Grid
from edgetune.runtime.safetensors_file import TensorSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Dense forms of the weights, by their name in --weights."""
NF4, NF4_NEAREST = "nf4", "nf4-nearest"
"""4-bit forms of the weights, rounded with feedback and to nearest."""
QUANT = QuantConfig()
"""Quantisation of the 4-bit forms."""


def peak_memory(job: Job) -> ExportMemory:
    """Forecast the merge, or rounding and measuring for the 4-bit forms; transformers reads either as a whole, in fp32."""
    dense = job.weights in DTYPES
    merging = merge.merge_memory(job) if dense else rounding_memory(job)
    reader = fp32_reader_memory(job, TRANSFORMERS_BYTES if dense else TRANSFORMERS_BYTES + PEFT_BYTES)
    return ExportMemory([merging, reference_memory(job)], [reader])


def write(job: Job, folder: Path) -> Written:
    """Write config.json, model.safetensors or its shards, and the base's tokenizer and settings."""
    config = {key: value for key, value in job.base.hf_config.items() if key not in ("dtype", "quantization_config")}
    if job.weights not in DTYPES:
        return _write_nf4(job, folder, config)
    dtype = DTYPES[job.weights]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    recipe = FusedRecipe.of(merge.DenseRecipe(merge.Merged(job.base, job.adapter), dtype), job.base.config)
    write_model(job.base.folder, folder, config, recipe, done=job.counter("writing", len(recipe.shapes)))
    return Written()


def _write_nf4(job: Job, folder: Path, config: dict[str, Any]) -> Written:
    """Write a 4-bit form, and measure how much of the adapter is left in it. Raises UsageError without an adapter."""
    if job.adapter is None:
        raise UsageError(
            f"There is no adapter to merge; type `edgetune quantize {job.base.folder} DEST` to write the base in 4 bits."
        )
    if fused_weights(job.base.config):
        raise UsageError(
            f"export hf does not round the linears that {job.base.config.model_type} stores as one matrix; type --weights bf16 "
            "instead."
        )
    if job.check:  # the reader would refuse them too, but only after all the work
        for _, inputs in job.base.config.linear_shapes().values():
            refuse_misread(inputs, QUANT.block_size)
    calibration, held_out = effect.texts_for(job)
    merged = merge.Merged(job.base, job.adapter)
    linears = rounded(merged, _grid, calibration if job.weights == NF4 else None)
    config |= {"torch_dtype": "bfloat16", "quantization_config": quantization_config(QUANT.double_quant)}
    recipe = RoundedRecipe(merged, _linear_specs, linears)
    write_model(job.base.folder, folder, config, recipe, done=job.counter("writing", len(recipe.shapes)))
    advice = "type --weights bf16, or export peft" if job.weights == NF4 else "type --weights nf4, which rounds with feedback"
    return Written(facts=(effect.check(job, reference_model(job, folder), held_out, advice),))


def _linear_specs(name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
    return bnb_layout.weight_specs(name, shape, QUANT.block_size, QUANT.double_quant)


def _grid(weight: Tensor) -> Nf4Grid:
    """Make the grid of a merged weight (out, in). Raises ModelError if it cannot be quantised."""
    try:
        return Nf4Grid.of(weight, QUANT)
    except ValueError as error:
        raise ModelError(f"The merged model cannot be quantised: {error}; train the adapter again.") from error


def reference_model(job: Job, folder: Path) -> Llama:
    """Load the model in `folder` with edgetune, in fp32."""
    return load_llama(open_model(folder), torch.float32, layer_memory=job.layer_memory)


def reference(job: Job, folder: Path) -> Llama:
    """Load the model to agree with: base and adapter, or for the 4-bit forms the rounded weights that were written."""
    return job.model() if job.weights in DTYPES else reference_model(job, folder)


def read(job: Job, folder: Path) -> TransformersReader:
    """Open the folder with transformers. Raises ModelError if its tokenizer reads other ids than edgetune, unless job.force."""
    with quiet():
        check_transformers(job, folder, "transformers")
    return TransformersReader(open_transformers(folder))


SPEC = TargetSpec(
    name="hf",
    weights=(*DTYPES, NF4, NF4_NEAREST),
    proved_by="transformers in fp32",
    packages=("transformers", "accelerate"),
    also_needs=dict.fromkeys((NF4, NF4_NEAREST), ("bitsandbytes",)),
    extra="peft",
    measured=(MeasuredForm(NF4), MeasuredForm(NF4_NEAREST)),
    peak_memory=peak_memory,
    write=write,
    read=read,
    reference=reference,
)
