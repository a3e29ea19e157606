"""Every C structure that crosses the kernels' ABI, mirrored field for field with ctypes.

The C++ definitions come first: a field is added, moved or renamed there and here in one change, and library.ABI is raised.
"""

from __future__ import annotations

import ctypes

POINTER, INT, UNSIGNED, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float


class AttentionRows(ctypes.Structure):
    """A (rows, heads, hd) tensor whose last dimension is contiguous."""

    _fields_ = (("data", POINTER), ("row", INT), ("head", INT))


class AttentionCall(ctypes.Structure):
    """The arguments of attention_forward and attention_backward."""

    _fields_ = (
        *((name, AttentionRows) for name in ("q", "k", "v", "o", "dout", "dq", "dk", "dv")),
        ("lse", POINTER),
        ("segments", POINTER),
        *((name, INT) for name in ("segment_count", "queries", "heads", "kv_heads", "size", "window", "bf16", "threads")),
        ("scratch", POINTER),
        ("scratch_bytes", INT),
        ("scale", FLOAT),
    )


class Absmax(ctypes.Structure):
    """The absmax of each block of a 4-bit weight, plain or double-quantised."""

    _fields_ = (*((name, POINTER) for name in ("plain", "codes", "table", "nested")), ("offset", FLOAT), ("shift", INT))


class DecodeLinear(ctypes.Structure):
    """A linear with its bias and adapter, as `matvec` and `decode` read it."""

    _fields_ = (
        *((name, INT) for name in ("kind", "rows", "cols")),
        *((name, POINTER) for name in ("weight", "codes")),
        ("absmax", Absmax),
        ("block_size", INT),
        ("bias", POINTER),
        *((name, INT) for name in ("rank", "lora_kind")),
        *((name, POINTER) for name in ("lora_A", "lora_B")),
    )


class DecodeShape(ctypes.Structure):
    """The sizes and factors that all blocks of a model share."""

    _fields_ = (
        *((name, INT) for name in ("hidden", "ffn", "heads", "kv_heads", "head_dim", "max_length", "cache_bf16", "compute")),
        *((name, INT) for name in ("rotated", "gelu")),
        *((name, FLOAT) for name in ("eps", "scale", "residual")),
    )


class DecodeBlock(ctypes.Structure):
    """One transformer layer: its linears, norms, RoPE tables and share of the KV cache."""

    _fields_ = (
        *((name, DecodeLinear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, POINTER) for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm", "post_attn_norm", "post_mlp_norm")),
        *((name, POINTER) for name in ("q_cosines", "q_sines", "k_cosines", "k_sines", "keys", "values")),
        ("window", INT),
    )


class DecodeJob(ctypes.Structure):
    """The arguments of `decode`."""

    _fields_ = (
        *((name, POINTER) for name in ("shape", "blocks")),
        ("block_count", INT),
        *((name, POINTER) for name in ("norm", "head", "logits", "h")),
        *((name, INT) for name in ("n", "position")),
        ("space", POINTER),
        ("space_own", INT),
    )


class ProjectWeight(ctypes.Structure):
    """A 4-bit weight as the fused products read it."""

    _fields_ = (("packed", POINTER), ("codes", POINTER), ("absmax", Absmax), ("block_shift", INT))


class ProjectLinear(ctypes.Structure):
    """A linear of a fused product, with its adapter and the adapter's gradients."""

    _fields_ = (
        ("weight", ProjectWeight),
        *((name, INT) for name in ("outputs", "rank")),
        *((name, POINTER) for name in ("a", "b", "da", "db")),
        *((name, FLOAT) for name in ("scale", "keep")),
        *((name, UNSIGNED) for name in ("key", "threshold")),
    )


class ProjectCall(ctypes.Structure):
    """The arguments of project_nf4 and project_nf4_backward."""

    _fields_ = (
        *((name, kind) for matrix in ("x", "y", "dx") for name, kind in ((matrix, POINTER), (f"{matrix}_row", INT))),
        *((name, POINTER) for name in ("reduced", "linears")),
        *((name, INT) for name in ("count", "rows", "inputs", "threads", "bf16", "int8")),
        *(("scratch", POINTER), ("scratch_bytes", INT)),
    )


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    AttentionRows,
    AttentionCall,
    Absmax,
    DecodeLinear,
    DecodeShape,
    DecodeBlock,
    DecodeJob,
    ProjectWeight,
    ProjectLinear,
    ProjectCall,
)
"""All of them, for the test that compares sizes and offsets with those of the built library."""
