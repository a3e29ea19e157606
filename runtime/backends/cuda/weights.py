"""4-bit weights on a card: dequantised as a whole, or multiplied with a few rows as they are.

Shapes: W (out, in) in blocks of block_size; x (n, in). A wrong call raises ValueError before a kernel sees a pointer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from edgetune.runtime.backends import reference
from edgetune.runtime.backends.cuda import kernels
from edgetune.runtime.nf4 import QuantizedTensor, code_table

PROGRAM_BYTES = 1024
"""Packed bytes that a program of `dequantize` unpacks: 8 for each of its 128 threads."""
ROW_BYTES = 512
"""Packed bytes of a row of W that a program of `matvec` holds at a time. This and the next two were chosen by counting
instructions of the compiled kernels; tests/benchmarks/cuda.py times other values on a card."""
ROWS = 2
"""Rows of W, that is outputs, that a program of `matvec` computes."""
WARPS = 1
"""Warps of a program of `matvec`: a single warp needs no barriers."""


@functools.cache
def _table(quant_type: str, device: torch.device) -> Tensor:
    """Return nf4.py's table (16,) f32, copied to each device once."""
    return code_table(quant_type).to(device)


def _is_power(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


def takes(quantized: QuantizedTensor) -> bool:
    """Return True if the kernels take this weight: blocks (of both levels) of a power of two, as in every known checkpoint."""
    nested = quantized.state.nested
    return quantized.state.block_size >= 2 and all(
        _is_power(size) for size in (quantized.state.block_size, *([] if nested is None else [nested.block_size]))
    )


def takes_rows(quantized: QuantizedTensor) -> bool:
    """Return True if `matvec` has a kernel for this weight: its rows must be whole blocks."""
    return takes(quantized) and quantized.shape[1] % quantized.state.block_size == 0


def _scales(quantized: QuantizedTensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a weight's arguments of both kernels: (packed, table, absmax, nested table, nested absmax, offset), constants."""
    state, nested = quantized.state, quantized.state.nested
    blocks = -(-quantized.numel // state.block_size)
    expected = [(quantized.packed, (quantized.numel + 1) // 2, torch.uint8)]
    if nested is None:
        expected += [(state.absmax, blocks, torch.float32)]
    else:
        expected += [(state.absmax, blocks, torch.uint8), (nested.table, 256, torch.float32)]
        expected += [(nested.absmax, -(-blocks // nested.block_size), torch.float32)]
    for tensor, count, dtype in expected:
        fits = tensor.numel() == count and tensor.dtype == dtype and tensor.device == quantized.device
        if not (fits and tensor.is_contiguous()):
            found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"a part of a weight is {found}; expected {count} contiguous {dtype} on {quantized.device}")
    second = (None, None, 0.0) if nested is None else (nested.table, nested.absmax, nested.offset)
    tensors = (quantized.packed, _table(state.quant_type, quantized.device), state.absmax, *second)
    return tensors, {"NESTED": nested is not None, "NESTED_SIZE": 1 if nested is None else nested.block_size}


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return the dense weight (out_features, in_features) in f32, bf16 or f16, written into `out` where given.

    The bits are those of nf4.dequantize.
    """
    if not takes(quantized):
        return reference.dequantize(quantized, dtype, out)
    if out is None:
        out = torch.empty(quantized.shape, dtype=dtype, device=quantized.device)
    if out.numel() != quantized.numel or not out.is_contiguous() or out.device != quantized.device:
        raise ValueError(f"out is {tuple(out.shape)} on {out.device}; expected contiguous {quantized.shape}")
    tensors, nested = _scales(quantized)
    half = quantized.state.block_size // 2
    blocks, at_once = -(-quantized.numel // quantized.state.block_size), max(PROGRAM_BYTES // half, 1)
    kernels.dequantize[(triton.cdiv(blocks, at_once),)](
        *tensors, out, quantized.numel, blocks, **nested, HALF=half, BLOCKS=at_once, enable_fp_fusion=False
    )
    return out


def matvec(x: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Multiply x (n, in) f32 or bf16, a few rows, by W^T; return (n, out) in x's dtype. W is never dense and never rounded."""
    if not takes_rows(quantized):
        return x @ dequantize(quantized, x.dtype).T
    out = torch.empty(x.shape[0], quantized.shape[0], dtype=x.dtype, device=x.device)
    multiply(x, quantized, out)
    return out


def multiply(
    x: Tensor,
    quantized: QuantizedTensor,
    out: Tensor,
    bias: Tensor | None = None,
    reduced: Tensor | None = None,
    lora_b: Tensor | None = None,
    add: bool = False,
) -> None:
    """Write x (n, in) W^T, plus bias (out,), plus reduced (n, r) lora_b (out, r)^T into out (n, out), in one launch.

    add: add all that to the old values of out. The weight must satisfy `takes_rows`. The rows of x, out and reduced may have
    gaps between them; lora_b is contiguous.
    """
    rows, width = quantized.shape
    fits = x.shape == (out.shape[0], width) and out.shape[1] == rows and x.device == out.device == quantized.device
    if not (fits and x.stride(1) == out.stride(1) == 1):
        raise ValueError(f"x is {tuple(x.shape)}, out {tuple(out.shape)}; expected rows of a weight {quantized.shape}")
    if bias is not None and (bias.shape != (rows,) or not bias.is_contiguous()):
        raise ValueError(f"bias is {tuple(bias.shape)}; expected ({rows},)")
    rank = 0 if lora_b is None else lora_b.shape[1]
    if lora_b is not None and (reduced is None or reduced.shape != (len(x), rank) or lora_b.shape[0] != rows):
        raise ValueError(f"lora_b is {tuple(lora_b.shape)}; expected ({rows}, r), and reduced to be ({len(x)}, r)")
    tensors, nested = _scales(quantized)
    half = quantized.state.block_size // 2
    kernels.matvec[(len(x) * triton.cdiv(rows, ROWS),)](
        x, *tensors, out, bias, reduced, lora_b, len(x), rows, width, rank, x.stride(0), out.stride(0),
        0 if reduced is None else reduced.stride(0), BIAS=bias is not None, ADD=add,
        RANK_TILE=triton.next_power_of_2(rank) if rank else 0, **nested,
        HALF=half, BLOCKS=max(ROW_BYTES // half, 1), ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
