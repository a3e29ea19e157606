"""Compute each operation of an ML program in numpy: OPERATIONS maps the name of an operation to its implementation.

Products and reductions are summed in fp32; the evaluator rounds every result to the dtype that the program declares.
Covers the operations that our exporter writes, as Core ML's specification defines them (MIL, opset iOS 18).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from edgetune.export.coreml.package import Array
from edgetune.runtime.errors import ModelError

Arguments = dict[str, Any]
"""The inputs of an operation by their names in the specification; optional ones may be missing."""
_CASTS = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32, "int16": np.int16, "uint16": np.uint16, "bool": np.bool_}
_PANEL_NUMBERS = 1 << 20
"""Numbers of a weight that are widened to fp32 at a time, 4 MB: chosen by hand, to stay within a processor's cache."""
_RSQRT_EPSILON = 1e-12
"""Epsilon of rsqrt where the program gives none: the specification's default."""
_EXP_LIMIT = 88.0
"""Largest whole number whose exponential is finite in fp32 (ln of fp32's maximum is 88.7)."""


def to_half(x: Array) -> Array:
    """Round fp32 to fp16, ties to even; numbers beyond its range become inf."""
    return torch.from_numpy(np.asarray(x, order="C")).half().numpy()


def update_slice(args: Arguments, out: Array) -> Array:
    """Write `update` into the slice of `out` that begin, end and stride select, as slice_update does; return `out`."""
    target = out[_slices(args)]
    if target.shape != args["update"].shape:  # numpy would broadcast, Core ML would not
        raise ModelError(
            f"slice_update writes {args['update'].shape} where the slice is {target.shape}; export the package again."
        )
    target[...] = args["update"]
    return out


def _wide(x: Array) -> Array:
    """Convert fp16 to fp32 and leave other dtypes as they are. torch does it with the processor's own instructions."""
    return torch.from_numpy(np.asarray(x, order="C")).float().numpy() if x.dtype == np.float16 else x


def _elementwise(function: Callable[..., Array]) -> Callable[[Arguments], Array]:
    """Return the operation that applies `function` to x and y, both widened to fp32."""
    return lambda args: function(_wide(args["x"]), _wide(args["y"]))


def _slices(args: Arguments) -> tuple[slice | int, ...]:
    """Convert begin, end and stride, with their masks, to an index for numpy."""
    rank = args["x"].ndim
    masks = {name: [False] * rank if args.get(name) is None else [bool(m) for m in args[name]]
             for name in ("begin_mask", "end_mask", "squeeze_mask")}  # fmt: skip
    begin, end = ([int(value) for value in args[name]] for name in ("begin", "end"))
    stride = [1] * rank if args.get("stride") is None else [int(value) for value in args["stride"]]
    return tuple(
        begin[axis]
        if masks["squeeze_mask"][axis]
        else slice(
            None if masks["begin_mask"][axis] else begin[axis],
            None if masks["end_mask"][axis] else end[axis],
            stride[axis],
        )
        for axis in range(rank)
    )


def _gather(args: Arguments) -> Array:
    if args.get("batch_dims") is not None and int(args["batch_dims"]):
        raise ModelError("The package gathers with batch_dims, which edgetune's evaluator does not support.")
    return np.take(args["x"], args["indices"].astype(np.int64), axis=int(args.get("axis", 0)))


def _attention(args: Arguments) -> Array:
    """Compute softmax(Q K^T / sqrt(width) + mask) V."""
    q, k, v = (_wide(args[name]) for name in ("query", "key", "value"))
    scores, mask = q @ k.swapaxes(-1, -2) / np.sqrt(np.float32(q.shape[-1])), args.get("attn_mask")
    if mask is not None:
        scores = scores + _wide(mask)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)) @ v


def _matmul(args: Arguments) -> Array:
    x, y = _wide(args["x"]), _wide(args["y"])
    x = x.swapaxes(-1, -2) if args.get("transpose_x") else x
    y = y.swapaxes(-1, -2) if args.get("transpose_y") else y
    return x @ y


def _linear(args: Arguments) -> Array:
    """Compute x W^T + b, widening a few rows of W at a time, so that no fp32 copy of a whole weight is made."""
    x, weight = torch.from_numpy(_wide(args["x"])), torch.from_numpy(args["weight"])
    rows = max(1, _PANEL_NUMBERS // weight.shape[1])
    y = torch.cat([x @ weight[at : at + rows].float().T for at in range(0, len(weight), rows)], dim=-1).numpy()
    return y if args.get("bias") is None else y + _wide(args["bias"])


def _reduce_mean(args: Arguments) -> Array:
    axes = tuple(int(axis) for axis in args["axes"])
    return np.mean(_wide(args["x"]), axis=axes, keepdims=bool(args.get("keep_dims", False)))


def _rsqrt(args: Arguments) -> Array:
    epsilon = _RSQRT_EPSILON if args.get("epsilon") is None else float(args["epsilon"])
    return 1 / np.sqrt(_wide(args["x"]) + np.float32(epsilon))


def _silu(args: Arguments) -> Array:
    """Compute x / (1 + exp(-x)). Beyond _EXP_LIMIT fp32's exp would overflow, and the quotient is zero anyway."""
    x = _wide(args["x"])
    return x / (1 + np.exp(-np.clip(x, -_EXP_LIMIT, _EXP_LIMIT)))


def _reshape(args: Arguments) -> Array:
    """Reshape x: a size of 0 keeps the axis, and a size of -1 is inferred."""
    x = args["x"]
    return x.reshape([x.shape[axis] if size == 0 else int(size) for axis, size in enumerate(args["shape"])])


def _split(args: Arguments) -> list[Array]:
    sizes, axis = args.get("split_sizes"), int(args["axis"])
    return np.split(args["x"], int(args["num_splits"]) if sizes is None else np.cumsum(sizes)[:-1], axis=axis)


def _look_up(args: Arguments) -> Array:
    """Look up u8 indices of any shape in a single table of scalars (1, ..., entries, 1): constexpr_lut_to_dense."""
    if args.get("vector_axis") is not None or args["lut"].size != args["lut"].shape[-2]:
        raise ModelError("The package holds tables of vectors or tables by block, which edgetune's evaluator does not support.")
    return args["lut"].reshape(-1)[args["indices"]]


def _scale_blocks(args: Arguments) -> Array:
    """Multiply data by a scale for each block along each axis: constexpr_blockwise_shift_scale.

    fp32 holds the product of two fp16 numbers exactly, so rounding it once afterwards gives fp16's own product.
    """
    if args.get("offset") is not None:
        raise ModelError("The package shifts its weights by offsets, which edgetune's evaluator does not support.")
    data, scale = _wide(args["data"]).astype(np.float32, copy=args["data"].dtype == np.float16), _wide(args["scale"])
    blocks = [part for size, count in zip(data.shape, scale.shape, strict=True) for part in (count, size // count)]
    one_per_block = [part for count in scale.shape for part in (count, 1)]
    in_blocks = data.reshape(blocks)  # a view: the product goes into `data`
    in_blocks *= scale.reshape(one_per_block)
    return data


OPERATIONS: dict[str, Callable[[Arguments], Any]] = {
    "add": _elementwise(np.add), "sub": _elementwise(np.subtract), "mul": _elementwise(np.multiply),
    "greater_equal": _elementwise(np.greater_equal), "select": lambda args: np.where(args["cond"], args["a"], args["b"]),
    "cast": lambda args: args["x"].astype(_CASTS[str(args["dtype"])]),
    "shape": lambda args: np.array(args["x"].shape, np.int32),
    "reshape": _reshape, "transpose": lambda args: np.transpose(args["x"], [int(axis) for axis in args["perm"]]),
    "expand_dims": lambda args: np.expand_dims(args["x"], tuple(int(axis) for axis in args["axes"])),
    "tile": lambda args: np.tile(args["x"], [int(count) for count in args["reps"]]), "split": _split,
    "concat": lambda args: np.concatenate(args["values"], axis=int(args["axis"])), "gather": _gather,
    "slice_by_index": lambda args: args["x"][_slices(args)].copy(),
    "slice_update": lambda args: update_slice(args, args["x"].copy()),
    "reduce_mean": _reduce_mean, "rsqrt": _rsqrt, "silu": _silu, "scaled_dot_product_attention": _attention,
    "linear": _linear, "matmul": _matmul,
    "constexpr_lut_to_dense": _look_up, "constexpr_blockwise_shift_scale": _scale_blocks,
}  # fmt: skip
"""The implementation of each supported operation, from its arguments to its result (a list for `split`).

States and constants have no entry: the evaluator handles them itself.
"""


def operation(name: str) -> Callable[[Arguments], Any]:
    """Return the implementation of an operation. Raises ModelError, naming it, for one that is not supported."""
    if name not in OPERATIONS:
        raise ModelError(f"The package uses the operation {name}, which edgetune's evaluator does not support.")
    return OPERATIONS[name]
