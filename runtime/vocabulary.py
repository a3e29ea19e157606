"""Look up the embedding and multiply by the head, both (V, D): dense or left in their file, the head also in 8 bits or NF4.

The head's products are computed in panels of rows, so that a quantised head is never dense as a whole and a head in a file
is never in memory as a whole. The 8-bit form is int8.py's, 8 + 32/D bits a number; NF4 is nf4.py's, 4.127 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO

import torch
from torch import Tensor

from edgetune.runtime import nf4, ops
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.files import read_at
from edgetune.runtime.int8 import PANEL_ROWS, Int8Rows
from edgetune.runtime.nf4 import QuantizedTensor, QuantState
from edgetune.runtime.ops_types import FEW_ROWS, Adapted

KINDS = ("int8", "nf4")
"""The forms that a dense head can be quantised to."""
FILE = "file"
"""The kind of a head that is left in its file, not quantised."""
MPS_TERMS = 16384
"""Most terms that a product on MPS sums over (half the limit of 32,767).

From 32,767 terms on, M1 and M2 also add what lies behind the matrices in memory, and torch before 2.14 does not prevent it
(pytorch#183535, #195163). Only the backward of the head sums over so many.
"""


@dataclass(frozen=True, eq=False)
class StoredRows:
    """A dense weight (V, D) that stays in `file` from byte `start` on. Only the rows that are read take memory."""

    file: FileIO
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device

    nbytes = 0

    def read(self, first: int, out: Tensor) -> None:
        """Fill `out` (n, D), of the stored dtype on the CPU, with rows from `first` on. Raises ModelError if that fails."""
        width = self.shape[1] * self.dtype.itemsize
        try:
            read_at(self.file, out.view(torch.uint8).numpy().data.cast("B"), self.start + first * width)
        except OSError as error:
            raise ModelError(
                f"{self.file.name} can no longer be read: {error.strerror}; copy the model folder again."
            ) from error

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of ids (N,) as (N, D) in the stored dtype, on the compute device.

        Raises IndexError for an id outside the vocabulary.
        """
        wanted = ids.tolist()
        if wanted and not 0 <= min(wanted) <= max(wanted) < self.shape[0]:
            raise IndexError(f"ids lie between {min(wanted)} and {max(wanted)}; expected 0 to {self.shape[0] - 1}")
        found = torch.empty(len(wanted), self.shape[1], dtype=self.dtype)
        for number, row in enumerate(wanted):
            self.read(row, found[number : number + 1])
        return found.to(self.device)


Embedding = Tensor | StoredRows
Head = Embedding | QuantizedTensor | Int8Rows


def fits_nf4_blocks(columns: int) -> bool:
    """Return True if rows of this many columns are whole NF4 blocks.

    A head whose blocks cross rows would be dequantised as a whole for every product.
    """
    return columns % QuantConfig().block_size == 0


def quantize(weight: Tensor, kind: str) -> QuantizedTensor | Int8Rows:
    """Quantise a dense head or linear (V, D) to one of KINDS.

    Raises ValueError for any other kind, and for inf and NaN among the values.
    """
    if kind not in KINDS:
        raise ValueError(f"a head of kind {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "nf4":
        config = QuantConfig()
        return nf4.quantize(weight, config.quant_type, config.block_size, config.double_quant)
    quantized = ops.int8_rows(weight)
    if not torch.isfinite(quantized.scale).all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds inf or NaN")
    return quantized


def rows(embedding: Embedding, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows of ids (N,) as (N, D) in `dtype`."""
    if isinstance(embedding, StoredRows):
        return embedding.rows(ids).to(dtype)
    return torch.nn.functional.embedding(ids, embedding).to(dtype)


def logits(x: Tensor, head: Head) -> Tensor:
    """Multiply x (N, D) by the head's transpose; return logits (N, V)."""
    if isinstance(head, Tensor):
        return x @ head.T
    if isinstance(head, QuantizedTensor) and len(x) <= FEW_ROWS:
        return ops.matvec(x, head)
    if isinstance(head, Int8Rows) and len(x) <= FEW_ROWS and (few := ops.int8_matvec(x, head)) is not None:
        return few
    out = x.new_empty(len(x), head.shape[0])
    if isinstance(head, QuantizedTensor) and ops.project(x, [Adapted(head)], out) is not None:
        return out
    for part, panel, scale in _panels(head, x.dtype):
        ops.product_into(out[:, part], x, panel.T)
        if scale is not None:
            out[:, part] *= scale
    return out


def input_gradient(dlogits: Tensor, head: Head) -> Tensor:
    """Multiply dlogits (N, V) by the head; return the gradient of its input, (N, D)."""
    count, width = len(dlogits), head.shape[1]
    if isinstance(head, Tensor) and (dlogits.device.type != "mps" or len(head) <= MPS_TERMS):
        return dlogits @ head
    if isinstance(head, QuantizedTensor):
        no_x, no_adapter = dlogits.new_empty(count, width), dlogits.new_empty(count, 0)
        dx = ops.project_backward(dlogits, no_x, no_adapter, [Adapted(head)], [])
        if dx is not None:
            return dx
    total = torch.zeros(count, width, dtype=torch.float32, device=dlogits.device)
    for part, panel, scale in _panels(head, dlogits.dtype):
        dy = dlogits[:, part]
        total += (dy if scale is None else (dy * scale).to(dy.dtype)) @ panel
    return total.to(dlogits.dtype)


def _panels(head: Head, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield (rows, their weights (n, D) with n up to PANEL_ROWS, a scale (n,) to multiply the products by or None)."""
    count, width = head.shape
    height = MPS_TERMS if isinstance(head, Tensor) else PANEL_ROWS
    if isinstance(head, QuantizedTensor) and width % head.state.block_size:  # blocks cross rows: one panel of all
        height = count
    parts = [slice(start, min(start + height, count)) for start in range(0, count, height)]
    if isinstance(head, Tensor):
        yield from ((part, head[part], None) for part in parts)
    elif isinstance(head, QuantizedTensor):
        yield from ((part, ops.dequantize(_nf4_rows(head, part), dtype), None) for part in parts)
    elif isinstance(head, StoredRows):
        buffer = torch.empty(min(height, count), width, dtype=head.dtype)
        for part in parts:
            head.read(part.start, buffer[: part.stop - part.start])
            yield part, buffer[: part.stop - part.start].to(head.device, dtype), None
    else:
        panel = torch.empty(min(height, count), width, dtype=dtype, device=head.device)
        for part in parts:  # codes are exact in bf16; scaling the products costs less than scaling the weights
            yield part, panel[: part.stop - part.start].copy_(head.codes[part]), head.scale[part, 0]


def _nf4_rows(head: QuantizedTensor, part: slice) -> QuantizedTensor:
    """Return some rows of whole blocks, or all rows, as an NF4 weight that dequantises to the same bits."""
    (count, width), state = head.shape, head.state
    if part == slice(0, count):
        return head
    first, last = part.start * width // state.block_size, part.stop * width // state.block_size
    absmax = state.absmax[first:last]
    if state.nested is not None:
        nested = state.nested
        places = torch.arange(first, last, device=head.device)
        absmax = nested.table[absmax.int()] * nested.absmax[places // nested.block_size] + nested.offset
    rows_state = QuantState(absmax, (part.stop - part.start, width), state.dtype, state.block_size, state.quant_type)
    return QuantizedTensor(head.packed[part.start * width // 2 : part.stop * width // 2], rows_state)
