"""A merged model for transformers and all that reads its folders: dense, or 4-bit in bitsandbytes' layout."""

from __future__ import annotations

from pathlib import Path

import torch

from edgetune.export import merge
from edgetune.export.peft import TransformersReader, open_transformers
from edgetune.export.target import Job, Written
from edgetune.runtime.model_folder import write_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WEIGHTS = (*DTYPES,)
NEEDS = ("transformers", "peft")


def write(job: Job, folder: Path) -> Written:
    """config.json, model.safetensors or its shards, and the base's tokenizer and settings."""
    merge.check_memory(job)
    dtype = DTYPES[job.weights]
    recipe = merge.DenseRecipe(merge.Merged(job.base, job.adapter), dtype)
    config = {key: value for key, value in job.base.hf_config.items() if key not in ("dtype", "quantization_config")}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_model(job.base.folder, folder, config, recipe)
    return Written()


def read(job: Job, folder: Path) -> TransformersReader:
    """The folder by transformers."""
    return TransformersReader(open_transformers(folder))
