"""Attention by C++ kernels: the functions of runtime/attention.py, which says what they compute.

All arguments are checked here before a pointer crosses. Scratch is torch's memory, so that it is counted and reused, and
running out of it raises, as for any other tensor.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from edgetune.runtime.backends.cpu.arguments import aligned
from edgetune.runtime.backends.cpu.library import kernel
from edgetune.runtime.backends.cpu.structures import AttentionCall, AttentionRows
from edgetune.runtime.ops_types import COMPUTE_DTYPES, AttentionGradients, AttentionInputs, Segment

MAX_HEAD_DIM = 256
"""Largest head size that is accepted, chosen by hand: the largest that tests/test_attention_kernels.py runs."""


def attention_forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Return o (N, H, hd) and lse (H, N) f32, for q (N, H, hd), k and v (M, KV, hd) in f32 or bf16.

    Rows outside every segment are left uninitialised. Raises ValueError for arguments that do not fit together.
    """
    q = inputs.q
    _check_inputs(inputs, like_q={}, like_k={})
    o = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    _run("attention_forward", inputs, {"o": o}, lse)
    return o, lse


def attention_backward(inputs: AttentionInputs, o: Tensor, lse: Tensor, do: Tensor, gradients: AttentionGradients) -> None:
    """Write the gradients of q, k and v, which are 0 outside every segment; do (N, H, hd) is the gradient of o.

    o (N, H, hd) and lse (H, N) f32 are the forward's. The bits are the same at any number of threads. Raises ValueError for
    arguments that do not fit together, among them segments that share rows.
    """
    q, dq, dk, dv = inputs.q, gradients.dq, gradients.dk, gradients.dv
    _check_inputs(inputs, like_q={"do": do, "o": o, "dq": dq}, like_k={"dk": dk, "dv": dv})
    if lse.shape != (q.shape[1], q.shape[0]) or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(f"lse is {tuple(lse.shape)} {lse.dtype}; expected contiguous {(q.shape[1], q.shape[0])} f32")
    # The kernels write the rows of segments only. Where these leave rows out, all gradients start from zero.
    if _covered([(segment.q_start, segment.q_end) for segment in inputs.segments]) < dq.shape[0]:
        dq.zero_()
    if _covered([(segment.k_start, segment.k_end) for segment in inputs.segments]) < dk.shape[0]:
        dk.zero_()
        dv.zero_()
    _run("attention_backward", inputs, {"o": o, "dout": do, "dq": dq, "dk": dk, "dv": dv}, lse)


def _run(name: str, inputs: AttentionInputs, others: dict[str, Tensor], lse: Tensor) -> None:
    """Call a kernel twice: the first call says how many bytes of scratch it needs, the second works in them."""
    q, k, segments = inputs.q, inputs.k, inputs.segments
    table = (ctypes.c_int64 * (4 * len(segments)))(*itertools.chain.from_iterable(segments))
    call = AttentionCall(
        lse=lse.data_ptr(),
        segments=ctypes.addressof(table),
        segment_count=len(segments),
        queries=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        size=q.shape[2],
        window=inputs.window or 0,
        bf16=q.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        scale=inputs.scale,
    )
    for field, tensor in {"q": q, "k": k, "v": inputs.v, **others}.items():
        setattr(call, field, AttentionRows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1)))
    function, pointer = kernel(name, "p"), ctypes.addressof(call)
    function(pointer)
    scratch = aligned(max(call.scratch_bytes, 1))  # never empty: without scratch a kernel only counts
    call.scratch = scratch.data_ptr()
    function(pointer)


def _check_inputs(inputs: AttentionInputs, like_q: dict[str, Tensor], like_k: dict[str, Tensor]) -> None:
    """Raise ValueError unless the inputs fit together, and the named tensors have the layout of q and of k."""
    q, k = inputs.q, inputs.k
    if q.dtype not in COMPUTE_DTYPES or q.dim() != 3 or k.dim() != 3:
        raise ValueError(f"q is {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)}; expected (rows, heads, hd) f32 or bf16")
    heads, size, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    if not 1 <= size <= MAX_HEAD_DIM or k.shape[2] != size or kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"q is {tuple(q.shape)} and k {tuple(k.shape)}; expected one head size, up to {MAX_HEAD_DIM}, and a number "
            "of query heads that key heads divide"
        )
    for shape, tensors in ((q.shape, {"q": q, **like_q}), (k.shape, {"k": k, "v": inputs.v, **like_k})):
        for name, tensor in tensors.items():
            if tensor.shape != shape or tensor.dtype != q.dtype or tensor.device.type != "cpu":
                found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                raise ValueError(f"{name} is {found}; expected {tuple(shape)} {q.dtype} on cpu")
            if tensor.stride(2) != 1 and size > 1:
                raise ValueError(f"{name} is not contiguous along its last dimension")
    _check_segments(q.shape[0], k.shape[0], inputs.segments)
    if inputs.window is not None and inputs.window < 1:
        raise ValueError(f"window is {inputs.window}; expected None or at least 1")
    if not (inputs.scale > 0 and math.isfinite(inputs.scale)):
        raise ValueError(f"scale is {inputs.scale}; expected a positive number")


def _check_segments(queries: int, keys: int, segments: Sequence[Segment]) -> None:
    for segment in segments:
        q_start, q_end, k_start, k_end = segment
        inside = 0 <= q_start <= q_end <= queries and 0 <= k_start <= k_end <= keys
        if not inside or q_end - q_start > k_end - k_start:
            raise ValueError(
                f"segment {tuple(segment)} does not fit {queries} queries and {keys} keys; expected (q_start, q_end, "
                "k_start, k_end) with a key for every query"
            )


def _covered(ranges: Sequence[tuple[int, int]]) -> int:
    """Return the number of rows that the ranges (start, end) cover. Raises ValueError where two of them share a row."""
    filled = sorted((start, end) for start, end in ranges if start < end)
    for before, after in itertools.pairwise(filled):
        if after[0] < before[1]:
            raise ValueError(f"segments share rows, {before} and {after}; expected every row in one segment at most")
    return sum(end - start for start, end in filled)
