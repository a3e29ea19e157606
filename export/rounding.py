"""Rounding a merged model to 4 bits so that small changes survive: each column's error goes into those still to come.

An adapter moves most weights by less than half a step of the grid, so that rounding to the nearest undoes it. Here the
columns of a weight are rounded one after another, and the later ones make good the error of each, as the inputs vary
together: (X^T X)^-1. The products with real inputs stay, although few weights do. Layer by layer the inputs are those that
the rounded layers before it make. Source: GPTQ (Frantar et al. 2022, arXiv 2210.17323), columns in order of their inputs'
size; the grids are the stored ones, so that codes are chosen for what will be read.

Shapes: W (out, in); X (N, in) the inputs of a linear; codes u8 (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edgetune.export.effect import TOKENS, Documents, packed
from edgetune.export.job import Job
from edgetune.export.memory import StageMemory, reference_memory
from edgetune.export.merge import COPIES, Merged
from edgetune.runtime import vocabulary
from edgetune.runtime.checkpoint import EMBEDDING, is_linear
from edgetune.runtime.config import LINEARS
from edgetune.runtime.errors import ModelError
from edgetune.runtime.lora import Identity, Norm, Panel, ProjectPlan, SwiGlu, Weight, project
from edgetune.runtime.model import Block, Context, hf_linear_name, rope_frequencies
from edgetune.runtime.safetensors_file import TensorSpec

DAMPING = (0.01, 0.1, 1.0)
"""Of the mean of X^T X's diagonal, added to it: few tokens leave directions unseen. The first that makes it invertible."""
MOMENTS = 3
"""Matrices of (in, in) at once while the Feedback of a linear's inputs is made."""
COLUMNS = 128
"""Rounded before the rest of the weight hears of their errors."""


class Grid(Protocol):
    """The values that each weight of one linear may take, and what the codes of them become."""

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Values (out,) f32 of one input's column -> codes (out,) and what these stand for, f32 (out,)."""

    def weight(self, codes: Tensor) -> Weight:
        """Codes u8 (out, in) as a weight to compute with, exactly what the file will hold."""

    def tensors(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        """Codes u8 (out, in) as the file holds them, by name."""


MakeGrid = Callable[[Tensor], Grid]
"""From a dense weight (out, in) f32 to its grid."""


@dataclass(frozen=True)
class Feedback:
    """How the inputs of a linear vary together: the order of the columns, and in it the upper Cholesky factor of
    (X^T X)^-1, (in, in).
    """

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Feedback:
        """x (N, in)."""
        moment = x.float().T @ x.float()
        moment.diagonal()[moment.diagonal() == 0] = 1.0  # an input that is never there: any rounding will do
        order = moment.diagonal().argsort(descending=True, stable=True)
        moment = moment[order][:, order]
        mean = moment.diagonal().mean()
        for damping in DAMPING:
            damped = moment + torch.diag((damping * mean).expand(len(order)))
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(factor).all():
                return cls(order, factor)
        raise ModelError("The adapted model makes inf or NaN of its text, so it cannot be merged to 4 bits; train it again.")


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Codes of the values nearest to a weight (out, in) f32."""
    columns = weight.T.contiguous()
    return torch.stack([grid.nearest(values, i)[0].to(torch.uint8) for i, values in enumerate(columns)], dim=1)


def with_feedback(weight: Tensor, grid: Grid, feedback: Feedback) -> Tensor:
    """Codes of a weight (out, in) f32 whose products with the inputs stay."""
    order, factor = feedback.order, feedback.factor
    left = weight.T[order].contiguous()  # (in, out): a column of W is a row here
    codes = torch.empty(left.shape, dtype=torch.uint8)
    for start in range(0, len(order), COLUMNS):
        stop = min(start + COLUMNS, len(order))
        errors = torch.empty(stop - start, left.shape[1])
        for i in range(start, stop):
            column = int(order[i])
            codes[column], value = grid.nearest(left[i], column)
            errors[i - start] = error = (left[i] - value) / factor[i, i]
            left[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()


def rounded(merged: Merged, make_grid: MakeGrid, documents: Documents | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every linear of the model, in its order: its name, and the tensors of its codes.

    documents: token ids to calibrate on; None rounds to the nearest. One linear is dense at a time, beside the inputs.
    """
    for layer in range(merged.base.config.num_layers) if documents is None else ():
        for name in _names(layer):
            weight = merged.tensor(name)
            grid = make_grid(weight)
            yield name, grid.tensors(name, nearest(weight, grid))
    if documents is not None:
        yield from _calibrated(merged, make_grid, documents)


def _names(layer: int) -> list[str]:
    return [f"model.layers.{layer}.{hf_linear_name(linear)}.weight" for linear in LINEARS]


@torch.no_grad()
def _calibrated(merged: Merged, make_grid: MakeGrid, documents: Documents) -> Iterator[tuple[str, dict[str, Tensor]]]:
    config = merged.base.config
    ids, positions, segments = packed(documents)
    angles = positions.double().unsqueeze(1) * rope_frequencies(config.rope, config.head_dim)
    plan = ProjectPlan(Panel())
    ctx = Context(angles.cos().float(), angles.sin().float(), segments, plan)
    h = vocabulary.rows(merged.base.dense(EMBEDDING), ids, torch.float32)
    for layer in range(config.num_layers):
        block = _block(merged, layer)

        def code(linears: tuple[str, ...], x: Tensor, block: Block = block) -> Iterator[tuple[str, dict[str, Tensor]]]:
            """Round linears of one input x (N, in), and let the block compute with them from now on."""
            feedback = Feedback.of(x)
            for linear in linears:
                name = f"model.layers.{block.layer}.{hf_linear_name(linear)}.weight"
                weight = merged.tensor(name)
                grid = make_grid(weight)
                codes = with_feedback(weight, grid, feedback)
                getattr(block, linear).weight = grid.weight(codes)
                yield name, grid.tensors(name, codes)

        norm = Norm(block.attn_norm, config.rms_norm_eps)
        yield from code(("q_proj", "k_proj", "v_proj"), norm.forward(h))
        attended = block.attend(project(h, norm, (block.q_proj, block.k_proj, block.v_proj), plan), ctx)
        yield from code(("o_proj",), attended)
        h = h + project(attended, Identity(), (block.o_proj,), plan)
        norm = Norm(block.mlp_norm, config.rms_norm_eps)
        yield from code(("gate_proj", "up_proj"), norm.forward(h))
        gate_up = project(h, norm, (block.gate_proj, block.up_proj), plan)
        yield from code(("down_proj",), SwiGlu().forward(gate_up))
        h = h + project(gate_up, SwiGlu(), (block.down_proj,), plan)


def _block(merged: Merged, layer: int) -> Block:
    """A layer with fp32 norms and biases, and the base's linears until they are rounded."""
    tensors: dict[str, Weight] = {
        name: weight.float() if isinstance(weight, Tensor) and not name.endswith("_proj.weight") else weight
        for name, weight in merged.base.block_tensors(layer).items()
    }
    return Block(merged.base.config, layer, tensors)


def rounding_memory(job: Job, beside: int = 0) -> StageMemory:
    """Rounding with feedback, calibrated, and measuring what is left: two models at once, and `beside` bytes."""
    config = job.base.config
    widths = config.hidden_size + 2 * config.intermediate_size + (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    moments = MOMENTS * max(config.hidden_size, config.intermediate_size) ** 2
    model, second = reference_memory(job), job.head_bytes + job.embedding_bytes
    numbers = COPIES * job.largest_linear + TOKENS * widths + moments
    return StageMemory(model.fixed + second + torch.float32.itemsize * numbers + beside, models=2)


class RoundedRecipe:
    """A model folder whose linears are rounded and whose other tensors are in bf16; a Recipe of model_folder.py.

    linear_specs: what a linear of a shape is stored as. linears: `rounded`'s.
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
        if is_linear(name):
            return self._linear_specs(name, self.shapes[name])
        return [TensorSpec(name, torch.bfloat16, self.shapes[name])]

    def tensors(self, name: str) -> dict[str, Tensor]:
        if not is_linear(name):
            return {name: self._merged.tensor(name)}
        found, tensors = next(self._linears)
        assert found == name, f"{found} was made where {name} is to be written"
        return tensors

    def release(self, name: str) -> None:
        self._merged.base.release(name)
