"""A Hugging Face folder to a 4-bit one: NF4 linears in bitsandbytes' layout, everything else (but perhaps the head) bf16.

The work is done in a hidden folder beside the destination, shard by shard; each shard appears there only when whole,
and the folder takes the destination's name only when complete. A run that was cut is continued by the same call, and
what it leaves is byte for byte what one uncut run leaves, at any number of threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime import bnb_layout, nf4
from edgetune.runtime.checkpoint import Checkpoint, model_shapes, open_model
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.errors import ModelError, ResourceError, UsageError
from edgetune.runtime.files import explain_full_disk, sync_folder
from edgetune.runtime.model_folder import (
    SHARD_BYTES,
    plan_shards,
    quantization_config,
    shard_specs,
    stored_bytes,
    write_companions,
    write_shard,
)
from edgetune.runtime.names import HEAD, is_linear
from edgetune.runtime.safetensors_file import SafetensorsFile, TensorSpec

HEADS = ("bf16", "nf4")
_BLOCK_SIZE = QuantConfig().block_size
_LAYOUT = 1  # part of what names the hidden folder: raise it when the bytes written change

Progress = Callable[[int, int], None]
"""Called with (parameters done, parameters in all) at the beginning and after each tensor."""


@dataclass(frozen=True)
class QuantizeResult:
    """What was made; bytes count weights alone."""

    folder: Path
    parameters: int
    source_bytes: int
    bytes: int


@dataclass(frozen=True)
class _Recipe:
    """How each tensor of the source is to be stored."""

    checkpoint: Checkpoint
    shapes: dict[str, tuple[int, ...]]
    double_quant: bool
    head: str

    def becomes_nf4(self, name: str) -> bool:
        return is_linear(name) or (name == HEAD and self.head == "nf4")

    def specs(self, name: str) -> list[TensorSpec]:
        if self.becomes_nf4(name):
            return bnb_layout.weight_specs(name, self.shapes[name], _BLOCK_SIZE, self.double_quant)
        return [TensorSpec(name, torch.bfloat16, self.shapes[name])]

    def tensors(self, name: str) -> dict[str, Tensor]:
        weight = self.checkpoint.dense(name)
        if not self.becomes_nf4(name):
            return {name: weight}
        try:
            quantized = nf4.quantize(weight, "nf4", _BLOCK_SIZE, double_quant=False)
            if self.double_quant:
                with _one_thread():
                    quantized = nf4.double_quantize(quantized)
        except ValueError as error:
            raise ModelError(f"{name} of {self.checkpoint.folder} cannot be quantised: {error}.") from error
        quantized = replace(quantized, state=replace(quantized.state, dtype=torch.bfloat16))
        return bnb_layout.weight_tensors(name, quantized)

    def release(self, name: str) -> None:
        self.checkpoint.release(name)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def quantize_folder(
    src: Path | str,
    dest: Path | str,
    *,
    double_quant: bool = True,
    head: str = "bf16",
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> QuantizeResult:
    """Quantise the linears of the model in `src` to NF4 (QLoRA §3) into a folder that transformers opens too.

    head: of HEADS; "nf4" quantises it like a linear.
    Raises ModelError for a source that is unreadable, already quantised or not finite, UsageError when `dest` is there or
    the head to be quantised is the embedding too, ResourceError when the disk is or becomes full. What was finished by then
    is used by the next call.
    """
    src, dest = Path(src), Path(dest)
    if head not in HEADS:
        raise UsageError(f"The head's form is {head!r}; expected one of {', '.join(HEADS)}.")
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UsageError(f"{dest} is already there; name a folder that is not, or delete it first.")
    checkpoint = open_model(src)
    if checkpoint.quant is not None:
        raise ModelError(f"{src} is 4-bit already; use it as it is (`--model {src}`), or quantise what it was made from.")
    if head != "bf16" and checkpoint.config.tie_embeddings:
        raise UsageError(f"{src} has one tensor as embedding and head, and an embedding stays dense: leave --head out.")
    recipe = _Recipe(checkpoint, model_shapes(checkpoint.config), double_quant, head)
    shards = plan_shards(recipe, shard_bytes)
    with explain_full_disk(dest):
        partial = _partial_folder(checkpoint, dest, [double_quant, shard_bytes, head])
        _check_space(partial, dest, recipe, shards)
        _write_shards(partial, recipe, shards, progress or (lambda done, total: None))
        config = {key: value for key, value in checkpoint.hf_config.items() if key != "dtype"}
        config |= {"torch_dtype": "bfloat16", "quantization_config": quantization_config(double_quant, head != "bf16")}
        write_companions(src, partial, config, recipe, shards)
        _publish(partial, dest)
    parameters = sum(map(math.prod, recipe.shapes.values()))
    size = sum(file.stat().st_size for file in dest.glob("*.safetensors"))
    return QuantizeResult(dest, parameters, checkpoint.nbytes, size)


def _partial_folder(checkpoint: Checkpoint, dest: Path, settings: list[Any]) -> Path:
    """The hidden folder of exactly this work: same source files, same settings. Those of other work are removed."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    work = json.dumps([_LAYOUT, checkpoint.digest, checkpoint.hf_config, stats, settings], sort_keys=True)
    name = f".{dest.name}.partial-{hashlib.sha256(work.encode()).hexdigest()[:16]}"
    for other in dest.parent.glob(f".{dest.name}.partial-*"):
        if other.name != name:
            shutil.rmtree(other, ignore_errors=True)
    partial = dest.parent / name
    partial.mkdir(parents=True, exist_ok=True, mode=0o700)
    return partial


def _check_space(partial: Path, dest: Path, recipe: _Recipe, shards: dict[str, list[str]]) -> None:
    """Refuse before an hour's work what cannot end well."""
    missing = [name for file, names in shards.items() if not (partial / file).exists() for name in names]
    needed = stored_bytes(recipe, missing) + (16 << 20)
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise ResourceError(
            f"The disk has {free / 1e9:.2f} GB free where {dest} takes {needed / 1e9:.2f} GB more; free some space and "
            "type the same command again."
        )


def _write_shards(partial: Path, recipe: _Recipe, shards: dict[str, list[str]], progress: Progress) -> None:
    done, total = 0, sum(map(math.prod, recipe.shapes.values()))
    progress(done, total)

    def made(name: str) -> None:
        nonlocal done
        done += math.prod(recipe.shapes[name])
        progress(done, total)

    for file, names in shards.items():
        if _is_whole(partial / file, shard_specs(recipe, names)):
            done += sum(math.prod(recipe.shapes[name]) for name in names)
            progress(done, total)
            continue
        write_shard(partial / file, recipe, names, made)


def _is_whole(path: Path, specs: list[TensorSpec]) -> bool:
    """Whether an earlier run finished this shard. Only whole files have their name, but a user may have touched one."""
    if not path.exists():
        return False
    try:
        tensors = SafetensorsFile.open(path).tensors.values()
    except ModelError:
        return False
    return [(t.name, t.dtype, t.shape) for t in tensors] == [(s.name, s.dtype, s.shape) for s in specs]


def _publish(partial: Path, dest: Path) -> None:
    """The one moment at which `dest` appears."""
    for leftover in partial.glob(".*"):  # a killed writer's temporary file
        leftover.unlink()
    if dest.exists():
        dest.rmdir()  # empty, as checked at the start
    partial.rename(dest)
    sync_folder(dest.parent)
