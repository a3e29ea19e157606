"""Quantise a Hugging Face folder: NF4 linears in bitsandbytes' layout, everything else in bf16 (the head in NF4 on request).

Weights are rounded to nearest or, given a Calibration, with error feedback (calibrated_layers.py).

Shards are written one by one to a hidden folder beside the destination. Each appears there only when it is complete, and the
folder takes the destination's name once all are. The same call resumes an interrupted run, and the result is byte for byte
that of an uninterrupted one: at any number of threads if rounded to nearest, with a Calibration at the same number of them.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime import bnb_layout, nf4
from edgetune.runtime.calibrated_layers import CalibratedLayers, Calibration
from edgetune.runtime.checkpoint import Checkpoint, model_shapes, open_model
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.device import one_thread
from edgetune.runtime.errors import ModelError, SettingError, UsageError
from edgetune.runtime.files import atomic_write, explain_full_disk, is_ours, refuse_occupied, sync_folder
from edgetune.runtime.fused import fused_shapes, fused_weights
from edgetune.runtime.model_folder import (
    SHARD_BYTES,
    check_space,
    companions,
    plan_shards,
    quantization_config,
    stored_bytes,
    write_companions,
    write_shards,
)
from edgetune.runtime.names import HEAD, is_linear
from edgetune.runtime.nf4 import NESTED_BLOCK_SIZE
from edgetune.runtime.safetensors_file import TensorSpec
from edgetune.runtime.tokenizer import Tokenizer, has_tokenizer

HEADS = ("bf16", "nf4")
"""The forms that the head can be stored in."""
_BLOCK_SIZE = QuantConfig().block_size
_LAYOUT = 1  # part of the hidden folder's name: raise it when the bytes written change

Progress = Callable[[int, int], None]
"""A callback that receives (parameters done, all parameters) at the start and after each tensor."""


@dataclass(frozen=True)
class QuantizeResult:
    """The result of a quantisation; the bytes are those of the weights."""

    folder: Path
    parameters: int
    source_bytes: int
    bytes: int


@dataclass(frozen=True)
class _Recipe:
    """Makes the stored form of each tensor of the source."""

    checkpoint: Checkpoint
    shapes: dict[str, tuple[int, ...]]
    double_quant: bool
    head: str
    fused: dict[str, tuple[str, ...]]
    """The linears that lie in each matrix which the family stores as one: it is quantised as one, as its readers expect."""
    calibrated: CalibratedLayers | None = None

    def becomes_nf4(self, name: str) -> bool:
        return is_linear(name) or name in self.fused or (name == HEAD and self.head == "nf4")

    def specs(self, name: str) -> list[TensorSpec]:
        if self.becomes_nf4(name):
            return nf4_specs(name, self.shapes[name], self.double_quant)
        return [TensorSpec(name, torch.bfloat16, self.shapes[name])]

    def tensors(self, name: str) -> dict[str, Tensor]:
        parts = self.fused.get(name, (name,))
        weight = (
            self.checkpoint.dense(parts[0]) if len(parts) == 1 else torch.cat([self.checkpoint.dense(part) for part in parts])
        )
        if not self.becomes_nf4(name):
            return {name: weight}
        if self.calibrated is not None and is_linear(name):
            return self.calibrated.tensors(name)
        try:
            return nf4_tensors(name, weight, self.double_quant)
        except ValueError as error:
            raise ModelError(f"{name} of {self.checkpoint.folder} cannot be quantised: {error}.") from error

    def release(self, name: str) -> None:
        for part in self.fused.get(name, (name,)):
            self.checkpoint.release(part)


def nf4_specs(name: str, shape: tuple[int, ...], double_quant: bool = True) -> list[TensorSpec]:
    """Return the tensors that a weight in NF4 is stored as."""
    return bnb_layout.weight_specs(name, shape, _BLOCK_SIZE, double_quant)


def nf4_tensors(name: str, weight: Tensor, double_quant: bool = True) -> dict[str, Tensor]:
    """Quantise a weight to NF4; return the tensors of `nf4_specs`, the same at any number of threads.

    Raises ValueError for inf or NaN.
    """
    quantized = nf4.quantize(weight, "nf4", _BLOCK_SIZE, double_quant=False)
    if double_quant:
        with one_thread():
            quantized = nf4.double_quantize(quantized)
    quantized = replace(quantized, state=replace(quantized.state, dtype=torch.bfloat16))
    return bnb_layout.weight_tensors(name, quantized)


def quantize_folder(
    src: Path | str,
    dest: Path | str,
    *,
    double_quant: bool = True,
    head: str = "bf16",
    calibration: Calibration | None = None,
    records: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> QuantizeResult:
    """Quantise the linears of the model in `src` to NF4 (QLoRA §3), into a folder that transformers opens too.

    head: one of HEADS; "nf4" quantises it, to nearest. calibration: text on which to keep the linears' outputs; None rounds to
    nearest. records: further files of the folder, from name to contents.
    Raises ModelError for a source that is unreadable, already quantised or holds inf or NaN; UsageError if `dest` exists, or
    if the head is to be quantised but is the embedding too; ResourceError when the disk is or becomes full. The next call
    resumes after the last shard that was finished.
    """
    src, dest = Path(src), Path(dest)
    if head not in HEADS:
        raise SettingError(f"The head's form is {head!r}; expected one of {', '.join(HEADS)}.")
    refuse_occupied(dest)
    checkpoint = _checked_source(src, double_quant, head, calibrated=calibration is not None)
    config = checkpoint.config
    recipe = _Recipe(checkpoint, fused_shapes(config, model_shapes(config)), double_quant, head, fused_weights(config))
    shards = plan_shards(recipe, shard_bytes)
    with explain_full_disk(dest):
        choices = [double_quant, shard_bytes, head, *([calibration.digest] if calibration else [])]
        partial = _partial_folder(checkpoint, dest, choices)
        _check_space(partial, dest, recipe, shards, copies=2 if calibration else 1)
        if calibration is not None:
            layers = CalibratedLayers(checkpoint, partial, replace(QuantConfig(), double_quant=double_quant))
            layers.make(calibration)
            recipe = replace(recipe, calibrated=layers)
        write_shards(partial, recipe, shards, progress or (lambda done, total: None))
        settings = {key: value for key, value in checkpoint.hf_config.items() if key != "dtype"}
        settings |= {"torch_dtype": "bfloat16", "quantization_config": quantization_config(double_quant, head != "bf16")}
        write_companions(src, partial, settings, recipe, shards)
        for name, content in (records or {}).items():
            atomic_write(partial / name, content)
        _publish(partial, dest)
    return quantized(checkpoint, dest)


def quantized(checkpoint: Checkpoint, dest: Path) -> QuantizeResult:
    """Return the sizes of a checkpoint and of the finished folder that it was quantised to."""
    parameters = sum(map(math.prod, model_shapes(checkpoint.config).values()))
    size = sum(file.stat().st_size for file in dest.glob("*.safetensors"))
    return QuantizeResult(dest, parameters, checkpoint.nbytes, size)


def _checked_source(src: Path, double_quant: bool, head: str, calibrated: bool) -> Checkpoint:
    """Open the model in `src`. Raises as `quantize_folder` does for one that cannot be quantised so, before hours of work."""
    checkpoint = open_model(src)
    if checkpoint.quant is not None:
        raise ModelError(f"{src} is already 4-bit; use it as it is (`--model {src}`), or quantise its 16-bit original.")
    if head != "bf16" and checkpoint.config.tie_embeddings:
        raise UsageError(f"{src} has one tensor for embedding and head, and the embedding stays dense: leave --head out.")
    _refuse_unsplittable(checkpoint, double_quant)
    if calibrated and fused_weights(checkpoint.config):
        raise UsageError(
            f"{src} stores several linears of a layer as one matrix, which calibration does not round; leave --calibrate out."
        )
    companions(src)
    checkpoint.refuse_inf_and_nan(checkpoint.long_floats(linears=False))
    if has_tokenizer(src):
        Tokenizer.load(src)
    return checkpoint


def _refuse_unsplittable(checkpoint: Checkpoint, double_quant: bool) -> None:
    """Raise ModelError if linears that are stored as one matrix could not be told apart in 4 bits (see fused.py)."""
    unit, shapes = _BLOCK_SIZE * (NESTED_BLOCK_SIZE if double_quant else 1), model_shapes(checkpoint.config)
    for whole, linears in fused_weights(checkpoint.config).items():
        if any(math.prod(shapes[linear]) % unit for linear in linears[:-1]):
            advice = "type --single-quant" if double_quant else "use it as it is"
            raise ModelError(
                f"{whole} of {checkpoint.folder} holds several linears, of which one would not begin a block of the "
                f"quantisation; {advice}."
            )


def _partial_folder(checkpoint: Checkpoint, dest: Path, settings: list[Any]) -> Path:
    """Return the hidden folder for these source files and settings, and delete those of other sources or settings."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    work = json.dumps([_LAYOUT, checkpoint.digest, checkpoint.hf_config, stats, settings], sort_keys=True)
    name = f".{dest.name}.partial-{hashlib.sha256(work.encode()).hexdigest()[:16]}"
    partial = dest.parent / name
    for other in dest.parent.glob(f".{glob.escape(dest.name)}.partial-*"):
        if other != partial and is_ours(other):
            shutil.rmtree(other, ignore_errors=True)
    with contextlib.suppress(FileExistsError):
        partial.mkdir(parents=True, exist_ok=True, mode=0o700)
    _refuse_foreign(partial)
    partial.chmod(0o700)
    return partial


def _refuse_foreign(partial: Path) -> None:
    """Raise UsageError if the hidden folder is another user's, or a link: its name can be foreseen."""
    if not (is_ours(partial) and partial.is_dir()):
        raise UsageError(f"{partial} is not a folder of yours; delete it, or name a DEST in a folder that only you can write.")


def _check_space(partial: Path, dest: Path, recipe: _Recipe, shards: dict[str, list[str]], copies: int) -> None:
    """Raise ResourceError if the disk has too little space, before an hour of work is lost to it.

    copies: 2 where each layer is kept in a file of its own until all are done.
    """
    missing = [name for file, names in shards.items() if not (partial / file).exists() for name in names]
    check_space(partial, dest, copies * stored_bytes(recipe, missing))


def _publish(partial: Path, dest: Path) -> None:
    """Rename the finished hidden folder to `dest`. Raises UsageError if another user has replaced it."""
    _refuse_foreign(partial)
    for leftover in partial.glob(".*"):  # a killed writer's temporary file
        leftover.unlink()
    if dest.exists():
        dest.rmdir()  # empty, as checked at the start
    partial.rename(dest)
    sync_folder(dest.parent)
