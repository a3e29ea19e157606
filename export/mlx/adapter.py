"""Write and read mlx-lm's LoRA adapter folders.

A folder holds adapters.safetensors, with `model.layers.0.self_attn.q_proj.lora_a` (in, r) and `.lora_b` (r, out), and an
adapter_config.json, which gives the scale itself instead of alpha. Source: mlx_lm.tuner.utils.load_adapters, mlx_lm.tuner.lora.
"""

from __future__ import annotations

import json
import re
import reprlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import Adapter, check_shapes
from edgetune.runtime.config import LINEARS, LlamaConfig, LoraConfig
from edgetune.runtime.errors import AdapterError, UsageError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.json_file import read_object
from edgetune.runtime.names import hf_linear_name, layer_tensor
from edgetune.runtime.peft_folder import real_number, whole_number
from edgetune.runtime.untrusted_file import ADAPTER_CONFIG

ADAPTER_FILE, CONFIG_FILE = "adapters.safetensors", "adapter_config.json"
DEFAULT_SCALE = 20.0
"""Scale of an adapter whose file gives none, as older versions of mlx-lm wrote it: mlx-lm's own default."""
_KEY = re.compile(r"model\.layers\.(\d{1,4})\.(?:self_attn|mlp)\.(\w+)\.lora_([ab])")


def write_adapter(adapter: Adapter, folder: Path, base_name: str, num_layers: int) -> None:
    """Write the two files, private to their owner. Layers that the adapter does not change are left out: mlx-lm starts them at
    zero."""
    adapter = adapter.uniform()
    config = adapter.config
    tensors = {
        f"{layer_tensor(layer, hf_linear_name(name))}.lora_{part.lower()}": tensor.T.contiguous()
        for (layer, name, part), tensor in sorted(adapter.tensors.items())
    }
    first = 0 if adapter.layers is None else adapter.layers[0]
    settings = {
        "fine_tune_type": "lora",
        "model": base_name,
        "num_layers": num_layers - first,
        "lora_parameters": {
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
            "keys": [hf_linear_name(name) for name in config.targets],
        },
        # edgetune's own settings, from which read_adapter restores the adapter exactly; mlx-lm ignores them
        "edgetune": {"alpha": config.alpha, "rslora": config.rslora, "every_layer": adapter.layers is None},
    }
    atomic_write(folder / CONFIG_FILE, json.dumps(settings, indent=2) + "\n")
    atomic_write(folder / ADAPTER_FILE, safetensors.torch.save(tensors, metadata={"format": "mlx"}))


def read_adapter(folder: Path, base: LlamaConfig | None = None) -> Adapter:
    """Read an mlx-lm LoRA folder, written by mlx-lm or by edgetune. base: as in peft_folder.load.

    Raises AdapterError if it is damaged, or holds what plain LoRA cannot express: DoRA, whole layers, embeddings.
    """
    settings = read_object(folder / CONFIG_FILE, ADAPTER_CONFIG)
    kind, parameters = settings.get("fine_tune_type", "lora"), settings.get("lora_parameters")
    if kind != "lora" or not isinstance(parameters, dict):
        raise AdapterError(
            f"The mlx-lm adapter at {folder} has fine_tune_type {reprlib.repr(kind)}; expected lora, with lora_parameters."
        )
    usual = _lora_config(settings, parameters, LINEARS, folder)

    def check(shapes: peft_folder.Shapes) -> None:
        if base is not None:
            check_shapes({key: shape[::-1] for key, shape in shapes.items()}, None, base, {usual.rank})

    stored = peft_folder.read_tensors(folder / ADAPTER_FILE, _KEY, check)
    tensors = {key: tensor.T.contiguous() for key, tensor in stored.items()}
    targets = tuple(name for name in LINEARS if name in {linear for _, linear, _ in tensors})
    return Adapter(replace(usual, targets=targets), tensors, {}, _layers(settings, tensors, folder))


def is_adapter(folder: Path) -> bool:
    """Return True if a folder is an mlx-lm adapter."""
    return (folder / ADAPTER_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def _lora_config(settings: dict[str, Any], parameters: dict[str, Any], targets: tuple[str, ...], folder: Path) -> LoraConfig:
    """Return the configuration, with alpha = scale * rank, or the alpha that edgetune wrote if it still gives that scale."""
    try:
        rank, scale = whole_number(parameters["rank"]), real_number(parameters.get("scale", DEFAULT_SCALE), "scale")
        dropout = real_number(parameters.get("dropout") or 0.0, "dropout")
        written_by_us = settings.get("edgetune")
        if isinstance(written_by_us, dict):
            alpha, rslora = real_number(written_by_us["alpha"], "alpha"), bool(written_by_us["rslora"])
            written = LoraConfig(rank, alpha, dropout, targets, rslora)
            if written.scale == scale:
                return written
        return LoraConfig(rank, scale * rank, dropout, targets)
    except (KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
        raise peft_folder.unusable(folder, error) from error


def _layers(settings: dict[str, Any], tensors: dict[tuple[int, str, str], Tensor], folder: Path) -> tuple[int, ...] | None:
    """Return the layers that have tensors, or None for every layer.

    num_layers counts layers from the last one down; a number below 1 stands for all.
    """
    count, layers = settings.get("num_layers"), tuple(sorted({layer for layer, _, _ in tensors}))
    written_by_us = settings.get("edgetune")
    if isinstance(written_by_us, dict) and written_by_us.get("every_layer") is False:
        return layers
    if type(count) is not int:
        raise AdapterError(
            f"The adapter_config.json at {folder} has num_layers {reprlib.repr(count)}; expected a whole number."
        )
    return None if layers == tuple(range(len(layers))) and (count < 1 or count >= len(layers)) else layers
