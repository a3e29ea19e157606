"""A model folder as Hugging Face lays it out, written a tensor at a time: shards, their index, and what else a model needs.

What stands in the weights is a Recipe's business: quantize.py's makes 4-bit ones, the exports' merge adapters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from edgetune.runtime.checkpoint import INDEX, WEIGHTS
from edgetune.runtime.files import atomic_write
from edgetune.runtime.safetensors_file import SafetensorsWriter, TensorSpec, aligned_order

SHARD_BYTES = 512 << 20
"""The most that a killed run has to do again; a layer is never split."""

# What else a folder needs to be a model: tokenizer, chat template, generation settings, licence.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


class Recipe(Protocol):
    """How each tensor of a model is stored. Tensors are asked for once, in the order of `shapes`, which is the layers'."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the model by its Hugging Face name."""

    def specs(self, name: str) -> list[TensorSpec]:
        """What a tensor of the model is stored as: itself, or codes and scales."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The values of these, by name."""

    def release(self, name: str) -> None:
        """What it was made from is not needed any more."""


def shard_specs(recipe: Recipe, names: Sequence[str]) -> list[TensorSpec]:
    """The stored tensors of a shard in the order in which they lie in its file."""
    return aligned_order(spec for name in names for spec in recipe.specs(name))


def stored_bytes(recipe: Recipe, names: Sequence[str]) -> int:
    """Bytes that these tensors of the model take in files."""
    return sum(spec.nbytes for name in names for spec in recipe.specs(name))


def plan_shards(recipe: Recipe, shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """File name -> names of the tensors in it: whole layers, in order, at most `shard_bytes` a file where one fits."""
    groups: list[list[str]] = []
    group_bytes = 0
    units: dict[str, list[str]] = {}
    for name in recipe.shapes:
        parts = name.split(".")
        units.setdefault(parts[2] if parts[1] == "layers" else name, []).append(name)
    for names in units.values():
        size = stored_bytes(recipe, names)
        if not groups or group_bytes + size > shard_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1] += names
        group_bytes += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def write_shard(path: Path, recipe: Recipe, names: Sequence[str], done: Callable[[str], None]) -> None:
    """Write one file of weights; `done` is told the name of each tensor that has been made."""
    specs = shard_specs(recipe, names)
    waiting: dict[str, Tensor] = {}  # made before their turn: the few whose size is no multiple of 64
    queue = list(reversed(specs))
    with SafetensorsWriter(path, specs, {"format": "pt"}) as writer:
        for name in names:
            waiting |= recipe.tensors(name)
            while queue and queue[-1].name in waiting:
                spec = queue.pop()
                writer.write(spec.name, waiting.pop(spec.name))
            recipe.release(name)
            done(name)


def write_companions(source: Path, folder: Path, config: dict[str, Any], recipe: Recipe, shards: dict[str, list[str]]) -> None:
    """config.json, the index of the shards, and the files of `source` that a model needs beside its weights."""
    for file in companions(source):
        atomic_write(folder / file.name, file.read_bytes())
    atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if len(shards) > 1:
        weight_map = {spec.name: file for file, names in shards.items() for name in names for spec in recipe.specs(name)}
        index = {
            "metadata": {"total_size": sum(stored_bytes(recipe, names) for names in shards.values())},
            "weight_map": weight_map,
        }
        atomic_write(folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_model(
    source: Path,
    folder: Path,
    config: dict[str, Any],
    recipe: Recipe,
    shard_bytes: int = SHARD_BYTES,
    done: Callable[[str], None] = lambda name: None,
) -> None:
    """The whole of it into `folder`, which whoever calls makes appear; `done` is told the name of each tensor."""
    shards = plan_shards(recipe, shard_bytes)
    for file, names in shards.items():
        write_shard(folder / file, recipe, names, done)
    write_companions(source, folder, config, recipe, shards)


def companions(folder: Path) -> list[Path]:
    """The files of a model folder that belong to it beside config and weights."""
    return [file for pattern in _COMPANIONS for file in sorted(folder.glob(pattern)) if file.is_file()]


def quantization_config(double_quant: bool, quantized_head: bool = False) -> dict[str, Any]:
    """What transformers' BitsAndBytesConfig writes for NF4. A list of what is dense must be there: without one the head is."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [] if quantized_head else ["lm_head"],
    }
