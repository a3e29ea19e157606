"""Write a model folder in Hugging Face's layout, one tensor at a time: shards, their index, and the files beside them.

A Recipe decides what the weights are: the one in quantize.py makes 4-bit weights, the exports' recipes merge adapters.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import ModelError, ResourceError
from edgetune.runtime.files import atomic_write, explain_full_disk
from edgetune.runtime.fused import fused_shapes, fused_weights
from edgetune.runtime.reader_files import config_for_readers, tokenizer_files_for_readers
from edgetune.runtime.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec, aligned_order
from edgetune.runtime.untrusted_file import COMPANION, MAX_TEXT_FILES, copy_untrusted, open_untrusted
from edgetune.runtime.weight_files import INDEX, WEIGHTS

SHARD_BYTES = 512 << 20
"""Largest shard in bytes, unless one layer is larger. A killed run repeats at most one shard (chosen by hand)."""
_SPARE_BYTES = 16 << 20
"""Disk space in bytes that is asked for beyond the weights, for tokenizer and headers. Chosen by hand."""

# The files that a model needs beside its weights: tokenizer, chat template, generation settings, licence.
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
)
_TEXTS = ("LICENSE*", "NOTICE*")


class Recipe(Protocol):
    """Makes the stored form of each tensor of a model. Each tensor is requested once, in the order of `shapes`."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the model by its Hugging Face name, layer by layer."""

    def specs(self, name: str) -> list[TensorSpec]:
        """Return the tensors that one tensor of the model is stored as: itself, or codes and scales."""

    def tensors(self, name: str) -> Mapping[str, Tensor | Iterable[Tensor]]:
        """Return the values of the tensors that `specs` lists, by name: whole, or as pieces in order to save memory."""

    def release(self, name: str) -> None:
        """Free what the tensor was made from: it is not needed again."""


@dataclass(frozen=True)
class FusedRecipe:
    """The Recipe (model_folder.py) of a dense model whose family joins linears; `recipe` makes the linears."""

    recipe: Recipe
    parts: Mapping[str, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, recipe: Recipe, config: LlamaConfig) -> FusedRecipe:
        """Return the recipe that joins what `recipe` makes where the family does so."""
        return cls(recipe, fused_weights(config), fused_shapes(config, recipe.shapes))

    def specs(self, name: str) -> list[TensorSpec]:
        if name not in self.parts:
            return self.recipe.specs(name)
        return [TensorSpec(name, self.recipe.specs(self.parts[name][0])[0].dtype, self.shapes[name])]

    def tensors(self, name: str) -> Mapping[str, Tensor | Iterable[Tensor]]:
        if name not in self.parts:
            return self.recipe.tensors(name)
        made = [self.recipe.tensors(part)[part] for part in self.parts[name]]
        return {name: [piece for linear in made for piece in ([linear] if isinstance(linear, Tensor) else linear)]}

    def release(self, name: str) -> None:
        for part in self.parts.get(name, (name,)):
            self.recipe.release(part)


def shard_specs(recipe: Recipe, names: Sequence[str]) -> list[TensorSpec]:
    """Return the stored tensors of a shard, in the order of its file."""
    return aligned_order(spec for name in names for spec in recipe.specs(name))


def stored_bytes(recipe: Recipe, names: Sequence[str]) -> int:
    """Return the bytes that these tensors of the model take in files."""
    return sum(spec.nbytes for name in names for spec in recipe.specs(name))


def plan_shards(recipe: Recipe, shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """Return {file name: names of its tensors}: whole layers, in order, at most `shard_bytes` a file unless one is larger."""
    groups: list[list[str]] = []
    group_bytes = 0
    units: dict[str, list[str]] = {}
    for name in recipe.shapes:  # a unit is a whole layer, or a single tensor outside the layers
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
    """Write one file of weights; `done` is called with the name of each tensor of the model once it is made."""
    specs = shard_specs(recipe, names)
    # The few tensors whose size is not a multiple of 64 bytes stand last in the file but are made with their layer.
    waiting: dict[str, Tensor | Iterable[Tensor]] = {}
    queue = list(reversed(specs))
    with SafetensorsWriter(path, specs, {"format": "pt"}) as writer:
        for name in names:
            waiting |= recipe.tensors(name)
            while queue and queue[-1].name in waiting:
                spec = queue.pop()
                writer.write(spec.name, waiting.pop(spec.name))
            recipe.release(name)
            done(name)


def write_shards(
    folder: Path, recipe: Recipe, shards: Mapping[str, Sequence[str]], progress: Callable[[int, int], None]
) -> None:
    """Write all files of weights, but those that are there and whole. progress: receives the parameters done, and all."""
    done, total = 0, sum(map(math.prod, recipe.shapes.values()))
    progress(done, total)

    def made(name: str) -> None:
        nonlocal done
        done += math.prod(recipe.shapes[name])
        progress(done, total)

    for file, names in shards.items():
        if is_whole(folder / file, shard_specs(recipe, names)):
            done += sum(math.prod(recipe.shapes[name]) for name in names)
            progress(done, total)
            continue
        write_shard(folder / file, recipe, names, made)


def check_space(folder: Path, dest: Path, nbytes: int) -> None:
    """Raise ResourceError if the disk of `folder` has too little space for weights of `nbytes`, which are to become `dest`."""
    needed, free = nbytes + _SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"The disk has {free / 1e9:.2f} GB free and {dest} takes {needed / 1e9:.2f} GB more; free some space and "
            "run the same command again."
        )


def is_whole(path: Path, specs: list[TensorSpec]) -> bool:
    """Return True if an earlier run finished this file. Its header is checked, since a user may have replaced the file."""
    if not path.exists():
        return False
    try:
        tensors = SafetensorsFile.open(path).tensors.values()
    except ModelError:
        return False
    return [(t.name, t.dtype, t.shape) for t in tensors] == [(s.name, s.dtype, s.shape) for s in specs]


def write_companions(source: Path, folder: Path, config: dict[str, Any], recipe: Recipe, shards: dict[str, list[str]]) -> None:
    """Write config.json, the index of the shards, and the files of `source` that a model needs beside its weights."""
    write_settings(source, folder, config)
    write_index(folder, recipe, shards)


def write_index(folder: Path, recipe: Recipe, shards: dict[str, list[str]]) -> None:
    """Write the index of the shards, where there are several."""
    if len(shards) > 1:
        weight_map = {spec.name: file for file, names in shards.items() for name in names for spec in recipe.specs(name)}
        index = {
            "metadata": {"total_size": sum(stored_bytes(recipe, names) for names in shards.values())},
            "weight_map": weight_map,
        }
        atomic_write(folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_settings(source: Path, folder: Path, config: dict[str, Any]) -> None:
    """Write config.json and the files of `source` beside it. Raises ModelError as `companions` does."""
    copy_companions(source, folder)
    write_config(folder, config)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    atomic_write(folder / "config.json", json.dumps(config_for_readers(config), indent=2) + "\n")


def write_model(
    source: Path,
    folder: Path,
    config: dict[str, Any],
    recipe: Recipe,
    shard_bytes: int = SHARD_BYTES,
    done: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a whole model into `folder`, which the caller publishes; `done` is called with the name of each tensor."""
    companions(source)  # raises before any work is done
    shards = plan_shards(recipe, shard_bytes)
    for file, names in shards.items():
        write_shard(folder / file, recipe, names, done)
    write_companions(source, folder, config, recipe, shards)


def companions(folder: Path) -> list[Path]:
    """Return the files of a model folder that a copy needs beside config.json and the weights.

    Raises ModelError for one that must not be copied, such as a link to a file elsewhere, and for too many licences.
    """
    texts = [file for pattern in _TEXTS for file in sorted(folder.glob(pattern))]
    if len(texts) > MAX_TEXT_FILES:
        raise ModelError(f"{folder} has {len(texts)} licences and notices; expected at most {MAX_TEXT_FILES}: remove some.")
    found = [
        file for file in [*(folder / name for name in _COMPANIONS), *texts] if os.path.lexists(file) and not os.path.isdir(file)
    ]
    for file in found:
        open_untrusted(file, COMPANION).close()
    return found


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the companions of the model in `source` into `folder`, each private, rewritten where a reader would misread them.

    Raises ModelError as `companions` does.
    """
    rewritten = tokenizer_files_for_readers(source)
    for file in companions(source):
        if file.name not in rewritten:
            with explain_full_disk(folder):
                (folder / file.name).unlink(missing_ok=True)  # of a run that was interrupted
                copy_untrusted(file, COMPANION, folder / file.name)
        elif (content := rewritten[file.name]) is not None:
            atomic_write(folder / file.name, content)


def quantization_config(double_quant: bool, quantized_head: bool = False) -> dict[str, Any]:
    """Return the `quantization_config` that transformers' BitsAndBytesConfig writes for NF4.

    `llm_int8_skip_modules` is always present: without the list, transformers leaves the head dense.
    """
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
