"""What a Core ML package is made of: each weight as it is to be stored, the plans of its functions, and the engine's own model
of just these weights, which is what the package has to agree with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from edgetune.export.coreml import app_files as app
from edgetune.export.coreml import weights as coreml_weights
from edgetune.export.coreml.model import Plan, linear_name
from edgetune.export.coreml.package import Array
from edgetune.export.coreml.weights import EMBEDDING_NAME, Stored
from edgetune.export.job import Job, work_folder
from edgetune.export.merge import Merged
from edgetune.export.targets import MeasuredForm
from edgetune.runtime import adapter as adapters
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LINEARS, QuantConfig
from edgetune.runtime.errors import UsageError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.model_folder import write_model
from edgetune.runtime.names import EMBEDDING, HEAD, is_linear, linear_weight
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.safetensors_file import TensorSpec

ADAPTER_AS = ("inputs", "functions", "merged")
MEASURED = (MeasuredForm("int4"), MeasuredForm("nf4", "merged"))
"""The forms whose stored weights are others than the engine's."""
ADAPTER_ALONE = "none"
"""--weights none: adapter.safetensors alone, for a package that is there already."""
CONTEXT_TOKENS = 2048
PREFILL_TOKENS = 128
"""Logits of a whole chunk come out, 2 bytes for each word of the vocabulary: this keeps them near 30 MB."""
BASE, ADAPTED = "base", "adapted"
"""The functions of a package with --adapter-as functions."""


@dataclass(frozen=True)
class Source:
    """Where the weights of a job come from, and in which form they go."""

    job: Job
    adapter_as: str | None

    @property
    def merges(self) -> bool:
        return self.adapter_as == "merged"

    @property
    def requantises(self) -> bool:
        """Whether the stored weights are others than the engine's."""
        return any(form.covers(self.job.weights, self.adapter_as) for form in MEASURED)

    @functools.cached_property
    def merged(self) -> Merged:
        return Merged(self.job.base, self.job.adapter if self.merges else None)

    def weight(self, name: str) -> Stored:
        """A weight as it is to be stored, by its Hugging Face name; embedding and head are fp16."""
        if not is_linear(name):
            return coreml_weights.store(name, self.job.base.tensor(name), "fp16")
        weight = self.merged.tensor(name) if self.merges else self.job.base.tensor(name)
        return coreml_weights.store(name, weight, self.job.weights)

    def blank(self, name: str, shape: tuple[int, int]) -> Stored:
        """What holds its place while the package is laid out."""
        quant = (None if self.merges else self.job.base.quant) or QuantConfig()  # a sum is dense, and quantised anew
        return coreml_weights.blank(name, shape, self.job.weights if is_linear(name) else "fp16", quant.block_size)

    def plans(self) -> dict[str, Plan]:
        """What the package's functions are made of, by name, the default one first."""
        base, adapter = self.job.base, self.job.adapter
        context = min(CONTEXT_TOKENS, base.config.max_positions)
        plan = Plan(base.config, context, min(PREFILL_TOKENS, context), base.dense, self.blank)
        if adapter is not None and self.adapter_as == "inputs":
            targets = adapter.config.targets
            return {"main": replace(plan, input_ranks={name: adapter.config.rank for name in LINEARS if name in targets})}
        if adapter is not None and self.adapter_as == "functions":
            return {ADAPTED: replace(plan, constants=_built_in(self.job)), BASE: plan}
        return {"main": plan}

    def stored(self) -> dict[str, str]:
        """Hugging Face names of all weights, layer by layer, by the name that coreml_weights.places has for each."""
        config = self.job.base.config
        head = {} if config.tie_embeddings else {"logits": HEAD}
        layers = {
            linear_name(layer, name): linear_weight(layer, name) for layer in range(config.num_layers) for name in LINEARS
        }
        return {EMBEDDING_NAME: EMBEDDING, **layers, **head}


def source_of(job: Job) -> Source:
    """Raises UsageError for an --adapter-as that is not known, AdapterError for one without an adapter."""
    how = job.adapter_as
    if how not in (None, *ADAPTER_AS):
        raise UsageError(f"--adapter-as {how} is not known; expected inputs, functions or merged.")
    if how is not None:
        job.needed_adapter()
    return Source(job, how or ("inputs" if job.adapter is not None else None))


def _built_in(job: Job) -> dict[tuple[int, str], tuple[Array, Array]]:
    """lora_A and lora_B f16 of each linear that has them, the scale in B."""
    adapter = job.needed_adapter()
    stacked = app.stacked(adapter, job.base.config)
    return {
        (layer, name): (stacked[f"{name}_a"][layer], stacked[f"{name}_b"][layer])
        for layer in range(job.base.config.num_layers)
        for name in adapter.config.targets
        if (layer, name, "A") in adapter.tensors
    }


def stored_model(job: Job, folder: Path) -> Llama:
    """The engine's model, with the weights as stored where they were quantised anew. Not read from the package: made a second
    time from the base. `folder`: where its files may stand until it is open."""
    source = source_of(job)
    if source.requantises:
        config = {key: value for key, value in job.base.hf_config.items() if key != "quantization_config"}
        model = _through_files(job, folder, lambda made: write_model(job.base.folder, made, config, _StoredRecipe(source)))
    else:
        model = bare(job, folder)
    if job.adapter is not None and not (source.merges and source.requantises):
        adapters.attach(model, job.adapter)
    return model


@dataclass(frozen=True)
class _StoredRecipe:
    """A model folder of the weights as a package has them, fp16, beside the base's own other tensors; a Recipe of
    model_folder.py."""

    source: Source

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.source.merged.shapes

    def specs(self, name: str) -> list[TensorSpec]:
        dtype = torch.float16 if is_linear(name) else self.source.job.base.dense(name).dtype
        return [TensorSpec(name, dtype, self.shapes[name])]

    def tensors(self, name: str) -> dict[str, Tensor]:
        if not is_linear(name):
            return {name: self.source.job.base.dense(name)}
        return {name: torch.from_numpy(self.source.weight(name).values())}

    def release(self, name: str) -> None:
        self.source.job.base.release(name)


def bare(job: Job, folder: Path) -> Llama:
    """The base in fp32; a dense one in NF4 where it is exported so, as it was while the adapter was trained, or where the
    adapter goes alone to such a package."""
    quant = QuantConfig() if job.weights in ("nf4", ADAPTER_ALONE) and job.base.quant is None else None
    if quant is not None and job.layer_memory is not None:
        return _through_files(job, folder, lambda made: quantize_folder(job.base.folder, made))
    return load_llama(job.base, torch.float32, quant=quant, layer_memory=None if quant is not None else job.layer_memory)


def _through_files(job: Job, folder: Path, write: Callable[[Path], object]) -> Llama:
    """A model in fp32 out of files that `write` makes, streamed from them where memory is short. They have no name any more
    once it is open, and go with it."""
    with work_folder(folder) as place:
        made = place / "model"
        made.mkdir(mode=0o700)
        write(made)
        return load_llama(open_model(made), torch.float32, layer_memory=job.layer_memory)
