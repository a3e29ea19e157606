"""Round a merged model to 4 bits with error feedback, so that the small changes of an adapter survive.

An adapter moves most weights by less than half a step of the grid, so rounding to nearest undoes it. Here the columns of a
weight are rounded one after another, and the error of each is compensated in the columns still to come, in proportion to how
their inputs correlate: (X^T X)^-1. The products with real inputs are preserved although few of the weights are. Layer by layer,
the inputs are the outputs of the rounded layers before it. Source: GPTQ (Frantar et al. 2022, arXiv 2210.17323), with the
columns ordered by the size of their inputs. Each grid is the one that is stored, so codes are chosen for the values that will
be read.

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
from edgetune.runtime.config import LINEARS, LlamaConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.model import Block, Context, norm_weight
from edgetune.runtime.names import EMBEDDING, is_linear, linear_weight
from edgetune.runtime.ops_types import Weight
from edgetune.runtime.project import Identity, Norm, Panel, ProjectPlan, project
from edgetune.runtime.rope import rotations
from edgetune.runtime.safetensors_file import TensorSpec

DAMPING = (0.01, 0.1, 1.0)
"""Shares of the mean of X^T X's diagonal to add to that diagonal; the first that makes the matrix invertible is used.

Few calibration tokens leave directions of the inputs unseen. 0.01 is GPTQ's; the larger ones are chosen by hand.
"""
MOMENTS = 3
"""Number of (in, in) matrices in memory while the Feedback of a linear's inputs is computed."""
COLUMNS = 128
"""Number of columns that are rounded before their errors are added to the rest of the weight. 128 is GPTQ's block size."""


class Grid(Protocol):
    """The values that each weight of one linear may take, and the stored form of their codes."""

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Round values (out,) f32 of one input's column; return codes (out,) and the values they stand for, f32 (out,)."""

    def weight(self, codes: Tensor) -> Weight:
        """Return codes u8 (out, in) as a weight to compute with, with exactly the values that the file will contain."""

    def tensors(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        """Return codes u8 (out, in) as the tensors of the file, by name."""


MakeGrid = Callable[[Tensor], Grid]
"""Make the Grid of a dense weight (out, in) f32."""


@dataclass(frozen=True)
class Feedback:
    """The correlation of a linear's inputs, by which rounding errors are fed back.

    order (in,): the columns, those with the largest inputs first. factor (in, in): the upper Cholesky factor of (X^T X)^-1
    with rows and columns in that order.
    """

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Feedback:
        """Compute the feedback of inputs x (N, in). Raises ModelError if they are not finite."""
        moment = x.float().T @ x.float()
        moment.diagonal()[moment.diagonal() == 0] = 1.0  # this input is always 0: any rounding will do
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
        raise ModelError(
            "The adapted model computes inf or NaN on the calibration text, so it cannot be merged to 4 bits; train the "
            "adapter again."
        )


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Round a weight (out, in) f32 to nearest; return its codes u8 (out, in)."""
    columns = weight.T.contiguous()
    return torch.stack([grid.nearest(values, i)[0].to(torch.uint8) for i, values in enumerate(columns)], dim=1)


def with_feedback(weight: Tensor, grid: Grid, feedback: Feedback) -> Tensor:
    """Round a weight (out, in) f32 so that its products with the inputs are preserved; return its codes u8 (out, in)."""
    order, factor = feedback.order, feedback.factor
    left = weight.T[order].contiguous()  # (in, out): a row here is a column of W
    codes = torch.empty(left.shape, dtype=torch.uint8)
    for start in range(0, len(order), COLUMNS):
        stop = min(start + COLUMNS, len(order))
        errors = torch.empty(stop - start, left.shape[1])
        for i in range(start, stop):
            column = int(order[i])
            codes[column], value = grid.nearest(left[i], column)
            errors[i - start] = error = (left[i] - value) / factor[i, i]
            left[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        # The columns beyond this block get all of its errors in one matrix product, which is faster than one at a time.
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()


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


@torch.no_grad()
def _calibrated(merged: Merged, make_grid: MakeGrid, documents: Documents) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Run the documents through the model a block at a time, and round each linear for the inputs it then gets."""
    config = merged.base.config
    ids, positions, segments = packed(documents)
    plan = ProjectPlan(Panel())
    ctx = Context(rotations(config, positions, torch.device("cpu")), segments, plan)
    h = vocabulary.rows(merged.base.dense(EMBEDDING), ids, torch.float32) * config.embedding_scale
    for layer in range(config.num_layers):
        block = _block(merged, layer)

        def code(linears: tuple[str, ...], x: Tensor, block: Block = block) -> Iterator[tuple[str, dict[str, Tensor]]]:
            """Round the linears that share the input x (N, in), and replace them in the block by what was rounded."""
            feedback = Feedback.of(x)
            for linear in linears:
                name = linear_weight(block.layer, linear)
                weight = merged.tensor(name)
                grid = make_grid(weight)
                codes = with_feedback(weight, grid, feedback)
                getattr(block, linear).weight = grid.weight(codes)
                yield name, grid.tensors(name, codes)

        # The order of the block's own forward pass: each linear must be rounded before its output is computed.
        norm = Norm(block.attn_norm, config.rms_norm_eps)
        yield from code(("q_proj", "k_proj", "v_proj"), norm.forward(h))
        attended = block.attend(project(h, norm, (block.q_proj, block.k_proj, block.v_proj), plan), ctx)
        yield from code(("o_proj",), attended)
        h = block.add(h, project(attended, Identity(), (block.o_proj,), plan), block.post_attn_norm)
        norm = Norm(block.mlp_norm, config.rms_norm_eps)
        yield from code(("gate_proj", "up_proj"), norm.forward(h))
        gate_up = project(h, norm, (block.gate_proj, block.up_proj), plan)
        yield from code(("down_proj",), block.gated.forward(gate_up))
        h = block.add(h, project(gate_up, block.gated, (block.down_proj,), plan), block.post_mlp_norm)


def _block(merged: Merged, layer: int) -> Block:
    """Return a block with fp32 norms and biases; its linears are the base's until rounded ones replace them."""
    tensors: dict[str, Weight] = {
        name: _in_fp32(name, weight, merged.base.config) for name, weight in merged.base.block_tensors(layer).items()
    }
    return Block(merged.base.config, layer, tensors)


def _in_fp32(name: str, weight: Weight, config: LlamaConfig) -> Weight:
    """Return a norm or a bias in fp32, a linear as it is."""
    if not isinstance(weight, Tensor) or is_linear(name):
        return weight
    return norm_weight(weight, config) if name.endswith("norm.weight") else weight.float()


def rounding_memory(job: Job, beside: int = 0) -> StageMemory:
    """Forecast rounding with feedback and measuring its effect, which runs two models at once, plus `beside` bytes."""
    config = job.base.config
    widths = config.hidden_size + 2 * config.intermediate_size + (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    moments = MOMENTS * max(config.hidden_size, config.intermediate_size) ** 2
    model, second = reference_memory(job), job.head_bytes + job.embedding_bytes
    numbers = COPIES * job.largest_linear + TOKENS * widths + moments
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
