"""Round weights with error feedback, so that the products of each linear with its real inputs are preserved.

The columns of a weight are rounded one after another, and the error of each is compensated in the columns still to come, in
proportion to how their inputs correlate: (X^T X)^-1. The products are preserved although few of the weights are. Layer by
layer, the inputs are the outputs of the rounded layers before it. Source: GPTQ (Frantar et al. 2022, arXiv 2210.17323), with
the columns ordered by the size of their inputs. Each grid is the one that is stored, so codes are chosen for the values that
will be read.

Shapes: W (out, in); X (N, in) the inputs of a linear; codes u8 (out, in).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.linear import AnyLinear
from edgetune.runtime.model import Block, Llama, final_norm_weight, norm_weight
from edgetune.runtime.names import EMBEDDING, FINAL_NORM, is_linear, linear_weight
from edgetune.runtime.ops_types import Segment, Weight
from edgetune.runtime.runner import Runner

Documents = list[list[int]]
"""Token ids, a list for each document."""

DAMPING = (0.01, 0.1, 1.0)
"""Shares of the mean of X^T X's diagonal to add to that diagonal; the first that makes the matrix invertible is used.

Few calibration tokens leave directions of the inputs unseen. 0.01 is GPTQ's; the larger ones are chosen by hand.
"""
MOMENTS = 3
"""Number of (in, in) matrices in memory while the Feedback of a linear's inputs is computed."""
COLUMNS = 128
"""Number of columns that are rounded before their errors are added to the rest of the weight. 128 is GPTQ's block size."""
_PIECE = 512
"""Rows or columns of an (in, in) matrix that are worked on at a time, so that Ctrl-C never waits for a whole matrix. Chosen by
hand."""
_PIECE_FLOPS = 4e9
"""Floating-point operations after which a product of the inputs is interrupted, for the same reason: 0.05 s on one Zen 4 core.
Chosen by hand."""


class Grid(Protocol):
    """The values that each weight of one linear may take, and the stored form of their codes."""

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Round values (out,) f32 of one input's column; return codes (out,) and the values they stand for, f32 (out,)."""

    def weight(self, codes: Tensor) -> Weight:
        """Return codes u8 (out, in) as a weight to compute with, with exactly the values that the file will contain."""

    def tensors(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        """Return codes u8 (out, in) as the tensors of the file, by name."""


@dataclass(frozen=True)
class Feedback:
    """The correlation of a linear's inputs, by which rounding errors are fed back.

    power (in,): the sum of each input's squares. order (in,): the columns, those with the largest inputs first. factor
    (in, in): the upper Cholesky factor of (X^T X)^-1 with rows and columns in that order.
    """

    power: Tensor
    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Feedback:
        """Compute the feedback of inputs x (N, in). Raises ModelError if they are not finite."""
        moment = _moment(x.float())
        power = moment.diagonal().clone()
        moment.diagonal()[power == 0] = 1.0  # this input is always 0: any rounding will do
        order = moment.diagonal().argsort(descending=True, stable=True)
        moment = moment[order][:, order]
        mean = moment.diagonal().mean()
        for damping in DAMPING:
            damped = moment.clone()
            damped.diagonal().add_(damping * mean)
            factor = _inverse_factor(damped)
            if factor is not None:
                return cls(power, order, factor)
        raise ModelError(
            "The model computes inf or NaN on the calibration text, so it cannot be rounded to 4 bits; with an adapter, train "
            "that again, else copy the model again."
        )


def _moment(x: Tensor) -> Tensor:
    """Return X^T X (in, in) of x (N, in)."""
    columns = x.shape[1]
    moment = torch.zeros(columns, columns)
    for part in x.split(max(int(_PIECE_FLOPS / (2 * _PIECE * columns)), _PIECE)):
        for start in range(0, columns, _PIECE):
            moment[start : start + _PIECE].addmm_(part[:, start : start + _PIECE].T, part)
    return moment


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """Return the upper Cholesky factor U of a matrix's inverse, U^T U = M^-1, or None if M is not positive definite.

    M = R R^T with R upper triangular, and so U = R^-1. R is the lower Cholesky factor of M with its rows and columns
    reversed, reversed again. M (in, in) is overwritten.
    """
    count, lower = len(matrix), matrix.flip(0, 1)
    for start in range(0, count, _PIECE):
        stop = min(start + _PIECE, count)
        corner, failed = torch.linalg.cholesky_ex(lower[start:stop, start:stop])
        if failed:
            return None
        lower[start:stop, start:stop] = corner
        if stop < count:
            below = torch.linalg.solve_triangular(corner, lower[stop:, start:stop].T, upper=False).T
            lower[stop:, start:stop] = below
            for row in range(stop, count, _PIECE):
                lower[row : row + _PIECE, stop:].addmm_(below[row - stop : row - stop + _PIECE], below.T, alpha=-1)
    _invert_upper(lower.flip(0, 1), matrix)
    return matrix if torch.isfinite(matrix).all() else None


def _invert_upper(upper: Tensor, inverse: Tensor) -> None:
    """Write the inverse of R (n, n), upper triangular, into `inverse` (n, n); what lies below R's diagonal is not read."""
    inverse.zero_()
    for start in range(0, len(upper), _PIECE):
        columns = slice(start, start + _PIECE)
        for row in range(start, -1, -_PIECE):  # from the diagonal upwards: each piece needs those below it
            rows, below = slice(row, row + _PIECE), slice(row + _PIECE, start + _PIECE)
            right = upper[rows, below] @ inverse[below, columns]
            right.neg_()
            if row == start:
                right.fill_diagonal_(1.0)
            inverse[rows, columns] = torch.linalg.solve_triangular(upper[rows, rows], right, upper=True)


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


RoundLinear = Callable[[str, Callable[[], Feedback]], Weight]
"""Rounds one linear: takes the name of its weight and a function that computes the feedback of its inputs; returns the rounded
weight, which the model computes with from then on."""


def rounded_layers(base: Checkpoint, documents: Documents, round_linear: RoundLinear) -> Iterator[int]:
    """Run the documents through the model, rounding each linear just before its product; yield each layer once it is rounded.

    One layer at a time is held beside the hidden states of all documents, in fp32.
    """
    blocks = [_block(base, layer) for layer in range(base.config.num_layers)]
    embedding = base.dense(EMBEDDING)
    norm = final_norm_weight(base.dense(FINAL_NORM), base.config)
    model = Llama(base.config, embedding, blocks, norm, embedding, torch.float32)
    names = {linear: linear_weight(block.layer, name) for block in blocks for name, linear in block.linears().items()}

    def watch(linears: Sequence[AnyLinear], x: Tensor) -> None:
        feedback = functools.cache(lambda: Feedback.of(x))
        for linear in linears:
            linear.weight = round_linear(names[linear], feedback)

    ids, positions, segments = packed(documents)
    for block, _ in Runner(model).layers(ids, positions, segments, watch=watch):
        for linear in block.linears().values():
            base.release(names[linear])
            linear.weight = torch.empty(0)  # this layer is done: free what it was rounded to
        yield block.layer


def packed(documents: Documents) -> tuple[Tensor, Tensor, list[Segment]]:
    """Put documents side by side; return token ids (N,), positions (N,) and each document's segment."""
    segments, end = [], 0
    for document in documents:
        segments.append(Segment.packed(end, end + len(document)))
        end += len(document)
    ids = torch.tensor([token for document in documents for token in document])
    return ids, torch.cat([torch.arange(segment.q_end - segment.q_start) for segment in segments]), segments


def _block(base: Checkpoint, layer: int) -> Block:
    """Return a block with fp32 norms and biases; its linears are the base's until rounded ones replace them."""
    tensors: dict[str, Weight] = {
        name: _in_fp32(name, weight, base.config) for name, weight in base.block_tensors(layer).items()
    }
    return Block(base.config, layer, tensors)


def _in_fp32(name: str, weight: Weight, config: LlamaConfig) -> Weight:
    """Return a norm or a bias in fp32, a linear as it is."""
    if not isinstance(weight, Tensor) or is_linear(name):
        return weight
    return norm_weight(weight, config) if name.endswith("norm.weight") else weight.float()


def rounding_numbers(config: LlamaConfig, tokens: int, copies: int) -> int:
    """Return the fp32 numbers that rounding with feedback holds: `copies` of the largest linear, activations and moments."""
    widths = config.hidden_size + 2 * config.intermediate_size + (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    moments = MOMENTS * max(config.hidden_size, config.intermediate_size) ** 2
    largest = max(rows * columns for rows, columns in config.linear_shapes().values())
    return copies * largest + tokens * widths + moments
