"""Adapter and base as one model, a tensor at a time: the sum is never held for more than one linear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edgetune.export.job import Job
from edgetune.export.memory import PROCESS_BYTES, StageMemory
from edgetune.runtime import adapter as adapters
from edgetune.runtime import nf4
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.checkpoint import Checkpoint, is_linear, model_shapes
from edgetune.runtime.errors import ModelError
from edgetune.runtime.safetensors_file import TensorSpec

COPIES = 3
"""fp32 copies of a linear at its merge: the sum, what it is dequantised through, and what it is written from."""


class Merged:
    """The tensors of base + adapter by their Hugging Face names.

    Raises AdapterError, naming every mismatch, for an adapter of another base.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter | None) -> None:
        self.base, self.adapter = base, adapter
        self.shapes = model_shapes(base.config)
        """Shape of every tensor, layer by layer: the order to ask for them in."""
        if adapter is not None:
            adapters.check_fits(adapter, base.config)

    def tensor(self, name: str) -> Tensor:
        """W + scale * B A in fp32 for a linear of a block, a 4-bit head in fp32, anything else as stored (then read-only)."""
        stored = self.base.tensor(name)
        if not is_linear(name):
            return stored if isinstance(stored, Tensor) else nf4.dequantize(stored, torch.float32)
        dense = stored.to(torch.float32, copy=True) if isinstance(stored, Tensor) else nf4.dequantize(stored, torch.float32)
        a, b = self.update(name)
        return dense if a is None or b is None else dense.addmm_(b, a, alpha=self.scale)

    def update(self, name: str) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """lora_A (r, in) and lora_B (out, r) of a linear; None and None where the adapter leaves it alone."""
        parts, tensors = name.split("."), {} if self.adapter is None else self.adapter.tensors
        layer, linear = int(parts[2]), parts[-2]
        if (layer, linear, "A") not in tensors:
            return None, None
        return tensors[layer, linear, "A"], tensors[layer, linear, "B"]

    @property
    def scale(self) -> float:
        """What multiplies B A."""
        return 1.0 if self.adapter is None else self.adapter.config.scale


def merged(job: Job) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all of them in their order; none is held once the next is asked for."""
    sums = Merged(job.base, job.adapter)
    for name in sums.shapes:
        yield name, sums.tensor(name)
        job.base.release(name)


@dataclass(frozen=True)
class DenseRecipe:
    """Every tensor rounded once, from the fp32 sum, to `dtype`; a Recipe of model_folder.py."""

    merged: Merged
    dtype: torch.dtype

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.merged.shapes

    def specs(self, name: str) -> list[TensorSpec]:
        return [TensorSpec(name, self.dtype, self.shapes[name])]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Raises ModelError for a weight that the dtype has no number for."""
        weight = self.merged.tensor(name)
        largest = max(-float(weight.min()), float(weight.max()))
        if not largest <= torch.finfo(self.dtype).max:
            raise ModelError(
                f"{name} holds {largest:g} and {self.dtype} ends at {torch.finfo(self.dtype).max:g}; type --weights bf16."
            )
        return {name: weight}

    def release(self, name: str) -> None:
        self.merged.base.release(name)


def merge_memory(job: Job) -> StageMemory:
    """Writing a merged model a tensor at a time: the adapter, and copies of the largest linear or of the embedding."""
    copies = max(torch.float32.itemsize * COPIES * job.largest_linear, job.head_bytes)
    return StageMemory(PROCESS_BYTES + job.adapter_bytes + copies)
