"""Write a model folder for mlx-lm: merged in bf16 or fp16, or rounded to MLX's 4-bit groups; open the latter again.

config.json is written with every setting spelled out, since mlx-lm's defaults are not transformers'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.export import effect, merge
from edgetune.export.job import Job, Written
from edgetune.export.mlx.affine import BITS, GROUP, AffineGrid, affine_specs, affine_weight
from edgetune.export.mlx.families import own_keys, rope_scaling
from edgetune.export.rounding import RoundedRecipe, rounded
from edgetune.runtime.checkpoint import block_shapes, model_shapes
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import UsageError
from edgetune.runtime.model import Block, Llama, final_norm_weight, norm_weight
from edgetune.runtime.model_folder import write_model
from edgetune.runtime.names import EMBEDDING, FINAL_NORM, HEAD, is_linear, layer_tensor
from edgetune.runtime.safetensors_file import SafetensorsFile

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The dense forms of --weights, and the dtype of each."""


_WINDOWED = ("ministral3", "gemma3_text")
"""Families whose windows mlx-lm has, whatever the layers'."""


def window_notice(config: LlamaConfig) -> tuple[str, ...]:
    """Return a notice if mlx-lm would ignore the model's sliding window."""
    windows = sorted({window for window in config.windows if window is not None})
    if not windows or _layer_types(config) is not None or config.model_type in _WINDOWED:
        return ()
    return (f"mlx-lm ignores this model's sliding window: its answers will differ beyond {windows[0]:,} tokens.",)


def _layer_types(config: LlamaConfig) -> list[str] | None:
    """Return config.json's layer_types, or None if mlx-lm would ignore them: its llama applies sliding windows only where some
    layers have none, and its qwen2 and qwen3 never do."""
    mixed = any(window is not None for window in config.windows) and any(window is None for window in config.windows)
    if not mixed or config.model_type.startswith("qwen"):
        return None
    return ["full_attention" if window is None else "sliding_attention" for window in config.windows]


def mlx_config(hf_config: dict[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """Return config.json for mlx-lm with everything spelled out. Its defaults are not transformers': a head is tied, theta is
    1e6."""
    dropped = ("dtype", "quantization_config", "rope_parameters", "rope_scaling", "layer_types")
    return {
        **{key: value for key, value in hf_config.items() if key not in dropped},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_scaling(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        **({} if (types := _layer_types(config)) is None else {"layer_types": types}),
        **own_keys(config),
    }


def write_dense(job: Job, folder: Path) -> tuple[str, ...]:
    """Write the merged model in one of DTYPES; return notices."""
    merged = merge.Merged(job.base, job.adapter)
    config = mlx_config(job.base.hf_config, job.base.config)
    dtype = DTYPES[job.weights]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    recipe = merge.DenseRecipe(merged, dtype)
    write_model(job.base.folder, folder, config, recipe, done=job.counter("writing", len(recipe.shapes)))
    return window_notice(job.base.config)


def write_int4(job: Job, folder: Path) -> Written:
    """Write the merged model with its linears rounded, with feedback, to MLX's 4-bit groups; measure what that leaves of it.

    Raises UsageError for a model whose rows are not whole groups, ModelError if too little is left.
    """
    merged, config = merge.Merged(job.base, job.adapter), mlx_config(job.base.hf_config, job.base.config)
    odd = sorted({shape[1] for shape in job.base.config.linear_shapes().values() if shape[1] % GROUP})
    if odd:
        raise UsageError(
            f"This model has linears with {odd[0]} inputs, which is not a multiple of {GROUP}, MLX's group size; type "
            "--weights bf16 instead."
        )
    calibration, held_out = effect.texts_for(job)
    config |= {"torch_dtype": "bfloat16", "quantization": {"group_size": GROUP, "bits": BITS}}
    recipe = RoundedRecipe(merged, affine_specs, rounded(merged, AffineGrid.of, calibration))
    write_model(job.base.folder, folder, config, recipe, done=job.counter("writing", len(recipe.shapes)))
    advice = "type --weights bf16"
    if job.adapter is not None:
        advice += ", or export mlx without --weights for the adapter alone"
    left = effect.check(job, open_int4(job, folder), held_out, advice)
    return Written(notices=window_notice(job.base.config), facts=(left,))


def open_int4(job: Job, folder: Path) -> Llama:
    """Open an int4 folder without mlx: return its model with the linears dense in fp32."""
    config, files = job.base.config, [SafetensorsFile.open(path) for path in sorted(folder.glob("model*.safetensors"))]
    file_of = {name: file for file in files for name in file.tensors}

    def tensor(name: str) -> Tensor:
        if name.endswith("norm.weight"):
            return norm_weight(file_of[name].tensor(name), config)
        if not is_linear(name):
            return file_of[name].tensor(name).float()
        return affine_weight(*(file_of[spec.name].tensor(spec.name) for spec in affine_specs(name, shapes[name])))

    shapes = model_shapes(config)
    blocks = [
        Block(config, layer, {name: tensor(layer_tensor(layer, name)) for name in block_shapes(config)})
        for layer in range(config.num_layers)
    ]
    embedding = tensor(EMBEDDING)
    head = embedding if config.tie_embeddings else tensor(HEAD)
    norm = final_norm_weight(file_of[FINAL_NORM].tensor(FINAL_NORM), config)
    return Llama(config, embedding, blocks, norm, head, torch.float32)
