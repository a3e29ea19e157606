"""Decide what a Core ML package holds: the form of every weight, and the plan of every function."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from edgetune.export.coreml.adapter_file import stacked
from edgetune.export.coreml.package import Array
from edgetune.export.coreml.plan import Plan, linear_name
from edgetune.export.coreml.stored_weight import StoredWeight, placeholder, store
from edgetune.export.coreml.weight_locations import EMBEDDING_NAME
from edgetune.export.job import Job
from edgetune.export.merge import Merged
from edgetune.export.targets import MeasuredForm
from edgetune.runtime.config import LINEARS, QuantConfig
from edgetune.runtime.errors import SettingError
from edgetune.runtime.names import EMBEDDING, HEAD, is_linear, linear_weight

ADAPTER_AS = ("inputs", "functions", "merged")
"""The values of --adapter-as: inputs of the program, a second function beside the bare base, or merged into the weights."""
MEASURED = (MeasuredForm("int4"), MeasuredForm("nf4", "merged"))
"""The forms whose stored weights are rounded again, so that they are not the engine's own."""
ADAPTER_ALONE = "none"
"""The value of --weights that writes adapter.safetensors alone, for a package that was exported before."""
CONTEXT_TOKENS = 2048
"""Largest cache of a package, in tokens. Chosen by hand."""
PREFILL_TOKENS = 128
"""Largest chunk of a prompt, in tokens. A call returns the logits of its whole chunk, 2 bytes for each token of the vocabulary:
128 keeps them near 30 MB."""
BASE, ADAPTED = "base", "adapted"
"""Names of the functions of a package with --adapter-as functions."""


@dataclass(frozen=True)
class Contents:
    """The weights of a job's package, in the form in which they are stored, and the plans of its functions."""

    job: Job
    adapter_as: str | None

    @property
    def merges(self) -> bool:
        """Return True if the adapter is added to the weights before they are stored."""
        return self.adapter_as == "merged"

    @property
    def requantizes(self) -> bool:
        """Return True if the stored weights are rounded again, so that they are not the engine's own."""
        return any(form.covers(self.job.weights, self.adapter_as) for form in MEASURED)

    @functools.cached_property
    def merged(self) -> Merged:
        """Return the tensors of the base, with the adapter added if this package merges it."""
        return Merged(self.job.base, self.job.adapter if self.merges else None)

    def weight(self, name: str) -> StoredWeight:
        """Return a weight in the form to store, by its Hugging Face name. Embedding and head are fp16."""
        if not is_linear(name):
            return store(name, self.job.base.tensor(name), "fp16")
        weight = self.merged.tensor(name) if self.merges else self.job.base.tensor(name)
        return store(name, weight, self.job.weights)

    def placeholder(self, name: str, shape: tuple[int, int]) -> StoredWeight:
        """Return the placeholder for a weight while coremltools lays out the package."""
        # a merged weight is dense and is quantised again, with the default block size
        quant = (None if self.merges else self.job.base.quant) or QuantConfig()
        return placeholder(name, shape, self.job.weights if is_linear(name) else "fp16", quant.block_size)

    def plans(self) -> dict[str, Plan]:
        """Return the plan of each function of the package by the function's name, the default first."""
        base, adapter = self.job.base, self.job.adapter
        context = min(CONTEXT_TOKENS, base.config.max_positions)
        plan = Plan(base.config, context, min(PREFILL_TOKENS, context), base.dense, self.placeholder)
        if adapter is not None and self.adapter_as == "inputs":
            lora = adapter.uniform().config
            return {"main": replace(plan, input_ranks={name: lora.rank for name in LINEARS if name in lora.targets})}
        if adapter is not None and self.adapter_as == "functions":
            return {ADAPTED: replace(plan, constants=_built_in(self.job)), BASE: plan}
        return {"main": plan}

    def weight_names(self) -> dict[str, str]:
        """Return the Hugging Face name of each weight, layer by layer, by its name in weight_locations."""
        config = self.job.base.config
        head = {} if config.tie_embeddings else {"logits": HEAD}
        layers = {
            linear_name(layer, name): linear_weight(layer, name) for layer in range(config.num_layers) for name in LINEARS
        }
        return {EMBEDDING_NAME: EMBEDDING, **layers, **head}


def contents_of(job: Job) -> Contents:
    """Return the contents of a job's package.

    Raises SettingError for an unknown --adapter-as, AdapterError for --adapter-as without an adapter.
    """
    how = job.adapter_as
    if how not in (None, *ADAPTER_AS):
        raise SettingError(f"Unknown --adapter-as {how}; expected inputs, functions or merged.")
    if how is not None:
        job.needed_adapter()
    return Contents(job, how or ("inputs" if job.adapter is not None else None))


def _built_in(job: Job) -> dict[tuple[int, str], tuple[Array, Array]]:
    """Return lora_A and lora_B, f16, of each layer's linear that the adapter changes; B includes the scale."""
    adapter = job.needed_adapter()
    inputs = stacked(adapter, job.base.config)
    return {
        (layer, name): (inputs[f"{name}_a"][layer], inputs[f"{name}_b"][layer])
        for layer in range(job.base.config.num_layers)
        for name in adapter.config.targets
        if (layer, name, "A") in adapter.tensors
    }
