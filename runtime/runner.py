"""Run the blocks of a model: the only loop over blocks, forward and backward.

Paging of weights, recomputation (gradient checkpointing) and offload of activations meet here and nowhere else. Each block is
a small autograd graph of its own, so that the tensors it saved are freed as soon as its gradients are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime.batch import Batch
from edgetune.runtime.device import end_command_buffer
from edgetune.runtime.files import explain_full_disk, read_at, scratch_file, write_at
from edgetune.runtime.loss import chunked_loss, nats_and_hits, token_nats
from edgetune.runtime.model import Block, Context, KVCache, Llama
from edgetune.runtime.ops_types import FEW_ROWS, Segment
from edgetune.runtime.project import Panel, ProjectPlan, Watch


class Recompute(StrEnum):
    """The activations that the backward recomputes instead of saving them.

    FLOPs per token for N weights: 4N (none), 4N (selective), 5.5N (full).
    """

    NONE = "none"  # no activation
    SELECTIVE = "selective"  # the outputs of norms and SwiGLU: elementwise, so nearly free
    FULL = "full"  # everything but the block's input; the last product is skipped, since nobody reads its value


LOSS_ROWS = 256
"""Rows of logits that exist at a time, by default; chosen by hand."""
ROW_MULTIPLE = 256
"""Tokens of a batch are padded to a multiple of this; chosen by hand. oneDNN compiles and keeps code for every shape it meets:
batches of every length would cost a compilation at each step, and memory would grow."""


@dataclass(frozen=True)
class _Offloaded:
    """A tensor that is in an Offload's file, at byte `start`."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Offload:
    """A scratch file in `folder` that holds the blocks' inputs instead of memory."""

    def __init__(self, folder: Path) -> None:
        self._file, self._folder = scratch_file(folder), folder

    def put(self, number: int, h: Tensor) -> _Offloaded:
        """Write the input h (N, D) of block `number`; the inputs of one batch all have the same size."""
        offloaded = _Offloaded(number * h.nbytes, h.shape, h.dtype, h.device)
        with explain_full_disk(self._folder):
            write_at(self._file, h.cpu().contiguous().view(torch.uint8).numpy().data.cast("B"), offloaded.start)
        return offloaded

    def get(self, offloaded: _Offloaded) -> Tensor:
        """Read an input back to its device."""
        h = torch.empty(offloaded.shape, dtype=offloaded.dtype)
        read_at(self._file, h.view(torch.uint8).numpy().data.cast("B"), offloaded.start)
        return h.to(offloaded.device)


@dataclass(frozen=True)
class _Pass:
    """One block's forward, kept for its backward: both ends of its graph, or the input alone if it is to be recomputed."""

    block: Block
    input: Tensor | _Offloaded
    output: Tensor | None


class _Seeded(torch.autograd.Function):
    """A scalar whose backward gives `output` (N, D) the gradient `dh` (N, D).

    torch.autograd.backward(output, dh) would do the same, but imports sympy to compare the shapes. That takes 40 MB, in the
    middle of the first step, where thousands of small allocations land between the step's tensors and leave 100 MB of holes.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, dh: Tensor) -> Tensor:
        ctx.dh = dh
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.dh, None


def warm_up_autograd() -> None:
    """Run a first backward, so that modules which torch imports in it (2.15: four) do not fragment the heap in mid-step."""
    torch.zeros((), requires_grad=True).backward()


class Runner:
    """The loop over a model's blocks. A model has one runner, which owns the panel that weights are dequantised into.

    offload: a folder for the blocks' inputs; needs full recomputation. int8: `train` computes large products in 8 bits where
    ops.project can.
    """

    def __init__(
        self,
        model: Llama,
        recompute: Recompute = Recompute.FULL,
        loss_rows: int = LOSS_ROWS,
        offload: Path | None = None,
        int8: bool = False,
    ) -> None:
        if offload is not None and recompute is not Recompute.FULL:
            raise ValueError(f"recompute is {recompute}; expected full, since only the blocks' inputs are offloaded")
        self.model, self.recompute, self.loss_rows, self.int8 = model, recompute, loss_rows, int8
        self.panel = Panel()
        self.between_blocks: Callable[[], None] = lambda: None
        """Called before each block, forward and backward. It may raise to end the pass."""
        self.check: Callable[[], None] = lambda: None
        """Called before each product of a block and each chunk of the loss. It may raise to end the pass."""
        self.offload = None if offload is None else Offload(offload)

    def train(
        self, batch: Batch, dropout_key: int | None = None, divisor: float = 1.0, row_multiple: int = ROW_MULTIPLE
    ) -> Tensor:
        """Run one batch forward and backward, adding to each adapter's .grad; return its summed loss over `divisor`, () f32.

        dropout_key: 32 bits made of seed, step and micro-batch, from which dropout follows; None switches dropout off.
        divisor: trained tokens of the whole step, so that each weighs the same whichever micro-batch it is in.
        row_multiple: the batch is padded to a multiple of so many tokens.
        """
        batch = batch.padded(row_multiple).to(self.model.device)
        ctx = self._context(batch.positions, batch.segments, None)
        ctx = replace(ctx, plan=replace(ctx.plan, int8=self.int8))
        layers, pager = range(len(self.model.blocks)), self.model.pager
        pager.expect([*layers, *reversed(layers)])
        h, passes = self.model.embed(batch.input_ids), []
        for block in self.model.blocks:
            self.between_blocks()
            with pager.layer(block.layer):
                done, h = self._forward(block, h, self._layer_context(ctx, block, dropout_key))
            passes.append(done)
            end_command_buffer(h.device)
        # Nothing but `passes` may hold a block's tensors from here on, or they would outlive its backward.
        del done
        weights = batch.loss_mask / divisor
        loss, dh = chunked_loss(self.model, h, batch.targets, weights, self.loss_rows, batch.soft, self.check)
        del h
        while passes:
            self.between_blocks()
            done = passes.pop()
            with pager.layer(done.block.layer):
                dh = self._backward(done, dh, self._layer_context(ctx, done.block, dropout_key))
            end_command_buffer(dh.device)
        return loss

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """Return the loss in nats, (N,) f32, of each target that carries loss; 0 elsewhere."""
        n, batch = len(batch.input_ids), batch.padded(ROW_MULTIPLE).to(self.model.device)
        h = self.infer(batch.input_ids, batch.positions, batch.segments, None)
        return token_nats(self.model, h, batch.targets, batch.loss_mask, self.loss_rows, self.check)[:n]

    @torch.no_grad()
    def score_and_hits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what `score` returns, and (N,) bool: True for each target that greedy decoding would write there."""
        n, batch = len(batch.input_ids), batch.padded(ROW_MULTIPLE).to(self.model.device)
        h = self.infer(batch.input_ids, batch.positions, batch.segments, None)
        nats, hits = nats_and_hits(self.model, h, batch.targets, batch.loss_mask, self.loss_rows, self.check)
        return nats[:n], hits[:n]

    @torch.no_grad()
    def score_versions(self, batches: Sequence[Batch], layers: Iterable[Sequence[Block]], versions: int) -> list[list[Tensor]]:
        """Return what `score` returns for each batch, by version: each version has blocks of its own in place of the model's.

        layers: one block of each version, layer by layer. All batches pass through a layer before the next one is taken, so of
        the layers that a generator makes only one need be in memory. Embedding, final norm and head are the model's.
        """
        padded = [batch.padded(ROW_MULTIPLE).to(self.model.device) for batch in batches]
        states = [[self.model.embed(batch.input_ids) for batch in padded] for _ in range(versions)]  # h (N, D) of each
        for blocks in layers:
            for block, states_of_version in zip(blocks, states, strict=True):
                for number, batch in enumerate(padded):
                    self.between_blocks()
                    ctx = self._context(batch.positions, batch.segments, None)
                    states_of_version[number] = block(states_of_version[number], ctx)
                    end_command_buffer(self.model.device)
            del block, blocks  # or this layer would be in memory while the next one is read
        return [
            [
                token_nats(self.model, h, batch.targets, batch.loss_mask, self.loss_rows, self.check)[: len(original.input_ids)]
                for h, batch, original in zip(states_of_version, padded, batches, strict=True)
            ]
            for states_of_version in states
        ]

    def read(self, ids: Sequence[int]) -> Tensor:
        """Run one sequence of token ids from its beginning, without a cache; return the last block's output (N, D)."""
        n, device = len(ids), self.model.device
        return self.infer(torch.tensor(list(ids), device=device), torch.arange(n, device=device), [Segment.packed(0, n)], None)

    @torch.no_grad()
    def infer(self, input_ids: Tensor, positions: Tensor, segments: Sequence[Segment], cache: KVCache | None) -> Tensor:
        """Run tokens (N,) through all blocks; return the last block's output (N, D).

        Keys and values are appended to `cache` where one is given.
        """
        h = torch.empty(0)
        for _, h in self.layers(input_ids, positions, segments, cache):  # noqa: B007
            pass
        return h

    @torch.no_grad()
    def layers(
        self,
        input_ids: Tensor,
        positions: Tensor,
        segments: Sequence[Segment],
        cache: KVCache | None = None,
        watch: Watch | None = None,
    ) -> Iterator[tuple[Block, Tensor]]:
        """Run tokens (N,) through the blocks; yield each one with its output (N, D).

        watch: receives the linears and the input of each product before it is computed, and may replace their weights.
        """
        ctx = self._context(positions, segments, cache)
        ctx = replace(ctx, plan=replace(ctx.plan, watch=watch))
        self.model.pager.expect(range(len(self.model.blocks)))
        h = self.model.embed(input_ids)
        for block in self.model.blocks:
            self.between_blocks()
            with self.model.pager.layer(block.layer):
                h = block(h, ctx)
            if len(h) > FEW_ROWS:  # a few tokens fit one command buffer for all blocks
                end_command_buffer(h.device)
            yield block, h
        if cache is not None:
            cache.length += len(input_ids)

    def _context(self, positions: Tensor, segments: Sequence[Segment], cache: KVCache | None) -> Context:
        rotations = self.model.rotations(positions)
        plan = ProjectPlan(self.panel, save_input=self.recompute is Recompute.NONE, check=self.check)
        return Context(rotations, segments, plan, cache)

    @staticmethod
    def _layer_context(ctx: Context, block: Block, dropout_key: int | None) -> Context:
        """Return the context with this layer's own dropout keys: consecutive numbers, eight a layer for its seven linears."""
        if dropout_key is None:
            return ctx
        # Multiplying by 2^32 / golden ratio (Knuth's multiplicative hash) spreads the keys of neighbouring steps apart.
        key = (dropout_key * 0x9E3779B1 + block.layer * 8) & 0xFFFFFFFF
        return replace(ctx, plan=replace(ctx.plan, dropout_key=key))

    def _forward(self, block: Block, h: Tensor, ctx: Context) -> tuple[_Pass, Tensor]:
        """Run one block on h (N, D); return the record that its backward needs, and the block's output (N, D)."""
        if self.recompute is Recompute.FULL:
            saved = h if self.offload is None else self.offload.put(block.layer, h)
            with torch.no_grad():
                return _Pass(block, saved, None), block(h, ctx)
        # Detached at both ends, so that the graph spans this block alone and is freed with its own backward.
        entry = h.detach().requires_grad_()
        with torch.enable_grad():
            output = block(entry, ctx)
        return _Pass(block, entry, output), output.detach()

    def _backward(self, done: _Pass, dh: Tensor, ctx: Context) -> Tensor:
        """Return the gradient (N, D) of a block's input, given dh (N, D) of its output, and add to the adapters' gradients."""
        entry, output = done.input, done.output
        if isinstance(entry, _Offloaded):
            assert self.offload is not None
            entry = self.offload.get(entry)
        if output is None:
            # Run the block again, now with a graph. Its dropout hashes the same key, so it drops the same positions; values
            # that no backward needs (the last product) are not computed.
            entry = entry.detach().requires_grad_()
            with torch.enable_grad():
                output = done.block(entry, replace(ctx, plan=replace(ctx.plan, values=False)))
        _Seeded.apply(output, dh).backward()
        assert entry.grad is not None
        return entry.grad
