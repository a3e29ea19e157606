"""Write a GGUF model as a Hugging Face folder, one tensor at a time, which edgetune and transformers open like any other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from edgetune.conversion.gguf_file import GgufFile
from edgetune.conversion.model import Model
from edgetune.conversion.origin import Origin
from edgetune.conversion.tokenizer import tokenizer_files
from edgetune.lock import lock_output
from edgetune.progress import Progress, ignore
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.device import one_thread
from edgetune.runtime.files import atomic_folder, atomic_write, mend, refuse_occupied
from edgetune.runtime.model_folder import (
    check_space,
    plan_shards,
    quantization_config,
    stored_bytes,
    write_config,
    write_index,
    write_shards,
)
from edgetune.runtime.quantize import nf4_specs, nf4_tensors
from edgetune.runtime.safetensors_file import TensorSpec
from edgetune.runtime.tokenizer import Tokenizer, has_tokenizer
from edgetune.weight_forms import is_small

Form = Literal["fp32", "bf16", "nf4"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}
"""The dtype of the tensors that each form keeps dense."""


@dataclass(frozen=True)
class Converted:
    """A finished conversion: the folder, the bytes of its weights, the seconds that it took, and the form of the linears."""

    path: Path
    bytes: int
    seconds: float
    form: Form


@dataclass(frozen=True)
class Recipe:
    """Makes the stored form of each tensor of a GGUF model, for `write_shard`."""

    model: Model
    form: Form

    @classmethod
    def of(cls, model: Model, form: Form | Literal["auto"]) -> Recipe:
        """Return the recipe of a form; "auto" is bf16 for a small model (weight_forms.py) and NF4 for a larger one."""
        if form != "auto":
            return cls(model, form)
        return cls(model, "bf16" if is_small(model.config) else "nf4")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.model.shapes

    @property
    def nbytes(self) -> int:
        """Return the bytes of the converted weights."""
        return stored_bytes(self, list(self.shapes))

    def specs(self, name: str) -> list[TensorSpec]:
        if self.form == "nf4" and name in self.model.linears:
            return nf4_specs(name, self.shapes[name])
        return [TensorSpec(name, _DTYPES[self.form], self.shapes[name])]

    def tensors(self, name: str) -> Mapping[str, Tensor | Iterable[Tensor]]:
        if self.form == "nf4" and name in self.model.linears:
            return nf4_tensors(name, self.model.tensor(name))
        return {name: self.model.pieces(name)}

    def release(self, name: str) -> None:
        """Do nothing: a GGUF file is not mapped."""


def convert(
    source: Path, dest: Path, name: str, form: Form | Literal["auto"] = "auto", progress: Progress = ignore
) -> Converted:
    """Convert a GGUF file, or a split one given its first part, to the folder `dest`, which appears when it is whole.

    name: what the user calls the model; it is kept in origin.json. progress: receives (parameters done, all parameters).
    Raises ModelError for a file that is damaged or that edgetune cannot run, UsageError if `dest` exists, BusyError if another
    process is writing it, and ResourceError when the disk is or becomes full. What a killed conversion left is deleted.
    """
    begin, dest = time.monotonic(), Path(dest)
    refuse_occupied(dest)
    file = GgufFile.open(source)
    recipe = Recipe.of(Model(file), form)
    tokenizer = tokenizer_files(file.metadata)
    with lock_output(dest):
        mend(dest)
        with atomic_folder(dest) as folder:
            check_space(folder, dest, recipe.nbytes)
            for companion, content in tokenizer.items():
                atomic_write(folder / companion, content)
            if has_tokenizer(folder):
                Tokenizer.load(folder)  # one that does not fit is refused before the minutes of work
            # Numbers are read and written faster than threads share them out: on a busy machine, threads that wait for each
            # other made seconds minutes. Only rounding to 4 bits is worth them.
            with contextlib.nullcontext() if recipe.form == "nf4" else one_thread():
                _write_weights(folder, recipe, progress)
            file.refuse_changes()
            _origin(file, name).write(folder)
            open_model(folder)
    return Converted(dest, recipe.nbytes, time.monotonic() - begin, recipe.form)


def _write_weights(folder: Path, recipe: Recipe, progress: Progress) -> None:
    """Write config.json, the weights and their index."""
    config = recipe.model.hf_config | {"torch_dtype": str(_DTYPES[recipe.form]).removeprefix("torch.")}
    if recipe.form == "nf4":
        config["quantization_config"] = quantization_config(double_quant=True)
    write_config(folder, config)
    shards = plan_shards(recipe)
    write_shards(folder, recipe, shards, progress)
    write_index(folder, recipe, shards)


def _origin(file: GgufFile, name: str) -> Origin:
    path = str(file.path.absolute())
    return Origin(path, name, file.quantisation, file.bytes, file.modified, file.digest)
