"""Sole owner of the loop over blocks: forward, and in backward recompute by policy, differentiate, release.

Paging, recomputation and activation offload meet here and nowhere else. Each block is a small autograd graph of its own, so
that what it saved is freed as soon as its gradients are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime.batch import Batch
from edgetune.runtime.device import end_command_buffer
from edgetune.runtime.files import explain_full_disk, read_at, scratch_file, write_at
from edgetune.runtime.loss import chunked_cross_entropy, token_nats
from edgetune.runtime.model import Block, Context, KVCache, Llama
from edgetune.runtime.ops_types import FEW_ROWS, Segment
from edgetune.runtime.project import Panel, ProjectPlan


class Recompute(StrEnum):
    """What the backward computes again instead of finding it saved. FLOPs a token of N weights: 4N, 4N, 5.5N."""

    NONE = "none"  # nothing
    SELECTIVE = "selective"  # norms and SwiGLU products: elementwise, so nearly free
    FULL = "full"  # everything but the block's input; its last product, whose value nobody reads, is left out


LOSS_ROWS = 256
"""Rows of logits that exist at once."""
ROW_MULTIPLE = 256
"""Rows are padded to a multiple of this: oneDNN compiles and keeps code for every shape it meets, so that rows of every
length would cost a compilation a step and let memory creep."""


@dataclass(frozen=True)
class _Away:
    """A tensor that lies in an Offload."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Offload:
    """Keeps the blocks' inputs in a nameless private file of `folder` instead of in memory."""

    def __init__(self, folder: Path) -> None:
        self._file, self._folder = scratch_file(folder), folder

    def put(self, number: int, h: Tensor) -> _Away:
        """Write the input (N, D) of block `number`; all inputs of a row have one size."""
        away = _Away(number * h.nbytes, h.shape, h.dtype, h.device)
        with explain_full_disk(self._folder):
            write_at(self._file, h.cpu().contiguous().view(torch.uint8).numpy().data.cast("B"), away.start)
        return away

    def get(self, away: _Away) -> Tensor:
        """Read it back."""
        h = torch.empty(away.shape, dtype=away.dtype)
        read_at(self._file, h.view(torch.uint8).numpy().data.cast("B"), away.start)
        return h.to(away.device)


@dataclass(frozen=True)
class _Pass:
    """One block's forward, kept for its backward: the graph's ends, or the input alone when it is to be run again."""

    block: Block
    entered: Tensor | _Away
    left: Tensor | None


class _Seeded(torch.autograd.Function):
    """A number whose backward gives `left` (T, d) the gradient `dh` (T, d).

    torch.autograd.backward(left, dh) would do so too, but to compare the shapes it imports sympy: 40 MB, and in the middle of
    the first step, where its thousands of small pieces end up between the heap's tensors and leave holes of 100 MB.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, dh: Tensor) -> Tensor:
        ctx.dh = dh
        return left.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.dh, None


class Runner:
    """Runs a model's blocks. One runner a model: it owns the panel that weights are dequantised into.

    offload: a folder for the blocks' inputs, where every block is recomputed from its own. int8: `train` makes its large
    products in 8 bits where ops.project can.
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
            raise ValueError(f"recompute is {recompute}; only full recomputation leaves nothing but inputs to offload")
        self.model, self.recompute, self.loss_rows, self.int8 = model, recompute, loss_rows, int8
        self.panel = Panel()
        self.offload = None if offload is None else Offload(offload)

    def train(self, batch: Batch, dropout_key: int | None = None, divisor: float = 1.0) -> Tensor:
        """Run one batch forward and backward, adding to each adapter's .grad; return its summed loss over `divisor`, () f32.

        dropout_key: 32 bits made of seed, step and micro-batch, from which dropout follows; None switches dropout off.
        divisor: trained tokens of the whole step, so that each weighs the same whichever micro-batch it is in.
        """
        batch = batch.padded(ROW_MULTIPLE).to(self.model.device)
        ctx = self._context(batch.positions, batch.segments, None)
        ctx = replace(ctx, plan=replace(ctx.plan, int8=self.int8))
        layers, pager = range(len(self.model.blocks)), self.model.pager
        pager.expect([*layers, *reversed(layers)])
        h, passes = self.model.embed(batch.input_ids), []
        for block in self.model.blocks:
            with pager.layer(block.layer):
                done, h = self._enter(block, h, self._of_layer(ctx, block, dropout_key))
            passes.append(done)
            end_command_buffer(h.device)
        del done
        loss, dh = chunked_cross_entropy(self.model, h, batch.targets, batch.loss_mask / divisor, self.loss_rows)
        del h
        while passes:
            done = passes.pop()
            with pager.layer(done.block.layer):
                dh = self._leave(done, dh, self._of_layer(ctx, done.block, dropout_key))
            end_command_buffer(dh.device)
        return loss

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """Return the loss in nats, (N,) f32, of each target that carries loss; 0 elsewhere."""
        n, batch = len(batch.input_ids), batch.padded(ROW_MULTIPLE).to(self.model.device)
        h = self.infer(batch.input_ids, batch.positions, batch.segments, None)
        return token_nats(self.model, h, batch.targets, batch.loss_mask, self.loss_rows)[:n]

    def read(self, ids: Sequence[int]) -> Tensor:
        """Last block's h (N, D) of one sequence of token ids, from its beginning and without a cache."""
        n, device = len(ids), self.model.device
        return self.infer(torch.tensor(list(ids), device=device), torch.arange(n, device=device), [Segment.packed(0, n)], None)

    @torch.no_grad()
    def infer(self, input_ids: Tensor, positions: Tensor, segments: Sequence[Segment], cache: KVCache | None) -> Tensor:
        """Last block's h (N, D), storing keys and values in `cache` where given."""
        ctx = self._context(positions, segments, cache)
        self.model.pager.expect(range(len(self.model.blocks)))
        h = self.model.embed(input_ids)
        for block in self.model.blocks:
            with self.model.pager.layer(block.layer):
                h = block(h, ctx)
            if len(h) > FEW_ROWS:  # a few tokens through all blocks are short enough
                end_command_buffer(h.device)
        if cache is not None:
            cache.length += len(input_ids)
        return h

    def _context(self, positions: Tensor, segments: Sequence[Segment], cache: KVCache | None) -> Context:
        cos, sin = self.model.rope(positions)
        plan = ProjectPlan(self.panel, save_input=self.recompute is Recompute.NONE)
        return Context(cos, sin, segments, plan, cache)

    @staticmethod
    def _of_layer(ctx: Context, block: Block, dropout_key: int | None) -> Context:
        """The context with this layer's own dropout keys: seven linears, eight keys a layer."""
        if dropout_key is None:
            return ctx
        key = (dropout_key * 0x9E3779B1 + block.layer * 8) & 0xFFFFFFFF
        return replace(ctx, plan=replace(ctx.plan, dropout_key=key))

    def _enter(self, block: Block, h: Tensor, ctx: Context) -> tuple[_Pass, Tensor]:
        if self.recompute is Recompute.FULL:
            kept = h if self.offload is None else self.offload.put(block.layer, h)
            with torch.no_grad():
                return _Pass(block, kept, None), block(h, ctx)
        entered = h.detach().requires_grad_()
        with torch.enable_grad():
            left = block(entered, ctx)
        return _Pass(block, entered, left), left.detach()

    def _leave(self, done: _Pass, dh: Tensor, ctx: Context) -> Tensor:
        """Gradient of the block's input; the adapters' gradients are added on the way."""
        entered, left = done.entered, done.left
        if isinstance(entered, _Away):
            assert self.offload is not None
            entered = self.offload.get(entered)
        if left is None:
            entered = entered.detach().requires_grad_()
            with torch.enable_grad():
                left = done.block(entered, replace(ctx, plan=replace(ctx.plan, values=False)))
        _Seeded.apply(left, dh).backward()
        assert entered.grad is not None
        return entered.grad
