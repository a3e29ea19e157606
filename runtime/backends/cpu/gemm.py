"""NF4 linears of many rows, forward and input gradient, by gemm.inl's fused kernels: no dense copy of the weight is made.

They need AMX, and shapes that tiles take; elsewhere these functions return False, nothing is written, and the caller
dequantises. Everything is checked here before a pointer crosses.
"""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from edgetune.runtime.backends.cpu.decode import _Absmax, _aligned, _quantized
from edgetune.runtime.backends.cpu.library import kernel, selected_isa
from edgetune.runtime.nf4 import QuantizedTensor

ISA = "amx"
STRIP = 32  # gemm.inl's SIDE
CHUNK = 64  # gemm.inl's CHUNK

_pointer, _int = ctypes.c_void_p, ctypes.c_int64


class _Call(ctypes.Structure):
    """gemm.inl's Product, field for field."""

    _fields_ = (
        *(("x", _pointer), ("x_row", _int), ("out", _pointer), ("out_row", _int)),
        *(("packed", _pointer), ("codes", _pointer), ("absmax", _Absmax)),
        *((name, _int) for name in ("block_shift", "rows", "outputs", "inputs", "accumulate", "threads")),
        *(("scratch", _pointer), ("scratch_bytes", _int)),
    )


class _Scratch(threading.local):
    """A thread's scratch, kept from call to call: a training step asks for it hundreds of times."""

    memory = torch.empty(0, dtype=torch.uint8)

    def address(self, size: int) -> int:
        """Of `size` bytes, which hold nothing in particular."""
        if self.memory.numel() < size:
            self.memory = _aligned(size)
        return self.memory.data_ptr()


_scratch = _Scratch()


def linear(x: Tensor, quantized: QuantizedTensor, out: Tensor) -> bool:
    """out (M, O) = x (M, I) W^T in bf16, fp32 sums rounded once, W (O, I) with dequantize's bits; out may be a column slice.

    False: no fused kernel fits this machine, dtype or shape, and nothing was written. Raises ValueError for arguments that
    do not fit together.
    """
    outputs, inputs = _check_shapes(quantized, x, "x", out, (1, 0))
    if not _fits(x, quantized, outputs, inputs):
        return False
    _run("linear_nf4", x, quantized, out, accumulate=False)
    return True


def linear_backward(dy: Tensor, quantized: QuantizedTensor, out: Tensor, accumulate: bool = False) -> bool:
    """out (M, I) = dy (M, O) W in bf16, fp32 sums rounded once; with `accumulate` out is added to them before that.

    dy and out may be column slices. False and ValueError as in `linear`.
    """
    outputs, inputs = _check_shapes(quantized, dy, "dy", out, (0, 1))
    if not _fits(dy, quantized, outputs, inputs):
        return False
    _run("linear_nf4_backward", dy, quantized, out, accumulate)
    return True


def _fits(x: Tensor, quantized: QuantizedTensor, outputs: int, inputs: int) -> bool:
    size = quantized.state.block_size
    blocks = size >= CHUNK and size & (size - 1) == 0 and inputs % size == 0
    return x.dtype == torch.bfloat16 and blocks and outputs % STRIP == 0 and selected_isa() == ISA


def _check_shapes(quantized: QuantizedTensor, x: Tensor, name: str, out: Tensor, order: tuple[int, int]) -> tuple[int, int]:
    """x (M, weight's dimension order[0]) and out (M, its dimension order[1]): (O, I). Raises ValueError."""
    if len(quantized.shape) != 2:
        raise ValueError(f"the weight is {tuple(quantized.shape)}; expected a matrix")
    for tensor, label, width in ((x, name, quantized.shape[order[0]]), (out, "out", quantized.shape[order[1]])):
        if tuple(tensor.shape) != (x.shape[0], width) or tensor.dtype != x.dtype or tensor.device.type != "cpu":
            found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{label} is {found}; expected {(x.shape[0], width)} {x.dtype} on cpu")
        if tensor.stride(1) != 1 and width > 1:
            raise ValueError(f"{label} is not contiguous along its last dimension")
    if out.shape[0] > 1 and out.stride(0) < out.shape[1]:
        raise ValueError("out has rows that overlap")
    return quantized.shape[0], quantized.shape[1]


def _run(name: str, x: Tensor, quantized: QuantizedTensor, out: Tensor, accumulate: bool) -> None:
    """Call a kernel twice: it says how much scratch it needs, then works in it."""
    outputs, inputs = quantized.shape
    weight = _quantized(quantized, outputs, inputs, "the weight")
    if x.shape[0] == 0:
        return
    call = _Call(
        x=x.data_ptr(),
        x_row=x.stride(0),
        out=out.data_ptr(),
        out_row=out.stride(0),
        packed=weight.weight,
        codes=weight.codes,
        absmax=weight.absmax,
        block_shift=weight.block_size.bit_length() - 1,
        rows=x.shape[0],
        outputs=outputs,
        inputs=inputs,
        accumulate=accumulate,
        threads=torch.get_num_threads(),
    )
    function, address = kernel(name, "p"), ctypes.addressof(call)
    function(address)
    call.scratch = _scratch.address(call.scratch_bytes)
    function(address)
