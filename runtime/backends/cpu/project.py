"""NF4 linears of many rows with their adapters, forward and backward, by project.inl: no dense copy of a weight is made.

They need AMX, and shapes that tiles take; elsewhere these functions return None, nothing is written, and the caller
dequantises. Everything is checked here before a pointer crosses.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgetune.runtime.backends.cpu.decode import _aligned, _quantized
from edgetune.runtime.backends.cpu.library import kernel, selected_isa
from edgetune.runtime.backends.cpu.structures import ProjectCall, ProjectLinear, ProjectWeight

if TYPE_CHECKING:
    from edgetune.runtime.ops import Adapted

ISA = "amx"
STRIP = 32  # gemm.inl's SIDE: ranks are padded to it, outputs are multiples of it
INT8_STRIP = 64  # gemm.inl's DEPTH of int8: outputs, the backward's depth, are multiples of it
INT8_DEPTH = 2**31 // 127**2  # of so many numbers the sums of int8 products fit 32 bits
CHUNK = 64  # gemm.inl's CHUNK


class _Scratch(threading.local):
    """A thread's scratch, kept from call to call: a training step asks for it hundreds of times."""

    memory = torch.empty(0, dtype=torch.uint8)

    def address(self, size: int) -> int:
        """Of `size` bytes, which hold nothing in particular."""
        if self.memory.numel() < size:
            self.memory = _aligned(size)
        return self.memory.data_ptr()


_scratch = _Scratch()


def project(x: Tensor, linears: Sequence[Adapted], y: Tensor | None, int8: bool = False) -> Tensor | None:
    """y (M, sum of O) = x (M, I) times each linear's W^T, plus its adapter's share; bf16, fp32 sums rounded once.

    y None: only what the backward needs. Returns that: dropout(x) A^T of each adapter, (M, ranks padded to 32), bf16. None
    where no fused kernel fits this machine, dtype or shape: nothing was written. Raises ValueError for arguments that do not
    fit together. W has dequantize's bits; y may be a slice of columns. int8: x and W are rounded to 8 bits, each row in steps
    of its largest / 127, where that costs x less than 6% (project.inl's COARSE) and the shapes allow it.
    """
    _check(x, "x", x.shape[0], linears[0].weight.shape[1], x.dtype)
    if y is not None:
        _check(y, "y", x.shape[0], sum(linear.weight.shape[0] for linear in linears), x.dtype)
        _check_written(y, "y")
    if not _fits(x, linears):
        return None
    reduced = x.new_empty(x.shape[0], _padded_ranks(linears))
    _run("project_nf4", [_linear(linear, None) for linear in linears], x, y, None, reduced, int8 and y is not None)
    return reduced


def project_backward(
    dy: Tensor,
    x: Tensor,
    reduced: Tensor,
    linears: Sequence[Adapted],
    gradients: Sequence[tuple[Tensor, Tensor]],
    int8: bool = False,
) -> Tensor | None:
    """dx (M, I) bf16; adds to (dA, dB) f32 of each linear that has an adapter, from project's own `reduced`.

    None, ValueError and int8 as in `project`; it is dy with the scales of W's rows that is rounded.
    """
    _check(x, "x", x.shape[0], linears[0].weight.shape[1], x.dtype)
    _check(dy, "dy", x.shape[0], sum(linear.weight.shape[0] for linear in linears), x.dtype)
    _check(reduced, "reduced", x.shape[0], _padded_ranks(linears), x.dtype)
    if not _fits(x, linears):
        return None
    if not reduced.is_contiguous():
        raise ValueError("reduced is not contiguous")
    if len(gradients) != sum(linear.a is not None for linear in linears):
        raise ValueError(f"there are {len(gradients)} pairs of gradients; expected one for each adapter")
    dx, pairs = torch.empty(x.shape, dtype=x.dtype), iter(gradients)
    structs = [_linear(linear, next(pairs) if linear.a is not None else None) for linear in linears]
    _run("project_nf4_backward", structs, x, dy, dx, reduced, int8)
    return dx


def fuses(dtype: torch.dtype) -> bool:
    """Whether there are fused kernels for this dtype here, for shapes that they take."""
    return dtype == torch.bfloat16 and selected_isa() == ISA


def _fits(x: Tensor, linears: Sequence[Adapted]) -> bool:
    if not fuses(x.dtype):
        return False
    for linear in linears:
        if linear.weight.shape[1] != x.shape[1]:
            raise ValueError(f"a weight is {tuple(linear.weight.shape)}; x has {x.shape[1]} features")
        (outputs, inputs), size = linear.weight.shape, linear.weight.state.block_size
        if size < CHUNK or size & (size - 1) or inputs % size or outputs % STRIP:
            return False
    return True


def _padded_ranks(linears: Sequence[Adapted]) -> int:
    return sum(-(-linear.a.shape[0] // STRIP) * STRIP for linear in linears if linear.a is not None)


def _check(matrix: Tensor, name: str, rows: int, width: int, dtype: torch.dtype) -> None:
    if tuple(matrix.shape) != (rows, width) or matrix.dtype != dtype or matrix.device.type != "cpu":
        found = f"{tuple(matrix.shape)} {matrix.dtype} on {matrix.device}"
        raise ValueError(f"{name} is {found}; expected {(rows, width)} {dtype} on cpu")
    if width > 1 and matrix.stride(1) != 1:
        raise ValueError(f"{name} is not contiguous along its last dimension")


def _check_written(matrix: Tensor, name: str) -> None:
    if matrix.shape[0] > 1 and matrix.stride(0) < matrix.shape[1]:
        raise ValueError(f"{name} has rows that overlap")


def _address(tensor: Tensor, name: str, shape: tuple[int, int]) -> int:
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}; expected {shape} f32, contiguous")
    return tensor.data_ptr()


def _linear(linear: Adapted, gradients: tuple[Tensor, Tensor] | None) -> ProjectLinear:
    """The struct; it points into the linear's own tensors, and into its gradients'."""
    weight, (outputs, inputs) = linear.weight, linear.weight.shape
    found = _quantized(weight, outputs, inputs, "the weight")
    struct = ProjectLinear(
        weight=ProjectWeight(found.weight, found.codes, found.absmax, weight.state.block_size.bit_length() - 1),
        outputs=outputs,
        keep=1,
    )
    if linear.a is None or linear.b is None:
        return struct
    rank = linear.a.shape[0]
    struct.rank, struct.scale = rank, linear.scale
    struct.a = _address(linear.a, "lora_A", (rank, inputs))
    struct.b = _address(linear.b, "lora_B", (outputs, rank))
    if linear.key is not None:
        struct.key, struct.threshold = linear.key & 0xFFFFFFFF, int(linear.dropout * 2**32)
        struct.keep = 1.0 / (1.0 - linear.dropout)
    if gradients is not None:
        struct.da = _address(gradients[0], "A's gradient", (rank, inputs))
        struct.db = _address(gradients[1], "B's gradient", (outputs, rank))
    return struct


def _fits_int8(linears: list[ProjectLinear], inputs: int) -> bool:
    outputs = [linear.outputs for linear in linears]
    return all(width % INT8_STRIP == 0 for width in outputs) and max(inputs, sum(outputs)) <= INT8_DEPTH


def _run(
    name: str, linears: list[ProjectLinear], x: Tensor, y: Tensor | None, dx: Tensor | None, reduced: Tensor, int8: bool
) -> None:
    """Call a kernel twice: it says how much scratch it needs, then works in it."""
    rows, inputs = x.shape
    if rows == 0:
        return
    array = (ProjectLinear * len(linears))(*linears)
    call = ProjectCall(
        x=x.data_ptr(),
        x_row=x.stride(0),
        y=y.data_ptr() if y is not None else None,
        y_row=y.stride(0) if y is not None else 0,
        dx=dx.data_ptr() if dx is not None else None,
        dx_row=dx.stride(0) if dx is not None else 0,
        reduced=reduced.data_ptr(),
        linears=ctypes.addressof(array),
        count=len(linears),
        rows=rows,
        inputs=inputs,
        threads=torch.get_num_threads(),
        int8=int8 and _fits_int8(linears, inputs),
    )
    function, address = kernel(name, "p"), ctypes.addressof(call)
    function(address)
    call.scratch = _scratch.address(call.scratch_bytes)
    function(address)
