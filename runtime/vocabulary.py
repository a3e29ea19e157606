"""The embedding and the head, (V, D) each: dense or left in their file; the head also in 8 bits or NF4. A head's products are
made in panels of rows, so that a quantised one is never dense as a whole, and one in a file never in memory.

8-bit is int8.py's: 8 + 32/D bits a number. NF4 is nf4.py's: 4.127 bits.
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
"""What a dense head can be quantised to."""
FILE = "file"
"""The kind of a head that is not quantised but stays in its file."""
MPS_TERMS = 16384
"""Terms of a product's sums on MPS, at most: M1 and M2 add what lies behind the matrices from 32,767 on, and torch before
2.14 lets them (pytorch#183535, #195163). Of all products only the head's backward has so many."""


@dataclass(frozen=True, eq=False)
class StoredRows:
    """A dense weight whose numbers stay in `file`, the first at byte `start`: what is read of it takes memory, no more."""

    file: FileIO
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device

    nbytes = 0

    def read(self, first: int, out: Tensor) -> None:
        """Fill `out` (n, D), of our dtype on the CPU, with rows from `first` on. Raises ModelError where the file is gone."""
        width = self.shape[1] * self.dtype.itemsize
        try:
            read_at(self.file, out.view(torch.uint8).numpy().data.cast("B"), self.start + first * width)
        except OSError as error:
            raise ModelError(
                f"{self.file.name} cannot be read any more: {error.strerror}; copy the model folder again."
            ) from error

    def rows(self, ids: Tensor) -> Tensor:
        """ids (N,) -> (N, D) in our dtype, on the compute device."""
        wanted = ids.tolist()
        if wanted and not 0 <= min(wanted) <= max(wanted) < self.shape[0]:
            raise IndexError(f"ids lie between {min(wanted)} and {max(wanted)}; expected 0 to {self.shape[0] - 1}")
        found = torch.empty(len(wanted), self.shape[1], dtype=self.dtype)
        for number, row in enumerate(wanted):
            self.read(row, found[number : number + 1])
        return found.to(self.device)


Embedding = Tensor | StoredRows
Head = Embedding | QuantizedTensor | Int8Rows


def has_nf4(columns: int) -> bool:
    """Whether rows of so many numbers end with NF4's blocks; such as do not would be looked up and multiplied as a whole."""
    return columns % QuantConfig().block_size == 0


def quantize(weight: Tensor, kind: str) -> QuantizedTensor | Int8Rows:
    """A dense head (V, D) in one of KINDS. In NF4 it is made dense as a whole for products where blocks cross rows (`has_nf4`).

    Raises ValueError for inf and NaN.
    """
    if kind not in KINDS:
        raise ValueError(f"a head of kind {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "nf4":
        config = QuantConfig()
        return nf4.quantize(weight, config.quant_type, config.block_size, config.double_quant)
    small = ops.int8_rows(weight)
    if not torch.isfinite(small.scale).all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds inf or NaN")
    return small


def rows(embedding: Embedding, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """ids (N,) -> their rows (N, D) in `dtype`."""
    if isinstance(embedding, StoredRows):
        return embedding.rows(ids).to(dtype)
    return torch.nn.functional.embedding(ids, embedding).to(dtype)


def logits(x: Tensor, head: Head) -> Tensor:
    """x (N, D) -> x W^T (N, V)."""
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
    """dlogits (N, V) -> dlogits W (N, D)."""
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
    """(which rows, their numbers (up to PANEL_ROWS, D), and what each row is still to be multiplied by, or None)."""
    count, width = head.shape
    height = MPS_TERMS if isinstance(head, Tensor) else PANEL_ROWS
    if isinstance(head, QuantizedTensor) and width % head.state.block_size:  # blocks cross rows
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
        for part in parts:  # codes are exact in bf16; the products are scaled, which are fewer than the weights
            yield part, panel[: part.stop - part.start].copy_(head.codes[part]), head.scale[part, 0]


def _nf4_rows(head: QuantizedTensor, part: slice) -> QuantizedTensor:
    """All rows, or some of whole blocks, as an NF4 weight of their own, of which dequantisation gives the same bits."""
    (count, width), state = head.shape, head.state
    if part == slice(0, count):
        return head
    first, last = part.start * width // state.block_size, part.stop * width // state.block_size
    absmax = state.absmax[first:last]
    if state.nested is not None:
        nested = state.nested
        places = torch.arange(first, last, device=head.device)
        absmax = nested.table[absmax.int()] * nested.absmax[places // nested.block_size] + nested.offset
    own = QuantState(absmax, (part.stop - part.start, width), state.dtype, state.block_size, state.quant_type)
    return QuantizedTensor(head.packed[part.start * width // 2 : part.stop * width // 2], own)
