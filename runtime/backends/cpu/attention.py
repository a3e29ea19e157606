"""Attention's C++ kernels behind ctypes, with the face of runtime/attention.py, which says what they compute.

Arguments are checked here, all of them, before a pointer crosses. Scratch is torch's memory: it is reported, reused and
refused like any other tensor's.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from edgetune.runtime.attention import Segment
from edgetune.runtime.backends.cpu.library import kernel
from edgetune.runtime.backends.cpu.structures import AttentionCall, AttentionRows

MAX_HEAD_DIM = 256


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q (N, H, hd), k and v (M, KV, hd), f32 or bf16 -> o (N, H, hd), lse (H, N) f32.

    Rows outside every segment are left as they were allocated. Raises ValueError for arguments that do not fit.
    """
    _check_tensors(q, k, v)
    _check_segments(q.shape[0], k.shape[0], segments)
    o = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    _run("attention_forward", {"q": q, "k": k, "v": v, "o": o}, lse, segments, window, scale)
    return o, lse


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    segments: Sequence[Segment],
    window: int | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write the gradients of q, k and v into dq (N, H, hd), dk and dv (M, KV, hd), 0 outside every segment.

    do, o (N, H, hd) and lse (H, N) f32 are the forward's. The same bits at any number of threads. Raises ValueError for
    arguments that do not fit together, among them segments that share rows.
    """
    _check_tensors(q, k, v, like_q={"do": do, "o": o, "dq": dq}, like_k={"dk": dk, "dv": dv})
    if lse.shape != (q.shape[1], q.shape[0]) or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(f"lse is {tuple(lse.shape)} {lse.dtype}; expected contiguous {(q.shape[1], q.shape[0])} f32")
    _check_segments(q.shape[0], k.shape[0], segments)
    for begin, gradients in ((0, (dq,)), (2, (dk, dv))):
        if _covered(segments, begin) < gradients[0].shape[0]:
            for gradient in gradients:
                gradient.zero_()
    tensors = {"q": q, "k": k, "v": v, "o": o, "dout": do, "dq": dq, "dk": dk, "dv": dv}
    _run("attention_backward", tensors, lse, segments, window, scale)


def _run(
    name: str, tensors: dict[str, Tensor], lse: Tensor, segments: Sequence[Segment], window: int | None, scale: float
) -> None:
    """Call a kernel twice: it says how much scratch it needs, then works in it."""
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; expected None or at least 1")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale is {scale}; expected a positive number")
    q, k = tensors["q"], tensors["k"]
    table = (ctypes.c_int64 * (4 * len(segments)))(*(bound for segment in segments for bound in segment))
    call = AttentionCall(
        lse=lse.data_ptr(),
        segments=ctypes.addressof(table),
        segment_count=len(segments),
        queries=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        size=q.shape[2],
        window=window or 0,
        bf16=q.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        scale=scale,
    )
    for field, tensor in tensors.items():
        setattr(call, field, AttentionRows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1)))
    function, address = kernel(name, "p"), ctypes.addressof(call)
    function(address)
    scratch = torch.empty(call.scratch_bytes + 63, dtype=torch.uint8)
    call.scratch = -(-scratch.data_ptr() // 64) * 64
    function(address)


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, like_q: dict[str, Tensor] | None = None, like_k: dict[str, Tensor] | None = None
) -> None:
    """Types, shapes and strides, before pointers cross."""
    if q.dtype not in (torch.float32, torch.bfloat16) or q.dim() != 3 or k.dim() != 3:
        raise ValueError(f"q is {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)}; expected (rows, heads, hd) f32 or bf16")
    heads, size, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    if not 1 <= size <= MAX_HEAD_DIM or k.shape[2] != size or kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"q is {tuple(q.shape)} and k {tuple(k.shape)}; expected one head size, up to {MAX_HEAD_DIM}, and a number "
            "of query heads that key heads divide"
        )
    queries, keys = {"q": q, **(like_q or {})}, {"k": k, "v": v, **(like_k or {})}
    for shape, tensors in ((q.shape, queries), (k.shape, keys)):
        for name, tensor in tensors.items():
            if tensor.shape != shape or tensor.dtype != q.dtype or tensor.device.type != "cpu":
                found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                raise ValueError(f"{name} is {found}; expected {tuple(shape)} {q.dtype} on cpu")
            if tensor.stride(2) != 1 and size > 1:
                raise ValueError(f"{name} is not contiguous along its last dimension")


def _check_segments(queries: int, keys: int, segments: Sequence[Segment]) -> None:
    for segment in segments:
        q_start, q_end, k_start, k_end = segment
        inside = 0 <= q_start <= q_end <= queries and 0 <= k_start <= k_end <= keys
        if not inside or q_end - q_start > k_end - k_start:
            raise ValueError(
                f"segment {tuple(segment)} does not fit {queries} queries and {keys} keys; expected (q_start, q_end, "
                "k_start, k_end) with a key for every query"
            )


def _covered(segments: Sequence[Segment], begin: int) -> int:
    """Rows that segments cover, of queries (begin 0) or keys (begin 2). Raises ValueError where two share one."""
    ranges = sorted((segment[begin], segment[begin + 1]) for segment in segments if segment[begin] < segment[begin + 1])
    for before, after in itertools.pairwise(ranges):
        if after[0] < before[1]:
            raise ValueError(f"segments share rows, {before} and {after}; expected every row in one segment at most")
    return sum(end - start for start, end in ranges)
