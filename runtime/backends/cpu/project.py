"""Fused products of 4-bit linears and their adapters, forward and backward, by project.inl: no weight is made dense.

They need shapes that fill their tiles. Elsewhere these functions return None with nothing written, and the caller dequantises.
Everything is checked here before a pointer crosses.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from edgetune.runtime.backends.cpu.arguments import address, address_of_output, address_of_rows, aligned
from edgetune.runtime.backends.cpu.library import kernel, selected_isa
from edgetune.runtime.backends.cpu.structures import ProjectCall, ProjectLinear, ProjectWeight
from edgetune.runtime.backends.cpu.weights import quantized_addresses
from edgetune.runtime.nf4 import code_table
from edgetune.runtime.ops_types import Adapted

BF16_ISAS = ("amx", "avx512_bf16")
"""Instruction sets whose kernels multiply bf16: x is bf16. On others sums are of fp32 numbers, and x is fp32 or bf16."""
SLOW_INT8 = ("neon",)
"""Instruction sets whose products in 8 bits are no faster than their fp32 ones."""
STRIP = 32
"""Ranks are padded to a multiple of this, and outputs must be one: SIDE in gemm.inl."""
INT8_STRIP = 64
"""In 8 bits, outputs (the depth of the backward's sums) must be a multiple of this: gemm.inl's DEPTH of bytes."""
INT8_DEPTH = 2**31 // 127**2
"""Largest number of int8 products whose sum fits 32 bits."""
CHUNK = 64
"""Least block size of a weight: CHUNK in constants.h."""


class _Scratch(threading.local):
    """A thread's scratch memory, kept from call to call: a training step asks for it hundreds of times."""

    memory = torch.empty(0, dtype=torch.uint8)

    def address(self, size: int) -> int:
        """Return the address of `size` uninitialised bytes."""
        if self.memory.numel() < size:
            self.memory = aligned(size)
        return self.memory.data_ptr()


_scratch = _Scratch()


def project(x: Tensor, linears: Sequence[Adapted], y: Tensor | None, int8: bool = False) -> Tensor | None:
    """Write x (M, I) times each linear's W^T, plus its adapter's part, into y (M, sum of O): x's dtype, fp32 sums rounded once.

    Return the tensor that the backward needs: dropout(x) A^T of each adapter, (M, ranks padded to 32), of x's dtype; y None
    computes only that. Return None, with nothing written, where no kernel fits this machine, dtype or shape. W has
    dequantize's bits; y may be a slice of columns. Raises ValueError for arguments that do not fit together.

    int8: round x and W to 8 bits, each row in steps of its largest / 127, where that costs x less than 3% (constants.h's
    INT8_ERROR_LIMIT) and the shapes allow it.
    """
    address_of_rows(x, "x", (x.shape[0], linears[0].weight.shape[1]), x.dtype)
    if y is not None:
        address_of_output(y, "y", (x.shape[0], _outputs(linears)), x.dtype)
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
    """Return dx (M, I) of x's dtype, and add to (dA, dB) f32 of each linear that has an adapter; `reduced` is project's.

    None and ValueError as in `project`. int8: round dy, with the scales of W's rows multiplied into it, to 8 bits.
    """
    address_of_rows(x, "x", (x.shape[0], linears[0].weight.shape[1]), x.dtype)
    address_of_rows(dy, "dy", (x.shape[0], _outputs(linears)), x.dtype)
    address_of_rows(reduced, "reduced", (x.shape[0], _padded_ranks(linears)), x.dtype)
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


def dtypes(isa: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes of x for which an instruction set has fused kernels."""
    if isa == "scalar":
        return ()
    return (torch.bfloat16,) if isa in BF16_ISAS else (torch.float32, torch.bfloat16)


def fuses(dtype: torch.dtype, int8: bool = False) -> bool:
    """Return True if this machine has fused kernels for the dtype; they still refuse some shapes.

    int8: return True if they are also faster in 8 bits.
    """
    isa = selected_isa()
    return dtype in dtypes(isa) and not (int8 and isa in SLOW_INT8)


def _fits(x: Tensor, linears: Sequence[Adapted]) -> bool:
    """Return True if the kernels take these linears. Raises ValueError where a weight has another width than x."""
    if not fuses(x.dtype):
        return False
    for linear in linears:
        if linear.weight.shape[1] != x.shape[1]:
            raise ValueError(f"a weight is {tuple(linear.weight.shape)}; x has {x.shape[1]} features")
        (outputs, inputs), size = linear.weight.shape, linear.weight.state.block_size
        # Blocks of a power of two, whole in every row, and outputs that fill the tiles.
        if size < CHUNK or size & (size - 1) or inputs % size or outputs % STRIP:
            return False
    return True


def _outputs(linears: Sequence[Adapted]) -> int:
    return sum(linear.weight.shape[0] for linear in linears)


def _padded_ranks(linears: Sequence[Adapted]) -> int:
    return sum(-(-linear.a.shape[0] // STRIP) * STRIP for linear in linears if linear.a is not None)


def _linear(linear: Adapted, gradients: tuple[Tensor, Tensor] | None) -> ProjectLinear:
    """Return the structure of a linear; it points into the linear's own tensors and into its gradients."""
    weight, (outputs, inputs) = linear.weight, linear.weight.shape
    packed, absmax = quantized_addresses(weight, "the weight")
    codes = code_table(weight.state.quant_type).data_ptr()  # cached: it lives as long as the process
    struct = ProjectLinear(
        weight=ProjectWeight(packed, codes, absmax, weight.state.block_size.bit_length() - 1),
        outputs=outputs,
        keep=1,
    )
    if linear.a is None or linear.b is None:
        return struct
    rank = linear.a.shape[0]
    struct.rank, struct.scale = rank, linear.scale
    struct.a = address(linear.a, "lora_A", (rank, inputs), torch.float32)
    struct.b = address(linear.b, "lora_B", (outputs, rank), torch.float32)
    if linear.key is not None:
        struct.key, struct.threshold = linear.key & 0xFFFFFFFF, int(linear.dropout * 2**32)
        struct.keep = 1.0 / (1.0 - linear.dropout)
    if gradients is not None:
        struct.da = address(gradients[0], "A's gradient", (rank, inputs), torch.float32)
        struct.db = address(gradients[1], "B's gradient", (outputs, rank), torch.float32)
    return struct


def _fits_int8(linears: list[ProjectLinear], inputs: int) -> bool:
    """Return True if the sums of int8 products, forward and backward, fit 32 bits and outputs fill the tiles."""
    outputs = [linear.outputs for linear in linears]
    return all(width % INT8_STRIP == 0 for width in outputs) and max(inputs, sum(outputs)) <= INT8_DEPTH


def _run(
    name: str, linears: list[ProjectLinear], x: Tensor, y: Tensor | None, dx: Tensor | None, reduced: Tensor, int8: bool
) -> None:
    """Call a kernel twice: the first call says how many bytes of scratch it needs, the second works in them."""
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
        bf16=x.dtype == torch.bfloat16,
        int8=int8 and _fits_int8(linears, inputs),
    )
    function, pointer = kernel(name, "p"), ctypes.addressof(call)
    function(pointer)
    call.scratch = _scratch.address(call.scratch_bytes)
    function(pointer)
