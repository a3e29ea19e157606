"""Round a merged model to 4 bits with error feedback, so that the small changes of an adapter survive.

An adapter moves most weights by less than half a step of the grid, so rounding to nearest undoes it; error_feedback.py says
what is done instead.

Shapes: W (out, in); codes u8 (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from edgetune.export.effect import TOKENS
from edgetune.export.job import Job
from edgetune.export.memory import StageMemory, reference_memory
from edgetune.export.merge import COPIES, Merged
from edgetune.runtime.config import LINEARS
from edgetune.runtime.error_feedback import (
    Documents,
    Feedback,
    Grid,
    nearest,
    rounded_layers,
    rounding_numbers,
    with_feedback,
)
from edgetune.runtime.names import is_linear, linear_weight
from edgetune.runtime.ops_types import Weight
from edgetune.runtime.safetensors_file import TensorSpec

MakeGrid = Callable[[Tensor], Grid]
"""Make the Grid of a dense weight (out, in) f32."""


def rounded(merged: Merged, make_grid: MakeGrid, documents: Documents | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the name of every linear of the model, in its order, with the tensors of its codes.

    documents: token ids to calibrate on; None rounds to nearest. One linear at a time is dense, beside the inputs.
    """
    if documents is not None:
        yield from _calibrated(merged, make_grid, documents)
        return
    for layer in range(merged.base.config.num_layers):
        for linear in LINEARS:
            name = linear_weight(layer, linear)
            weight = merged.tensor(name)
            grid = make_grid(weight)
            yield name, grid.tensors(name, nearest(weight, grid))


def _calibrated(merged: Merged, make_grid: MakeGrid, documents: Documents) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Run the documents through the model a block at a time, and round each linear for the inputs it then gets."""
    tensors: dict[str, dict[str, Tensor]] = {}

    def round_linear(name: str, feedback: Callable[[], Feedback]) -> Weight:
        weight = merged.tensor(name)
        grid = make_grid(weight)
        codes = with_feedback(weight, grid, feedback())
        tensors[name] = grid.tensors(name, codes)
        return grid.weight(codes)

    for _ in rounded_layers(merged.base, documents, round_linear):
        yield from tensors.items()
        tensors.clear()


def rounding_memory(job: Job, beside: int = 0) -> StageMemory:
    """Forecast rounding with feedback and measuring its effect, which runs two models at once, plus `beside` bytes."""
    model, second = reference_memory(job), job.head_bytes + job.embedding_bytes
    numbers = rounding_numbers(job.base.config, TOKENS, COPIES)
    return StageMemory(model.fixed + second + torch.float32.itemsize * numbers + beside, models=2)


class RoundedRecipe:
    """The Recipe (model_folder.py) of a model with rounded linears and all other tensors in bf16.

    linear_specs: returns the stored tensors of a linear from its name and shape. linears: from `rounded`.
    """

    def __init__(
        self,
        merged: Merged,
        linear_specs: Callable[[str, tuple[int, ...]], list[TensorSpec]],
        linears: Iterator[tuple[str, dict[str, Tensor]]],
    ) -> None:
        self._merged, self._linear_specs, self._linears = merged, linear_specs, linears

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._merged.shapes

    def specs(self, name: str) -> list[TensorSpec]:
        """Return the tensors that are written for `name`: several for a linear, one in bf16 for any other."""
        if is_linear(name):
            return self._linear_specs(name, self.shapes[name])
        return [TensorSpec(name, torch.bfloat16, self.shapes[name])]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the values of `specs(name)`. Linears must be asked for in the order in which they are rounded."""
        if not is_linear(name):
            return {name: self._merged.tensor(name)}
        rounded_name, tensors = next(self._linears)
        assert rounded_name == name, f"{rounded_name} was rounded, but {name} is to be written"
        return tensors

    def release(self, name: str) -> None:
        self._merged.base.release(name)
