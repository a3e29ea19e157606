"""Merge adapter and base into one model, a tensor at a time: no more than one merged linear is in memory."""

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
from edgetune.runtime.checkpoint import Checkpoint, model_shapes
from edgetune.runtime.errors import ModelError
from edgetune.runtime.names import is_linear
from edgetune.runtime.safetensors_file import TensorSpec

COPIES = 3
"""Number of fp32 copies of a linear while it is merged: the sum, the buffer it is dequantised through, and the one it is
written from."""


class Merged:
    """The tensors of base and adapter merged, by their Hugging Face names.

    shapes: the shape of every tensor, layer by layer, which is the order to ask for them in. Raises AdapterError, naming every
    mismatch, for an adapter of another base.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter | None) -> None:
        self.base, self.adapter = base, adapter
        self.shapes = model_shapes(base.config)
        if adapter is not None:
            adapters.check_fits(adapter, base.config)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor: W + scale * B A (out, in) in fp32 for a linear of a block, a 4-bit head in fp32, others as stored.

        A tensor that is returned as stored is read-only.
        """
        stored = self.base.tensor(name)
        if not is_linear(name):
            return stored if isinstance(stored, Tensor) else nf4.dequantize(stored, torch.float32)
        dense = stored.to(torch.float32, copy=True) if isinstance(stored, Tensor) else nf4.dequantize(stored, torch.float32)
        layer, linear = int(name.split(".")[2]), name.split(".")[-2]
        if self.adapter is None or (layer, linear, "A") not in self.adapter.tensors:
            return dense
        a, b = (self.adapter.tensors[layer, linear, part] for part in "AB")
        return dense.addmm_(b, a, alpha=self.adapter.scale_of(layer, linear))


def merged(job: Job) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the merged model, layer by layer; the base releases each one before it reads the next."""
    sums = Merged(job.base, job.adapter)
    for name in sums.shapes:
        yield name, sums.tensor(name)
        job.base.release(name)


@dataclass(frozen=True)
class DenseRecipe:
    """The Recipe (model_folder.py) of a dense model: every tensor is rounded once, from the fp32 sum to `dtype`."""

    merged: Merged
    dtype: torch.dtype

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.merged.shapes

    def specs(self, name: str) -> list[TensorSpec]:
        return [TensorSpec(name, self.dtype, self.shapes[name])]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the merged tensor, to be rounded when it is written. Raises ModelError if it exceeds the dtype's range."""
        weight = self.merged.tensor(name)
        largest = max(-float(weight.min()), float(weight.max()))
        if not largest <= torch.finfo(self.dtype).max:
            raise ModelError(
                f"{name} contains {largest:g}, and {self.dtype} ends at {torch.finfo(self.dtype).max:g}; type --weights bf16."
            )
        return {name: weight}

    def release(self, name: str) -> None:
        self.merged.base.release(name)


def merge_memory(job: Job) -> StageMemory:
    """Forecast the writing of a merged model: the adapter, and copies of the largest linear or of the embedding."""
    copies = max(torch.float32.itemsize * COPIES * job.largest_linear, job.head_bytes)
    return StageMemory(PROCESS_BYTES + job.adapter_bytes + copies)
